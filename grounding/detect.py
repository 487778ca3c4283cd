"""A trained MedGLIP at work: phrases → candidates, what counts as found, and region tokens of any boxes.

Dimension key: B images, V phrases, L locations, N regions, D label-vector width, R region-feature width.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch.nn import functional as F

from grounding.boxes import area, containment, nms, pairwise_iou
from grounding.images import Letterbox, MedicalImage, to_pixel_values
from grounding.labels import LabelTree, load_label_tree, normalise, split_negation
from grounding.model import MODALITIES, MedGLIP, MedGLIPConfig, MedGLIPOutput, checkpoint_hash, load_checkpoint
from grounding.text import PhraseEncoder
from grounding.types import NOT_FOUND_LEVEL, RegionSet, RegionTokens

FLOOR = 0.05  # candidates below this score are nothing
NEAREST = 40  # locations a phrase that compete
PLACES, FINDINGS = 2, 6  # boxes a phrase at most; a place with a side occurs once
LEAST_HELD = 0.2  # share of a finding that a place must hold for the finding to hang on it
REGIONS = 24  # regions an image that become tokens
LIKE_A_KNOWN_PHRASE = 0.55  # cosine of text vectors below which a phrase counts as unknown to the checkpoint


class PhraseError(ValueError):
    """A phrase, modality or image that the checkpoint does not know; the message names it and what is known."""


@dataclass
class Detection:
    """One image: every candidate (for average precision), and which of them count as found."""

    candidates: RegionSet
    found: RegionSet
    tokens: RegionTokens


class Grounder:
    """A checkpoint with its text encoder and label tree; ``detect`` is the whole prediction."""

    def __init__(self, model: MedGLIP, tree: LabelTree, hash_: str):
        self.model, self.tree, self.hash = model, tree, hash_
        self.encoder = PhraseEncoder(model.config.text_encoder)

    @property
    def config(self) -> MedGLIPConfig:
        return self.model.config

    def modality(self, given: str | None) -> str | None:
        """``given``, else the one modality that the checkpoint was trained on; None where it has several."""
        return given or (self.config.modalities[0] if len(self.config.modalities) == 1 else None)

    def resolve(self, phrases: Sequence[str], modality: str | None = None) -> list[tuple[str, str | None]]:
        """Phrases → (text, label id or None), negation taken out. Raises PhraseError for an unknown one."""
        modality = self.modality(modality)
        resolved = []
        for phrase in phrases:
            text, _ = split_negation(phrase)
            label = self.tree.find(text, modality=modality)
            if not self._trained_on(label) and text not in self.config.phrases:
                self._check_known(text)
            resolved.append((text, label))
        return resolved

    def _trained_on(self, label: str | None) -> bool:
        """Whether the checkpoint has a label, or a broader one; the tree has more than any one checkpoint."""
        return label is not None and not {label, *self.tree.broader(label)}.isdisjoint(self.config.vocabulary)

    def _check_known(self, phrase: str) -> None:
        if not normalise(phrase):
            raise PhraseError("empty phrase; name what to look for, such as " + repr(self.config.phrases[0]))
        known = self.encoder.encode(self.config.phrases)
        likeness = known.vectors @ self.encoder.encode([phrase]).vectors[0]
        best = likeness.topk(min(3, len(known))).indices.tolist()
        if likeness.max() < LIKE_A_KNOWN_PHRASE:
            nearest = ", ".join(known.texts[k] for k in best)
            raise PhraseError(f"phrase {phrase!r} is unknown to this checkpoint; nearest it knows: {nearest}")

    def check_modality(self, modality: str | None) -> None:
        """Raises PhraseError for a modality that does not exist, or that the checkpoint was not trained on."""
        if modality is not None and modality not in self.config.modalities:
            what = "not one this checkpoint was trained on" if modality in MODALITIES else "not a modality"
            raise PhraseError(f"modality {modality!r} is {what}; it knows: {', '.join(self.config.modalities)}")

    @torch.no_grad()
    def check_familiar(self, image: MedicalImage) -> float:
        """Similarity in [-1, 1] to the nearest training image. Raises PhraseError below the calibrated limit."""
        pixels, _ = to_pixel_values(image.pixels, self.config.image_size)
        pooled = F.normalize(self.model.trunk.feature_maps(pixels[None])[-1].mean((2, 3)), dim=-1)
        similarity = float((pooled @ self.model.familiar.T).max())
        if similarity < self.config.familiarity:
            known = ", ".join(self.config.modalities)
            regions = ", ".join(dict.fromkeys(label.split("/")[0] for label in self.config.vocabulary))
            raise PhraseError(
                f"the image does not look like those this checkpoint was trained on ({known}, {regions}): similarity "
                f"{similarity:.2f}, needs {self.config.familiarity:.2f}; if it is one, say so with --modality {known}"
            )
        return similarity

    def vocabulary(self) -> list[tuple[str, str | None]]:
        """What is looked for when nobody asks."""
        return [(self.tree.phrase(label), label) for label in self.config.vocabulary]

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[np.ndarray],
        phrases: Sequence[tuple[str, str | None]] | None = None,
        modality: str | None = None,
    ) -> list[Detection]:
        """uint8 images (H, W) or (H, W, 3) of any size → a Detection each. ``phrases`` from ``resolve`` are looked for
        beside the vocabulary, since a finding hangs on a place that nobody asked for; the answer holds them alone."""
        asked = list(phrases or [])
        labels = {label for _, label in asked}
        every = [*asked, *(row for row in self.vocabulary() if row[1] not in labels)]
        out, boxes = self._forward(images, [text for text, _ in every], modality)
        detections = [self._decode(out, k, every, box) for k, box in enumerate(boxes)]
        return [self._only(detection, asked) for detection in detections] if asked else detections

    def _only(self, detection: Detection, asked: list[tuple[str, str | None]]) -> Detection:
        """What answers one of the asked phrases: its own label, or a narrower one ("left insula" for "insula")."""
        wanted = {label or text for text, label in asked}

        def restricted(regions: RegionSet) -> RegionSet:
            wider = [{x, *(self.tree.broader(x) if x in self.tree.nodes else [])} for x in regions.labels]
            rows = regions.select([k for k, names in enumerate(wider) if names & wanted])
            return dataclasses.replace(rows, queries=regions.queries[: len(asked)])

        return dataclasses.replace(
            detection, candidates=restricted(detection.candidates), found=restricted(detection.found)
        )

    def _forward(self, images: Sequence[np.ndarray], texts: Sequence[str], modality: str | None):
        self.check_modality(modality)
        pixels, boxes = zip(*(to_pixel_values(image, self.config.image_size) for image in images), strict=True)
        weights = None
        if modality is not None:
            weights = torch.zeros(len(images), len(MODALITIES))
            weights[:, MODALITIES.index(modality)] = 1
        return self.model(torch.stack(pixels), self.encoder.encode(texts), weights), boxes

    def _decode(self, out: MedGLIPOutput, k: int, phrases: list[tuple[str, str | None]], box: Letterbox) -> Detection:
        location, phrase, scores = self._candidates(out, k, phrases)
        boxes = out.boxes[k][location]
        if len(boxes):
            read = self.model.read_regions(_row(out, k), boxes[None])
            aligned = read.logits[0, torch.arange(len(boxes)), phrase].sigmoid()
            scores, boxes = (scores * aligned.sqrt()).clamp(0, 1), read.boxes[0]
        inside = box.invert(boxes).clamp(0, 1)
        labels = [phrases[v][1] or phrases[v][0] for v in phrase.tolist()]
        masks = _masks(out, k, location, boxes, box)
        presence = (out.presence[k] * self.config.presence[0] + self.config.presence[1]).sigmoid()
        queries = [
            {"phrase": text, "label": label, "presence": round(float(p), 4)}
            for (text, label), p in zip(phrases, presence, strict=True)
        ]
        order = scores.argsort(descending=True, stable=True).tolist()
        candidates = RegionSet(inside.numpy(), labels, box.image_size, scores.numpy(), masks, queries).select(order)
        found = self._found(candidates)
        tokens = self.tokens_of(out, k, self._most_important(found), box)
        return Detection(candidates, found, tokens)

    def _candidates(self, out: MedGLIPOutput, k: int, phrases: list[tuple[str, str | None]]):
        """Locations, phrase indices and scores after non-maximum suppression within each phrase."""
        scores = (out.logits[k].sigmoid() * out.quality[k].sigmoid()[:, None]).sqrt()
        best = scores.topk(min(NEAREST, len(scores)), dim=0).indices
        rows: list[tuple[int, int]] = []
        modality = MODALITIES[int(out.modality[k].argmax())]
        for v, (_, label) in enumerate(phrases):
            if not self._occurs(label, modality):
                continue
            ranked = best[:, v][scores[best[:, v], v] > FLOOR]
            limit = self._most_boxes(label)
            kept = (
                [0] * min(1, len(ranked)) if limit == 1 else nms(out.boxes[k][ranked], scores[ranked, v], 0.5)[:limit]
            )
            rows += [(int(ranked[i]), v) for i in kept]
        location = torch.tensor([row[0] for row in rows], dtype=torch.long)
        phrase = torch.tensor([row[1] for row in rows], dtype=torch.long)
        return location, phrase, scores[location, phrase]

    def _occurs(self, label: str | None, modality: str) -> bool:
        """A checkpoint of several modalities does not look for a polyp in a blood smear."""
        one = len(self.config.modalities) == 1
        return one or label not in self.tree.nodes or modality in self.tree.modalities(label)

    def _most_boxes(self, label: str | None) -> int:
        if label is None or self.tree.is_finding(label):
            return FINDINGS
        return 1 if self.tree.laterality(label) else PLACES

    def _found(self, candidates: RegionSet) -> RegionSet:
        """Candidates over their label's threshold; "left insula" stands for the "insula" around the same place; a
        finding is attached to the place that holds it, also where that place itself is not sure enough to be found."""
        limit = [self.config.thresholds.get(label, 0.3) for label in candidates.labels]
        kept = [k for k, score in enumerate(candidates.scores) if score >= limit[k]]
        regions = self._drop_broader(candidates.select(kept))
        return dataclasses.replace(regions, labels=attach_findings(regions, self.tree, candidates))

    def _drop_broader(self, regions: RegionSet) -> RegionSet:
        boxes = torch.from_numpy(regions.boxes)
        overlap = pairwise_iou(boxes, boxes)
        broader = [self.tree.broader(x) if x in self.tree.nodes else [] for x in regions.labels]
        keep = []
        for i, label in enumerate(regions.labels):
            covered = any(label in broader[j] and overlap[i, j] > 0.6 for j in range(len(regions)))
            same = any(regions.labels[j] == label and containment(boxes[[i]], boxes[[j]]) > 0.8 for j in keep)
            if not covered and not same:
                keep.append(i)
        return regions.select(keep)

    def _most_important(self, regions: RegionSet) -> RegionSet:
        """At most REGIONS: findings before places, then by score."""

        def rank(k: int) -> tuple[bool, float]:
            label = regions.labels[k]
            return (label in self.tree.nodes and not self.tree.is_finding(label), -float(regions.scores[k]))

        return regions.select(sorted(range(len(regions)), key=rank)[:REGIONS])

    @torch.no_grad()
    def tokens_of(self, out: MedGLIPOutput, k: int, regions: RegionSet, box: Letterbox) -> RegionTokens:
        """Region tokens (B = 1) of any boxes on image ``k`` of ``out``, annotations with score 1; then a token for each
        finding that was looked for and is not among them, with its presence probability for a score."""
        boxes = torch.from_numpy(regions.boxes)
        features = self.model.read_regions(_row(out, k), box.apply(boxes)[None]).features[0]
        scores = torch.ones(len(regions)) if regions.scores is None else torch.from_numpy(regions.scores)
        sides = area(boxes).sqrt() * self.config.image_size
        missing = [query for query in regions.queries if self._is_missing(query["label"], regions)]
        labels = [*regions.labels, *(query["label"] for query in missing)]
        presence = torch.tensor([float(query["presence"]) for query in missing])
        n = len(missing)
        return RegionTokens(
            features=torch.cat([features, features.new_zeros(n, features.shape[1])])[None],
            boxes=torch.cat([boxes, boxes.new_zeros(n, 4)])[None],
            scores=torch.cat([scores, presence])[None],
            labels=[labels],
            label_vectors=self.label_vectors(labels)[None],
            levels=torch.cat([(sides > 32).long() + (sides > 80).long(), torch.full((n,), NOT_FOUND_LEVEL)])[None],
            valid=torch.ones(1, len(labels), dtype=torch.bool),
            queries=[regions.queries],
        )

    def _is_missing(self, label: str | None, regions: RegionSet) -> bool:
        if label not in self.tree.nodes or not self.tree.is_finding(label):
            return False
        return not any(x == label or (x in self.tree.nodes and label in self.tree.broader(x)) for x in regions.labels)

    @torch.no_grad()
    def label_vectors(self, labels: Sequence[str]) -> torch.Tensor:
        """(N, D), unit length: what the text side makes of each label."""
        if not labels:
            return torch.zeros(0, self.config.width)
        texts = [self.tree.phrase(x) if x in self.tree.nodes else x for x in labels]
        return F.normalize(self.model.encode_phrases(self.encoder.encode(texts)), dim=-1)

    def label_table(self) -> dict[str, torch.Tensor]:
        """Label → label vector (D) of every label that a region of this checkpoint can have, attached findings too."""
        places = [label for label in self.config.vocabulary if not self.tree.is_finding(label)]
        leaves = {label.rsplit("/", 1)[1] for label in self.config.vocabulary if self.tree.is_finding(label)}
        attached = [f"{place}/{leaf}" for place in places for leaf in leaves if f"{place}/{leaf}" in self.tree.nodes]
        labels = list(dict.fromkeys([*self.config.vocabulary, *attached]))
        return dict(zip(labels, self.label_vectors(labels), strict=True))

    @torch.no_grad()
    def given(self, images: Sequence[np.ndarray], regions: Sequence[RegionSet]) -> list[RegionTokens]:
        """Region tokens of regions from elsewhere: annotations, another program, a radiologist."""
        out, boxes = self._forward(images, [self.config.phrases[0]], None)
        modality, rows = self.modality(None), []
        for k, (one, box) in enumerate(zip(regions, boxes, strict=True)):
            scores = np.ones(len(one), np.float32) if one.scores is None else one.scores
            labels = [self.tree.find(x, modality=modality) or x for x in one.labels]
            one = dataclasses.replace(one, scores=scores, labels=labels)
            one = dataclasses.replace(one, labels=attach_findings(one, self.tree))
            rows.append(self.tokens_of(out, k, self._most_important(one), box))
        return rows


def load_grounder(checkpoint: Path) -> Grounder:
    """Raises CheckpointError."""
    return Grounder(load_checkpoint(checkpoint), load_label_tree(), checkpoint_hash(checkpoint))


def _row(out: MedGLIPOutput, k: int) -> MedGLIPOutput:
    """The maps of image ``k`` alone, as ``read_regions`` reads them."""
    return dataclasses.replace(
        out, detail=out.detail[k : k + 1], coarse=out.coarse[k : k + 1], prompted=out.prompted[k : k + 1]
    )


def _masks(
    out: MedGLIPOutput, k: int, location: torch.Tensor, boxes: torch.Tensor, box: Letterbox
) -> list[dict[str, Any]]:
    """COCO RLE in the user's image, N: prototypes weighed by coefficients, half and over, inside the region's box.

    Only the pixels of the box are looked at: a region is small, and the image may have millions.
    """
    top, left, height, width = box.content
    if not len(location):
        return []
    logits = torch.einsum("np,phw->nhw", out.coefficients[k][location], out.prototypes[k])
    full = F.interpolate(logits[:, None], size=(box.size, box.size), mode="bilinear", align_corners=False)
    full = full[:, :, top : top + height, left : left + width]
    (h, w), masks = box.image_size, []
    for one, (x1, y1, x2, y2) in zip(full, (box.invert(boxes).clamp(0, 1)).tolist(), strict=True):
        rows, columns = _centres_inside(y1, y2, h), _centres_inside(x1, x2, w)
        masks.append(encode_inside(_sampled(one[None], rows, columns, (h, w)), rows.start, columns.start, (h, w)))
    return masks


def _centres_inside(low: float, high: float, side: int) -> range:
    """The pixels whose centres lie strictly between two edges in [0, 1]."""
    return range(math.floor(low * side - 0.5) + 1, math.ceil(high * side - 0.5))


def _sampled(logits: torch.Tensor, rows: range, columns: range, size: tuple[int, int]) -> np.ndarray:
    """(1, 1, h', w') logits of the whole image → bool at those pixels of it at (H, W); as F.interpolate would."""
    if logits.shape[-2:] == size:
        return (logits[0, 0, rows.start : rows.stop, columns.start : columns.stop] > 0).numpy()
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)), bool)
    y, x = ((torch.tensor(r) + 0.5) / side * 2 - 1 for r, side in zip((rows, columns), size, strict=True))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    return (F.grid_sample(logits, grid, padding_mode="border", align_corners=False)[0, 0] > 0).numpy()


def encode_inside(inside: np.ndarray, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """COCO RLE of the (H, W) mask that is `inside` (h, w) bool at (top, left), and zero elsewhere."""
    columns, rows = np.nonzero(inside.T)
    pixels = (columns + left) * size[0] + rows + top  # run lengths go down the columns
    apart = np.diff(pixels) != 1
    starts = pixels[np.r_[True, apart][: len(pixels)]]
    ends = pixels[np.r_[apart, True][: len(pixels)]] + 1
    counts = np.diff(np.r_[0, np.stack([starts, ends], 1).ravel(), size[0] * size[1]])
    counts = counts if counts[-1] else counts[:-1]  # as COCO writes it
    coded = rle.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": coded["counts"].decode()}


def attach_findings(regions: RegionSet, tree: LabelTree, places: RegionSet | None = None) -> list[str]:
    """Labels of ``regions`` in which each bare finding has the path of the place that holds it, among ``places``
    (default: ``regions`` themselves).

    With masks: the place with the largest (share of the finding inside) × (its score). With boxes alone, which overlap:
    the smallest that holds at least half. A finding that already has a place, or that none holds, keeps its label.
    """
    places = regions if places is None else places
    bare = [k for k, x in enumerate(regions.labels) if x in tree.nodes and tree.is_finding(x) and not tree.broader(x)]
    rows = [j for j, x in enumerate(places.labels) if x in tree.nodes and not tree.is_finding(x) and tree.parent(x)]
    labels = list(regions.labels)
    if not bare or not rows:
        return labels
    places = places.select(rows)
    inside = _contained(regions.select(bare), places)
    for k, held in zip(bare, inside, strict=True):
        j = _holder(held, places, tree)
        path = f"{places.labels[j]}/{labels[k].rsplit('/', 1)[1]}"
        labels[k] = path if held[j] >= LEAST_HELD and path in tree.nodes else labels[k]
    return labels


def _holder(held: np.ndarray, places: RegionSet, tree: LabelTree) -> int:
    """Index of the place that a finding hangs on; ``held`` (P,) is the share of it in each."""
    if places.masks is None:
        sizes = area(torch.from_numpy(places.boxes)).numpy()
        return int(np.where(held >= 0.5, sizes, np.inf).argmin()) if (held >= 0.5).any() else int(held.argmax())
    scores = np.ones(len(places)) if places.scores is None else places.scores
    best = int((held * scores).argmax())
    # "insula" never scores below "left insula"; the side is believed where it scores nearly as much.
    sided = [
        j for j, x in enumerate(places.labels) if places.labels[best] in tree.broader(x) and held[j] > 0.5 * held[best]
    ]
    sided = [j for j in sided if scores[j] > 0.5 * scores[best]]
    return max(sided, key=lambda j: held[j] * scores[j], default=best)


def _contained(inner: RegionSet, outer: RegionSet) -> np.ndarray:
    """(I, O) share of each inner region that lies in each outer one: by masks where both have them, else by boxes."""
    if inner.masks is None or outer.masks is None:
        return containment(torch.from_numpy(inner.boxes), torch.from_numpy(outer.boxes)).numpy()
    # COCO's IoU with a "crowd" is the intersection over the first area.
    return np.asarray(rle.iou(inner.masks, outer.masks, [True] * len(outer)), np.float32)
