"""Clinical metrics: the pairs of RadEval, scikit-learn's numbers, entities in every modality, optional programs."""

import json
import random
import sys
from pathlib import Path

import pytest

from eval.clinical import ASPECTS, chexpert_scores, entity_scores, label_scores
from eval.entities import Entity, read_entities
from eval.labeler import FIVE, OBSERVATIONS, label
from eval.report_models import MODELS, model_scores
from eval.text import text_scores
from eval.types import Score, ScoreError, plain

SHARED = Path(__file__).resolve().parents[3] / "shared"

REPORTS = [
    "No acute cardiopulmonary process.",
    "Mild cardiomegaly. Small left pleural effusion. No pneumothorax.",
    "Possible right lower lobe pneumonia. Heart size is normal.",
    "Large right pneumothorax. Right chest tube in place.",
    "Moderate pulmonary edema with bilateral pleural effusions.",
    "Left lower lobe consolidation. No effusion.",
    "Stable left upper lobe nodule. Old rib fractures.",
    "",
]


@pytest.fixture(scope="module")
def pairs():
    path = SHARED / "vectors/radeval/divergence_examples.json"
    if not path.is_file():
        pytest.skip("shared/vectors is not here")
    return {pair["id"]: pair for pair in json.loads(path.read_text(encoding="utf-8"))}


def scores_of(prediction, reference):
    """(observations' F1, entities' F1, the row that says what is wrong) of one pair."""
    chexpert = chexpert_scores({"x": prediction}, {"x": reference})["f1-14"]["micro"]
    report = entity_scores({"x": prediction}, {"x": reference})["report"]
    return chexpert.value, report.value, report.per_sample[0]


def of_pair(pair):
    return scores_of(pair["hyp"], pair["ref"])


def test_pair_1_paraphrase_is_rewarded_where_bleu_is_near_zero(pairs):
    chexpert, entities, row = of_pair(pairs[1])
    assert (chexpert, entities) == (1.0, 1.0)
    assert not any(row[key] for key in ("hallucinated", "missing", "misplaced", "other_severity", "contradicted"))
    words = text_scores({"x": pairs[1]["hyp"]}, {"x": [pairs[1]["ref"]]}, tokenizer="words", meteor=False)
    assert words["BLEU-4"].value < 0.01


def test_pair_2_negation_flip_scores_nothing(pairs):
    chexpert, entities, row = of_pair(pairs[2])
    assert (chexpert, entities) == (0.0, 0.0)
    assert row["contradicted"] == ["effusion (chest/pleura)"]


def test_pair_3_omission_is_penalised_in_recall_alone(pairs):
    pair = pairs[3]
    chexpert = chexpert_scores({"x": pair["hyp"]}, {"x": pair["ref"]})
    assert (chexpert["precision"].value, chexpert["recall"].value) == (1.0, 0.5)
    entities = entity_scores({"x": pair["hyp"]}, {"x": pair["ref"]})
    assert entities["all"]["precision"].value == 1.0
    assert entities["all"]["recall"].value == pytest.approx(1 / 3)
    assert entities["report"].per_sample[0]["missing"] == [
        "mild left effusion (chest/pleura)",
        "mild right effusion (chest/pleura)",
    ]


def test_pair_4_hallucination_is_penalised(pairs):
    chexpert, entities, row = of_pair(pairs[4])
    assert (chexpert, entities) == (0.0, 0.0)
    assert row["hallucinated"] == ["mild right pneumothorax (chest/pleura)"] and not row["missing"]
    assert scores_of(pairs[4]["ref"], pairs[4]["ref"])[:2] == (1.0, 1.0)


def test_pair_5_exact_match_has_the_maximum(pairs):
    assert of_pair(pairs[5])[:2] == (1.0, 1.0)


def test_pair_6_total_mismatch_bottoms_out(pairs):
    chexpert, entities, row = of_pair(pairs[6])
    assert (chexpert, entities) == (0.0, 0.0)
    assert row["hallucinated"] == ["right mass (chest/lung/upper_lobe)"]
    assert {text.split(" (")[0] for text in row["missing"]} == {"left consolidation", "left pneumonia"}


