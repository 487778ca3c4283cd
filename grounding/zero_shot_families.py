"""The zero-shot detectors of transformers behind one forward pass: pixels and phrases → boxes, logits and features.

Grounding DINO and MM-Grounding-DINO read all phrases in one text, and their logits are a query's with each token.
OmDet-Turbo reads each phrase by itself, and a task text that lists them. OWL-ViT and OWLv2 read each by itself only.

Image processors and tokenizers are loaded apart: OmDet-Turbo's processor asks for torchvision, which is not needed.

Dimension key: B images, Q object queries (OWL: patches), C columns of the logits (tokens or phrases), R feature width,
S text inputs. ``share``: which part of the network input (width, height) the image fills; it lies at the top left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grounding.chunks import Columns, anchored_packs, caption, spoken, token_spans
from grounding.model import CheckpointError

TOKENS = ("grounding-dino", "mm-grounding-dino")  # one text, logits a token
SINGLE = ("owlvit", "owlv2")  # phrases one by one
TASK = ("omdet-turbo",)  # phrases one by one, and a text that lists them
FAMILIES = (*TOKENS, *SINGLE, *TASK)


@dataclass
class Detector:
    """A model with what prepares its inputs."""

    model: Any
    image_processor: Any
    tokenizer: Any

    @property
    def family(self) -> str:
        return self.model.config.model_type

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass
class Level:
    """One layer's answer: ``logits`` (B, Q, C), ``boxes_cxcywh`` (B, Q, 4) in [0, 1] of the network input."""

    logits: torch.Tensor
    boxes_cxcywh: torch.Tensor


@dataclass
class TextInputs:
    """``tensors`` for the model, and for each image the logit columns of each of its phrases."""

    tensors: dict[str, torch.Tensor]
    columns: list[Columns]


