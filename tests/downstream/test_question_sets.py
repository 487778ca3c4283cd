"""``medglip data questions`` on the layouts of question sets: VQA-RAD, SLAKE and VQA-Med on their real files, the
others on fixtures written here in the layout of the page that each adapter cites."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from downstream.cli import main
from downstream.data import image_of
from downstream.samples import read_questions
from grounding.store import open_store

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"shared/data/{name} is not here")
    return DATA / name


def picture(path, seed=0, side=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side), np.uint8)).save(path)
    return path


def build(source, out, *more):
    """Exit code of the command."""
    return main(["data", "questions", "--source", str(source), "--out", str(out), *map(str, more)])


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def why(out):
    return {row["key"]: row["why"] for row in lines(out / "skipped.jsonl")}


def check_trainable(folder):
    """Every question's image is in the store, under the id by which training looks for it."""
    there = set(open_store(folder / "store").image_ids)
    questions = read_questions(folder / "questions.jsonl")
    assert questions and {image_of(question) for question in questions} <= there
    assert (folder / "reports.jsonl").exists()
    return questions


# Real files


def test_vqa_rad_splits_by_image(tmp_path, capsys):
    folder, out = real("vqa-rad"), tmp_path / "out"
    published = json.loads((folder / "data" / "trainset.json").read_text())
    assert build(f"vqa-rad:{folder}", out, "--split", "image", "--share", "train=0.7", "--share", "val=0.3") == 0
    parts = {part: check_trainable(out / part) for part in ("train", "val")}
    together = [question for part in parts.values() for question in part]
    assert {q.sample_id for q in together} == {f"vqa-rad/{row['qid']}" for row in published}
    closed = [row for row in published if row["answer_type"].strip() == "CLOSED"]
    assert sum(q.answer_type == "closed" for q in together) == len(closed) == 1823
    by_id = {q.sample_id: q for q in together}
    assert all(by_id[f"vqa-rad/{row['qid']}"].answer == " ".join(str(row["answer"]).split()) for row in published)
    images = {part: {q.image_id for q in parts[part]} for part in parts}
    assert not images["train"] & images["val"] and len(images["train"] | images["val"]) == 314
    pixels = [set(open_store(out / part / "store").column("pixels")) for part in parts]
    assert not pixels[0] & pixels[1]
    assert abs(len(parts["val"]) / len(together) - 0.3) < 0.02
    assert json.loads((out / "split.json").read_text())["split"] == "image"
    assert "split: image" in capsys.readouterr().out


def test_slake_text_keeps_both_languages_and_says_that_images_are_missing(tmp_path, capsys):
    folder, out = real("slake-json"), tmp_path / "out"
    assert build(f"slake:{folder}", out) == 0
    rows = lines(out / "questions.jsonl")
    published = [
        r for f in ("train", "validate", "test") for r in json.loads((folder / f"Slake1.0/{f}.json").read_text())
    ]
    assert len(rows) == len(published) - 1  # one has no answer
    assert sum(row["language"] == "zh" for row in rows) == sum(row["q_lang"] == "zh" for row in published)
    assert not (out / "store").exists() and {row["image"] for row in rows} == {row["img_name"] for row in published}
    reasons = why(out)
    assert reasons["train.json[1622]"] == "no answer" and reasons["xmlab1/source.jpg"] == "image is not on disk"
    said = capsys.readouterr().out
    assert "no image is on disk" in said and "--split published leaves them out" in said


def test_slake_published_parts_are_made_disjoint(tmp_path):
    """Those of the English questions are; the Chinese ones were split anew."""
    folder, out = real("slake-json"), tmp_path / "out"
    assert build(f"slake:{folder}?language=en", tmp_path / "en", "--split", "published") == 0
    assert json.loads((tmp_path / "en" / "split.json").read_text())["shared_samples"] == 0
    assert build(f"slake:{folder}", out, "--split", "published") == 0
    images = {part: {q["image_id"] for q in lines(out / part / "questions.jsonl")} for part in ("train", "val", "test")}
    assert not images["train"] & (images["val"] | images["test"]) and not images["val"] & images["test"]
    test = json.loads((folder / "Slake1.0/test.json").read_text())
    assert len(lines(out / "test" / "questions.jsonl")) == len(test)
    about = json.loads((out / "split.json").read_text())
    assert about["shared_samples"] == sum("in the published" in reason for reason in why(out).values()) > 0