def test_pair_7_severity_flip_is_caught_by_the_entities_alone(pairs):
    pair = pairs[7]
    chexpert, report, row = of_pair(pair)
    assert chexpert == 1.0  # labels of this granularity cannot see it
    scores = entity_scores({"x": pair["hyp"]}, {"x": pair["ref"]})
    assert [scores[aspect]["f1"].value for aspect in ASPECTS] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert 0 < report < 1
    assert row["other_severity"] == ["severe pulmonary oedema (chest)"]


def test_pair_8_opposite_conclusion_is_flagged(pairs):
    chexpert, entities, row = of_pair(pairs[8])
    assert (chexpert, entities) == (0.0, 0.0)
    assert row["contradicted"] == ["right consolidation (chest/lung/lower_lobe)"]
    assert len(row["missing"]) == 2


def test_the_pairs_rank_as_their_texts_say(pairs):
    """Same meaning above a part of it or a wrong degree, and those above the opposite, the invented, the other."""
    for metric in (1, 0):
        value = {k: of_pair(pair)[metric] for k, pair in pairs.items()}
        assert min(value[1], value[5]) == 1.0
        assert 0 < value[3] < 1.0
        assert max(value[k] for k in (2, 4, 6, 8)) < min(value[3], value[7])
    words = {
        k: text_scores({"x": p["hyp"]}, {"x": [p["ref"]]}, tokenizer="words", meteor=False)["ROUGE-L"].value
        for k, p in pairs.items()
    }
    assert words[2] > words[1]  # and words alone rank them the other way round


def drawn(n, seed=0):
    rng = random.Random(seed)
    truth = {f"s{k}": rng.choice(REPORTS) for k in range(n)}
    said = {i: text if rng.random() < 0.4 else rng.choice(REPORTS) for i, text in truth.items()}
    return said, truth


@pytest.mark.parametrize(("family", "names"), [("f1-14", OBSERVATIONS), ("f1-5", FIVE)])
@pytest.mark.parametrize("doubt", [True, False])
def test_f1_equals_scikit_learns(family, names, doubt):
    metrics = pytest.importorskip("sklearn.metrics")
    said, truth = drawn(200)
    scores = chexpert_scores(said, truth)
    scores = scores if doubt else scores["uncertain as negative"]
    wanted = (1, -1) if doubt else (1,)
    a, b = ([[label(texts[i])[o] in wanted for o in names] for i in sorted(truth)] for texts in (said, truth))
    supported = [k for k in range(len(names)) if any(row[k] for row in (*a, *b))]
    a, b = ([[row[k] for k in supported] for row in rows] for rows in (a, b))
    for average in ("micro", "macro", "weighted"):
        expected = metrics.f1_score(b, a, average=average, zero_division=0)
        assert scores[family][average].value == pytest.approx(expected, abs=1e-12)
    some = [k for k in range(len(a)) if any(a[k]) or any(b[k])]
    expected = metrics.f1_score([b[k] for k in some], [a[k] for k in some], average="samples", zero_division=0)
    assert scores[family]["example"].value == pytest.approx(expected, abs=1e-12)


def all_scores(results):
    for value in results.values():
        if isinstance(value, Score):
            yield value
        elif isinstance(value, dict):
            yield from all_scores(value)


@pytest.mark.parametrize("metric", [chexpert_scores, entity_scores])
def test_perfect_reports_score_one_and_order_changes_nothing(metric):
    said, truth = drawn(60)
    perfect = metric({i: text or "Normal." for i, text in truth.items()}, truth)
    assert {s.value for s in all_scores(metric(truth, {i: t for i, t in truth.items() if t}))} <= {1.0, None}
    assert perfect["version"]
    assert metric(said, truth) == metric(dict(reversed(said.items())), dict(reversed(truth.items())))


