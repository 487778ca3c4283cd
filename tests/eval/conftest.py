"""What the tests of the rule labeler share: its answers, written short."""

import pytest

from eval.labeler import label

CODES = {
    "EC": "Enlarged Cardiomediastinum",
    "CM": "Cardiomegaly",
    "LO": "Lung Opacity",
    "LL": "Lung Lesion",
    "ED": "Edema",
    "CO": "Consolidation",
    "PN": "Pneumonia",
    "AT": "Atelectasis",
    "PX": "Pneumothorax",
    "PE": "Pleural Effusion",
    "PO": "Pleural Other",
    "FR": "Fracture",
    "SD": "Support Devices",
}
MARKS = {1: "+", 0: "-", -1: "?"}


@pytest.fixture(scope="session")
def read_labels():
    """Report → what is said of CODES: {"PE-", "CM+", "PN?"}: denied, there, may be; No Finding aside."""
    short = {name: code for code, name in CODES.items()}

    def read(report):
        labels = label(report).items()
        return {short[name] + MARKS[value] for name, value in labels if name in short and value is not None}

    return read
