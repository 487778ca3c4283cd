"""Samples of region stores to training batches: which phrase names which region, and which absences are known.

Dimension key: B images, N regions (padded), V phrases, S input size.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from torch.utils.data import Dataset

from grounding.augment import augment, tile
from grounding.decode import FINDINGS, PLACES
from grounding.images import Letterbox, read_image, to_pixel_values
from grounding.labels import LabelTree
from grounding.losses import Targets
from grounding.mixture import Mixture
from grounding.model import MODALITIES
from grounding.store import Block, Store, StoreError
from grounding.types import GroundingSample

MASK_STRIDE = 4
SMALL = 12  # input pixels: of findings that are mostly smaller, the head's finest level (stride 8) sees little
VISIBLE = ("brightness", "margin", "shape", "texture")  # attributes that become phrases; others say how, when or who


class Stores:
    """Several region stores, one after another."""

    def __init__(self, stores: Sequence[Store]):
        self.stores = list(stores)

    def __len__(self) -> int:
        return sum(map(len, self.stores))

    def __getitem__(self, index: int) -> GroundingSample:
        for store in self.stores:
            if index < len(store):
                return store[index]
            index -= len(store)
        raise IndexError(f"image {index} beyond the last")

    def labels_with_attributes(self) -> tuple[set[str], set[tuple[str, str, str]]]:
        """`Store.labels_with_attributes` of all."""
        labels, attributes = zip(*(store.labels_with_attributes() for store in self.stores), strict=True)
        return set().union(*labels), set().union(*attributes)


@dataclass(frozen=True)
class PhraseTarget:
    """A phrase to train on: ``names`` are ways to say it; it names a region whose label is ``label`` or narrower, and
    which has the ``attribute`` (name, value) if there is one."""

    names: tuple[str, ...]
    label: str
    attribute: tuple[str, str] | None = None


def phrase_targets(store: Store | Stores, tree: LabelTree) -> list[PhraseTarget]:
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


def _names(label: str, values: dict, target: PhraseTarget, tree: LabelTree, hierarchy: bool) -> bool:
    wider = broader(label, tree) if hierarchy or target.attribute else []
    fits = target.label == label or target.label in wider
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

    Each phrase is said in one of its ways, drawn anew for every batch, so that synonyms are learned. S is
    ``image_size``, or one of ``scales`` drawn by seed and step, the same on every rank. ``augmented``: see
    `grounding.augment`. ``tiles`` > 1: every other time, an image whose findings are mostly smaller than SMALL is
    shown in a window of the size that prediction with ``tiles`` cuts. Without ``hierarchy`` a lesion of the left insula
    is no lesion; without ``partial_negatives`` every phrase that names nothing is taken to be absent, whether its
    source labels it or not.
    """

    def __init__(
        self,
        targets: Sequence[PhraseTarget],
        tree: LabelTree,
        image_size: int,
        seed: int,
        *,
        scales: Sequence[int] = (),
        augmented: bool = False,
        tiles: int = 1,
        hierarchy: bool = True,
        partial_negatives: bool = True,
    ):
        self.targets, self.tree, self.image_size = targets, tree, image_size
        self.scales, self.augmented, self.tiles = tuple(scales), augmented, tiles
        self.hierarchy, self.partial_negatives = hierarchy, partial_negatives
        self.labels = {target.label for target in targets}
        self.narrower = narrower_pairs(targets, tree)
        self.siblings = sibling_groups(targets, tree)
        self.seed = seed
        self._rows: dict[tuple, list[bool]] = {}

    def _positive(self, label: str, values: dict[str, str]) -> list[bool]:
        key = (label, *sorted(values.items()))
        if key not in self._rows:
            self._rows[key] = [_names(label, values, target, self.tree, self.hierarchy) for target in self.targets]
        return self._rows[key]

    def size(self, step: int) -> int:
        """S of a step."""
        return random.Random(f"{self.seed}/{step}/size").choice(self.scales) if self.scales else self.image_size

    def __call__(self, samples: Sequence[GroundingSample], step: int):
        random_ = random.Random(f"{self.seed}/{step}")
        texts = [t.names[0] if random_.random() < 0.6 else random_.choice(t.names) for t in self.targets]
        pixels, rows, labelled = zip(*(self._image(sample, step) for sample in samples), strict=True)
        n = max(1, *(len(row["boxes"]) for row in rows))
        padded = {key: torch.stack([_pad(row[key], n) for row in rows]) for key in rows[0]}
        generator = torch.Generator().manual_seed(random_.getrandbits(40))
        # Only where its source labels a phrase is its absence a negative.
        sure = [[target.label in labels for target in self.targets] for labels in labelled]
        known = torch.tensor(sure) if self.partial_negatives else torch.ones(len(samples), len(self.targets)).bool()
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

    def _image(self, sample: GroundingSample, step: int):
        picture = read_image(sample.image).pixels
        drawn = random.Random(f"{self.seed}/{step}/{sample.image_id}")
        if self.tiles > 1 and self._is_fine(sample) and drawn.random() < 0.5:
            sample, picture = tile(sample, picture, drawn, self.tree, self.tiles)
        if self.augmented:
            sample, picture = augment(sample, picture, drawn, self.tree, self.labels)
        pixels, letterbox = to_pixel_values(picture, self.size(step))
        regions, size = sample.regions, letterbox.size // MASK_STRIDE
        values = regions.attributes or [{}] * len(regions)
        positive = [self._positive(label, v) for label, v in zip(regions.labels, values, strict=True)]
        masks = [resized_mask(mask, letterbox, size) for mask in regions.masks or []]
        n = len(regions)
        row = {
            "boxes": letterbox.apply(torch.from_numpy(regions.boxes)),
            "valid": torch.ones(n, dtype=torch.bool),
            "positive": torch.tensor(positive, dtype=torch.bool).reshape(n, len(self.targets)),
            "masks": torch.from_numpy(np.stack(masks)) if masks else torch.zeros(n, size, size),
            "has_mask": torch.full((n,), bool(masks)),
        }
        return pixels, row, set(sample.labelled)

    def _is_fine(self, sample: GroundingSample) -> bool:
        """Whether half of the findings are smaller than SMALL in the model's input."""
        labels, boxes = sample.regions.labels, sample.regions.boxes
        findings = [k for k, label in enumerate(labels) if label not in self.tree.nodes or self.tree.is_finding(label)]
        height, width = sample.regions.image_size
        areas = (boxes[findings, 2] - boxes[findings, 0]) * (boxes[findings, 3] - boxes[findings, 1]) * height * width
        return bool(findings) and float(np.median(areas**0.5)) * self.image_size / max(height, width) < SMALL