@pytest.mark.parametrize("metric", [chexpert_scores, entity_scores])
def test_intervals_resample_patients(metric):
    said, truth = drawn(80)
    alone = [s for s in all_scores(metric(said, truth)) if s.value is not None]
    assert all(s.ci95 is not None and s.ci95[0] <= s.value <= s.ci95[1] for s in alone)
    one = metric(said, truth, dict.fromkeys(truth, "p"))
    assert all(s.ci95 is None and s.clusters in (1, None) for s in all_scores(one))
    # Each report four times over, of the same patient, says no more than once.
    four = [{f"{i}/{k}": text for i, text in texts.items() for k in range(4)} for texts in (said, truth)]
    again = [s for s in all_scores(metric(*four, {i: i.split("/")[0] for i in four[1]})) if s.value is not None]
    for a, b in zip(alone, again, strict=True):
        assert b.value == pytest.approx(a.value)
        assert (b.ci95[1] - b.ci95[0]) == pytest.approx(a.ci95[1] - a.ci95[0], abs=0.12)


@pytest.mark.parametrize("metric", [chexpert_scores, entity_scores])
def test_bad_input_gives_reasons_not_zeros(metric):
    nothing = metric({}, {})
    assert all(s.value is None and s.reason == "no reports" for s in all_scores(nothing))
    missing = metric({}, {"a": REPORTS[1]})
    assert {s.value for s in all_scores(missing)} <= {0.0, None}
    json.dumps(plain(metric({"a": "心脏增大。" * 50, "b": "\x00"}, {"a": "42", "b": REPORTS[4]})), allow_nan=False)


def test_a_report_that_says_nothing_does_not_agree_with_a_normal_one():
    truth = {"x": REPORTS[0]}
    for text, value in ((REPORTS[0], 1.0), ("The lungs are clear.", 1.0), ("", 0.0), ("I cannot tell.", 0.0)):
        assert entity_scores({"x": text}, truth)["report"].value == value


def test_label_scores_take_the_labels_of_any_program():
    truth = {"a": {"Edema": 1, "Fracture": -1}, "b": {"Edema": 0}}
    scores = label_scores({"a": {"Edema": 1}, "b": {"Edema": -1}}, truth)
    assert (scores["precision"].value, scores["recall"].value) == (0.5, 0.5)
    assert scores["uncertain as negative"]["f1-14"]["micro"].value == 1.0
    (first, second) = scores["f1-14"]["micro"].per_sample
    assert (first["missing"], second["hallucinated"]) == (["Fracture"], ["Edema"])


ENTITIES = [
    ("xray", "Small right and moderate left pleural effusions.",
     {("effusion", "chest/pleura", "right", "mild"), ("effusion", "chest/pleura", "left", "moderate")}),
    ("xray", "Opacities in the right upper lobe and left lower lobe.",
     {("opacity", "chest/lung/upper_lobe", "right", None), ("opacity", "chest/lung/lower_lobe", "left", None)}),
    ("xray", "Left lower lobe opacity, likely atelectasis.",
     {("opacity", "chest/lung/lower_lobe", "left", None), ("atelectasis", "chest/lung/lower_lobe", "left", None)}),
    ("xray", "Right middle lobe opacity may reflect atelectasis or pneumonia.",
     {(kind, "chest/lung/middle_lobe", "right", None) for kind in ("opacity", "atelectasis", "pneumonia")}),
    ("xray", "The chest tube projects outside the thoracic cavity.", {("chest_tube", "chest", None, None)}),
    ("xray", "The left hemidiaphragm is elevated.", {("elevated_diaphragm", "chest/diaphragm", "left", None)}),
    ("xray", "Left rib fracture.", {("fracture", "chest/skeleton/rib", "left", None)}),
    ("xray", "In the left lower lobe there is an opacity.", {("opacity", "chest/lung/lower_lobe", "left", None)}),
    ("xray", "Mild edema and large right effusion.",
     {("pulmonary_oedema", "chest", None, "mild"), ("effusion", "chest/pleura", "right", "severe")}),
    ("xray", "Pleural effusion, small, on the right.", {("effusion", "chest/pleura", "right", "mild")}),
    ("mri", "A 15 mm bright lesion in the left temporal lobe. No lesion in the right thalamus.",
     {("lesion", "brain/temporal_lobe", "left", None)}),
    ("mri", "Left frontal and right parietal lesions.",
     {("lesion", "brain/frontal_lobe", "left", None), ("lesion", "brain/parietal_lobe", "right", None)}),
    ("ct", "Two lesions in the liver. Simple cyst in the right kidney. Gallstones.",
     {("liver_lesion", "abdomen/liver", None, None), ("kidney_cyst", "abdomen/kidney", "right", None),
      ("gallstone", "abdomen/gallbladder", None, None)}),
    ("ct", "Subdural haemorrhage on the left.", {("subdural_haemorrhage", "brain", "left", None)}),
    ("ultrasound", "Irregular mass in the left breast.", {("breast_lesion", "breast", "left", None)}),
    ("endoscopy", "A polyp in the colon. No ulcer.", {("polyp", "gastrointestinal_tract/colon", None, None)}),
    ("fundus", "Microaneurysms near the left macula.", {("microaneurysm", "eye/retina/macula", "left", None)}),
    ("dermoscopy", "Lesion suspicious for melanoma.",
     {("skin_lesion", "skin", None, None), ("melanoma", "skin", None, None)}),
    ("microscopy", "Several malaria parasites are seen.", {("malaria_parasite", "blood_smear", None, None)}),
]  # fmt: skip


