"""Image trunks by name: any Hugging Face model that yields maps at strides 4, 8, 16 and 32.

Dimension key: B images, C channels, S input size, h w map size.
"""

import functools
import json
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from grounding.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel, he_init, load_lite0
from grounding.hub import first_line, whole_weights
from grounding.images import MEAN, STD

STRIDES = (4, 8, 16, 32)
PROBE = 64  # input size at which a trunk is looked over when it is built
TINY_STAGES = ((1, 3, 1, 1, 8), (1, 3, 2, 2, 8), (1, 3, 2, 2, 16), (1, 3, 2, 2, 24), (1, 3, 2, 2, 32))


class CheckpointError(ValueError):
    """A grounding checkpoint, or a trunk for one, that cannot be used; the message names it and the remedy."""


class HubTrunk(nn.Module):
    """A Hugging Face image model as a trunk. ``channels``: of its four ``feature_maps``.

    The model's configuration carries ``image_mean`` and ``image_std`` of its own input; pixels come in normalised as
    ImageNet and are changed over here. Batch norms keep the statistics that they came with (``frozen_statistics``): a
    result must not depend on who else is in the batch. Raises CheckpointError where a stride is missing.
    """

    def __init__(self, model: PreTrainedModel, name: str, frozen_statistics: bool = True):
        super().__init__()
        self.model, self.name, self.frozen_statistics = model, name, frozen_statistics
        mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)
        self.register_buffer("gain", (torch.tensor(STD) / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((torch.tensor(MEAN) - mean) / std)[:, None, None], persistent=False)
        self.eval()
        self.channels = self._channels()

    def train(self, mode: bool = True) -> "HubTrunk":
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @torch.no_grad()
    def _channels(self) -> list[int]:
        try:
            if self.model.main_input_name != "pixel_values":
                raise ValueError("it reads " + self.model.main_input_name)
            found, larger = (self._by_stride(torch.zeros(1, 3, size, size)) for size in (PROBE, PROBE + 32))
            if set(STRIDES) <= found.keys() & larger.keys():
                return [found[stride].shape[1] for stride in STRIDES]
            strides = ", ".join(map(str, self._by_stride(torch.zeros(1, 3, 224, 224)))) or "none"
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"trunk {self.name!r} is no image pyramid: {first_line(error)}") from error
        raise CheckpointError(
            f"trunk {self.name!r} has maps at these strides: {strides}; 4, 8, 16 and 32 are needed: name a pyramid "
            "such as Swin, ConvNeXtV2, DINOv3-ConvNeXt or ResNet"
        )

    def feature_maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, S, S), normalised as ImageNet, S a multiple of 32 → maps (B, C, S/s, S/s), s = 4, 8, 16, 32."""
        found = self._by_stride(pixel_values)
        return [found[stride] for stride in STRIDES]

    def _by_stride(self, pixel_values: torch.Tensor) -> dict[int, torch.Tensor]:
        """Stride → map, of several maps at one stride the last."""
        maps = self._maps(pixel_values * self.gain + self.shift)
        return {pixel_values.shape[-1] // one.shape[-1]: one for one in maps}

    def _maps(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if isinstance(self.model, EfficientNetLiteModel):
            return tuple(self.model.feature_maps(pixel_values))
        out = self.model(pixel_values, output_hidden_states=True)
        maps = out.feature_maps if "feature_maps" in out else out.hidden_states
        return tuple(one for one in maps if one.dim() == 4)

    def freeze_early(self) -> None:
        """Stops training of the layers up to stride 4: those that both the first and the second map come from."""
        first, second, *_ = self._behind()
        for parameter in first & second:
            parameter.requires_grad_(False)

    def freeze_unused(self) -> None:
        """Stops training of what no map comes from, such as a pooler: processes would wait for its gradient."""
        for parameter in set(self.parameters()).difference(*self._behind()):
            parameter.requires_grad_(False)

    @torch.enable_grad()
    def _behind(self) -> list[set[nn.Parameter]]:
        """The trainable parameters that each map comes from, found by asking autograd."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        maps = self.feature_maps(torch.zeros(1, 3, PROBE, PROBE))
        found = [torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True) for x in maps]
        return [{p for p, g in zip(parameters, row, strict=True) if g is not None} for row in found]


Trunk = EfficientNetLiteModel | HubTrunk


