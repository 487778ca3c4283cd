"""The layouts that `medglip data build` reads, as a table: name → reader, licence, and what it was checked on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grounding.convert import (
    chest_csv,
    chest_json,
    coco,
    dicom,
    folders,
    medical,
    odvg,
    others,
    slake,
    voc,
    volumes,
    yolo,
)
from grounding.convert.folder_sets import SETS, lgg_mri
from grounding.convert.record import Item

REAL, FIXTURE = "real files", "fixture"
BOTH = "real annotations"  # its pictures, which are not at hand, were made for the test


@dataclass(frozen=True)
class Converter:
    """`read(root, source=…, licence=…, **options)`. `licence`: the publisher's, where one is known; "" not stated."""

    read: Callable[..., Iterator[Item]]
    checked: str
    licence: str = ""


def _masks(root: Path, source: str, licence: str, name: str) -> Iterator[Item]:
    return folders.convert_folder(root, source, licence, SETS[name])


def _volumes(layout: str) -> Callable[..., Iterator[Item]]:
    return partial(volumes.nifti_volumes, layout=layout)


CONVERTERS = {
    # Generic layouts; most want ?modality=
    "coco": Converter(coco.coco, REAL),
    "voc": Converter(voc.voc, REAL),
    "yolo": Converter(yolo.yolo, REAL),
    "masks": Converter(folders.binary_masks, REAL),
    "colour-masks": Converter(folders.colour_masks, REAL),
    "odvg": Converter(odvg.odvg, FIXTURE),
    "dicom-seg": Converter(dicom.dicom_seg, FIXTURE),
    "dicom-rtstruct": Converter(dicom.dicom_rtstruct, FIXTURE),
    # X-ray
    "cxr-lungboxes": Converter(coco.cxr_lungboxes, REAL, "CC BY 4.0, or as stated for an image"),
    "chestx-det10": Converter(chest_json.chestx_det10, BOTH),
    "chestx-det": Converter(chest_json.chestx_det, BOTH, "Apache-2.0"),
    "nih-boxes": Converter(chest_csv.nih_boxes, BOTH),
    "vindr-cxr": Converter(chest_csv.vindr_cxr, FIXTURE, "PhysioNet Credentialed Health Data License 1.5.0"),
    "rsna-pneumonia": Converter(chest_csv.rsna_pneumonia, FIXTURE),
    "ms-cxr": Converter(chest_json.ms_cxr, FIXTURE, "PhysioNet Credentialed Health Data License 1.5.0"),
    "padchest-gr": Converter(chest_json.padchest_gr, FIXTURE),
    "covid-structures": Converter(chest_csv.covid_structures, FIXTURE, "CC BY 4.0, or as stated for an image"),
    # CT and MRI
    "msd": Converter(_volumes("msd"), FIXTURE, "CC BY-SA 4.0"),
    "amos": Converter(_volumes("amos"), FIXTURE, "CC BY 4.0"),
    "totalsegmentator": Converter(_volumes("totalsegmentator"), FIXTURE, "CC BY 4.0"),
    "brats": Converter(_volumes("brats"), FIXTURE),
    "btcv": Converter(_volumes("btcv"), FIXTURE),
    "kits19": Converter(partial(_masks, name="kits19-mini"), REAL, "CC BY-NC-SA 4.0"),
    "curvas-ct": Converter(partial(_masks, name="curvas-ct"), REAL, "CC BY-NC 4.0"),
    "bhsd-ct": Converter(partial(_masks, name="bhsd-ct"), REAL, "MIT"),
    "lgg-mri": Converter(lgg_mri, REAL, "CC BY-NC-SA 4.0"),
    # Ultrasound
    "busi": Converter(partial(_masks, name="busi"), REAL),
    "liver-us": Converter(partial(_masks, name="liver-us"), REAL, "CC BY 4.0"),
    "tn3k": Converter(partial(_masks, name="tn3k"), FIXTURE),
    "hc18": Converter(others.hc18, FIXTURE, "CC BY 4.0"),
    # Fundus, endoscopy, dermoscopy, microscopy
    "idrid-yolo": Converter(yolo.idrid_yolo, REAL, "CC BY 4.0"),
    "idrid": Converter(others.idrid, FIXTURE, "CC BY 4.0"),
    "refuge": Converter(others.refuge, FIXTURE),
    "kvasir-seg": Converter(partial(_masks, name="kvasir-seg"), REAL, "research and education only"),
    "cvc-clinicdb": Converter(partial(_masks, name="cvc-clinicdb"), FIXTURE),
    "isic2018": Converter(partial(_masks, name="isic2018"), REAL, "CC BY-NC 4.0"),
    "ph2": Converter(partial(_masks, name="ph2"), FIXTURE, "research and education only"),
    "bccd": Converter(voc.bccd, REAL, "MIT"),
    # Collections
    "slake": Converter(slake.slake, BOTH, "CC BY 4.0"),
    "biomedparse": Converter(medical.biomedparse, FIXTURE),
    "imed361m": Converter(medical.imed361m, FIXTURE),
    "samed2d": Converter(medical.samed2d, FIXTURE),
    "medsam": Converter(medical.medsam, FIXTURE),
}
