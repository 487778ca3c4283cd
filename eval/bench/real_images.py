"""The real images of ../shared/data: 12 sets, with patient and volume where a source tells them."""

import csv
from dataclasses import dataclass
from pathlib import Path

SETS = {
    "bccd": "bccd/BCCD/JPEGImages/*.jpg",
    "bhsd-ct": "bhsd-ct/projects/*/*/mini_test/images/*.png",
    "busi": "busi/data/*/images/*.png",
    "curvas-ct": "curvas-ct/projects/*/*/mini_test/images/*.png",
    "cxr-lungboxes": "cxr-lungboxes/images/*.*",
    "idrid-yolo": "idrid-yolo/DR_dataset/images/train/*.jpg",
    "isic2018-512": "isic2018-512/data512/*/*.jpg",
    "kits19-mini": "kits19-mini/projects/*/*/mini_test/images/*.png",
    "kvasir-seg": "kvasir-seg/Kvasir-SEG/images/*.jpg",
    "lgg-mri": "lgg-mri/kaggle_3m/*/*[0-9].tif",
    "liver-us": "liver-us/projects/*/*/mini_test/images/*.png",
    "vqa-rad": "vqa-rad/data/images/*.jpg",
}


@dataclass(frozen=True)
class Item:
    """One image file. `origin`: of a plant, the training image that it leaks; `kind`: how."""

    id: str
    path: Path
    patient: str | None
    study: str | None = None
    frame: int | None = None
    origin: str | None = None
    kind: str | None = None


def read_items(data: Path) -> list[Item]:
    """Every image of the 12 sets, with patient and volume where the source tells them."""
    with (data / "cxr-lungboxes/metadata.csv").open(encoding="utf-8") as file:
        patients = {row["filename"]: row["patientid"] for row in csv.DictReader(file)}
    items = []
    for name, pattern in SETS.items():
        for path in sorted(data.glob(pattern)):
            patient, frame = _patient_and_frame(name, path, patients)
            study = None if frame is None else f"{name}/{patient}"
            items.append(Item(f"{name}/{path.stem}", path, f"{name}/{patient}", study, frame))
    return items


def _patient_and_frame(name: str, path: Path, patients: dict[str, str]) -> tuple[str, int | None]:
    if name == "bhsd-ct":
        return str(int(path.stem) // 1000), int(path.stem) % 1000
    if name in ("curvas-ct", "kits19-mini"):
        volume, frame = path.stem.split("_")
        return volume, int(frame)
    if name == "lgg-mri":
        return path.parent.name, int(path.stem.rsplit("_", 1)[1])
    return patients.get(path.name, path.stem) if name == "cxr-lungboxes" else path.stem, None