def test_vqa_med_2019_reads_categories_and_all_right_answers(tmp_path):
    folder, out = real("vqa-med-2019-text"), tmp_path / "out"
    assert build(f"vqa-med:{folder}", out) == 0
    rows = lines(out / "questions.jsonl")
    assert len(rows) == 500 and {row["question_type"] for row in rows} == {"modality", "plane", "organ", "abnormality"}
    two = next(row for row in rows if row["image"] == "synpic40410")
    assert two["references"] == ["face, sinuses, and neck", "skull and contents"]
    assert two["answer"] == two["references"][0] and two["answer_type"] == "open"


# Fixtures


def rad_row(qid, image, answer="Yes", kind="CLOSED ", phrase="freeform", organ="CHEST"):
    row = {"qid": qid, "image_name": image, "image_organ": organ, "question": f"Is it so {qid}?", "answer": answer}
    return row | {"answer_type": kind, "question_type": "PRES", "phrase_type": phrase}


def test_osf_vqa_rad_published_parts_share_images_which_is_said(tmp_path, capsys):
    for k in range(3):
        picture(tmp_path / "VQA_RAD Image Folder" / f"s{k}.jpg", k)
    rows = [rad_row(1, "s0.jpg"), rad_row(2, "s1.jpg", 2, "OPEN"), rad_row(3, "s0.jpg", "No", phrase="test_freeform")]
    rows += [rad_row(4, "gone.jpg"), rad_row(5, "s2.jpg", ""), rad_row(6, "s2.jpg", phrase="test_para"), 7]
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    source, out = f"vqa-rad:{tmp_path}", tmp_path / "out"
    assert build(source, out) == 0 and "1 samples share a patient or image" in capsys.readouterr().out
    reasons = why(out)
    name = "VQA_RAD Dataset Public.json"
    assert reasons[f"{name}[4]"] == "no answer" and reasons["gone.jpg"] == "image is not on disk"
    assert "gone.jpg is not on disk" in reasons[f"{name}[3]"] and reasons[f"{name}[6]"] == "a int is no row"
    assert build(source, out, "--split", "published") == 0
    ids = {part: {q.sample_id for q in check_trainable(out / part)} for part in ("train", "test")}
    assert ids == {"train": {"vqa-rad/2"}, "test": {"vqa-rad/3", "vqa-rad/6"}}
    assert build(source, tmp_path / "train", "--split", "train") == 0
    assert {q.sample_id for q in check_trainable(tmp_path / "train")} == {"vqa-rad/1", "vqa-rad/2"}
    number = next(q for q in read_questions(tmp_path / "train" / "questions.jsonl") if q.sample_id == "vqa-rad/2")
    assert (number.answer, number.answer_type, number.modality) == ("2", "open", "xray")


