"""RegionVLM: any image-text-to-text model of transformers, tuned with LoRA, that reads region tokens.

A prompt holds one placeholder token a region. Its `input_ids` stay as they are (positions and image placeholders are
computed from them); a hook on the input-embedding layer puts the projected regions in the placeholders' rows. The
language layers are those beside the input embeddings, so that no table of families is needed.
Dimension key: B images, N regions, T tokens, W width, V vocabulary.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from bridges.projector import ProjectorConfig, RegionProjector
from grounding.types import RegionTokens

FORMAT_VERSION = 1
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_KINDS = ("lora", "rslora", "dora")
# Between vision tower and language model. (Qwen-VL's merger is a part of the tower, and frozen like it.)
IMAGE_PROJECTORS = ("multi_modal_projector", "connector")
PACKAGES = ("torch", "transformers", "peft", "med-glip")


class CheckpointError(ValueError):
    """A bridge checkpoint that cannot be used; one line that names it and the remedy."""


@dataclass(frozen=True)
class BridgeConfig:
    """What belongs to a checkpoint beside its tensors.

    `base` and `fingerprint` name the model it was trained on, in 4 bits with `four_bit`. `lora_layers` are counted from
    the last, None means all; `lora_targets` are names of linear layers in them. `lora_kind`: lora (its product counts
    twice), rslora (8/√r times: Kalajdzievski 2023, arXiv 2312.03732) or dora (Liu et al., ICML 2024).
    """

    base: str
    fingerprint: str
    region_token_id: int
    projector: ProjectorConfig
    lora_r: int = 16
    lora_layers: int | None = 8
    lora_kind: str = "lora"
    lora_targets: tuple[str, ...] = LORA_TARGETS
    four_bit: bool = False

    def __post_init__(self):
        if self.lora_kind not in LORA_KINDS:
            raise ValueError(f"lora_kind={self.lora_kind!r}; known: {', '.join(LORA_KINDS)}")


class RegionVLM(nn.Module):
    """`model` (frozen, with LoRA on its language layers, its image projector trainable) and a RegionProjector.

    Raises ValueError where the input embeddings of `model`, or the layers that LoRA is for, cannot be found.
    """

    def __init__(self, model: PreTrainedModel, config: BridgeConfig):
        super().__init__()
        self.config = config
        self._towers = _frozen_parts(model)  # a list: they belong to `model`
        # M-RoPE: positions are computed from image grids, and from the mask, which leaves free slots out.
        self._own_positions = hasattr(model.base_model, "get_rope_index")
        model.name_or_path = config.base  # PEFT writes it into adapter_config.json
        self.model = get_peft_model(model, _lora(model, config))
        for name, parameter in self.model.named_parameters():
            if _in_image_projector(name):
                parameter.requires_grad_(True)
        self.projector = RegionProjector(config.projector)
        self.image_token_id: int = model.config.image_token_id
        self._rows: torch.Tensor | None = None
        self.model.get_input_embeddings().register_forward_hook(self._inject)

    def train(self, mode: bool = True) -> "RegionVLM":
        """As nn.Module's; the frozen vision tower stays in evaluation mode."""
        super().train(mode)
        for module in self._towers:
            module.eval()
        return self

    def gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, regions: RegionTokens, **inputs: Any):
        """The model's output for `inputs` (`input_ids` (B, T), `pixel_values` …) with `regions` (B, N) put in.

        Raises ValueError unless `input_ids` hold exactly B · N region placeholders, or where a region is not finite.
        """
        self._rows = self.projector(regions)
        try:
            return self.model(**self._positioned(inputs))
        finally:
            self._rows = None

    @torch.no_grad()
    def generate(self, regions: RegionTokens, max_new_tokens: int, **inputs: Any) -> torch.Tensor:
        """Continuation (B, new tokens) int64, padded with the pad token after the end of each row. Greedy, unless
        `inputs` say otherwise (`num_beams`, `do_sample` … of transformers)."""
        # A generated placeholder would be taken for one of the prompt's.
        placeholders = [self.config.region_token_id, self.image_token_id]
        self._rows = self.projector(regions)
        try:
            settings = {"do_sample": False, "suppress_tokens": placeholders, "max_new_tokens": max_new_tokens}
            tokens = self.model.generate(**(settings | self._positioned(inputs)))
        finally:
            self._rows = None
        return tokens[:, inputs["input_ids"].shape[1] :]

    def _positioned(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k != "position_ids" or not self._own_positions}

    def _inject(self, module: nn.Module, args: tuple[torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
        input_ids, rows = args[0], self._rows
        mask = input_ids == self.config.region_token_id
        count = int(mask.sum())
        # A decoding step with cached keys embeds the one new token, which is never a placeholder.
        if rows is None or (count == 0 and input_ids.shape[-1] == 1):
            return embeds
        if len(input_ids) > len(rows):  # several beams a prompt, side by side
            rows = rows.repeat_interleave(len(input_ids) // len(rows), 0)
        if count != rows.shape[0] * rows.shape[1]:
            wanted = rows.shape[0] * rows.shape[1]
            raise ValueError(f"input_ids hold {count} region placeholders for {wanted} region tokens; make them equal")
        return embeds.masked_scatter(mask[..., None], rows.to(embeds.dtype))

    def merge(self) -> PreTrainedModel:
        """Fold LoRA into the language model, which is returned; this RegionVLM goes on with it, but cannot be saved."""
        self.model = self.model.merge_and_unload()
        return self.model

    def save(self, folder: str | Path, settings: Mapping[str, Any], state: Mapping[str, torch.Tensor] | None = None):
        """Write adapter, bridge and image projector (safetensors, in PEFT's layout for the adapter), not the base.

        `settings` are the caller's (JSON) and come back from `load`. `state` is the whole state dict where the
        parameters are spread over processes. The folder appears whole or not at all, and replaces an older one.
        """
        folder, state = Path(folder), self.state_dict() if state is None else state
        part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
        part.mkdir(parents=True)
        try:
            whole = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
            # "auto" would ask the hub whether the vocabulary has changed.
            adapter = get_peft_model_state_dict(self.model, whole, save_embedding_layers=False)
            save_file(_contiguous(adapter), part / "adapter_model.safetensors")
            self.model.peft_config["default"].save_pretrained(str(part))
            save_file(_contiguous(_bridge_state(state)), part / "bridge.safetensors")
            (part / "bridge.json").write_text(json.dumps(self._description(settings), indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _description(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = None
        return {
            "format_version": FORMAT_VERSION,
            "config": asdict(self.config),
            "settings": dict(settings),
            "versions": versions,
        }

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel, fingerprint: str) -> "RegionVLM":
        """A saved RegionVLM on `model`, the base it was trained on (see `read_checkpoint`), in evaluation mode.

        Raises CheckpointError where the base is another one, or a file is missing or does not fit.
        """
        config, _ = read_checkpoint(folder)
        if fingerprint != config.fingerprint:
            raise CheckpointError(
                f"{folder}: trained on base model {config.base!r} with weights {config.fingerprint}, "
                f"but the weights here are {fingerprint}; load the base that it was trained on"
            )
        vlm = cls(model, config)
        try:
            adapter = load_file(Path(folder) / "adapter_model.safetensors")
            bridge = load_file(Path(folder) / "bridge.safetensors")
            wrong = set_peft_model_state_dict(vlm.model, adapter).unexpected_keys
            names = set(_bridge_state(vlm.state_dict()))
            wrong += sorted(names ^ set(bridge))
            vlm.load_state_dict(bridge, strict=False)
        except Exception as error:  # safetensors and torch raise many kinds for a damaged file or a wrong shape
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder}: damaged checkpoint ({reason}); copy it again") from error
        if wrong:
            raise CheckpointError(f"{folder}: damaged checkpoint (tensor {wrong[0]} does not belong); copy it again")
        return vlm.eval()


def read_checkpoint(folder: str | Path) -> tuple[BridgeConfig, dict[str, Any]]:
    """(config, settings) of a saved RegionVLM. Raises CheckpointError for none, or one of another format version."""
    file = Path(folder) / "bridge.json"
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a bridge checkpoint ({error}); train one with downstream.train") from None
    version = saved.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint format {version}, this program reads {FORMAT_VERSION}; train it again"
        )
    config = {**saved["config"], "projector": ProjectorConfig(**saved["config"]["projector"])}
    if "lora_targets" in config:  # checkpoints written before there was a choice have none
        config["lora_targets"] = tuple(config["lora_targets"])
    return BridgeConfig(**config), saved["settings"]


def checkpoint_hash(folder: str | Path) -> str:
    """16 hex digits of the SHA-256 of a checkpoint's tensors."""
    digest = hashlib.sha256()
    for name in ("adapter_model.safetensors", "bridge.safetensors"):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits over name, shape and 64 values of each weight, without the image projector, which is trained."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if _in_image_projector(name):
            continue
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def input_embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The input-embedding table of the language model. Raises ValueError for a model that does not show it."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        table = None
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"the input embeddings of {type(model).__name__} cannot be found (get_input_embeddings gives "
            f"{type(table).__name__}); regions need a model that looks tokens up in one table"
        )
    return table


def embedding_scale(model: PreTrainedModel) -> float:
    """Root mean square of what the input-embedding layer yields, for `ProjectorConfig.scale`."""
    table = input_embeddings(model)
    weight = table.weight.detach()
    # Gemma's layer multiplies its table by a constant: measured on some rows, 1 elsewhere.
    ids = torch.arange(0, len(weight), max(1, len(weight) // 64), device=weight.device)
    with torch.no_grad():
        factor = (table(ids).float().norm() / weight[ids].float().norm()).item()
    return weight.float().pow(2).mean().sqrt().item() * factor


def language_prefix(model: PreTrainedModel) -> str:
    """Name of the module that holds the input embeddings and the language layers, such as "model.language_model"."""
    table = input_embeddings(model)
    name = next(name for name, module in model.named_modules() if module is table).rpartition(".")[0]
    if not isinstance(getattr(model.get_submodule(name), "layers", None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__}: no list of layers beside its input embeddings, in {name!r}")
    return name


def _frozen_parts(model: PreTrainedModel) -> list[nn.Module]:
    """What stands beside the language model (a vision tower), less the image projector."""
    parent, _, own = language_prefix(model).rpartition(".")
    parts = model.get_submodule(parent).named_children()
    return [module for name, module in parts if name not in (own, *IMAGE_PROJECTORS)]


def _in_image_projector(parameter: str) -> bool:
    return not set(parameter.split(".")).isdisjoint(IMAGE_PROJECTORS)


def _lora(model: PreTrainedModel, config: BridgeConfig) -> LoraConfig:
    prefix = language_prefix(model)
    depth = len(model.get_submodule(f"{prefix}.layers"))
    first = 0 if config.lora_layers is None else max(0, depth - config.lora_layers)
    layers, targets = "|".join(map(str, range(first, depth))), "|".join(map(re.escape, config.lora_targets))
    # A pattern, since a vision tower has layers and projections of the same names.
    pattern = rf"{re.escape(prefix)}\.layers\.({layers})\..*\.({targets})"
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not any(re.fullmatch(pattern, name) for name in names):
        known = sorted({name.rpartition(".")[2] for name in names if name.startswith(f"{prefix}.layers.")})
        raise ValueError(f"lora_targets={', '.join(config.lora_targets)}: no such layer; there are {', '.join(known)}")
    rank_stable = config.lora_kind == "rslora"
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=8 if rank_stable else 2 * config.lora_r,
        target_modules=pattern,
        use_rslora=rank_stable,
        use_dora=config.lora_kind == "dora",
    )


def _bridge_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k.startswith("projector.") or _in_image_projector(k)}


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
