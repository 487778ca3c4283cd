"""SLAKE: organs and lesions of CT, MRI and X-ray, as boxes and as grey values of a mask."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from grounding.convert.record import AnnotationError, Item, Regions, Skipped, finish, load
from grounding.convert.tables import NOT_ON_DISK, corners, inside, numbers, read_json_list, skip
from grounding.images import read_image
from grounding.types import GroundingSample

MODALITIES = {"CT": "ct", "MRI": "mri", "X-Ray": "xray"}
LISTS = ("train.json", "validate.json", "validation.json", "test.json")
# mask.txt of the release: https://huggingface.co/datasets/BoKelvin/SLAKE/commit/644f1706f5d9954e10a5e23c4cd732a03d103e89
VALUES = {
    30: "Left Humerus Head",
    35: "Right Humerus Head",
    40: "Larynx",
    45: "Right Femoral Head",
    50: "Left Femoral Head",
    55: "Brain Stem",
    60: "Duodenum",
    65: "Tooth",
    70: "Liver",
    75: "Trachea",
    80: "Left Eye",
    90: "Right Eye",
    95: "Brain Edema",
    105: "Rectum",
    110: "Esophagus",
    120: "Left Ear",
    125: "Bladder",
    130: "Right Ear",
    135: "Left Kidney",
    140: "Brain Non-enhancing Tumor",
    145: "Spinal Cord",
    150: "Kidney Cancer",
    155: "Right Kidney",
    160: "Left Temporal Lobe",
    165: "Stomach",
    170: "Right Temporal Lobe",
    175: "Liver Cancer",
    180: "Heart",
    185: "Brain Enhancing Tumor",
    200: "Left Mandible",
    205: "Small Bowel",
    210: "Right Mandible",
    215: "Left Lung",
    225: "Right Lung",
    230: "Spleen",
    235: "Colon",
    240: "Left Parotid",
    245: "Lung Cancer",
    250: "Right Parotid",
}
NAMES = {
    "Bladder": "urinary bladder",
    "Brain Edema": "brain edema",
    "Kidney Cancer": "kidney tumour",
    "Liver Cancer": "liver tumour",
    "Lung Cancer": "lung tumour",
}


def slake(root: Path, source: str, licence: str) -> Iterator[Item]:
    """SLAKE: folders `xmlab<N>` (in `root` or `root/imgs`) with source.jpg, mask.png (grey values of mask.txt),
    detection.json ([{"Heart": [x, y, w, h]}, ...] in pixels) and question.json; the lists train.json, validate.json and
    test.json name all images (https://huggingface.co/datasets/BoKelvin/SLAKE).

    The modality is that of the questions. A box of detection.json is a region, with the part of the mask in it where
    the mask has that structure; what only the mask has is a region, too. Sides are those of the names. Which structures
    an image was searched for is not told: `labelled` is empty. Neither are patients.
    """
    root = Path(root)
    folders = {path.name: path for path in sorted([*root.glob("xmlab*"), *root.glob("*/xmlab*")]) if path.is_dir()}
    lists = [path for name in LISTS for path in sorted([*root.glob(name), *root.glob(f"*/{name}")])]
    if not folders and not lists:
        raise AnnotationError(f"{root}: neither folders xmlab<N> nor train.json; is this the folder of SLAKE?")
    values, modalities = _values(root), _modalities(row for path in lists for row in read_json_list(path))
    make = partial(GroundingSample, source=source, licence=licence, labelled=())
    for name in sorted({*folders, *modalities}):
        path = inside(folders[name], "source.jpg") if name in folders else None
        read = partial(_read, path, name, modalities.get(name, ""), values, make)
        yield Item(name, read) if path else skip(name, NOT_ON_DISK)


def _modalities(rows: Iterable[Any]) -> dict[str, str]:
    """Folder → modality as the questions say it."""
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("img_name"), str)]
    return {Path(row["img_name"]).parent.name: str(row.get("modality", "")) for row in rows}


def _values(root: Path) -> dict[int, str]:
    """Grey value → structure, from mask.txt (lines ``70:Liver``) where it is there."""
    file = inside(root, "mask.txt")
    lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines() if file else []
    pairs = [line.partition(":") for line in lines]
    return {int(value): name.strip() for value, _, name in pairs if value.strip().isdecimal()} or VALUES


def _read(
    path: Path, name: str, modality: str, values: dict[int, str], make: partial
) -> Iterable[GroundingSample | Skipped]:
    questions = inside(path.parent, "question.json")
    if questions:
        modality = next((str(row.get("modality", "")) for row in _objects(read_json_list(questions))), modality)
    if modality not in MODALITIES:
        raise ValueError(f"no question says the modality ({modality or 'no question'})")
    height, width = load(str(path)).pixels.shape[:2]
    regions = Regions((height, width), NAMES)
    masks = _masks(regions, path.with_name("mask.png"), values)
    for label, box in _boxes(regions, path.with_name("detection.json")):
        _add(regions, label, box, masks.get(label))
    boxed = set(regions.done().texts or [])
    for label, mask in masks.items():
        if label not in boxed:
            regions.add_mask(mask, label)
    source = make.keywords["source"]
    ids = {"image_id": f"{source}/{name}", "patient_id": f"{source}/{name}", "image": str(path)}
    sample = make(**ids, modality=MODALITIES[modality], regions=regions.done())
    yield from finish(sample, regions, name)


def _objects(rows: list) -> list[dict]:
    return [row for row in rows if isinstance(row, dict)]


def _masks(regions: Regions, file: Path, values: dict[int, str]) -> dict[str, np.ndarray]:
    """Structure → (H, W) bool. What cannot be read is named in `regions.left_out`."""
    if not file.is_file():
        return {}
    try:
        pixels = read_image(file).pixels
    except (ValueError, OSError) as error:
        regions.left_out.append(f"mask.png: {error}")
        return {}
    if pixels.shape != regions.image_size:
        size = " x ".join(map(str, pixels.shape))
        regions.left_out.append(f"mask.png: {size}, not a grey image of the size of source.jpg")
        return {}
    found = [int(value) for value in np.unique(pixels) if value]
    regions.left_out += [f"mask.png: value {value} is not in mask.txt" for value in found if value not in values]
    return {values[value]: pixels == value for value in found if value in values}


def _boxes(regions: Regions, file: Path) -> list[tuple[str, list[float]]]:
    """(structure, xyxy) of detection.json. What cannot be read is named in `regions.left_out`."""
    if not file.is_file():
        return []
    boxes = []
    try:
        rows = _objects(read_json_list(file))
    except ValueError as error:
        regions.left_out.append(f"detection.json: {error}")
        return []
    for label, box in (pair for row in rows for pair in row.items()):
        try:
            boxes.append((label, corners(*numbers(box, 4))))
        except ValueError as error:
            regions.left_out.append(f"detection.json: {label}: {error}")
    return boxes


def _add(regions: Regions, label: str, box: list[float], mask: np.ndarray | None) -> None:
    """The box, with what the mask has in it, in which case the box is the mask's."""
    if mask is not None:
        edges = np.array([np.floor(box[0]), np.floor(box[1]), np.ceil(box[2]), np.ceil(box[3])])
        x1, y1, x2, y2 = edges.clip(0, max(mask.shape)).astype(int)
        part = np.zeros_like(mask)
        part[y1:y2, x1:x2] = mask[y1:y2, x1:x2]
        if part.any():
            regions.add_mask(part, label)
            return
    regions.add_box(box, label)