def hub(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": path.read_bytes() if path else None, "path": None} for path, *_ in rows]
    table = pa.table({"image": images, "question": [r[1] for r in rows], "answer": [r[2] for r in rows]})
    pq.write_table(table, folder / name)


@pytest.mark.parametrize("layout", ["vqa-rad", "path-vqa"])
def test_hub_parquet_knows_an_image_by_its_bytes(tmp_path, layout):
    a, b = picture(tmp_path / "a.png", 1), picture(tmp_path / "b.png", 2)
    hub(
        tmp_path / "data", "train-00000-of-00001.parquet", [(a, "is it a?", "yes"), (b, "what?", "b"), (None, "q", "a")]
    )
    hub(tmp_path / "data", "test-00000-of-00001.parquet", [(a, "is it a, again?", "no")])
    assert build(f"{layout}:{tmp_path}?modality=microscopy", tmp_path / "out") == 0
    questions = check_trainable(tmp_path / "out")
    assert [q.answer_type for q in questions] == ["closed", "closed", "open"]
    assert len({q.image_id for q in questions}) == len(open_store(tmp_path / "out" / "store")) == 2
    assert why(tmp_path / "out") == {"train-00000-of-00001.parquet[0/2]": "no image"}
    assert build(f"{layout}:{tmp_path}", tmp_path / "parts", "--split", "published") == 0
    assert [q.question for q in check_trainable(tmp_path / "parts" / "train")] == ["what?"]


def test_path_vqa_pickles_are_read_without_running_them(tmp_path, capsys):
    picture(tmp_path / "images" / "train" / "train_0001.jpg")
    file = tmp_path / "qas" / "train" / "train_qa.pkl"
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps([{"image": "train_0001", "question": "what is it?", "answer": "a cell"}]))
    assert build(f"path-vqa:{tmp_path}", tmp_path / "out", "--split", "train") == 0
    assert [q.answer for q in check_trainable(tmp_path / "out")] == ["a cell"]
    file.write_bytes(pickle.dumps(Path("run me")))
    assert build(f"path-vqa:{tmp_path}", tmp_path / "out") == 1
    assert "train_qa.pkl: cannot be read" in capsys.readouterr().err


def test_vqa_med_2020_pairs_and_2021_answers_beside_their_questions(tmp_path):
    for k, name in enumerate(("train/a", "test/b", "test/c")):
        picture(tmp_path / f"{name}.jpg", k)
    (tmp_path / "VQAnswering_2020_Train_QA_pairs.txt").write_text("a|is this an mri?|yes\nbroken\n")
    (tmp_path / "Task1-2021-Test-Questions.txt").write_text("b|what is abnormal?\nc|what is abnormal here?\n")
    answers = "b|pulmonary embolism\nc|empyema|Pleural effusion\n"
    (tmp_path / "Task1-VQAnswering2021-Test-ReferenceAnswers.txt").write_text(answers)
    assert build(f"vqa-med:{tmp_path}", tmp_path / "out") == 0
    rows = {row["image_id"]: row for row in lines(tmp_path / "out" / "questions.jsonl")}
    assert rows["vqa-med/a"]["modality"] == "mri" and rows["vqa-med/a"]["answer_type"] == "closed"
    assert rows["vqa-med/b"]["answer"] == "pulmonary embolism" and "references" not in rows["vqa-med/b"]
    assert rows["vqa-med/c"]["references"] == ["empyema", "Pleural effusion"]
    assert why(tmp_path / "out") == {"VQAnswering_2020_Train_QA_pairs.txt:2": "1 columns, not image|question|answer"}
    check_trainable(tmp_path / "out")


