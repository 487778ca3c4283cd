"""Samples of a region store to training batches: which phrase names which region, and which absences are known.

Dimension key: B images, N regions (padded), V phrases, S input size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

from grounding.images import Letterbox, read_image, to_pixel_values
from grounding.labels import LabelTree
from grounding.losses import Targets
from grounding.model import MODALITIES
from grounding.store import Store
from grounding.types import GroundingSample

MASK_STRIDE = 4
VISIBLE = ("brightness", "margin", "shape", "texture")  # attributes that become phrases; others say how, when or who


@dataclass(frozen=True)
class PhraseTarget:
    """A phrase to train on: ``names`` are ways to say it; it names a region whose label is ``label`` or narrower, and
    which has the ``attribute`` (name, value) if there is one."""

    names: tuple[str, ...]
    label: str
    attribute: tuple[str, str] | None = None


def phrase_targets(store: Store, tree: LabelTree) -> list[PhraseTarget]:
    """Every label of the store's regions with its broader ones, free phrases, and how its findings look."""
    used, attributes = store.labels_with_attributes()
    labels = {x for label in used for x in (label, *broader(label, tree))}
    targets = [
        PhraseTarget((tree.phrase(label), *tree.synonyms(label)), label) for label in tree.ids if label in labels
    ]
    targets += [PhraseTarget((label,), label) for label in sorted(labels - tree.nodes.keys())]
    attributes = {(_root_finding(x, tree), name, value) for x, name, value in attributes if name in VISIBLE}
    for label, name, value in sorted(attributes):
        leaf = label.rsplit("/", 1)[1].replace("_", " ")
        targets.append(PhraseTarget((f"{value} {leaf}",), label, (name, value)))
    return targets


def broader(label: str, tree: LabelTree) -> list[str]:
    """`LabelTree.broader`; of a free phrase, nothing."""
    return tree.broader(label) if label in tree.nodes else []


def _root_finding(label: str, tree: LabelTree) -> str:
    """``brain/frontal_lobe/lesion`` → ``brain/lesion``."""
    return [label, *broader(label, tree)][-1]


def vocabulary(targets: Sequence[PhraseTarget], tree: LabelTree) -> tuple[str, ...]:
    """The label ids looked for when nobody asks: places, and findings as such; geometry says where a finding is."""
    labels = [target.label for target in targets if target.attribute is None]
    return tuple(x for x in labels if x not in tree.nodes or not tree.is_finding(x) or _root_finding(x, tree) == x)


def narrower_pairs(targets: Sequence[PhraseTarget], tree: LabelTree) -> torch.Tensor:
    """(pairs, 2) indices of child and parent phrases: "left insula" is an "insula", "bright lesion" a "lesion"."""
    plain = {target.label: k for k, target in enumerate(targets) if target.attribute is None}
    pairs = []
    for k, target in enumerate(targets):
        wider = [target.label] if target.attribute else broader(target.label, tree)[:1]
        pairs += [(k, plain[label]) for label in wider if label in plain]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def sibling_groups(targets: Sequence[PhraseTarget], tree: LabelTree) -> list[list[int]]:
    """Phrases of which one region has at most one: the values of an attribute, the sides of a place or finding."""
    groups: dict[tuple, list[int]] = {}
    for k, target in enumerate(targets):
        if target.attribute:
            groups.setdefault((target.label, target.attribute[0]), []).append(k)
        elif (wider := broader(target.label, tree)) and tree.laterality(target.label):
            groups.setdefault((wider[0],), []).append(k)
    return [group for group in groups.values() if len(group) > 1]


def _names(label: str, values: dict, target: PhraseTarget, tree: LabelTree) -> bool:
    fits = target.label == label or target.label in broader(label, tree)
    return fits and (target.attribute is None or values.get(target.attribute[0]) == target.attribute[1])


def resized_mask(mask: dict, letterbox: Letterbox, size: int) -> np.ndarray:
    """COCO RLE of the user's image → (size, size) float32 coverage in the letterboxed frame."""
    top, left, height, width = letterbox.content
    canvas = np.zeros((letterbox.size, letterbox.size), np.float32)
    picture = Image.fromarray(rle.decode(mask).astype(np.float32))
    canvas[top : top + height, left : left + width] = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    step = letterbox.size // size
    return canvas.reshape(size, step, size, step).mean((1, 3))


class Collator:
    """A list of GroundingSamples → (pixel_values (B, 3, S, S), phrase texts, Targets).

    Each phrase is said in one of its ways, drawn anew for every batch, so that synonyms are learned.
    """

    def __init__(self, targets: Sequence[PhraseTarget], tree: LabelTree, image_size: int, seed: int):
        self.targets, self.tree, self.image_size = targets, tree, image_size
        self.narrower = narrower_pairs(targets, tree)
        self.siblings = sibling_groups(targets, tree)
        self.seed = seed
        self._rows: dict[tuple, list[bool]] = {}

    def _positive(self, label: str, values: dict[str, str]) -> list[bool]:
        key = (label, *sorted(values.items()))
        if key not in self._rows:
            self._rows[key] = [_names(label, values, target, self.tree) for target in self.targets]
        return self._rows[key]

    def __call__(self, samples: Sequence[GroundingSample], step: int):
        random_ = random.Random(f"{self.seed}/{step}")
        texts = [t.names[0] if random_.random() < 0.6 else random_.choice(t.names) for t in self.targets]
        pixels, rows = zip(*(self._image(sample) for sample in samples), strict=True)
        n = max(1, *(len(row["boxes"]) for row in rows))
        padded = {key: torch.stack([_pad(row[key], n) for row in rows]) for key in rows[0]}
        generator = torch.Generator().manual_seed(random_.getrandbits(40))
        labelled = [set(sample.labelled) for sample in samples]  # only there is an absence a negative
        known = torch.tensor([[target.label in labels for target in self.targets] for labels in labelled])
        modality = torch.tensor([MODALITIES.index(sample.modality) for sample in samples])
        targets = Targets(
            **padded,
            jittered=_jitter(padded["boxes"], generator),
            known=known,
            modality=modality,
            narrower=self.narrower,
            siblings=self.siblings,
        )
        return torch.stack(pixels), texts, targets

    def _image(self, sample: GroundingSample):
        pixels, letterbox = to_pixel_values(read_image(sample.image).pixels, self.image_size)
        regions, size = sample.regions, self.image_size // MASK_STRIDE
        values = regions.attributes or [{}] * len(regions)
        positive = [self._positive(label, v) for label, v in zip(regions.labels, values, strict=True)]
        masks = [resized_mask(mask, letterbox, size) for mask in regions.masks or []]
        n = len(regions)
        return pixels, {
            "boxes": letterbox.apply(torch.from_numpy(regions.boxes)),
            "valid": torch.ones(n, dtype=torch.bool),
            "positive": torch.tensor(positive, dtype=torch.bool).reshape(n, len(self.targets)),
            "masks": torch.from_numpy(np.stack(masks)) if masks else torch.zeros(n, size, size),
            "has_mask": torch.full((n,), bool(masks)),
        }


def _pad(rows: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


def _jitter(boxes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Corners moved by up to 12 % of the side, so that the region encoder meets boxes like a detector's."""
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    return (boxes + (torch.rand(boxes.shape, generator=generator) - 0.5) * 0.24 * sides).clamp(0, 1)
