import pytest

from eval.findings import Finding, compare_findings, finding_scores, parse_findings
from grounding.labels import load_label_tree

TREE = load_label_tree()
LEFT_TEMPORAL = Finding("lesion", "temporal_lobe", "left")
RIGHT_THALAMUS = Finding("lesion", "thalamus", "right")

TRUTH = {
    "a": "A 15 mm bright, solid, round lesion with a sharp margin in the left temporal lobe.",
    "b": "A 20 mm dark, ring-shaped lesion in the right thalamus. A 10 mm lesion in the left temporal lobe.",
    "c": "No lesion is seen.",
}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (TRUTH["a"], [LEFT_TEMPORAL]),
        (TRUTH["a"].replace("lobe.", "lobe [r0]."), [LEFT_TEMPORAL]),
        (TRUTH["b"], [RIGHT_THALAMUS, LEFT_TEMPORAL]),
        ("No lesion is seen.", []),
        ("Normal study.", []),
        ("", []),
        ("There is no lesion in the left temporal lobe.", []),
        ("A lesion is not seen in the left temporal lobe.", []),
        ("No lesion in the left temporal lobe, but a mass in the right thalamus.", [RIGHT_THALAMUS]),
        ("3 lesions in the left temporal lobe and right thalamus.", [LEFT_TEMPORAL, RIGHT_THALAMUS]),
        ("Two 10 mm lesions, both in the temporal lobe on the left.", [LEFT_TEMPORAL]),
        ("A 1.5 cm lesion in the brain.", [Finding("lesion", "brain", None)]),
        ("A lesion in the left temporal lobe of the brain.", [LEFT_TEMPORAL]),
        ("LEFT TEMPORAL LOBE LESION", [LEFT_TEMPORAL]),
        ("A lesion in the left insular cortex.", [Finding("lesion", "insula", "left")]),
        ("A lesion in the temporal lobe.", [Finding("lesion", "temporal_lobe", None)]),
        ("A lesion.", [Finding("lesion", None, None)]),
        ("The left temporal lobe is normal.", []),
        ("Findings: No lesion is seen. Impression: Normal study.", []),
        (
            "Findings: A lesion in the right thalamus.\nImpression: Single lesion in the right thalamus.",
            [RIGHT_THALAMUS],
        ),
    ],
)
def test_parse_findings(report, expected):
    assert parse_findings(report, TREE) == expected


@pytest.mark.parametrize("label", [i for i in TREE.ids if TREE.is_finding(i)])
def test_every_finding_of_the_tree_is_read_back(label):
    place = TREE.parent(label)
    (finding,) = parse_findings(f"A 10 mm bright lesion in the {TREE.phrase(place)}.", TREE)
    assert finding.side == TREE.laterality(place)
    assert finding.structure == place.rpartition("/")[2].removeprefix(f"{finding.side}_")
    assert parse_findings(f"No {TREE.phrase(label)}.", TREE) == []


def test_perfect_reports_score_one():
    scores = finding_scores(TRUTH, TRUTH, tree=TREE)
    for aspect in ("finding", "structure", "side", "count"):
        assert [scores[aspect][name].value for name in ("precision", "recall", "f1")] == [1.0, 1.0, 1.0]
    assert scores["presence"].value == 1.0


def test_exact_counts():
    said = {
        "a": "A 15 mm lesion in the right temporal lobe.",  # wrong side
        "b": "A 10 mm lesion in the left temporal lobe. A lesion in the left temporal lobe.",  # one right, one invented
        "c": "No lesion is seen.",
    }
    scores = finding_scores(said, TRUTH, tree=TREE)
    rows = {row["sample_id"]: (row["tp"], row["fp"], row["fn"]) for row in scores["finding"]["f1"].per_sample}
    assert rows == {"a": (0, 1, 1), "b": (1, 1, 1), "c": (0, 0, 0)}
    assert scores["finding"]["f1"].value == pytest.approx(1 / 3)
    assert scores["structure"]["f1"].value == pytest.approx(2 / 3)
    assert scores["side"]["f1"].value == pytest.approx(1 / 3)
    assert scores["count"]["f1"].value == 1.0
    assert scores["presence"].value == 1.0


def test_a_missing_report_is_wrong_also_for_a_normal_study():
    scores = finding_scores({}, TRUTH, tree=TREE)
    assert (scores["presence"].value, scores["finding"]["recall"].value) == (0.0, 0.0)
    assert str(scores["finding"]["precision"]) == "undefined (no findings stated)"


def test_normal_studies_alone_have_no_f1():
    scores = finding_scores({"c": TRUTH["c"]}, {"c": TRUTH["c"]}, tree=TREE)
    assert scores["finding"]["f1"].value is None
    assert scores["presence"].value == 1.0


def test_order_changes_nothing_and_patients_are_clusters():
    said = {i: TRUTH["a"] for i in TRUTH}
    turned = dict(reversed(TRUTH.items()))
    assert finding_scores(said, TRUTH, tree=TREE) == finding_scores(said, turned, tree=TREE)
    one_patient = finding_scores(said, TRUTH, dict.fromkeys(TRUTH, "p"), tree=TREE)
    assert one_patient["finding"]["f1"].ci95 is None


def test_compare_findings():
    truth = {f"{i}{k}": text for i, text in TRUTH.items() for k in range(20)}
    worse = {i: text.replace("left", "right") for i, text in truth.items()}
    result = compare_findings(truth, worse, truth, tree=TREE)
    assert (result["a"], result["n"]) == (1.0, 60)
    assert result["difference"] == pytest.approx(2 / 3)
    assert 0 < result["ci95"][0] < 2 / 3 < result["ci95"][1]
    assert compare_findings(truth, truth, truth, tree=TREE)["ci95"] == (0.0, 0.0)