def build_trunk(name: str, image_size: int, pretrained: bool, trunk_config: dict[str, Any] | None) -> Trunk:
    """A trunk to train. ``name``: "embedded" (EfficientNet-Lite0), "tiny" (a small one for tests), a folder or a hub
    id; ``trunk_config``: of `read_config`. Pretrained, its layers up to stride 4 are frozen; else its weights are
    random and all are trained.

    Raises CheckpointError for one that cannot be read or has no pyramid.
    """
    if name == "embedded" and pretrained:
        trunk: Trunk = load_lite0(image_size=image_size)
    elif name in ("embedded", "tiny") or not pretrained:
        trunk = empty_trunk(name, image_size, trunk_config, frozen_statistics=pretrained)
    else:
        trunk = HubTrunk(_load(name, trunk_config), name)
    model = trunk.model if isinstance(trunk, HubTrunk) else trunk
    if not pretrained and isinstance(model, EfficientNetLiteModel):
        he_init(model)
    return _frozen(trunk, early=pretrained)


def _frozen(trunk: Trunk, early: bool) -> Trunk:
    if isinstance(trunk, HubTrunk):
        trunk.freeze_unused()
    else:
        trunk.head.requires_grad_(False)  # the detector does not use it
    if early:
        trunk.freeze_early()
    return trunk


def empty_trunk(
    name: str, image_size: int, trunk_config: dict[str, Any] | None, frozen_statistics: bool = True
) -> Trunk:
    """The trunk without its weights, to load a state into: needs neither the hub nor the folder that it came from."""
    if name == "embedded":
        return EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size))
    if name == "tiny":
        return EfficientNetLiteModel(EfficientNetLiteConfig(TINY_STAGES, 8, 32, image_size=image_size))
    if trunk_config is None:
        raise CheckpointError(f"trunk {name!r}: the checkpoint does not hold its configuration; train it again")
    config = AutoConfig.for_model(**trunk_config)
    return HubTrunk(_model_class(name, config)(config), name, frozen_statistics)


def read_config(name: str) -> dict[str, Any] | None:
    """The trunk's own configuration with the four stages chosen, and the mean and standard deviation of its input in
    [0, 1]; None for the trunks that come with this program. Raises CheckpointError where it cannot be read."""
    if name in ("embedded", "tiny"):
        return None
    try:
        config, pixels = AutoConfig.from_pretrained(name), get_image_processor_config(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"trunk {name!r} cannot be read ({first_line(error)}); name embedded, a folder with config.json "
            "and weights, or a model of the hub"
        ) from error
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        config.out_features = config.stage_names[-len(STRIDES) :]
    row = json.loads(config.to_json_string(use_diff=False))
    for unused in ("id2label", "label2id", "dtype", "_name_or_path"):
        row.pop(unused, None)
    return row | dict(zip(("image_mean", "image_std"), _input_statistics(pixels), strict=True))


def _input_statistics(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Of preprocessor_config.json: (mean, standard deviation) of pixels in [0, 1]; ImageNet's where it says nothing."""
    if not row:
        return list(MEAN), list(STD)
    top = 255 * row.get("rescale_factor", 1 / 255) if row.get("do_rescale", True) else 255.0
    mean, std = row.get("image_mean", MEAN), row.get("image_std", STD)
    if not row.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return [x / top for x in mean], [x / top for x in std]


def _model_class(name: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    for mapping in (MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise CheckpointError(f"trunk {name!r} is a {config.model_type}, not an image model; name one such as Swin")


def _load(name: str, trunk_config: dict[str, Any] | None) -> PreTrainedModel:
    """With its weights; raises CheckpointError where some are missing, as random ones would train in silence."""
    config = AutoConfig.for_model(**(trunk_config or {}))
    logging.disable_progress_bar()  # a flash of a bar
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a report of the classifier's weights, which are rightly not used
    try:
        kind = _model_class(name, config)
        with whole_weights():
            model, found = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise CheckpointError(f"trunk {name!r}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(before)
    tables = {key for key, p in model.named_parameters() if p.dim() > 1}  # norms of the maps are new, and may be
    missing = sorted(tables & set(found["missing_keys"]))
    if missing:
        raise CheckpointError(f"trunk {name!r} holds no weights for {missing[0]} and {len(missing) - 1} others")
    return model


def checkpoint_blocks(trunk: Trunk, on: bool) -> None:
    """Gradient checkpointing (Chen et al., 2016): the blocks of the trunk keep their input only, and are computed again
    in the backward pass. A block is what the model declares as one, the innermost where they are nested."""
    model = trunk.model if isinstance(trunk, HubTrunk) else trunk
    declared = set(model._no_split_modules or ())
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) or type(m).__name__ in declared]
    for block in blocks:
        block.__dict__.pop("forward", None)
        inner = set(block.modules()) - {block}
        if on and inner.isdisjoint(blocks):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
