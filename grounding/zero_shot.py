"""Any zero-shot detector of transformers in the place of a MedGLIP: Grounding DINO, MM-Grounding-DINO, OWL-ViT, OWLv2
and OmDet-Turbo, from a folder or the hub, with the same answers (`Detection`) and region tokens.

What it looks for when nobody asks is in `medglip.json` beside the weights, which fine-tuning writes; without one, the
labels of the label tree for the image's modality. Lists of any length are read in several passes (`grounding.chunks`).

Dimension key: Q queries of all passes over an image, V phrases, N regions, R feature width, E label-vector width.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from grounding.attach import attach_findings, drop_broader
from grounding.boxes import area, generalised_iou, nms
from grounding.chunks import anchored, phrase_scores
from grounding.decode import LOCATIONS_A_BOX, NEAREST, most_boxes
from grounding.detect import Detection, Grounder, check_pixels
from grounding.images import MedicalImage
from grounding.labels import LabelTree, load_label_tree, normalise, split_negation
from grounding.model import MODALITIES, CheckpointError, MedGLIPConfig
from grounding.phrases import Phrasebook, PhraseError, check_any
from grounding.text import PhraseEncoder
from grounding.types import NOT_FOUND_LEVEL, RegionSet, RegionTokens
from grounding.zero_shot_families import (
    FAMILIES,
    SINGLE,
    Detector,
    chunk,
    forward,
    load_detector,
    pixel_inputs,
    text_inputs,
)

SETTINGS = "medglip.json"
# The fields of MedGLIPConfig that it keeps:
KEPT = ("vocabulary", "phrases", "modalities", "most_boxes", "thresholds", "presence", "text_encoder")
FOUND = {"grounding-dino": 0.25, "mm-grounding-dino": 0.25, "omdet-turbo": 0.3, "owlvit": 0.1, "owlv2": 0.1}
PASSES = 8  # (image, text) pairs that share a forward pass
SMALL, LARGE = 1 / 6, 5 / 12  # sides, of the image's, at which a region's level changes; those of MedGLIP at 192 pixels
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

Phrases = Sequence[tuple[str, str | None]]  # (text, label id or None)


@dataclass
class Sight:
    """All passes over one image: ``boxes`` (Q, 4) xyxy in [0, 1] of the image, ``scores`` (Q, V), 0 where the pass of
    that query did not read that phrase, ``features`` (Q, R)."""

    boxes: torch.Tensor
    scores: torch.Tensor
    features: torch.Tensor


class ZeroShotGrounder(Grounder):
    """A `Grounder` by its public methods; all that touches the model is its own. Any phrase may be asked for: these
    detectors are made for words that they were not trained on."""

    def __init__(self, detector: Detector, tree: LabelTree, hash_: str, config: MedGLIPConfig, tuned: bool):
        self.detector, self.tree, self.hash = detector, tree, hash_
        self._config, self.tuned = config, tuned
        self.encoder = PhraseEncoder(config.text_encoder)
        self.book = Phrasebook(config, tree, self.encoder)

    @property
    def config(self) -> MedGLIPConfig:
        """Of its fields those in `KEPT` mean something here."""
        return self._config

    def resolve(self, phrases: Sequence[str], modality: str | None = None) -> list[tuple[str, str | None]]:
        """Phrases → (text, label id or None), negation taken out. Raises PhraseError for an empty one or no one."""
        check_any(phrases)
        resolved = []
        for phrase in phrases:
            text, _ = split_negation(phrase)
            if not normalise(text):
                raise PhraseError("empty phrase; name what to look for, such as " + repr(self.config.phrases[0]))
            resolved.append((text, self.book.find(text, self.modality(modality))))
        return resolved

    def check_familiar(self, image: MedicalImage) -> float:
        """1: a zero-shot detector was made for images of any kind, and keeps none to compare with."""
        return 1.0

    def vocabulary(self, modality: str | None = None) -> list[tuple[str, str | None]]:
        """What is looked for when nobody asks: of a checkpoint that was not fine-tuned, labels of the modality."""
        labels = self.config.vocabulary
        if not self.tuned and modality is not None:
            labels = tuple(label for label in labels if modality in self.tree.modalities(label))
        return [(self.book.phrase(x), x) for x in labels]

    def detect(
        self, images: Sequence[np.ndarray], phrases: Phrases | None = None, modality: str | None = None, tiles: int = 1
    ) -> list[Detection]:
        """uint8 images (H, W) or (H, W, 3) of any size → a Detection each, without masks. ``phrases`` from ``resolve``:
        looked for beside a fine-tuned checkpoint's vocabulary, whose places findings hang on, else alone.

        Raises PhraseError for an empty list of phrases, an unknown modality, a phrase longer than the model reads, or
        ``tiles`` > 1, which a MedGLIP has; ImageError for pixels that are not uint8.
        """
        self.check_modality(modality)
        if tiles > 1:
            raise PhraseError(f"tiles={tiles}: a {self.detector.family} detector looks at whole images; give tiles=1")
        if phrases is not None:
            check_any(phrases)
        asked = list(phrases or [])
        labels = {label for _, label in asked}
        own = self.vocabulary(modality) if self.tuned or not asked else []
        every = [*asked, *(row for row in own if row[1] not in labels)]
        detections = self.detect_each(images, [every] * len(images))
        return [self._only(detection, asked) for detection in detections] if asked else detections

    def detect_each(self, images: Sequence[np.ndarray], phrases: Sequence[Phrases]) -> list[Detection]:
        """Every image with its own phrases, and none but these."""
        for k, image in enumerate(images):
            check_pixels(image, k)
        sights = self._look(images, [[text for text, _ in rows] for rows in phrases])
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return [self._detection(*row) for row in zip(sights, phrases, sizes, strict=True)]

    @torch.no_grad()
    def _look(self, images: Sequence[np.ndarray], phrases: Sequence[Sequence[str]]) -> list[Sight]:
        """Images of one size share a pass, each with its own phrases: an image is seen the same in any company."""
        inputs = [pixel_inputs(self.detector, [image]) for image in images]
        packs = {rows: chunk(self.detector, rows) if rows else [] for rows in map(tuple, phrases)}
        jobs = [(k, pack) for k, rows in enumerate(phrases) for pack in packs[tuple(rows)]]
        shapes = [pixels["pixel_values"].shape for pixels, _ in inputs]
        sights: list[list] = [[] for _ in images]
        for shape in dict.fromkeys(shapes):
            own = [job for job in jobs if shapes[job[0]] == shape]
            for start in range(0, len(own), PASSES):
                batch = own[start : start + PASSES]
                for (k, pack), seen in zip(batch, self._pass(inputs, phrases, batch), strict=True):
                    sights[k].append((pack, *seen))
        return [self._merged(rows, len(asked)) for rows, asked in zip(sights, phrases, strict=True)]

    def _pass(self, inputs: list, phrases: Sequence[Sequence[str]], batch: list):
        """(boxes (Q, 4), scores (Q, phrases of the pack), features (Q, R)) of each (image, pack)."""
        pixels = {name: torch.cat([inputs[k][0][name] for k, _ in batch]) for name in inputs[batch[0][0]][0]}
        text = text_inputs(self.detector, [[phrases[k][v] for v in pack] for k, pack in batch])
        levels, features = forward(self.detector.model, pixels, text.tensors)
        for row, (k, _) in enumerate(batch):
            centre, size = levels[0].boxes_cxcywh[row].split(2, -1)
            boxes = torch.cat([centre - size / 2, centre + size / 2], -1) / inputs[k][1].repeat(1, 2)
            scores = phrase_scores(levels[0].logits[row], text.columns[row])
            yield boxes.clamp(0, 1).float().cpu(), scores.float().cpu(), features[row].float().cpu()

    def _merged(self, passes: list, phrases: int) -> Sight:
        if not passes:
            return Sight(torch.zeros(0, 4), torch.zeros(0, phrases), torch.zeros(0, self.config.region_width))
        packs, boxes, scores, features = zip(*passes, strict=True)
        rows: list[torch.Tensor] = []
        taken: set[int] = set()
        anchors = len(set.intersection(*map(set, packs))) if len(packs) > 1 else 0
        for pack, own in zip(packs, anchored(scores, anchors), strict=True):
            wide = own.new_zeros(len(own), phrases)
            new = [column for column, v in enumerate(pack) if v not in taken]  # an anchor counts once
            wide[:, [pack[column] for column in new]] = own[:, new]
            taken.update(pack)
            rows.append(wide)
        return Sight(torch.cat(boxes), torch.cat(rows), torch.cat(features))

    def _detection(self, sight: Sight, phrases: Phrases, image_size: tuple[int, int]) -> Detection:
        query, labels, scores = self._kept(sight, phrases)
        best = sight.scores.max(0).values if len(sight.scores) else torch.zeros(len(phrases))
        slope, offset = self.config.presence
        presence = (best.clamp(1e-6, 1 - 1e-6).logit() * slope + offset).sigmoid()
        queries = [
            {"phrase": text, "label": label, "presence": round(float(p), 4)}
            for (text, label), p in zip(phrases, presence, strict=True)
        ]
        order = scores.argsort(descending=True, stable=True).tolist()
        boxes = sight.boxes[query].numpy()
        candidates = RegionSet(boxes, labels, image_size, scores.numpy(), None, queries).select(order)
        found = self._found(candidates)
        return Detection(candidates, found, self._tokens(sight, self._most_important(found)))

    def _kept(self, sight: Sight, phrases: Phrases) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Queries, their labels and scores after non-maximum suppression within each label, over all passes."""
        columns: dict[str, list[int]] = {}
        for v, (text, label) in enumerate(phrases):
            columns.setdefault(label or text, []).append(v)
        floor = 0.01 if self.detector.family in SINGLE else 0.05
        rows: list[tuple[int, str, float]] = []
        for name, own in columns.items() if len(sight.boxes) else ():
            scores = sight.scores[:, own].max(1).values
            limit = most_boxes(phrases[own[0]][1], self.config, self.tree)
            ranked = scores.topk(min(max(NEAREST, LOCATIONS_A_BOX * limit), len(scores))).indices
            ranked = ranked[scores[ranked] > floor]
            kept = nms(sight.boxes[ranked], scores[ranked], 0.5)[:limit]
            rows += [(int(ranked[i]), name, float(scores[ranked[i]])) for i in kept]
        queries = torch.tensor([row[0] for row in rows], dtype=torch.long)
        return queries, [row[1] for row in rows], torch.tensor([row[2] for row in rows])

    def _found(self, candidates: RegionSet) -> RegionSet:
        limits, usual = self.config.thresholds, FOUND[self.detector.family]
        scores = np.zeros(len(candidates)) if candidates.scores is None else candidates.scores
        kept = [k for k, label in enumerate(candidates.labels) if scores[k] >= limits.get(label, usual)]
        regions = drop_broader(candidates.select(kept), self.tree)
        return dataclasses.replace(regions, labels=attach_findings(regions, self.tree, candidates))

    def given(self, images: Sequence[np.ndarray], regions: Sequence[RegionSet]) -> list[RegionTokens]:
        """Region tokens of regions from elsewhere. The image is read with the names of its regions, and a region has
        the feature of the query that overlaps it most."""
        modality, named = self.modality(None), []
        for k, image in enumerate(images):
            check_pixels(image, k)
        for one in regions:
            labels = [self.tree.find(x, modality=modality) or x for x in one.labels]
            scores = np.ones(len(one), np.float32) if one.scores is None else one.scores
            one = dataclasses.replace(one, scores=scores, labels=labels)
            named.append(dataclasses.replace(one, labels=attach_findings(one, self.tree)))
        texts = [[*dict.fromkeys(self.book.phrase(x) for x in one.labels)] for one in named]
        sights = self._look(images, texts)
        return [self._tokens(s, self._most_important(one)) for s, one in zip(sights, named, strict=True)]

    def _tokens(self, sight: Sight, regions: RegionSet) -> RegionTokens:
        """As `Grounder.tokens_of`: a token a region (B = 1), then one for each finding that was looked for in vain."""
        boxes = torch.from_numpy(regions.boxes)
        features = sight.features[_nearest(boxes, sight.boxes)]
        missing = [query for query in regions.queries if self._is_missing(query["label"], regions)]
        labels, n = [*regions.labels, *(query["label"] for query in missing)], len(missing)
        scores = torch.ones(len(regions)) if regions.scores is None else torch.from_numpy(regions.scores)
        presence = torch.tensor([float(query["presence"]) for query in missing])
        sides = area(boxes).sqrt()
        levels = (sides > SMALL).long() + (sides > LARGE).long()
        return RegionTokens(
            features=torch.cat([features, features.new_zeros(n, features.shape[1])])[None],
            boxes=torch.cat([boxes, boxes.new_zeros(n, 4)])[None],
            scores=torch.cat([scores, presence])[None],
            labels=[labels],
            label_vectors=self.label_vectors(labels)[None],
            levels=torch.cat([levels, torch.full((n,), NOT_FOUND_LEVEL)])[None],
            valid=torch.ones(1, len(labels), dtype=torch.bool),
            queries=[regions.queries],
        )

    def label_vectors(self, labels: Sequence[str]) -> torch.Tensor:
        """(N, E), unit length: the text encoder's vector and the side, which that hardly tells."""
        if not labels:
            return torch.zeros(0, self.config.width)
        encoded = self.encoder.encode([self.book.phrase(x) for x in labels])
        return F.normalize(torch.cat([encoded.vectors, encoded.sides[:, None].float()], 1), dim=-1)