def load_detector(path: Path | str) -> Detector:
    """From a folder or hub id. Raises CheckpointError."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = str(path)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in FAMILIES:
            raise CheckpointError(f"{name}: a {config.model_type} model; known detectors: {', '.join(FAMILIES)}")
        model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
            name, config=config, output_loading_info=True, use_safetensors=True
        )
        processor, tokenizer = AutoImageProcessor.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: cannot be loaded as a detector ({reason}); give a whole checkpoint") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(f"{name}: {len(missing)} weights are missing, such as {missing[0]}; load another file")
    return Detector(model.eval(), processor, tokenizer)


def pixel_inputs(detector: Detector, images: Sequence[np.ndarray]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """uint8 (H, W) or (H, W, 3) images as the checkpoint wants them, and ``share`` (B, 2) as width, height."""
    rgb = [np.ascontiguousarray(np.broadcast_to(_coloured(image), (*image.shape[:2], 3))) for image in images]
    out = detector.image_processor(images=rgb, input_data_format="channels_last", return_tensors="pt")
    tensors = {name: out[name].to(detector.device) for name in ("pixel_values", "pixel_mask") if name in out}
    if "pixel_mask" in tensors and detector.family not in SINGLE:
        mask = tensors["pixel_mask"]
        share = torch.stack([mask[:, 0].sum(1) / mask.shape[2], mask[:, :, 0].sum(1) / mask.shape[1]], 1)
    elif detector.family == "owlv2":  # pads to a square, then resizes
        share = torch.tensor([[w / max(h, w), h / max(h, w)] for h, w in (image.shape[:2] for image in rgb)])
    else:
        share = torch.ones(len(rgb), 2)
    return tensors, share.float().to(detector.device)


def _coloured(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 3 else image[..., None]


def text_limit(detector: Detector) -> int:
    """Tokens of one text, special ones among them."""
    config = detector.model.config
    if detector.family in TOKENS:
        return min(config.max_text_len, config.text_config.max_position_embeddings)
    return config.text_config.max_position_embeddings


def chunk(detector: Detector, phrases: Sequence[str]) -> list[list[int]]:
    """Phrase indices of each pass. Raises PhraseError for a phrase that the model cannot read whole."""
    plain = detector.tokenizer([spoken(phrase) for phrase in phrases], add_special_tokens=False)["input_ids"]
    lengths = [len(ids) + 1 for ids in plain]  # and what ends it
    limit = text_limit(detector) - 2  # start and end of text
    if detector.family in SINGLE:
        for phrase, length in zip(phrases, lengths, strict=True):
            anchored_packs([phrase], [length - 1], limit)
        return [list(range(len(phrases)))]
    if detector.family in TASK:
        limit -= len(detector.tokenizer("Detect", add_special_tokens=False)["input_ids"])
    return anchored_packs(phrases, lengths, limit)


def text_inputs(detector: Detector, phrases: Sequence[Sequence[str]]) -> TextInputs:
    """Of a batch in which every image has its own phrases, each list short enough for one pass."""
    read = {**dict.fromkeys(TOKENS, _captions), **dict.fromkeys(SINGLE, _one_by_one), **dict.fromkeys(TASK, _task)}
    inputs = read[detector.family](detector, phrases)
    inputs.tensors = {name: tensor.to(detector.device) for name, tensor in inputs.tensors.items()}
    return inputs


def _captions(detector: Detector, phrases: Sequence[Sequence[str]]) -> TextInputs:
    captions = [caption(rows) for rows in phrases]
    encoded = detector.tokenizer(
        [one.text for one in captions], padding=True, return_offsets_mapping=True, return_tensors="pt"
    )
    offsets = encoded.pop("offset_mapping").tolist()
    columns = [token_spans(rows, one.spans) for rows, one in zip(offsets, captions, strict=True)]
    names = ("input_ids", "attention_mask", "token_type_ids")
    return TextInputs({name: encoded[name] for name in names if name in encoded}, columns)


def _one_by_one(detector: Detector, phrases: Sequence[Sequence[str]]) -> TextInputs:
    """Each phrase of the batch once, and which of them each image asks for; short lists are filled up with their own
    first phrase, whose further columns nobody reads."""
    said = [[spoken(phrase) for phrase in rows] for rows in phrases]
    texts = list(dict.fromkeys(phrase for rows in said for phrase in rows))
    place, most = {phrase: k for k, phrase in enumerate(texts)}, max(map(len, said))
    asked = torch.tensor([[place[x] for x in rows] + [place[rows[0]]] * (most - len(rows)) for rows in said])
    encoded = detector.tokenizer(texts, padding=True, return_tensors="pt")
    columns: list[Columns] = [tuple((k,) for k in range(len(rows))) for rows in said]
    tensors = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "asked": asked}
    return TextInputs(tensors, columns)


def _task(detector: Detector, phrases: Sequence[Sequence[str]]) -> TextInputs:
    inputs = _one_by_one(detector, phrases)
    tasks = [f"Detect {', '.join(map(spoken, rows))}." for rows in phrases]
    encoded = detector.tokenizer(tasks, padding=True, return_tensors="pt")
    inputs.tensors |= {"task_ids": encoded["input_ids"], "task_mask": encoded["attention_mask"]}
    return inputs


def forward(
    model: Any, pixels: dict[str, torch.Tensor], text: dict[str, torch.Tensor]
) -> tuple[list[Level], torch.Tensor]:
    """The levels, that of the last layer first, and the region features of its queries (B, Q, R): the decoder's hidden
    states (Grounding DINO, OmDet-Turbo), or the class embeddings of the patches (OWL). Gradients flow."""
    family = model.config.model_type
    run = _forward_tokens if family in TOKENS else _forward_single if family in SINGLE else _forward_task
    return run(model, pixels, text)


def _forward_tokens(model: Any, pixels: dict, text: dict) -> tuple[list[Level], torch.Tensor]:
    out = model(**pixels, **text)
    levels = [Level(out.logits, out.pred_boxes)]
    if model.training:
        levels += [*_earlier_layers(model, out, text["attention_mask"].bool()), _proposals(model, out)]
    return levels, out.last_hidden_state


def _earlier_layers(model: Any, out: Any, mask: torch.Tensor) -> list[Level]:
    levels, reference = [], out.init_reference_points
    for k in range(model.config.decoder_layers - 1):
        hidden = out.intermediate_hidden_states[:, k]
        logits = model.class_embed[k](hidden, out.encoder_last_hidden_state_text, mask)
        boxes = (model.bbox_embed[k](hidden) + torch.special.logit(reference, eps=1e-5)).sigmoid()
        levels.append(Level(logits, boxes))
        reference = out.intermediate_reference_points[:, k]
    return levels


def _proposals(model: Any, out: Any) -> Level:
    """The encoder's proposals that became queries, with gradients. (transformers' own encoder term scores the learned
    query embeddings, which do not see the image, at detached boxes.)"""
    best = out.enc_outputs_class.max(-1).values.topk(model.config.num_queries, dim=1).indices[..., None]
    logits = out.enc_outputs_class.gather(1, best.expand(-1, -1, out.enc_outputs_class.shape[-1]))
    return Level(logits, out.enc_outputs_coord_logits.gather(1, best.expand(-1, -1, 4)).sigmoid())


def _forward_single(model: Any, pixels: dict, text: dict) -> tuple[list[Level], torch.Tensor]:
    towers = model.owlv2 if model.config.model_type == "owlv2" else model.owlvit
    feature_map, _ = model.image_embedder(pixels["pixel_values"])
    encoded = towers.get_text_features(text["input_ids"], text["attention_mask"]).pooler_output
    image = feature_map.flatten(1, 2)
    logits, features = model.class_predictor(image, encoded[text["asked"]], None)
    return [Level(logits, model.box_predictor(image, feature_map))], features


def _forward_task(model: Any, pixels: dict, text: dict) -> tuple[list[Level], torch.Tensor]:
    maps = model.encoder(model.vision_backbone(pixels["pixel_values"]), return_dict=True).extracted_states
    classes = model.language_backbone(text["input_ids"], encode_type="class")[text["asked"]].transpose(0, 1)
    task, mask = model.language_backbone(text["task_ids"], mask=text["task_mask"], encode_type="task")
    out = model.decoder(maps, classes, task, mask, return_dict=True)
    pairs = zip(reversed(out.decoder_classes.unbind()), reversed(out.decoder_coords.unbind()), strict=True)
    levels = [Level(logits, boxes) for logits, boxes in pairs]
    return [*levels, Level(out.encoder_class_logits, out.encoder_coord_logits)], out.last_hidden_state
