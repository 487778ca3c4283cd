"""Where the published sets of NIfTI volumes keep their images and labels, and what their words mean."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grounding.convert.record import AnnotationError, Skipped, below
from grounding.convert.tables import read_json

# The first letters of a source's word for the modality (in lower case, letters and digits only) → ours.
MODALITY_WORDS = {
    "ct": "ct",
    "mr": "mri",
    "t1": "mri",
    "t2": "mri",
    "flair": "mri",
    "adc": "mri",
    "xray": "xray",
    "cxr": "xray",
    "ultrasound": "ultrasound",
    "fundus": "fundus",
    "endoscop": "endoscopy",
    "colonoscop": "endoscopy",
    "dermoscop": "dermoscopy",
    "microscop": "microscopy",
    "pathology": "microscopy",
    "histopathology": "microscopy",
}
# What words mean that say too little without the name of their task; keyed by a part of that name.
TASK_WORDS = {
    "liver": {"cancer": "liver tumour", "tumor": "liver tumour"},
    "hepatic": {"vessel": "hepatic vessel", "tumour": "liver tumour"},
    "lung": {"cancer": "lung tumour"},
    "pancreas": {"cancer": "pancreatic tumour"},
    "colon": {"colon cancer primaries": "colon tumour"},
    "prostate": {"pz": "peripheral zone of the prostate", "tz": "transition zone of the prostate"},
    "hippocampus": {"anterior": "anterior hippocampus", "posterior": "posterior hippocampus"},
    "kits": {"tumor": "kidney tumour", "tumour": "kidney tumour", "cyst": "kidney cyst"},
    "amos": {"arota": "aorta", "bladder": "urinary bladder"},  # spelt so by the publisher
    "brats": {
        "edema": "peritumoural oedema",
        "non-enhancing tumor": "non-enhancing tumour",
    },
}
WORDS = {
    "autochthon": "erector spinae muscle",
    "clavicula": "clavicle",
    "gall bladder": "gallbladder",
    "heart atrium": "atrium",
    "heart myocardium": "myocardium",
    "heart ventricle": "ventricle",
    "hip": "hip bone",
    "iliac artery": "common iliac artery",
    "iliac vena": "common iliac vein",
    "lung lower lobe": "lower lobe",
    "lung middle lobe": "middle lobe",
    "lung upper lobe": "upper lobe",
    "postcava": "inferior vena cava",
}
BRATS_SEQUENCES = re.compile(r"(.+)(?:_(t1|t1ce|t2|flair)|-(t1n|t1c|t2w|t2f))\.nii(\.gz)?")
BTCV_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal vein and splenic vein",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)

Label = tuple[tuple[int, ...], str]  # the values of a label volume that mean it, and its name in the source


@dataclass(frozen=True)
class Volume:
    """An image file and its label files. `channels`: (name, modality) of each 3-D volume in it, in order. `words`: what
    names of labels mean, in lower case. `window`: the preset for CT where the user names none. `ignore`: values of
    voxels that nobody labelled."""

    key: str
    case: str
    patient: str
    image: Path
    channels: tuple[tuple[str, str], ...]
    labels: tuple[tuple[Path, tuple[Label, ...]], ...]
    words: Mapping[str, str] = field(default_factory=dict)
    window: str = "abdomen"
    ignore: tuple[int, ...] = ()


Found = Iterator[Volume | Skipped]


def decathlon(root: Path) -> Found:
    """``imagesTr/CASE.nii.gz`` with ``labelsTr/CASE.nii.gz`` and `dataset.json` (http://medicaldecathlon.com), images
    3-D or 4-D; or one file a channel, ``CASE_0000.nii.gz``, and labels the other way round, ``{"liver": 1}`` (nnU-Net,
    https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md)."""
    about = _dataset_json(root)
    words = about.get("modality") or about.get("channel_names")
    words = [str(word) for word in words.values()] if isinstance(words, dict) else []
    modalities = [modality_of(word) or "" for word in words]
    if not words or "" in modalities:
        raise AnnotationError(f"{root / 'dataset.json'}: modality is {words}; write for example {{'0': 'CT'}}")
    unique = len(words) == len(set(words)) > 1
    names = words if unique else [str(k) for k in range(len(words))] if len(words) > 1 else [""]
    channels = tuple(zip(names, modalities, strict=True))
    yield from _image_folders(root, about, lambda case: channels)


def amos(root: Path) -> Found:
    """As `decathlon`, with ``imagesVa`` and ``labelsVa`` beside (https://zenodo.org/records/7262581). The number in a
    name tells CT (up to 500) from MRI, where dataset.json says CT throughout; the readme says "less than 500", but also
    "500 CT and 100 MRI"."""

    def channels(case: str) -> tuple[tuple[str, str], ...]:
        number = re.search(r"(\d+)$", case)
        return (("", "ct" if number and int(number[1]) <= 500 else "mri"),)

    yield from _image_folders(root, _dataset_json(root), channels)


def totalsegmentator(root: Path) -> Found:
    """``s0001/ct.nii.gz`` (``mri.nii.gz``) with one mask a class, ``s0001/segmentations/CLASS.nii.gz``
    (https://doi.org/10.5281/zenodo.6802613, https://doi.org/10.5281/zenodo.11367004). What has a file is labelled."""
    images = below(root, "*/ct.nii.gz", "*/mri.nii.gz")
    for image in images:
        masks = _volumes_in(image.parent / "segmentations")
        case, key = image.parent.name, image.relative_to(root).as_posix()
        labels = tuple((mask, (((1,), stem(mask)),)) for mask in masks)
        if masks:
            yield Volume(key, case, case, image, (("", modality_of(stem(image)) or ""),), labels)
        else:
            yield Skipped(key, "no masks in the folder segmentations")
    for folder in sorted(set(root.glob("*/segmentations")) - {image.parent / "segmentations" for image in images}):
        yield Skipped(folder.relative_to(root).as_posix(), "masks without an image")


def brats(root: Path) -> Found:
    """``CASE/CASE_{t1,t1ce,t2,flair,seg}.nii.gz`` with the values 1, 2, 4 (up to BraTS 2021,
    https://www.med.upenn.edu/cbica/brats2020/data.html) or ``CASE-{t1n,t1c,t2w,t2f,seg}.nii.gz`` with 1, 2, 3 (from
    2023, https://www.synapse.org/brats2023), where CASE ends in the number of the patient's scan. Every sequence is a
    volume. The labels of case 355 of 2020 are called ``W39_1998.09.19_Segm.nii``."""
    for image in below(root, "**/*.nii.gz", "**/*.nii"):
        name, key = BRATS_SEQUENCES.fullmatch(image.name), image.relative_to(root).as_posix()
        if not name or name[0].startswith("."):
            continue
        case, later = name[1], bool(name[3])
        own = (image.with_name(f"{case}{'-' if later else '_'}seg{suffix}") for suffix in (".nii.gz", ".nii"))
        labels = [path for path in own if path.is_file()] or sorted(image.parent.glob("*_Segm.nii*"))
        parts = {2: "edema", 1: "necrotic tumour core", 3 if later else 4: "enhancing tumour"}
        table = (*(((value,), text) for value, text in parts.items()), (tuple(parts), "whole tumour"))
        patient = re.sub(r"-\d{3}$", "", case) if later else case
        channel = ((name[2] or name[3], "mri"),)
        # Later sets are of other tumours, too: BraTS-MEN meningioma, BraTS-MET metastases.
        words = TASK_WORDS["brats"] | {"whole tumour": "brain tumour" if later and "GLI" not in case else "glioma"}
        if labels:
            yield Volume(key, case, patient, image, channel, ((labels[0], table),), words)
        else:
            yield Skipped(key, "no label file, CASE_seg.nii.gz, beside it")


def btcv(root: Path) -> Found:
    """``img/img0001.nii.gz`` and ``label/label0001.nii.gz``, also in one folder; abdominal CT of thirteen organs
    (https://www.synapse.org/Synapse:syn3193805/wiki/217789)."""
    table = tuple(((value,), organ) for value, organ in enumerate(BTCV_ORGANS, 1))
    used = set()
    for image in below(root, "**/img[0-9]*.nii.gz", "**/img[0-9]*.nii"):
        name, key = image.name.replace("img", "label", 1), image.relative_to(root).as_posix()
        folders = (image.parent, image.parent.with_name("label"), image.parent.with_name("labels"))
        label = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if label is None:
            yield Skipped(key, f"{name} is not on disk")
        else:
            used.add(label)
            yield Volume(key, stem(image), stem(image), image, (("", "ct"),), ((label, table),))
    for label in sorted({*root.glob("**/label[0-9]*.nii.gz"), *root.glob("**/label[0-9]*.nii")} - used):
        yield Skipped(label.relative_to(root).as_posix(), "labels without an image")


LAYOUTS: dict[str, Callable[[Path], Found]] = {
    "msd": decathlon,
    "amos": amos,
    "totalsegmentator": totalsegmentator,
    "brats": brats,
    "btcv": btcv,
}


def _dataset_json(root: Path) -> dict:
    path = root / "dataset.json"
    about = read_json(path) if path.is_file() else None
    if not isinstance(about, dict):
        raise AnnotationError(f"{path}: no such file, or not a JSON object; give the folder that holds imagesTr")
    return about


def _image_folders(root: Path, about: dict, channels: Callable) -> Found:
    """What every ``images*`` folder that has a ``labels*`` folder holds, and what dataset.json lists beyond that."""
    table = label_values(about.get("labels"), root / "dataset.json")
    task = f"{root.name} {about.get('name')}".lower()
    make = {
        "words": next((words for part, words in TASK_WORDS.items() if part in task), {}),
        "window": "lung" if "lung" in task else "abdomen",
        "ignore": tuple(value for values, name in table if name.lower() == "ignore" for value in values),
    }
    table = tuple(label for label in table if label[1].lower() != "ignore")
    folders = [path for path in sorted(root.glob("images*")) if _labels_of(path).is_dir()]
    if not folders:
        raise AnnotationError(f"{root}: no folder imagesTr with a folder labelsTr; is this the folder of the task?")
    seen = set()
    for folder in folders:
        labels = {stem(path): path for path in _volumes_in(_labels_of(folder))}
        for image in _volumes_in(folder):
            case, channel = _case(stem(image), labels)
            key, named = f"{folder.name}/{image.name}", channels(case)
            named = named if channel is None else named[channel : channel + 1]
            seen.add((folder.name, case))
            if case not in labels:
                yield Skipped(key, f"no label file {case}.nii.gz")
            elif not named:
                yield Skipped(key, f"dataset.json has no channel {channel}")
            else:
                yield Volume(key, case, case, image, named, ((labels[case], table),), **make)
        for case in sorted(case for case in labels if (folder.name, case) not in seen):
            yield Skipped(f"{_labels_of(folder).name}/{labels[case].name}", "labels without an image")
    yield from _not_on_disk(about.get("training"), seen)


def _labels_of(images: Path) -> Path:
    return images.with_name(images.name.replace("images", "labels", 1))


def _case(name: str, labels: Mapping[str, Path]) -> tuple[str, int | None]:
    """(case, channel): ``BRATS_001_0002`` is channel 2 of BRATS_001, but ``amos_0004`` is a case, since that has a
    label file of its own."""
    if name not in labels and re.fullmatch(r".+_\d{4}", name) and name[:-5] in labels:
        return name[:-5], int(name[-4:])
    return name, None


def _not_on_disk(listed: object, seen: set[tuple[str, str]]) -> Iterator[Skipped]:
    """Images of dataset.json's list ``[{"image": "./imagesTr/CASE.nii.gz", ...}]`` of which no file was found."""
    for k, entry in enumerate(listed if isinstance(listed, list) else []):
        image = entry.get("image") if isinstance(entry, dict) else None
        if not isinstance(image, str):
            yield Skipped(f"dataset.json: training[{k}]", "has no image")
        elif (Path(image).parent.name, stem(Path(image))) not in seen:
            yield Skipped(image.removeprefix("./"), "listed in dataset.json, but not on disk")


def _volumes_in(folder: Path) -> list[Path]:
    """Its NIfTI files, without the ``._`` files that macOS leaves in archives (the Decathlon's hold them)."""
    paths = sorted({*folder.glob("*.nii.gz"), *folder.glob("*.nii")})
    return [path for path in paths if not path.name.startswith(".")]


def stem(path: Path) -> str:
    """Its name without ``.nii.gz`` or ``.nii``."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def label_values(labels: object, path: Path) -> tuple[Label, ...]:
    """The labels of a dataset.json without background, in both orders: ``{"1": "liver"}``, and ``{"liver": 1}`` or
    ``{"whole tumour": [1, 2]}``. Raises AnnotationError, which names `path`."""
    table = []
    for key, value in labels.items() if isinstance(labels, dict) else ():
        name, values = (value, key) if isinstance(value, str) else (key, value)
        try:
            numbers = tuple(int(one) for one in (values if isinstance(values, list) else [values]))
        except (TypeError, ValueError, OverflowError):
            raise AnnotationError(f"{path}: label {key!r}: {value!r} is not a number and a name") from None
        if name.lower() != "background" and numbers != (0,):
            table.append((numbers, name))
    if not table:
        raise AnnotationError(f"{path}: no labels; write for example {{'labels': {{'0': 'background', '1': 'liver'}}}}")
    return tuple(table)


def modality_of(word: str) -> str | None:
    """Ours for a source's word: "MRI-FLAIR", "mr_t1ce" → "mri"; None for one that is none of the eight ("pet_00")."""
    word = re.sub(r"[^a-z0-9]", "", word.lower())
    return next((modality for start, modality in MODALITY_WORDS.items() if word.startswith(start)), None)


def spoken(word: str) -> str:
    """A class name as it is said: "adrenal_gland_right" → "right adrenal gland", "vertebrae_L1" → "L1 vertebra"."""
    words = word.replace("_", " ").split()
    sides = [part.lower() for part in words if part.lower() in ("left", "right")]
    if len(sides) == 1:
        words = [part for part in words if part.lower() != sides[0]]
    rest = re.sub(r"^vertebrae ([CTLS]\d+)$", r"\1 vertebra", " ".join(words))
    return " ".join([*(sides if len(sides) == 1 else []), WORDS.get(rest.lower(), rest)])
