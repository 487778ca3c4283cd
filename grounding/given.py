"""Regions from elsewhere in the detector's place (`regions=file:PATH`): a regions.jsonl, or the COCO json that
annotation tools and other programs write."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from grounding.convert.record import find_label, frame_scale
from grounding.labels import LabelTree, load_label_tree
from grounding.store import Store
from grounding.types import RegionError, RegionSet, read_regions


def read_given(path: Path, store: Store) -> dict[str, RegionSet]:
    """image_id → regions, for images of `store`; those that the file does not name are left out.

    A COCO json names files: an image is the one whose id ends with that name, without its suffix. Categories become
    labels where the label tree knows them for the image's modality; scores are kept, and run-length masks of the
    image's size. Raises RegionError naming the file where it cannot be read, names no image of the store, or one that
    several images could be.
    """
    return _of_coco(path, store) if path.suffix.lower() == ".json" else read_regions(path)


def _of_coco(path: Path, store: Store) -> dict[str, RegionSet]:
    tree, places, found = load_label_tree(), _places(store), dict[str, RegionSet]()
    try:
        data = json.loads(path.read_bytes())
        names = {row["id"]: str(row["name"]) for row in data["categories"]}
        rows: dict[Any, list[Mapping]] = defaultdict(list)
        for row in data["annotations"]:
            rows[row["image_id"]].append(row)
        for image in data["images"]:
            if (place := _place(places, store, str(image["file_name"]))) is not None:
                found[store.image_ids[place]] = _regions(image, rows[image["id"]], names, store, place, tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error if isinstance(error, OSError | ValueError) else repr(error)
        raise RegionError(f"{path}: cannot be used ({reason}); give a COCO json, or a regions.jsonl") from error
    if not found:
        raise RegionError(f"{path}: names no image of {store.folder}; its file_name must be what an image_id ends with")
    return found


def _regions(
    image: Mapping, rows: list[Mapping], names: Mapping[Any, str], store: Store, place: int, tree: LabelTree
) -> RegionSet:
    meta = store.metadata(place)
    labels = {key: find_label(name, tree, meta.modality or None) for key, name in names.items()}
    stated = (image.get("height") or meta.image_size[0], image.get("width") or meta.image_size[1])
    frame_scale(stated, meta.image_size)  # raises ValueError where the shape is another one
    regions = RegionSet.from_coco(rows, labels, stated)
    return regions if stated == meta.image_size else replace(regions, image_size=meta.image_size, masks=None)


def _places(store: Store) -> dict[str, list[int]]:
    """Last part of an image id → the places of the images that have it."""
    places = defaultdict(list)
    for place, image_id in enumerate(store.image_ids):
        places[image_id.rpartition("/")[2]].append(place)
    return places


def _place(places: Mapping[str, list[int]], store: Store, file_name: str) -> int | None:
    """The image that a file name means, None where the store has none. Raises RegionError where it has several."""
    stem = PurePosixPath(file_name.replace("\\", "/")).with_suffix("")
    found = [k for k in places.get(stem.name, ()) if f"/{store.image_ids[k]}".endswith(f"/{stem}")]
    if len(found) > 1:
        both = " and ".join(store.image_ids[k] for k in found[:2])
        raise RegionError(f"{file_name!r} is {both}; name their folders, too")
    return found[0] if found else None