def test_pmc_vqa_options_are_asked_kept_and_scored(tmp_path):
    picture(tmp_path / "images" / "PMC1_F1.jpg")
    choices = "A:Diffuse uptake,B:Focal uptake,C:No uptake,D:Unknown"
    head = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
    row = f"PMC1_F1.jpg, What is the uptake?, Focal uptake,{choices},B\n"
    (tmp_path / "train.csv").write_text(head + row + "PMC1_F1.jpg,too,few\n")
    letters = head.replace(",Answer_label", "") + f"PMC1_F1.jpg,And in 2?,C,{choices}\n"
    (tmp_path / "test_2.csv").write_text(letters)
    out = tmp_path / "out"
    assert build(f"pmc-vqa:{tmp_path}", out) == 0
    rows = {row["sample_id"]: row for row in lines(out / "questions.jsonl")}
    first, second = rows["pmc-vqa/train.csv:2"], rows["pmc-vqa/test_2.csv:2"]
    assert first["answer"] == "Focal uptake" and second["answer"] == "No uptake"
    assert first["options"]["B"] == "Focal uptake" and first["answer_type"] == "closed"
    assert first["question"].endswith("Options: A: Diffuse uptake; B: Focal uptake; C: No uptake; D: Unknown")
    assert why(out)["train.csv:3"] == "3 values where the header has 8"
    said = [
        {"sample_id": name, "prediction": letter}
        for name, letter in ((first["sample_id"], "B"), (second["sample_id"], "(A)"))
    ]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    score = ["score", "vqa", "--predictions", tmp_path / "said.jsonl", "--references", out / "questions.jsonl"]
    assert main([*map(str, score), "--out", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())


def test_omnimedvqa_takes_paths_below_the_root_and_both_names_of_the_modality(tmp_path):
    row = {
        "question_id": "X_1",
        "question_type": "Disease Diagnosis",
        "question": "What is it?",
        "gt_answer": "Glaucoma",
    }
    row |= {"image_path": "Images/ACRIMA/Im1.png", "option_A": "Glaucoma", "option_B": "Drusen", "dataset": "ACRIMA"}
    other = row | {"question_id": "X_2", "image_path": "Images/Other/Im1.png", "modality": "CT(Computed Tomography)"}
    file = tmp_path / "QA_information" / "Open-access" / "ACRIMA.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([row | {"modality_type": "Fundus Photography"}, other, row]))
    picture(tmp_path / "Images" / "ACRIMA" / "Im1.png", 1)
    picture(tmp_path / "Images" / "Other" / "Im1.png", 2)
    assert build(f"omnimedvqa:{tmp_path}", tmp_path / "out") == 0
    questions = {q.sample_id: q for q in check_trainable(tmp_path / "out")}
    assert {q.modality for q in questions.values()} == {"fundus", "ct"}
    assert questions["omnimedvqa/X_2"].image_id == "omnimedvqa/Images/Other/Im1"
    assert why(tmp_path / "out") == {"ACRIMA.json[2]": "omnimedvqa/X_1 is there already"}


def test_slake_with_images_brings_its_regions(tmp_path):
    row = {"img_name": "xmlab1/source.jpg", "question": "Is it the lung?", "answer": "Yes", "answer_type": "CLOSED"}
    row |= {"q_lang": "en", "modality": "CT", "content_type": "Organ", "qid": 0}
    for name in ("train", "validate", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([row] if name == "train" else []))
    picture(tmp_path / "imgs" / "xmlab1" / "source.jpg", side=40)
    boxes = [{"Left Lung": [4, 8, 20, 12]}, {"Liver": [0, 0, 0, 0]}]
    (tmp_path / "imgs" / "xmlab1" / "detection.json").write_text(json.dumps(boxes))
    assert build(f"slake:{tmp_path}", tmp_path / "out") == 0
    (asked,) = check_trainable(tmp_path / "out")
    regions = open_store(tmp_path / "out" / "store").by_id(asked.image_id).regions
    np.testing.assert_allclose(regions.boxes, [[0.1, 0.2, 0.6, 0.5]], atol=1e-6)
    (left,) = lines(tmp_path / "out" / "skipped.jsonl")
    assert left["source"] == "slake" and left["key"] == "slake/xmlab1" and left["why"].startswith("Liver")


def test_a_csv_of_questions_with_a_coco_json_of_regions(tmp_path):
    picture(tmp_path / "pictures" / "a.png", 1, 100)
    picture(tmp_path / "pictures" / "b.png", 2)
    (tmp_path / "q.csv").write_text("image,question,answer,patient_id\na.png,Where?,left,p1\nb.png,Where?,right,p2\n")
    images = [{"id": 1, "file_name": "a.png", "width": 100, "height": 100}, {"id": 2, "file_name": "gone.png"}]
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40]}
    coco = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "lung nodule"}]}
    (tmp_path / "regions.json").write_text(json.dumps(coco))
    source = f"csv:{tmp_path / 'q.csv'}?images=pictures&coco=regions.json&modality=ct"
    assert build(source, tmp_path / "out") == 0
    questions = check_trainable(tmp_path / "out")
    store = open_store(tmp_path / "out" / "store")
    samples = {q.patient_id: store.by_id(q.image_id) for q in questions}
    np.testing.assert_allclose(samples["csv/p1"].regions.boxes, [[0.1, 0.2, 0.4, 0.6]], atol=1e-6)
    assert samples["csv/p1"].patient_id == "csv/p1" and len(samples["csv/p2"].regions) == 0
    assert any("images[1]" in key for key in why(tmp_path / "out"))