@pytest.mark.parametrize(("modality", "report", "expected"), ENTITIES)
def test_entities(modality, report, expected):
    assert set(read_entities(report, modality).stated) == {Entity(*row) for row in expected}


def test_a_name_means_what_the_modality_has():
    found = {m: read_entities("A lesion.", m).stated[0].finding for m in ("mri", "dermoscopy", "ultrasound")}
    assert found["mri"] == "lesion" and found["dermoscopy"] == "skin_lesion"
    truth = {"a": "A lesion.", "b": "Small effusion."}
    scores = entity_scores(truth, truth, modality={"a": "mri", "b": "xray"})
    assert {kind: s["all"].value for kind, s in scores["by_modality"].items()} == {"mri": 1.0, "xray": 1.0}


def test_an_impression_that_repeats_the_findings_adds_nothing():
    findings = "Small left pleural effusion. Opacity in the right lower lobe."
    assert (
        read_entities(findings + " IMPRESSION: Effusion. Right basilar opacity.").stated
        == read_entities(findings).stated
    )


@pytest.mark.parametrize(
    ("said", "agree"),
    [
        ("Opacity in the left lower lobe.", {"finding", "location", "side", "severity", "all"}),
        ("Opacity in the left lung.", {"finding", "location", "side", "severity", "all"}),
        ("Left basilar opacity.", {"finding", "location", "side", "severity", "all"}),
        ("Opacity in the right lower lobe.", {"finding", "location", "severity"}),
        ("Opacity in the left upper lobe.", {"finding", "side", "severity"}),
        ("Large opacity in the left lower lobe.", {"finding", "location", "side"}),
        ("Mass in the left lower lobe.", set()),
    ],
)
def test_what_agrees_under_which_aspect(said, agree):
    scores = entity_scores({"x": said}, {"x": "Opacity in the left lower lobe."}, modality="xray")
    assert {aspect for aspect in ASPECTS if scores[aspect]["f1"].value == 1.0} == agree


def test_a_program_that_is_not_there_is_named_in_one_line():
    for name, (_, packages) in MODELS.items():
        with pytest.raises(ScoreError) as error:
            model_scores(name, {"x": "a"}, {"x": "b"})
        text = str(error.value)
        assert packages in text or packages.split()[0] in text
        assert "\n" not in text and ("pip install" in text or "network" in text)
    with pytest.raises(ScoreError, match="unknown metric 'rouge'; choose one of chexbert"):
        model_scores("rouge", {}, {})
    with pytest.raises(ScoreError, match="does not start"):
        model_scores("green", {"x": "a"}, {"x": "b"}, python="/nowhere/python")
    with pytest.raises(ScoreError, match="failed: exit code 1"):
        model_scores("green", {"x": "a"}, {"x": "b"}, python="/bin/false")
    assert str(model_scores("radcliq", {}, {}, python=sys.executable)["radcliq"]) == "undefined (no reports)"
