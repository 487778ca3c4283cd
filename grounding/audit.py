"""What two region stores, or a store and a question set, have in common (`medglip data audit`, `forbid`)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from eval.fingerprint import T
from eval.leakage import Images, Leak, audit, audit_questions, images_of_questions, report
from grounding.images import read_image
from grounding.store import Store, StoreError, open_store

SAME_PICTURE = ("pixels", "near-duplicate")  # within one store, a patient or study with several images is no fault


@dataclass(frozen=True)
class Found:
    """`text`: what to read; `rows`: every leak between two sets, as JSON."""

    text: str
    rows: list[dict]


def images_of(store: Store, name: str) -> Images:
    """The columns that an audit needs. Raises StoreError where the store was built without fingerprints."""
    if store.table.column("thumbnail").null_count:
        raise StoreError(f"{name}: built without fingerprints; build it again")
    columns = {key: store.column(column) for key, column in COLUMNS.items()}
    thumbnails = [block.thumbnails for block in store.blocks] or [np.zeros((0, T, T), np.uint8)]
    return Images(name=name, **columns, thumbnails=np.concatenate(thumbnails))


COLUMNS = {"ids": "image_id", "patients": "patient_id", "studies": "study_id", "frames": "frame", "pixels": "pixels"}


def audit_files(stores: Sequence[Path], questions: Sequence[Path], image_root: Path | None) -> Found:
    """Every store in itself, each pair of stores, and each question set against each store."""
    sets = [images_of(open_store(path), str(path)) for path in stores]
    texts, rows = [], []
    for one in sets:
        twice = [leak for leak in audit(one, None) if leak.kind in SAME_PICTURE]
        texts.append(f"# {one.name}: the same picture twice\n\n{report(twice)}")
    for a, b in combinations(sets, 2):
        leaks = audit(a, b)
        texts.append(f"# {a.name} and {b.name}\n\n{report(leaks)}")
        rows += [{"a": a.name, "b": b.name, **asdict(leak)} for leak in leaks]
    for path in questions:
        asked = images_of_questions(path, image_root or path.parent, _pixels)
        if asked.unread:
            name, why = next(iter(asked.unread.items()))
            texts.append(f"{path}: {len(asked.unread)} images could not be read, such as {name}: {why}")
        for one in sets:
            leaks = audit_questions(one, asked)
            texts.append(f"# {one.name} and the questions of {path}\n\n{report(leaks)}")
            rows += [{"a": one.name, "b": str(path), **asdict(leak)} for leak in leaks]
    return Found("\n\n".join(texts), rows)


def _pixels(path: Path) -> np.ndarray:
    return read_image(path).pixels


def check_forbidden(store: Path, forbidden: Sequence[Path]) -> None:
    """Raises StoreError where `store` has a patient, study or picture in common with one of the `forbidden` stores."""
    if not forbidden:
        return
    mine = images_of(open_store(store), str(store))
    for path in forbidden:
        leaks: list[Leak] = audit(mine, images_of(open_store(path), str(path)))
        if leaks:
            first, count = leaks[0], len({leak.id_b for leak in leaks})
            raise StoreError(
                f"{store} leaks into {path}, which is forbidden: {count} images, such as {first.id_a} and {first.id_b} "
                f"({first.kind}); see medglip data audit {store} {path}"
            )
