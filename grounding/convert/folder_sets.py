"""Public sets of images and masks in folders, as a table: name → `Layout`; and LGG, which has a table of patients.

Read with `convert_folder(root, source, licence, SETS[name])`. Where a mask holds several lesions (polyps, haemorrhages,
tumours, nodules), or both kidneys, each piece is a region; any other organ is one region a slice. A kidney does not
include its tumour, as the masks have it.

kvasir-seg   images/ID.jpg, masks/ID.jpg. https://datasets.simula.no/kvasir-seg/. The boxes of its json are in pixels
             of the original images, which copies may have resized; they are not read.
isic2018     task 1, lesion boundaries: ISIC_ID.jpg, ISIC_ID_segmentation.png, in any folders.
             https://challenge.isic-archive.com/landing/2018/45/: one primary lesion an image, of one piece, so a mask
             is one region, crumbs included; smaller secondary lesions may have been passed over.
busi         https://scholar.cu.edu.eg/?q=afahmy/pages/dataset: "benign (4).png" with "benign (4)_mask.png" and, for
             further lesions, "benign (4)_mask_1.png" in one folder a class; also in images/ and mask/ below it
             (https://github.com/yirutsai/Breast-ultrasound-dataset). Each file is one lesion; normal is black.
bhsd-ct, kits19-mini, curvas-ct, liver-us
             colour masks: images/ and masks/ with equal names, as in the mini_test folders of the repositories
             TensorFlow-FlexUNet-Image-Segmentation-... of https://github.com/sarah-antillia. BHSD: the last three
             digits are the slice, those before the volume. CURVAS: VOLUME_SLICE, the same volumes in the folders of
             three annotators. Slices may be rotated: sides are not told.
cvc-clinicdb Original/N.tif, "Ground Truth/N.tif"; 612 frames of 29 sequences.
             https://polyp.grand-challenge.org/CVCClinicDB/ and
             https://github.com/openmedlab/Awesome-Medical-Dataset/blob/main/resources/CVC-ClinicDB.md
ph2          IMD002/IMD002_Dermoscopic_Image/IMD002.bmp, IMD002/IMD002_lesion/IMD002_lesion.bmp; the masks of colours
             in IMD002_roi are not read. https://www.fc.up.pt/addi/ph2%20database.html
tn3k         trainval-image/0000.jpg, trainval-mask/0000.jpg, test-image/, test-mask/: numbers repeat in the two.
             https://github.com/haifangong/TRFE-Net-for-thyroid-nodule-segmentation and
             https://github.com/openmedlab/Awesome-Medical-Dataset/blob/main/resources/TN3K.md
"""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from grounding.convert.folders import Layout, convert_folder
from grounding.convert.record import Item, left_out

# First frames of CVC-ClinicDB's sequences. Frames 278-317 and 384-428 hold two sequences each, which no page at hand
# parts: taken as one, they cannot leak into each other.
# fmt: off
CVC_SEQUENCES = (
    1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 318, 343, 364, 384, 429, 448, 467, 479, 504, 529,
    547, 572, 592,
)
# fmt: on
HAEMORRHAGES = {
    "EDH": "epidural haemorrhage",
    "IPH": "intraparenchymal haemorrhage",
    "IVH": "intraventricular haemorrhage",
    "SAH": "subarachnoid haemorrhage",
    "SDH": "subdural haemorrhage",
}

