"""A trained MedGLIP at work: images and phrases → what was found, and region tokens of any boxes.

Dimension key: B images, V phrases, L locations, N regions, D label-vector width, R region-feature width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from grounding.attach import attach_findings
from grounding.boxes import area
from grounding.decode import Decoder, as_found, joined, most_boxes, only_extremes, row_of
from grounding.images import ImageError, Letterbox, MedicalImage, to_pixel_values
from grounding.labels import LabelTree, load_label_tree
from grounding.masks import View
from grounding.model import (
    MODALITIES,
    MedGLIP,
    MedGLIPConfig,
    MedGLIPOutput,
    checkpoint_hash,
    load_checkpoint,
    location_grid,
)
from grounding.phrases import Phrasebook, PhraseError, Sought, check_any
from grounding.text import PhraseBatch, PhraseEncoder
from grounding.tiles import merge, whole_in, windows
from grounding.types import NOT_FOUND_LEVEL, RegionSet, RegionTokens

REGIONS = 24  # regions an image that become tokens
LOGITS = 2**26  # region–phrase scores that are held at a time, 256 MB; beyond, images and phrases go in parts
TILES_AT_ONCE = 4
LISTS = 8  # phrase lists whose vectors are kept


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
        self.book = Phrasebook(model.config, tree, self.encoder)
        self.decoder = Decoder(model, tree)
        self._batches: dict[tuple[str, ...], PhraseBatch] = {}

    @property
    def config(self) -> MedGLIPConfig:
        return self.model.config

    def modality(self, given: str | None) -> str | None:
        """``given``, else the one modality that the checkpoint was trained on; None where it has several."""
        return given or (self.config.modalities[0] if len(self.config.modalities) == 1 else None)

    def resolve(self, phrases: Sequence[str], modality: str | None = None) -> list[tuple[str, str | None]]:
        """Phrases → (text, label id or None), negation taken out. Raises PhraseError for an unknown one, and for an
        empty list. See ``Phrasebook.resolve`` for likeness, and ``grounding.position`` for places in the image."""
        check_any(phrases)
        return [self.book.resolve(phrase, self.modality(modality)) for phrase in phrases]

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
        return self.book.vocabulary()

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[np.ndarray],
        phrases: Sequence[tuple[str, str | None]] | None = None,
        modality: str | None = None,
        tiles: int = 1,
    ) -> list[Detection]:
        """uint8 images (H, W) or (H, W, 3) of any size → a Detection each. ``phrases`` from ``resolve`` are looked for
        beside the vocabulary, since a finding hangs on a place that nobody asked for; the answer holds them alone.

        ``tiles`` > 1: the image is looked at once more in overlapping tiles, that many along its longer side, for what
        is too small in the whole. Presence and region features still come from the whole image: a probability is
        calibrated for that, and a token should know what is around its region.

        Raises PhraseError for an empty list of phrases or an unknown modality, ImageError for pixels that are not
        uint8.
        """
        self.check_modality(modality)
        for k, image in enumerate(images):
            check_pixels(image, k)
        asked = None if phrases is None else [self.book.sought(text, label) for text, label in phrases]
        if asked is not None:
            check_any(asked)
        every = self._every(asked or [])
        at_once = max(1, LOGITS // (self._locations * len(every)))
        detections = [
            detection
            for start in range(0, len(images), at_once)
            for detection in self._detect(images[start : start + at_once], every, modality, tiles)
        ]
        return [self._answers(detection, asked) for detection in detections] if asked else detections

    def _every(self, asked: list[Sought]) -> list[Sought]:
        """What is asked, then the vocabulary: all but the labels that were asked for without a place."""
        labels = {sought.label for sought in asked if sought.position is None}
        return [*asked, *(self.book.sought(*row) for row in self.vocabulary() if row[1] not in labels)]

    @property
    def _locations(self) -> int:
        return len(location_grid(self.config.image_size)[0])

    def _detect(
        self, images: Sequence[np.ndarray], every: list[Sought], modality: str | None, tiles: int
    ) -> list[Detection]:
        out, views, sets = self._candidates(images, every, None if modality is None else [modality] * len(images))
        detections = []
        for k, (image, view, candidates) in enumerate(zip(images, views, sets, strict=True)):
            if cuts := windows(view.image_size, tiles, self.config.image_size):
                likeliest = modality or MODALITIES[int(out.modality[k].argmax())]
                candidates = self._with_tiles(image, candidates, every, likeliest, cuts)
            found = self.decoder.found(candidates, every)
            apart = {sought.text for sought in every if sought.position}
            plain = [j for j in range(len(found)) if found.texts is None or found.texts[j] not in apart]
            tokens = self.tokens_of(out, k, self._most_important(found.select(plain) if apart else found), view.box)
            detections.append(Detection(candidates, found, tokens))
        return detections

    def _with_tiles(
        self, image: np.ndarray, whole: RegionSet, every: list[Sought], modality: str, cuts: list[tuple]
    ) -> RegionSet:
        """Candidates of the whole image and of its tiles. What there is one of, such as a left lung, is not looked for
        in tiles: half of a chest has one lung, too."""
        passes = [whole]
        for start in range(0, len(cuts), TILES_AT_ONCE):
            some = cuts[start : start + TILES_AT_ONCE]
            parts = [image[top : top + h, left : left + w] for top, left, h, w in some]
            weights = [modality] * len(parts)
            _, _, sets = self._candidates(parts, every, weights, [(whole.image_size, window) for window in some])
            passes += [whole_in(regions, window) for regions, window in zip(sets, some, strict=True)]
        single = {sought.name for sought in every if most_boxes(sought.label, self.config, self.tree) == 1}
        passes[1:] = [
            regions.select([k for k, x in enumerate(regions.labels) if x not in single]) for regions in passes[1:]
        ]
        known = self.config.most_boxes

        def limit(label: str) -> int:
            most = most_boxes(label, self.config, self.tree)
            return most if label in known or most == 1 else most * len(passes)

        return merge(passes, limit)

    def _candidates(
        self,
        images: Sequence[np.ndarray],
        every: list[Sought],
        modalities: list[str] | None,
        frames: list[tuple] | None = None,
        bare: bool = False,
    ) -> tuple[MedGLIPOutput, list[View], list[RegionSet]]:
        """The last of the passes (maps are the same in each), how each image lies in the input, and its candidates.
        ``frames``: of tiles, (size of the image, window). ``bare``: with the phrase that found each, without masks."""
        size = max(1, LOGITS // (self._locations * len(images)))
        if self.config.fusion == "two_way":
            size = len(every)  # there phrases see each other: another list is another question
        rows: list[list] = [[] for _ in images]
        for start in range(0, len(every), size):
            some = every[start : start + size]
            out, boxes = self._forward(images, [sought.thing for sought in some], modalities)
            views = [View(box, box.image_size) for box in boxes]
            if frames is not None:
                views = [View(box, *frame) for box, frame in zip(boxes, frames, strict=True)]
            for k, view in enumerate(views):
                kind = self.decoder.modality(out, k, None if modalities is None else modalities[k])
                found = self.decoder.candidates(out, k, some, view, kind)
                queries = self.decoder.queries(out.presence[k], some, found.share, kind)
                rows[k].append(self.decoder.regions(out, k, some, found, view, queries, bare))
        return out, views, [joined(parts) for parts in rows]

    def _answers(self, detection: Detection, asked: Sequence[Sought]) -> Detection:
        """What answers one of the asked phrases: its own label, or a narrower one ("left insula" for "insula"); for a
        phrase with a place, what it found itself."""
        wanted = {sought.name for sought in asked if sought.position is None}
        placed = {sought.text for sought in asked if sought.position}

        def restricted(regions: RegionSet) -> RegionSet:
            wider = [{x, *(self.tree.broader(x) if x in self.tree.nodes else [])} for x in regions.labels]
            own = [text in placed for text in regions.texts or [""] * len(regions)]
            rows = regions.select([k for k, names in enumerate(wider) if own[k] or names & wanted])
            return dataclasses.replace(rows, queries=regions.queries[: len(asked)])

        found = only_extremes(restricted(detection.found), asked)
        candidates = as_found(restricted(detection.candidates), found, asked)
        return dataclasses.replace(detection, candidates=candidates, found=found)

    def _only(self, detection: Detection, asked: Sequence[tuple[str, str | None]]) -> Detection:
        """The same for detectors that know no places in the image."""
        return self._answers(detection, [Sought(text, label, text) for text, label in asked])

    @torch.no_grad()
    def top_boxes(self, images: Sequence[np.ndarray], phrases: Sequence[tuple[str, str | None]]) -> list[RegionSet]:
        """The best candidate of each phrase, whatever else was asked: one RegionSet an image, without masks, with
        ``texts`` = the phrases; phrases without any candidate have no region. ``queries`` has all, in order."""
        every = [self.book.sought(text, label) for text, label in phrases]
        check_any(every)
        tops = []
        for regions in self._candidates(images, every, None, bare=True)[2]:
            first: dict[tuple[str, str], int] = {}
            for k, row in enumerate(zip(regions.labels, regions.texts or [], strict=True)):
                first.setdefault(row, k)
            tops.append(regions.select(list(first.values())))
        return tops

    def _forward(self, images: Sequence[np.ndarray], texts: Sequence[str], modalities: Sequence[str] | None):
        pixels, boxes = zip(*(to_pixel_values(image, self.config.image_size) for image in images), strict=True)
        weights = None
        if modalities is not None:
            weights = torch.zeros(len(images), len(MODALITIES))
            weights[range(len(images)), [MODALITIES.index(modality) for modality in modalities]] = 1
        return self.model(torch.stack(pixels), self._phrase_batch(texts), weights), boxes

    def _phrase_batch(self, texts: Sequence[str]) -> PhraseBatch:
        """The vectors of a phrase list; of the last few lists they are at hand, since most images get the same."""
        key = tuple(texts)
        if key not in self._batches:
            while len(self._batches) >= LISTS:
                self._batches.pop(next(iter(self._batches)))
            self._batches[key] = self.encoder.encode(key)
        return self._batches[key]

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
        features = self.model.read_regions(row_of(out, k), box.apply(boxes)[None]).features[0]
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
        texts = [self.book.phrase(x) if x in self.tree.nodes or x in self.config.vocabulary else x for x in labels]
        return F.normalize(self.model.encode_phrases(self.encoder.encode(texts)), dim=-1)

    def label_table(self) -> dict[str, torch.Tensor]:
        """Label → label vector (D) of every label that a region of this checkpoint can have, attached findings too."""
        known = [label for label in self.config.vocabulary if label in self.tree.nodes]
        places = [label for label in known if not self.tree.is_finding(label)]
        leaves = {label.rsplit("/", 1)[1] for label in known if self.tree.is_finding(label)}
        attached = [f"{place}/{leaf}" for place in places for leaf in leaves if f"{place}/{leaf}" in self.tree.nodes]
        labels = list(dict.fromkeys([*self.config.vocabulary, *attached]))
        return dict(zip(labels, self.label_vectors(labels), strict=True))

    @torch.no_grad()
    def given(self, images: Sequence[np.ndarray], regions: Sequence[RegionSet]) -> list[RegionTokens]:
        """Region tokens of regions from elsewhere: annotations, another program, a radiologist."""
        for k, image in enumerate(images):
            check_pixels(image, k)
        out, boxes = self._forward(images, [self.config.phrases[0]], None)
        modality, rows = self.modality(None), []
        for k, (one, box) in enumerate(zip(regions, boxes, strict=True)):
            scores = np.ones(len(one), np.float32) if one.scores is None else one.scores
            labels = [self.tree.find(x, modality=modality) or x for x in one.labels]
            one = dataclasses.replace(one, scores=scores, labels=labels)
            one = dataclasses.replace(one, labels=attach_findings(one, self.tree))
            rows.append(self.tokens_of(out, k, self._most_important(one), box))
        return rows


def check_pixels(pixels: np.ndarray, number: int) -> None:
    """Raises ImageError for what is not an 8-bit image (H, W) or (H, W, 3); ``number`` names it."""
    shape = pixels.shape
    if pixels.dtype == np.uint8 and pixels.size and (pixels.ndim == 2 or (pixels.ndim == 3 and shape[2] == 3)):
        return
    missing = int(np.isnan(pixels).sum()) if pixels.dtype.kind == "f" else 0
    nan = f", {missing} of them not a number" if missing else ""
    raise ImageError(
        f"image {number}: {pixels.dtype} pixels of shape {shape}{nan}; give uint8 (H, W) or (H, W, 3): read the file "
        "with read_image, or map its values with to_uint8(values, *window_limits(values))"
    )


def load_grounder(checkpoint: Path) -> Grounder:
    """A MedGLIP, or a Hugging Face zero-shot detector with the same methods. Raises CheckpointError."""
    from grounding.zero_shot import is_zero_shot, load_zero_shot

    if is_zero_shot(checkpoint):
        return load_zero_shot(checkpoint)
    grounder = Grounder(load_checkpoint(checkpoint), load_label_tree(), checkpoint_hash(checkpoint))
    grounder.book.warn_of_foreign_labels(str(checkpoint))
    return grounder