def _pad(rows: torch.Tensor, n: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(n - len(rows), *rows.shape[1:])])


def _jitter(boxes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Corners moved by up to 12 % of the side, so that the region encoder meets boxes like a detector's."""
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    return (boxes + (torch.rand(boxes.shape, generator=generator) - 0.5) * 0.24 * sides).clamp(0, 1)


@dataclass(frozen=True)
class Batches(Dataset):
    """Step → (image ids, pixel_values, phrase texts, Targets) of this process. ``rows``: the images of ``store`` that
    are trained on, in the order in which ``mixture`` counts them."""

    store: Store | Stores
    rows: Sequence[int]
    collate: Collator
    mixture: Mixture
    batch_size: int
    world: int
    rank: int

    def __getitem__(self, step: int):
        indices = self.mixture.indices(step, self.batch_size, self.world, self.rank)
        samples = [self.store[self.rows[k]] for k in indices]
        return [sample.image_id for sample in samples], *self.collate(samples, step)


def check_mapped(store: Store, tree: LabelTree) -> None:
    """Raises StoreError where the label tree knows no label of a source: its codes or names were never mapped."""
    for source, labels in labels_by_source(store).items():
        if labels and not labels & tree.nodes.keys():
            some = ", ".join(map(repr, sorted(labels)[:5]))
            raise StoreError(
                f"{store.folder}: source {source}: the label tree knows none of its {len(labels)} labels ({some}); "
                "give them the tree's names when the store is built, add them to configs/labels.yaml, or train with "
                "free_phrases=true if they are phrases that a person would say"
            )


def labels_by_source(store: Store) -> dict[str, set[str]]:
    """Source → the labels of its regions."""
    found: dict[str, set[int]] = {}
    for block in store.blocks:
        names, codes = np.unique(np.array(block.batch.column("source").to_pylist()), return_inverse=True)
        labels, rows = _labels_and_rows(block)
        for k, name in enumerate(names.tolist()):
            found.setdefault(name, set()).update(np.unique(labels[codes[rows] == k]).tolist())
    return {name: {store.labels[k] for k in numbers} for name, numbers in found.items()}


def _labels_and_rows(block: Block) -> tuple[np.ndarray, np.ndarray]:
    """(M,) label number and (M,) row of each region of a block."""
    offsets = block.offsets
    return block.labels[offsets[0] : offsets[-1]], np.repeat(np.arange(len(block)), np.diff(offsets))


def most_boxes(stores: Sequence[Store], labels: Sequence[str], tree: LabelTree) -> dict[str, int]:
    """How many boxes a phrase may have, for the ``labels`` that occur more often in an image than is usual.

    1.5 times the 99th percentile over the images that show the label, since an image to come may hold more. Of a place
    only where that percentile itself is unusual: there are two lungs, however many images were seen.
    """
    found = {}
    for label in labels:
        counts = np.concatenate([_counts(store, label, tree) for store in stores])
        many = float(np.percentile(counts, 99)) if len(counts) else 0.0
        finding = label not in tree.nodes or tree.is_finding(label)
        usual = FINDINGS if finding else 1 if tree.laterality(label) else PLACES
        if math.ceil(1.5 * many) > usual and (finding or many > usual):
            found[label] = math.ceil(1.5 * many)
    return found


def _counts(store: Store, label: str, tree: LabelTree) -> np.ndarray:
    """Regions that ``label`` names, in each image that has one."""
    named = [k for k, other in enumerate(store.labels) if label == other or label in broader(other, tree)]
    counts = [np.zeros(0, int)]
    for block in store.blocks:
        labels, rows = _labels_and_rows(block)
        counts.append(np.bincount(rows[np.isin(labels, named)]))
    of_all = np.concatenate(counts)
    return of_all[of_all > 0]
