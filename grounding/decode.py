"""What a forward pass of MedGLIP says: candidates, which of them count as found, and how likely each phrase is there.

Dimension key: V phrases, L locations, N candidates, M modalities.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as rle

from grounding.attach import attach_findings, drop_broader
from grounding.boxes import nms
from grounding.labels import LabelTree
from grounding.masks import View, decode_masks
from grounding.model import MODALITIES, MedGLIP, MedGLIPConfig, MedGLIPOutput
from grounding.phrases import Sought
from grounding.position import extreme
from grounding.types import RegionSet

FLOOR = 0.05  # candidates below this score are nothing
NEAREST = 40  # locations a phrase that compete, where it has few boxes
LOCATIONS_A_BOX = 8  # and where it has many
PLACES, FINDINGS = 2, 6  # boxes a phrase at most; a place with a side occurs once
READ_AT_ONCE = 4096  # boxes whose features are read at a time


@dataclass
class Candidates:
    """N candidates of one view, phrase by phrase: ``location`` and ``phrase`` (N,) int64, ``scores`` (N,) in [0, 1],
    ``boxes`` (N, 4) of the network input; ``share`` (V,): best score at the place that a phrase asks for, over the best
    anywhere."""

    location: torch.Tensor
    phrase: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    share: torch.Tensor


class Decoder:
    """Rules between a model's maps and RegionSets; holds no state of its own."""

    def __init__(self, model: MedGLIP, tree: LabelTree):
        self.model, self.tree = model, tree

    @property
    def config(self) -> MedGLIPConfig:
        return self.model.config

    def modality(self, out: MedGLIPOutput, k: int, given: str | None) -> torch.Tensor:
        """(M,) probabilities: the one that the caller knows, else what the image looks like."""
        if given is None:
            return out.modality[k].softmax(-1)
        return torch.eye(len(MODALITIES))[MODALITIES.index(given)]

    def candidates(
        self, out: MedGLIPOutput, k: int, phrases: Sequence[Sought], view: View, modality: torch.Tensor
    ) -> Candidates:
        """Of image ``k``: locations after non-maximum suppression within each phrase, each box read again."""
        location, phrase, scores, share = self._ranked(out, k, phrases, view, modality)
        boxes = out.boxes[k][location]
        if len(boxes):
            read = [self.model.read_regions(row_of(out, k), some[None]) for some in boxes.split(READ_AT_ONCE)]
            logits = [
                r.logits[0, torch.arange(len(p)), p] for r, p in zip(read, phrase.split(READ_AT_ONCE), strict=True)
            ]
            scores = (scores * torch.cat(logits).sigmoid().sqrt()).clamp(0, 1)
            boxes = torch.cat([r.boxes[0] for r in read])
        return Candidates(location, phrase, scores, boxes, share)

    def _ranked(
        self, out: MedGLIPOutput, k: int, phrases: Sequence[Sought], view: View, modality: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = (out.logits[k].sigmoid() * out.quality[k].sigmoid()[:, None]).sqrt()
        scores, share = self._at_their_places(scores, out.boxes[k], phrases, view)
        limits = [most_boxes(sought.label, self.config, self.tree) for sought in phrases]
        compete = [NEAREST if limit <= FINDINGS else LOCATIONS_A_BOX * limit for limit in limits]
        best = scores.topk(min(max(compete), len(scores)), dim=0).indices
        rows: list[tuple[int, int]] = []
        for v, sought in enumerate(phrases):
            if not self._occurs(sought.label, modality):
                continue
            nearest = best[: compete[v], v]
            ranked = nearest[scores[nearest, v] > FLOOR]
            limit = limits[v]
            kept = (
                [0] * min(1, len(ranked)) if limit == 1 else nms(out.boxes[k][ranked], scores[ranked, v], 0.5)[:limit]
            )
            rows += [(int(ranked[i]), v) for i in kept]
        location = torch.tensor([row[0] for row in rows], dtype=torch.long)
        phrase = torch.tensor([row[1] for row in rows], dtype=torch.long)
        return location, phrase, scores[location, phrase], share

    @staticmethod
    def _at_their_places(
        scores: torch.Tensor, boxes: torch.Tensor, phrases: Sequence[Sought], view: View
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (L, V) that are 0 outside the place that a phrase asks for, before candidates compete for being among
        the few of a phrase; and (V,) what is left of the best score."""
        share = torch.ones(scores.shape[1])
        if all(sought.position is None for sought in phrases):
            return scores, share
        inside, scores = view.invert(boxes).numpy(), scores.clone()
        for v, sought in enumerate(phrases):
            if sought.position is not None:
                best = scores[:, v].max()
                scores[:, v] *= torch.from_numpy(sought.position.inside(inside))
                share[v] = scores[:, v].max() / best
        return scores, share

    def _occurs(self, label: str | None, modality: torch.Tensor) -> bool:
        """A checkpoint of several modalities does not look for a polyp in a blood smear."""
        one = len(self.config.modalities) == 1
        likeliest = MODALITIES[int(modality.argmax())]
        return one or label not in self.tree.nodes or likeliest in self.tree.modalities(label)

    def regions(
        self,
        out: MedGLIPOutput,
        k: int,
        phrases: Sequence[Sought],
        rows: Candidates,
        view: View,
        queries: list[dict],
        bare: bool = False,
    ) -> RegionSet:
        """Candidates of image ``k`` as a RegionSet of the user's image, best first. ``texts`` say which phrase found a
        region, where one of the phrases asks for a place; and where they are to be ``bare``, that is without masks."""
        labels = [phrases[v].name for v in rows.phrase.tolist()]
        placed = any(sought.position for sought in phrases)
        texts = [phrases[v].text for v in rows.phrase.tolist()] if placed or bare else None
        masks = None
        if out.coefficients is not None and out.prototypes is not None and not bare:
            masks = decode_masks(out.coefficients[k][rows.location], out.prototypes[k], rows.boxes, view)
        boxes, scores = view.invert(rows.boxes).numpy(), rows.scores.numpy()
        order = rows.scores.argsort(descending=True, stable=True).tolist()
        return RegionSet(boxes, labels, view.image_size, scores, masks, queries, texts=texts).select(order)

    def queries(
        self, logits: torch.Tensor, phrases: Sequence[Sought], share: torch.Tensor, modality: torch.Tensor
    ) -> list[dict]:
        """What was looked for, with the calibrated probability that it is there; logits (V,)."""
        presence = presence_of(logits, [sought.label for sought in phrases], modality, self.config, self.tree) * share
        return [
            {"phrase": sought.text, "label": sought.label, "presence": round(float(p), 4)}
            for sought, p in zip(phrases, presence, strict=True)
        ]

    def found(self, candidates: RegionSet, phrases: Sequence[Sought]) -> RegionSet:
        """Candidates over their label's threshold; "left insula" stands for the "insula" around the same place; a
        finding is attached to the place that holds it, also where that place itself is not sure enough to be found."""
        limit = [self.config.thresholds.get(label, 0.3) for label in candidates.labels]
        kept = [k for k, score in enumerate(candidates.scores) if score >= limit[k]]
        apart = frozenset(sought.text for sought in phrases if sought.position)
        regions = drop_broader(candidates.select(kept), self.tree, apart)
        return dataclasses.replace(regions, labels=attach_findings(regions, self.tree, candidates))


def most_boxes(label: str | None, config: MedGLIPConfig, tree: LabelTree) -> int:
    """How many boxes a phrase may have: as many as in the training data, else by what it is."""
    if label in config.most_boxes:
        return max(1, config.most_boxes[label])
    if label not in tree.nodes or tree.is_finding(label):
        return FINDINGS
    return 1 if tree.laterality(label) else PLACES


def presence_of(
    logits: torch.Tensor, labels: Sequence[str | None], modality: torch.Tensor, config: MedGLIPConfig, tree: LabelTree
) -> torch.Tensor:
    """(V,) calibrated probabilities from presence logits (V,).

    Where a checkpoint has several modalities: each label's own offset, and times the probability (``modality``, (M,))
    that the image is of a kind in which the label occurs, which the presence head learned little of: what a source does
    not label is no negative to it.
    """
    slope, offset = config.presence
    if len(config.modalities) == 1:
        return (logits * slope + offset).sigmoid()
    own = torch.tensor([config.presence_offsets.get(label or "", 0.0) for label in labels])
    occurs = torch.tensor(
        [[label not in tree.nodes or m in tree.modalities(label) for m in MODALITIES] for label in labels]
    )
    return (logits * slope + offset + own).sigmoid() * (occurs.float() @ modality).clamp(0, 1)


def only_extremes(regions: RegionSet, phrases: Sequence[Sought]) -> RegionSet:
    """Of what each phrase with a superlative found, the one that it means; of the others, all. By area of the masks
    where every region has one."""
    if regions.texts is None:
        return regions
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
    masks = regions.full_masks
    areas = sides.prod(1) if masks is None or not masks else np.asarray(rle.area(masks), float)
    kept = set(range(len(regions)))
    for sought in phrases:
        rows = [k for k, text in enumerate(regions.texts) if text == sought.text]
        if rows and sought.position and sought.position.superlative:
            kept -= set(rows) - {rows[extreme(sought.position.superlative, regions.boxes[rows], areas[rows])]}
    return regions.select(sorted(kept))


def as_found(candidates: RegionSet, found: RegionSet, phrases: Sequence[Sought]) -> RegionSet:
    """Candidates without those that a phrase with a superlative does not mean: of its own, the one that was found
    stays, or the best where none was."""
    extremes = {sought.text for sought in phrases if sought.position and sought.position.superlative}
    if not extremes:
        return candidates
    meant = {text: box.tolist() for text, box in zip(found.texts or [], found.boxes, strict=True) if text in extremes}
    kept, seen = [], set()
    for k, text in enumerate(candidates.texts or []):
        if text not in extremes:
            kept.append(k)
        elif text not in seen and meant.get(text, candidates.boxes[k].tolist()) == candidates.boxes[k].tolist():
            kept.append(k)
            seen.add(text)
    return candidates.select(kept)


def joined(parts: Sequence[RegionSet]) -> RegionSet:
    """Candidates of one image for several lists of phrases, best first, with all queries."""
    if len(parts) == 1:
        return parts[0]
    every = concatenated(parts)
    order = np.argsort(-every.scores, kind="stable").tolist()
    return dataclasses.replace(every.select(order), queries=[query for part in parts for query in part.queries])


def concatenated(parts: Sequence[RegionSet]) -> RegionSet:
    """Regions of one image, with the queries of the first part."""

    def column(name: str) -> list | None:
        lists = [getattr(part, name) for part in parts]
        if all(x is None for x in lists):
            return None
        return [item for x, part in zip(lists, parts, strict=True) for item in x or [None] * len(part)]

    return dataclasses.replace(
        parts[0],
        boxes=np.concatenate([part.boxes for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        labels=[label for part in parts for label in part.labels],
        masks=column("masks"),
        texts=column("texts"),
    )


def row_of(out: MedGLIPOutput, k: int) -> MedGLIPOutput:
    """The maps of image ``k`` alone, as ``read_regions`` reads them."""
    return dataclasses.replace(
        out, detail=out.detail[k : k + 1], coarse=out.coarse[k : k + 1], prompted=out.prompted[k : k + 1]
    )