# What the command says


def test_images_that_cannot_be_read_or_told_apart_are_listed(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "one" / "b.png")
    picture(tmp_path / "two" / "b.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    table = "image,question,answer,patient_id\na.png,so?,yes,p\nb.png,so?,no,p\nbad.png,so?,no,p\none/b.png,so?,no,p\n"
    (tmp_path / "q.csv").write_text(table)
    assert build(f"csv:{tmp_path / 'q.csv'}?name=mine&modality=ct", tmp_path / "out") == 0
    assert [q.image_id for q in check_trainable(tmp_path / "out")] == ["mine/a", "mine/one/b"]
    reasons = why(tmp_path / "out")
    assert "several files are called b.png" in reasons["q.csv:3"] and "?images=FOLDER" in reasons["q.csv:3"]
    assert "mine/bad" in reasons and "bad.png is not on disk, or cannot be read" in reasons["q.csv:4"]


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    for k in range(130):  # three parts
        picture(tmp_path / "images" / f"{k}.png", k, 8)
    (tmp_path / "q.csv").write_text("image,question,answer\n" + "".join(f"{k}.png,so?,yes\n" for k in range(130)))
    for workers in (1, 2):
        assert build(f"csv:{tmp_path / 'q.csv'}?images=images", tmp_path / str(workers), "--workers", workers) == 0
    one, two = (tmp_path / str(workers) for workers in (1, 2))
    assert open_store(one / "store").table.equals(open_store(two / "store").table)
    assert (one / "questions.jsonl").read_text() == (two / "questions.jsonl").read_text()


def test_help_names_every_layout():
    from downstream.data_cli import QUESTION_LAYOUTS
    from downstream.question_build import LAYOUTS

    assert QUESTION_LAYOUTS.split(", ") == list(LAYOUTS)


def test_wrong_use_names_the_remedy(tmp_path, capsys):
    (tmp_path / "q.csv").write_text("image,question,answer\na.png,so?,yes\n")
    wrong = {
        f"nope:{tmp_path}": (2, "layouts: vqa-rad"),
        f"csv:{tmp_path / 'gone'}": (2, "does not exist"),
        f"csv:{tmp_path / 'q.csv'}?colour=red": (2, "colour"),
        f"vqa-rad:{tmp_path}": (1, "trainset.json"),
        f"pmc-vqa:{tmp_path / 'q.csv'}": (1, "the header has no Figure_path"),
    }
    for source, (code, words) in wrong.items():
        assert build(source, tmp_path / "out") == code
        assert words in capsys.readouterr().err
    assert build(f"csv:{tmp_path / 'q.csv'}", tmp_path / "out", "--split", "published") == 2
    assert "give split image" in capsys.readouterr().err
    assert build(f"csv:{tmp_path / 'q.csv'}", tmp_path / "out", "--share", "train=1") == 2
    assert not (tmp_path / "out").exists()


def test_regionqa_makes_training_data_of_a_store(brain_store, tmp_path, capsys):
    assert main(["data", "regionqa", str(brain_store), "--out", str(tmp_path / "qa"), "--per-image", "2"]) == 0
    check_trainable(tmp_path / "qa")
    assert main(["data", "regionqa", str(brain_store), "--out", str(tmp_path / "qa"), "--per-image", "0"]) == 2