SETS = {
    "kvasir-seg": Layout(
        modality="endoscopy",
        image=r"(?P<folder>(?:.*/)?)images/(?P<name>[^/]+)\.jpg",
        mask=r"(?P<folder>(?:.*/)?)masks/(?P<name>[^/]+)\.jpg",
        text="polyp",
        instances=("polyp",),
        labelled=("polyp",),
    ),
    "isic2018": Layout(
        modality="dermoscopy",
        image=r"(?:.*/)?(?P<name>ISIC_\d{7})\.jpg",
        mask=r"(?:.*/)?(?P<name>ISIC_\d{7})_segmentation\.png",
        text="skin lesion",
        labelled=("skin lesion",),
    ),
    "busi": Layout(
        modality="ultrasound",
        image=r"(?P<folder>.*?)(?:images/)?(?P<name>(?P<text>benign|malignant|normal) \(\d+\))\.png",
        mask=r"(?P<folder>.*?)(?:mask/)?(?P<name>(?:benign|malignant|normal) \(\d+\))_mask(?:_\d+)?\.png",
        names={"benign": "benign breast lesion", "malignant": "malignant breast lesion"},
        labelled=("benign breast lesion", "malignant breast lesion"),
    ),
    "bhsd-ct": Layout(
        modality="ct",
        image=r"(?P<folder>(?:.*/)?)images/(?P<name>(?P<patient>\d+)(?P<frame>\d{3}))\.png",
        mask=r"(?P<folder>(?:.*/)?)masks/(?P<name>\d+)\.png",
        colours={
            (255, 0, 0): "EDH",
            (0, 0, 255): "IPH",
            (255, 255, 0): "IVH",
            (0, 255, 255): "SAH",
            (0, 255, 0): "SDH",
        },
        instances=tuple(HAEMORRHAGES),
        names=HAEMORRHAGES,
        labelled=tuple(HAEMORRHAGES.values()),
    ),
    "curvas-ct": Layout(
        modality="ct",
        image=r"(?P<folder>(?:(?:.*/)?CURVAS-Annotation-(?P<annotator>\d)/)?(?:.*/)?)images/"
        r"(?P<name>(?P<patient>\d+)_(?P<frame>\d{1,9}))\.png",
        mask=r"(?P<folder>(?:.*/)?)masks/(?P<name>\d+_\d+)\.png",
        colours={(255, 0, 255): "liver", (255, 255, 0): "kidney", (0, 255, 255): "pancreas"},
        instances=("kidney",),
        labelled=("liver", "kidney", "pancreas"),
    ),
    "kits19-mini": Layout(
        modality="ct",
        image=r"(?P<folder>(?:.*/)?)images/(?P<name>(?P<patient>\d+)_(?P<frame>\d{1,9}))\.png",
        mask=r"(?P<folder>(?:.*/)?)masks/(?P<name>\d+_\d+)\.png",
        colours={(0, 0, 255): "kidney", (255, 0, 0): "kidney tumour"},
        instances=("kidney", "kidney tumour"),
        labelled=("kidney", "kidney tumour"),
    ),
    "liver-us": Layout(
        modality="ultrasound",
        image=r"(?P<folder>(?:.*/)?)images/(?P<name>\d+)\.png",
        mask=r"(?P<folder>(?:.*/)?)masks/(?P<name>\d+)\.png",
        colours={(0, 255, 0): "benign liver mass", (255, 0, 0): "malignant liver mass"},
        instances=("benign liver mass", "malignant liver mass"),
        labelled=("benign liver mass", "malignant liver mass"),
    ),
    "cvc-clinicdb": Layout(
        modality="endoscopy",
        image=r"(?P<folder>(?:.*/)?)Original/(?P<name>(?P<frame>\d{1,9}))\.(?:tif|png)",
        mask=r"(?P<folder>(?:.*/)?)Ground Truth/(?P<name>\d+)\.(?:tif|png)",
        text="polyp",
        instances=("polyp",),
        labelled=("polyp",),
        sequences=CVC_SEQUENCES,
    ),
    "ph2": Layout(
        modality="dermoscopy",
        image=r"(?P<folder>(?:.*/)?)(?P<name>IMD\d+)_Dermoscopic_Image/IMD\d+\.bmp",
        mask=r"(?P<folder>(?:.*/)?)IMD\d+_lesion/(?P<name>IMD\d+)_lesion\.bmp",
        text="skin lesion",
        labelled=("skin lesion",),
    ),
    "tn3k": Layout(
        modality="ultrasound",
        image=r"(?P<folder>(?:.*/)?(?:trainval|test)-)image/(?P<name>\d+)\.jpg",
        mask=r"(?P<folder>(?:.*/)?(?:trainval|test)-)mask/(?P<name>\d+)\.(?:jpg|png)",
        text="thyroid nodule",
        instances=("thyroid nodule",),
        labelled=("thyroid nodule",),
    ),
}

LGG = Layout(
    modality="mri",
    image=r"(?P<folder>(?:.*/)?)(?P<name>(?P<study>(?P<patient>TCGA_\w\w_\w{4})_\d{8})_(?P<frame>\d{1,9}))\.tif",
    mask=r"(?P<folder>(?:.*/)?)(?P<name>TCGA_\w\w_\w{4}_\d{8}_\d+)_mask\.tif",
    text="FLAIR abnormality",
    instances=("FLAIR abnormality",),
    names={"FLAIR abnormality": "glioma"},
    labelled=("glioma",),
)
# TCGA's words in alphabetical order; data.csv holds their numbers.
LATERALITY = {"1": "left", "2": "midline", "3": "right"}
GRADES = {"1": "G2", "2": "G3"}


def lgg_mri(root: Path, source: str, licence: str) -> Iterator[Item]:
    """Lower-grade gliomas: each piece of the FLAIR abnormality, with `laterality` and `grade` of data.csv.

    Layout: https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation, kaggle_3m/PATIENT_DATE/ with
    PATIENT_DATE_SLICE.tif and PATIENT_DATE_SLICE_mask.tif. The image is the file as it is: red before contrast, green
    FLAIR, blue after contrast; where a sequence is missing, its channel repeats FLAIR. The numbers of data.csv come
    without a key. Grade was compared with TCGA's clinical data for four patients; laterality agrees with the side of
    the mask, in radiological display, in all 61 one-sided slices at hand. The side of a region comes from the table
    alone. data.csv may be missing.
    """
    facts, wrong = _patients(Path(root))
    yield from convert_folder(root, source, licence, LGG, facts)
    for key, why in wrong:
        yield Item(key, partial(left_out, key, [why]))


def _patients(root: Path) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
    """({patient: attributes}, rows that cannot be read)."""
    facts: dict[str, dict[str, str]] = {}
    wrong = []
    for file in filter(Path.is_file, sorted(root.glob("**/data.csv"))):
        table = csv.reader(file.read_text("utf-8-sig", errors="replace").replace("\0", "").splitlines())
        name = file.relative_to(root).as_posix()
        try:
            header = next(table, [])
            for row in table:
                if len(row) == len(header) and row and row[0].startswith("TCGA_"):
                    facts.setdefault(row[0], _words(dict(zip(header, row, strict=True))))
                else:
                    why = f"{len(row)} values where the header has {len(header)}, or no patient"
                    wrong.append((f"{name}:{table.line_num}", why))
        except csv.Error as error:
            wrong.append((f"{name}:{table.line_num}", f"not CSV from here on ({error})"))
    return facts, wrong


def _words(row: dict[str, str]) -> dict[str, str]:
    """`laterality` and `grade` of a row of data.csv, where it has them."""
    words = {
        "laterality": LATERALITY.get(row.get("laterality", "")),
        "grade": GRADES.get(row.get("neoplasm_histologic_grade", "")),
    }
    return {name: word for name, word in words.items() if word}
