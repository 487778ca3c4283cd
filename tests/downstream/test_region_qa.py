import json
from collections import Counter, defaultdict
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from scipy import ndimage

from downstream.citations import cite
from downstream.cli import main
from downstream.region_qa import build_region_qa, read_looks
from downstream.region_qa_looks import LOOKS, looks_of, measure, thresholds_of
from downstream.region_qa_questions import FEATURES, box_of, counted, organ_of, place_of, plural, with_article
from downstream.samples import read_questions, read_reports
from eval.findings import parse_findings
from grounding.labels import load_label_tree
from grounding.store import open_store, write_store
from grounding.types import GroundingSample, RegionSet, RegionTokens

POLYP = "gastrointestinal_tract/polyp"
LIVER, KIDNEY = "abdomen/liver", "abdomen/kidney"
SIDE = 128
BRIGHT = {"brightness": "brighter", "margin": "sharp", "shape": "round", "texture": "homogeneous"}
DARK = {"brightness": "darker", "margin": "blurred", "shape": "irregular", "texture": "heterogeneous"}


def blob(looks: dict[str, str], row: int, column: int, radius: float, rng) -> tuple[np.ndarray, np.ndarray]:
    """(grey levels to add (S, S) float, mask (S, S) bool) of a region with the looks."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - np.array([row, column])[:, None, None]
    angle = np.arctan2(rows, columns)
    wave = 1 + (0.3 * np.cos(3 * angle + 1) if looks["shape"] == "irregular" else 0 * angle)
    mask = np.hypot(rows, columns) <= radius * wave
    level = np.where(mask, 60.0 if looks["brightness"] == "brighter" else -60.0, 0.0)
    if looks["margin"] == "blurred":
        level = ndimage.gaussian_filter(level, 3)
    noise = 14 if looks["texture"] == "heterogeneous" else 1
    return level + np.where(mask, rng.normal(0, noise, mask.shape), 0), mask


def coded(mask: np.ndarray) -> dict:
    return {"size": list(mask.shape), "counts": rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()}


def box_around(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0] / SIDE, rows[0] / SIDE, (columns[-1] + 1) / SIDE, (rows[-1] + 1) / SIDE]


def image_of(number: int, parts, labelled, modality="endoscopy", spacing=None, with_masks=True) -> GroundingSample:
    """parts: (label, mask, grey levels to add)."""
    grey = 120.0 + sum((level for _, _, level in parts), np.zeros((SIDE, SIDE)))
    file = BytesIO()
    Image.fromarray(grey.clip(6, 249).astype(np.uint8)).save(file, "PNG")
    regions = RegionSet(
        boxes=np.array([box_around(mask) for _, mask, _ in parts]).reshape(-1, 4),
        labels=[label for label, _, _ in parts],
        image_size=(SIDE, SIDE),
        masks=[coded(mask) for _, mask, _ in parts] if with_masks and parts else None,
    )
    name = f"{modality}{number}"
    return GroundingSample(name, f"p{name}", "made", modality, file.getvalue(), regions, labelled, spacing)


def polyps(n: int, label: str = POLYP, seed: int = 0, with_masks: bool = True) -> list[GroundingSample]:
    """Images with a bright sharp disc on the left (even) or a dark blurred irregular blob on the right (4k + 1); half
    as many more without any."""
    rng, images = np.random.default_rng(seed), []
    for k in range(n):
        looks, column = ((BRIGHT, 36), (DARK, 92), (BRIGHT, 92), (DARK, 36))[k % 4]
        level, mask = blob(looks, int(rng.integers(28, 100)), column, rng.uniform(15, 19), rng)
        images.append(image_of(k, [(label, mask, level)], (label,), with_masks=with_masks))
    return images + [image_of(n + k, [], (label,)) for k in range(n // 2)]


def organs(n: int) -> list[GroundingSample]:
    """A liver on the left, a kidney on the right, and something that no label tree knows in the one or the other."""
    rng, images = np.random.default_rng(1), []
    left, right = (np.zeros((SIDE, SIDE), bool) for _ in range(2))
    left[20:110, 8:60], right[30:90, 68:110] = True, True
    for k in range(n):
        level, spot = blob(BRIGHT, 60, 34 if k % 2 else 88, 6 if k % 4 < 2 else 11, rng)
        parts = [(LIVER, left, 30 * left), (KIDNEY, right, 20 * right), ("odd spot", spot, level)]
        images.append(image_of(k, parts, (LIVER, KIDNEY, "odd spot"), "ct", (2.0, 2.0)))
    return images


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "store"
    write_store([*polyps(40), *organs(24)], folder, "made")
    return folder


@pytest.fixture(scope="module")
def built(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("qa")
    return out, build_region_qa(store, out, seed=0, per_image=6)


def test_the_measures_tell_a_bright_sharp_disc_from_a_dark_blurred_irregular_blob():
    rng = np.random.default_rng(0)
    found = []
    for looks in (BRIGHT, DARK):
        level, mask = blob(looks, 60, 60, 18, rng)
        found.append(measure((120 + level).clip(0, 255).astype(np.uint8), mask))
    disc, odd = found
    assert disc["brightness"] == pytest.approx(60, abs=2) and odd["brightness"] < -35
    assert disc["contrast"] == pytest.approx(abs(disc["brightness"]), abs=0.01)  # a grey picture
    assert disc["margin"] > 0.95 and odd["margin"] < 0.6
    assert disc["shape"] > 0.97 and odd["shape"] < 0.85
    assert disc["texture"] < 2 and odd["texture"] > 10


def test_what_is_small_or_cut_or_long_is_not_measured():
    grey, mask = np.full((SIDE, SIDE), 100, np.uint8), np.zeros((SIDE, SIDE), bool)
    assert measure(grey, mask) == {}
    mask[40:50, 40:50] = True
    assert measure(grey, mask) == {}
    mask[:30, 40:70] = True
    assert "shape" not in measure(grey, mask)
    mask[:] = False
    mask[40:60, 20:100] = True
    assert "shape" not in measure(grey, mask) and "margin" not in measure(grey, mask)  # long; no step


def test_black_and_bone_around_a_region_are_no_surroundings():
    grey, mask = np.full((SIDE, SIDE), 100, np.uint8), np.zeros((SIDE, SIDE), bool)
    mask[40:80, 40:80], grey[40:80, 40:80] = True, 120
    plain = measure(grey, mask)["brightness"]
    grey[:, 84:], grey[84:] = 255, 0
    assert measure(grey, mask)["brightness"] == plain
    assert plain == pytest.approx(20)  # greys are float32: the last bit is the processor's


def test_a_look_is_a_third_of_its_kind_and_the_middle_has_none():
    regions = [("mri", "brain/glioma", {"texture": float(value)}) for value in range(31)]
    thresholds = thresholds_of(regions)
    assert thresholds == {"mri|brain/glioma": {"texture": [10.0, 20.0]}}
    said = [looks_of({"texture": float(v)}, thresholds, "mri", "brain/glioma").get("texture") for v in (5, 15, 25)]
    assert said == ["homogeneous", None, "heterogeneous"]
    assert looks_of({"texture": 5.0}, thresholds, "ct", "brain/glioma") == {}
    assert thresholds_of(regions[:11]) == {"mri|brain/glioma": {}}


def test_thirds_that_lie_close_are_moved_apart():
    low, high = thresholds_of([("mri", "a", {"texture": 5 + k / 100}) for k in range(20)])["mri|a"]["texture"]
    assert high - low == pytest.approx(4)


def test_every_answer_about_looks_is_that_of_the_drawing(built):
    out, _ = built
    asked = [q for q in read_questions(out / "questions.jsonl") if q.modality == "endoscopy"]
    told = [q for q in asked if q.question_type in ("margin", "shape", "texture") or q.answer in ("brighter", "darker")]
    assert {q.question_type for q in told} >= {"margin", "shape", "texture", "brightness"}
    for question in told:
        looks = (BRIGHT, DARK)[int(question.image_id.removeprefix("endoscopy")) % 2]
        assert question.answer == looks[question.question_type], question


def test_side_and_presence_and_organ_are_those_of_the_drawing(built):
    out, _ = built
    kinds = defaultdict(list)
    for question in read_questions(out / "questions.jsonl"):
        kinds[question.question_type, question.modality].append(question)
    for q in kinds["side", "endoscopy"]:
        assert q.answer == ("left" if int(q.image_id[9:]) % 4 in (0, 3) else "right")
    for q in kinds["presence", "endoscopy"]:
        assert q.answer == ("yes" if int(q.image_id[9:]) < 40 else "no") and " polyp" in q.question
    for q in kinds["organ", "ct"]:
        assert q.answer == ("liver" if int(q.image_id[2:]) % 2 else "kidney") and "the odd spot" in q.question
    for q in kinds["size", "ct"]:
        assert q.answer == ("no" if int(q.image_id[2:]) % 4 < 2 else "yes") and "mm" in q.question
    wanted = ("side", "endoscopy"), ("presence", "endoscopy"), ("organ", "ct"), ("size", "ct")
    assert all(kinds[cell] for cell in wanted)


def test_each_text_has_all_its_answers_equally_often(built):
    out, found = built
    counts = defaultdict(Counter)
    questions = read_questions(out / "questions.jsonl")
    for question in questions:
        counts[question.question, question.modality][question.answer] += 1
    assert all(len(set(answers.values())) == 1 and len(answers) > 1 for answers in counts.values())
    scores = found["scores"]
    assert scores["majority"]["value"] == pytest.approx(scores["chance"]["value"])
    assert scores["text_only"]["value"] <= scores["chance"]["value"] + 0.05
    assert len({question.sample_id for question in questions}) == len(questions) == found["questions"]


@pytest.mark.parametrize("per_image", [1, 6])
def test_a_quarter_of_the_questions_or_more_are_about_looks(tmp_path, per_image):
    boxes_only = [
        replace(sample, image_id=f"b{k}") for k, sample in enumerate(polyps(100, label="bump", with_masks=False))
    ]
    write_store([*polyps(16), *boxes_only], tmp_path / "store", "made")
    found = build_region_qa(tmp_path / "store", tmp_path / "qa", seed=1, per_image=per_image)
    questions = read_questions(tmp_path / "qa" / "questions.jsonl")
    looks = [question for question in questions if question.needs == "feature"]
    assert 0 < len(questions) <= per_image * found["images"]
    assert len(looks) >= 0.25 * len(questions)
    assert found["feature_share"] == pytest.approx(len(looks) / len(questions))
    assert {question.question_type for question in looks} <= set(FEATURES)


def test_the_seed_alone_decides(store, built, tmp_path):
    build_region_qa(store, tmp_path / "same", seed=0, per_image=6)
    build_region_qa(store, tmp_path / "other", seed=1, per_image=6)
    for name in ("questions.jsonl", "reports.jsonl", "thresholds.json", "looks.jsonl"):
        assert (tmp_path / "same" / name).read_bytes() == (built[0] / name).read_bytes()
    assert (tmp_path / "other" / "questions.jsonl").read_bytes() != (built[0] / "questions.jsonl").read_bytes()


def test_the_folder_is_what_training_reads(store, built):
    out, found = built
    opened = open_store(out / "store")
    assert opened.image_ids == open_store(store).image_ids
    assert {image for r in read_reports(out / "reports.jsonl") for image in r.images} <= set(opened.image_ids)
    for image_id, looks in read_looks(out / "looks.jsonl").items():
        assert len(looks) == len(opened.by_id(image_id).regions)
    card = (out / "CARD.md").read_text()
    assert f"{found['questions']:,} questions" in card and "Without looking" in card


def test_a_second_part_is_judged_by_the_thresholds_of_the_first(built, tmp_path):
    pale = [image_of(k, [(POLYP, *_bright_one(k))], (POLYP,)) for k in range(16)]
    write_store([*pale, *polyps(8, seed=3)[1:8:2]], tmp_path / "store", "made")
    build_region_qa(tmp_path / "store", tmp_path / "qa", seed=0, per_image=6, train=built[0])
    assert (tmp_path / "qa" / "thresholds.json").read_bytes() == (built[0] / "thresholds.json").read_bytes()
    # Among themselves a third of these would be blurred; by the thresholds of the first part none is.
    said = read_looks(tmp_path / "qa" / "looks.jsonl")
    assert not any("blurred" in said[f"endoscopy{k}"][0] for k in (0, 2, 4, 6, 8, 10))


def _bright_one(number: int):
    level, mask = blob(BRIGHT, 60, 60, 16, np.random.default_rng(number))
    return mask, level


def test_a_train_folder_that_is_none_is_named(store, tmp_path):
    with pytest.raises(ValueError, match="nothing: not what medglip data regionqa wrote for the training part"):
        build_region_qa(store, tmp_path / "qa", 0, 4, train=tmp_path / "nothing")


def test_reports_state_the_findings_and_cite_finds_each_region(built):
    out, _ = built
    tree, opened = load_label_tree(), open_store(out / "store")
    texts = {}
    for report in read_reports(out / "reports.jsonl"):
        regions = opened.by_id(report.images[0]).regions
        texts[report.study_id] = report.findings
        wanted = [finding for label in regions.labels if label == POLYP for finding in parse_findings("polyp", tree)]
        assert [f.kind for f in parse_findings(report.findings, tree)] == [f.kind for f in wanted]
        cited = cite(report.findings, _slots(regions), tree)
        assert cited.count("[r0]") == regions.labels.count(POLYP)
    assert texts["endoscopy40"] == "No polyp is seen."
    assert texts["endoscopy0"].startswith("There is a polyp; it lies in the ")
    assert "left" in texts["endoscopy0"] and "right" in texts["endoscopy1"]
    assert "brighter than its surroundings" in texts["endoscopy0"] and "darker" in texts["endoscopy1"]
    assert texts["ct0"].startswith("The kidney and the liver are shown. There is an odd spot in the kidney; ")


def _slots(regions: RegionSet) -> RegionTokens:
    n = len(regions)
    return RegionTokens(
        features=torch.zeros(1, n, 1),
        boxes=torch.from_numpy(regions.boxes)[None],
        scores=torch.ones(1, n),
        labels=[regions.labels],
        label_vectors=torch.zeros(1, n, 1),
        levels=torch.zeros(1, n, dtype=torch.long),
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


def test_many_of_one_kind_have_one_sentence(tmp_path):
    rng = np.random.default_rng(0)
    parts = [(POLYP, *blob(BRIGHT, 20 + 28 * k, 40, 8 + k, rng)[::-1]) for k in range(4)]
    write_store([image_of(0, parts, (POLYP,))], tmp_path / "store", "made")
    build_region_qa(tmp_path / "store", tmp_path / "qa", 0, 4)
    report = read_reports(tmp_path / "qa" / "reports.jsonl")[0]
    assert report.findings.startswith("There is more than one polyp, four in all; the largest lies in the lower left")
    assert report.impression == "Four polyps."


def test_a_store_without_masks_has_no_questions_about_looks_and_says_so(tmp_path):
    write_store(polyps(16, with_masks=False), tmp_path / "store", "made")
    found = build_region_qa(tmp_path / "store", tmp_path / "qa", 0, 4)
    assert found["questions"] and found["feature_share"] == 0
    assert all(question.needs == "boxes" for question in read_questions(tmp_path / "qa" / "questions.jsonl"))
    assert "No region has a mask" in (tmp_path / "qa" / "CARD.md").read_text()


def test_a_store_of_one_answer_yields_reports_alone_and_says_so(tmp_path):
    write_store(polyps(3)[:1], tmp_path / "store", "made")
    found = build_region_qa(tmp_path / "store", tmp_path / "qa", 0, 4)
    assert found["questions"] == 0 and found["reports"] == 1
    assert any(note.startswith("No question could be balanced") for note in found["notes"])


def test_an_empty_store_is_refused(tmp_path):
    write_store([], tmp_path / "store", "made")
    with pytest.raises(ValueError, match="holds no images"):
        build_region_qa(tmp_path / "store", tmp_path / "qa", 0, 4)


def test_another_store_in_the_folder_is_not_replaced(store, tmp_path):
    write_store(polyps(2), tmp_path / "store", "made")
    with pytest.raises(ValueError, match="another store is there"):
        build_region_qa(store, tmp_path, 0, 4)
    assert len(open_store(tmp_path / "store")) == 3


def test_labels_that_the_tree_does_not_know_are_asked_about_by_their_words(tmp_path):
    write_store(polyps(16, label="shiny bump"), tmp_path / "store", "made")
    build_region_qa(tmp_path / "store", tmp_path / "qa", 0, 4)
    questions = read_questions(tmp_path / "qa" / "questions.jsonl")
    assert questions and all("shiny bump" in question.question for question in questions)


def test_absence_is_not_asked_where_it_is_not_known(tmp_path):
    images = [replace(sample, labelled=()) for sample in polyps(16)]
    write_store(images, tmp_path / "store", "made")
    build_region_qa(tmp_path / "store", tmp_path / "qa", 0, 4)
    assert not {"presence", "count"} & {q.question_type for q in read_questions(tmp_path / "qa" / "questions.jsonl")}
    assert not any("No " in report.findings for report in read_reports(tmp_path / "qa" / "reports.jsonl"))


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0.1, 0.1, 0.3, 0.3), ("left", "upper left")),
        ((0.6, 0.1, 0.9, 0.9), ("right", None)),
        ((0.48, 0.7, 0.58, 0.8), (None, None)),  # most of it is right of the middle, but nobody would say so
        ((0.2, 0.7, 0.7, 0.8), (None, None)),
        ((0.7, 0.7, 0.7, 0.7), ("right", "lower right")),
    ],
)
def test_place_of(box, place):
    assert place_of(np.array(box)) == place


def test_the_smallest_structure_that_holds_most_of_a_finding():
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.1, 0.1, 0.3, 0.3], [0.4, 0.1, 0.68, 0.3]])
    regions = RegionSet(boxes, [LIVER, KIDNEY, "spot", "spot"], (SIDE, SIDE))
    tree = load_label_tree()
    assert organ_of(regions, 2, tree) == KIDNEY
    assert organ_of(regions, 3, tree) is None  # more than a third, less than half of it in the smaller one
    assert box_of("Where is the larger spot?", regions.select([0, 1, 2]), tree) is None
    assert box_of("Where is the spot?", regions.select([0, 2]), tree) == pytest.approx((0.1, 0.1, 0.3, 0.3))


@pytest.mark.parametrize(
    ("name", "many"),
    [("polyp", "polyps"), ("liver mass", "liver masses"), ("metastasis", "metastases"), ("biopsy", "biopsies"),
     ("Platelets", "Platelets"), ("subarachnoid haemorrhage", "areas of subarachnoid haemorrhage")],
)  # fmt: skip
def test_plural(name, many):
    assert plural(counted(name)) == many
    assert with_article("uterine fibroid") == "a uterine fibroid" and with_article("ulcer") == "an ulcer"


def test_the_command_writes_the_same_and_says_what_the_text_gives_away(store, built, tmp_path, capsys):
    arguments = ["data", "regionqa", str(store), "--out", str(tmp_path), "--per-image", "6", "--seed", "0"]
    assert main(arguments) == 0
    assert (tmp_path / "questions.jsonl").read_bytes() == (built[0] / "questions.jsonl").read_bytes()
    assert "from the text alone 0." in " ".join(capsys.readouterr().out.split())


def test_looks_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "looks.jsonl").write_text(json.dumps({"image_id": "a"}) + "\n")
    with pytest.raises(ValueError, match="looks.jsonl, line 1"):
        read_looks(tmp_path / "looks.jsonl")
    assert set(LOOKS) == {"texture", "margin", "shape", "contrast"}