def _nearest(boxes: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """(N, 4), (Q, 4) → (N,) the query with the largest GIoU, which also ranks those that do not overlap. A box that the
    detector put out finds itself."""
    if not len(boxes):
        return torch.zeros(0, dtype=torch.long)
    return torch.stack([generalised_iou(box, queries).argmax() for box in boxes])


def is_zero_shot(path: Path | str) -> bool:
    """Whether a folder or hub id holds a zero-shot detector; False, too, for what is not there or cannot be read."""
    folder = Path(path)
    if folder.exists():
        try:
            return json.loads((folder / "config.json").read_text()).get("model_type") in FAMILIES
        except (OSError, ValueError, AttributeError):
            return False
    # "runs/mine" is a mistyped folder where there is a folder "runs": no reason to ask the hub, which takes a while.
    if not HUB_ID.fullmatch(str(path)) or Path(folder.parts[0]).exists():
        return False
    return _hub_family(str(path)) in FAMILIES


def _hub_family(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from transformers import PretrainedConfig

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return json.loads(Path(cached).read_text()).get("model_type")
    try:
        return PretrainedConfig.get_config_dict(name)[0].get("model_type")
    except OSError:
        return None


def load_zero_shot(path: Path | str, device: str | None = None) -> ZeroShotGrounder:
    """``device``: "cpu", "cuda:1" …; by default the first accelerator, if there is one. Raises CheckpointError."""
    detector, tree = load_detector(path), load_label_tree()
    chosen = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    detector.model.to(chosen)
    file = Path(path) / SETTINGS
    tuned = file.exists()
    config = read_settings(file) if tuned else _untuned(tree)
    encoder = PhraseEncoder(config.text_encoder)
    width = encoder.encode([config.phrases[0]]).vectors.shape[1]
    config = dataclasses.replace(config, text_width=width, width=width + 1, region_width=_feature_width(detector))
    return ZeroShotGrounder(detector, tree, _hash(path, detector), config, tuned)


def _untuned(tree: LabelTree) -> MedGLIPConfig:
    """Places, and findings as such: where a finding is, geometry says."""
    labels = tuple(x for x in tree.ids if not tree.is_finding(x) or not tree.broader(x))
    return MedGLIPConfig(vocabulary=labels, phrases=tuple(map(tree.phrase, labels)), modalities=MODALITIES)


def _feature_width(detector: Detector) -> int:
    config = detector.model.config
    if detector.family in SINGLE:
        return config.text_config.hidden_size
    return config.decoder_hidden_dim if detector.family == "omdet-turbo" else config.d_model


def read_settings(file: Path) -> MedGLIPConfig:
    """medglip.json. Raises CheckpointError for one that is broken or of another kind."""
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        unknown = sorted(set(row) - set(KEPT))
        if unknown or not row["vocabulary"] or not row["phrases"]:
            raise ValueError(f"unknown key {unknown[0]!r}" if unknown else "vocabulary and phrases must not be empty")
        slope, offset = row.get("presence", (1.0, 0.0))
        lists = {name: tuple(row[name]) for name in ("vocabulary", "phrases", "modalities")}
        return MedGLIPConfig(**row | lists | {"presence": (float(slope), float(offset))})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: {error!r}; fine-tune again, or delete it to use the label tree") from error


def settings_text(config: MedGLIPConfig) -> str:
    """What `read_settings` reads."""
    return json.dumps({name: getattr(config, name) for name in KEPT}, indent=2, ensure_ascii=False) + "\n"


def _hash(path: Path | str, detector: Detector) -> str:
    """Of the files in a folder; of a hub id with its commit."""
    digest = hashlib.sha256()
    files = sorted(p for p in Path(path).glob("*") if p.suffix in (".safetensors", ".json"))
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    if not files:
        digest.update(f"{path}@{getattr(detector.model.config, '_commit_hash', None)}".encode())
    return digest.hexdigest()[:16]
