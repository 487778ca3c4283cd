"""Whole reports under the labeler: its 14 observations, CheXpert's own samples, and real reports."""

import csv
import itertools
from pathlib import Path

import pytest

from eval.labeler import OBSERVATIONS, label, mentions

SHARED = Path(__file__).resolve().parents[3] / "shared"

NORMAL = ["No acute cardiopulmonary process.", "Heart size normal and lungs are clear.", "Normal chest radiograph."]


@pytest.mark.parametrize("report", NORMAL)
def test_a_normal_report_has_no_finding(report):
    assert label(report)["No Finding"] == 1


@pytest.mark.parametrize("report", ["", "   \n", "?", "I cannot read this image.", "心脏大小正常", "42"])
def test_a_text_that_says_nothing_has_no_label(report):
    assert set(label(report).values()) == {None}


def test_no_finding_is_about_pathology():
    assert label("Pacemaker in place. Lungs are clear.")["No Finding"] == 1
    assert label("Small effusion.")["No Finding"] is None
    assert label("Possible effusion.")["No Finding"] is None


def test_labels_are_the_fourteen_in_order():
    assert tuple(label("No effusion.")) == OBSERVATIONS and len(OBSERVATIONS) == 14


@pytest.mark.parametrize(
    ("parts", "value"),
    [
        (("No effusion.", "Small effusion."), 1),
        (("No effusion.", "Possible effusion."), -1),
        (("Small effusion.", "Possible effusion."), 1),
    ],
)
def test_positive_wins_over_uncertain_over_negative(parts, value):
    for order in itertools.permutations(parts):
        assert label(" ".join(order))["Pleural Effusion"] == value


def test_mentions_tell_where_a_label_comes_from():
    report = "Heart is enlarged. No effusion."
    found = {(m.observation, m.value, m.text) for m in mentions(report)}
    assert found == {("Cardiomegaly", 1, "Heart is enlarged"), ("Pleural Effusion", 0, "No effusion")}


def test_wrapped_lines_are_one_sentence(read_labels):
    words = "No focal consolidation in either lung and no evidence of right or left pneumothorax or pleural effusion."
    for width in (45, 50, 60):
        lines, line = [], ""
        for word in words.split():
            line, full = (word, line) if len(line) + 1 + len(word) > width else (f"{line} {word}".strip(), "")
            lines += [full] if full else []
        assert read_labels("\n".join([*lines, line])) == {"CO-", "PX-", "PE-"}


def test_a_very_long_text_is_read():
    assert label("No effusion. " * 80_000)["Pleural Effusion"] == 0
    assert label("no " * 20_000 + "effusion")["Pleural Effusion"] == 0


def test_chexpert_samples():
    """Four reports and 14 labels each; at least 54 of the 56 as stanfordmlgroup/chexpert-labeler gives them."""
    path = SHARED / "vectors/chexpert/labeled_reports.csv"
    if not path.is_file():
        pytest.skip("shared/vectors is not here")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = 0
    for row in rows:
        labels = label(row["Reports"])
        right += sum(labels[name] == (int(float(row[name])) if row[name] else None) for name in OBSERVATIONS)
    assert len(rows) * len(OBSERVATIONS) == 56
    assert right >= 54


def test_agreement_with_the_index_terms_of_real_reports():
    """The MeSH-like terms of 3,851 reports are a rough guide: what they name, the labeler should mostly find."""
    path = SHARED / "data/iu-xray-text/indiana_reports.csv"
    if not path.is_file():
        pytest.skip("shared/data is not here")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:1000]
    for term in ("Cardiomegaly", "Pleural Effusion", "Pulmonary Atelectasis"):
        observation = term.removeprefix("Pulmonary ")
        found = [label(f"{row['findings']} {row['impression']}")[observation] in (1, -1) for row in rows]
        named = [term in row["Problems"].split(";") for row in rows]
        both = sum(a and b for a, b in zip(found, named, strict=True))
        assert both / sum(named) > 0.9, term
        assert both / sum(found) > 0.7, term
