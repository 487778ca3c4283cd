"""Files as they come: encodings, broken lines, odd values, very long answers. Through the command line."""

import json

import pytest

from downstream.cli import main

TRUTH = {
    "images": [{"id": 1, "height": 50, "width": 40}],
    "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20]}],
    "categories": [{"id": 1, "name": "polyp"}],
}
ROW = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.5}
QUESTION = {"sample_id": "q1", "question": "Is there a lesion?", "answer": "yes", "answer_type": "closed"}
ANSWER = {"sample_id": "q1", "prediction": "Yes."}


def line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Scores two files of bytes or rows; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(predictions, references=(QUESTION,), task="vqa", names=("p.jsonl", "r.jsonl"), extra=()):
        for name, content in zip(names, (predictions, references), strict=True):
            raw = content if isinstance(content, bytes) else "".join(map(line, content)).encode()
            (tmp_path / name).write_bytes(raw)
        code = main(["score", task, "--predictions", names[0], "--references", names[1], *extra])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(result):
    """The one line that the command refuses with."""
    code, _, error = result
    assert code == 1 and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_a_byte_order_mark_is_no_part_of_the_text(score):
    code, out, _ = score(b"\xef\xbb\xbf" + line(ANSWER).encode())
    assert code == 0 and "1.000" in out


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_with_the_command_that_converts(score, encoding):
    error = refused(score(line(ANSWER).encode(encoding)))
    assert "p.jsonl: is UTF-16 text" in error and "iconv -f UTF-16 -t UTF-8 p.jsonl" in error


def test_latin_1_is_refused_with_its_line(score):
    mixed = line(ANSWER).encode() + line({"sample_id": "q2", "prediction": "Ödem"}).encode("latin-1")
    error = refused(score(mixed))
    assert "p.jsonl:2: byte 0xD6 is not UTF-8 text" in error and "iconv -f WINDOWS-1252" in error


def test_every_bad_line_is_named_with_its_reason(score):
    bad = b'{"sample_id": "q1"\n[1]\n{"sample_id": "q1", "prediction": "yes"}\nnull\n{"a": NaN,}\n'
    error = refused(score(bad))
    assert "p.jsonl:1: not JSON" in error and "and 3 more: line 2 not a JSON object; line 4 not a JSON object" in error
    assert "line 5 not JSON" in error


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ('{"sample_id": "q1", "prediction": "\\ud83d"}', "half a character"),
        ('{"sample_id": "q1", "prediction": ' + "[" * 100_000 + "}", "nested too deeply"),
        ('{"sample_id": "q1", "prediction": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ('{"sample_id": "q1", "prediction": NaN}', '"prediction" is NaN; give a text ("" for no answer)'),
        ('{"sample_id": "q1", "prediction": null}', '"prediction" is null; give a text ("" for no answer)'),
        ('{"sample_id": "q1", "prediction": ["yes"]}', '"prediction" is ["yes"]'),
        ('{"sample_id": ["q1"], "prediction": "yes"}', "an id is a text or a whole number"),
        ('{"sample_id": 1.5, "prediction": "yes"}', "an id is a text or a whole number"),
    ],
)
def test_odd_values_are_refused_with_a_reason(score, raw, reason):
    assert reason in refused(score(raw.encode() + b"\n"))


def test_numbers_are_answers_and_ids(score):
    question = {**QUESTION, "sample_id": 7, "answer": 2, "answer_type": "OPEN "}
    code, out, _ = score([{"sample_id": "7", "prediction": 2.0}], [question])
    assert code == 0 and "1.000" in out


def test_nulls_are_counted(score):
    rows = [{"sample_id": f"q{k}", "prediction": None} for k in range(9)]
    assert "(and 8 more: line 2" in refused(score(rows))


@pytest.mark.parametrize(
    "text", ["no lesion. " * 95_000, "x" * 1_000_000, "12 mm, " * 150_000, "是" * 300_000, " " * 10**6]
)
def test_a_megabyte_long_answer_is_scored_in_seconds(score, text):
    code, out, _ = score([{**ANSWER, "prediction": text}], extra=["--html", "page.html"])
    assert code == 0 and "overall" in out


def test_other_scripts(score):
    question = {**QUESTION, "question": "病变在哪里?", "answer": "左肺", "answer_type": "open"}
    code, out, _ = score([{**ANSWER, "prediction": "左肺。"}], [question])
    assert code == 0 and "1.000" in out


def test_one_class_and_one_sample_have_a_score_without_interval(score):
    code, out, _ = score([ANSWER])
    assert code == 0 and "1.000 " in out and "undefined (no open questions)" in out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": "10 10 20 20"}, "row 0 has bbox"),
        ({"bbox": [10, 10, None, 20]}, "row 0 has bbox"),
        ({"bbox": [10, 10, -20, 20]}, "row 0 has bbox"),
        ({"score": "high"}, "row 0 has score 'high'"),
        ({"image_id": [1]}, "row 0 has image_id"),
        ({"image_id": 99}, "row 0 has image_id 99, which is not among the images"),
        ({"segmentation": {"size": [50, 40]}}, "row 0 has a segmentation that cannot be read"),
        ({"segmentation": {"size": [50, 40], "counts": 7}}, "row 0 has a segmentation that cannot be read"),
        ({"segmentation": {"size": [9, 40], "counts": "0"}}, "needs the size [50, 40]"),
        ({"segmentation": {"size": [50, 40], "counts": [7, 1]}}, "do not add up"),
        ({"segmentation": [[1]]}, "at least three x, y pairs"),
    ],
)
def test_bad_coco_rows(score, change, reason):
    files = json.dumps([ROW | change]).encode(), json.dumps(TRUTH).encode()
    assert reason in refused(score(*files, task="grounding", names=("p.json", "r.json")))


@pytest.mark.parametrize("part", ["images", "categories"])
def test_bad_coco_heads(score, part):
    truth = {"images": [], "annotations": [], "categories": []} | {part: [7]}
    assert part in refused(score(b"[]", json.dumps(truth).encode(), task="grounding", names=("p.json", "r.json")))


def test_boxes_out_of_frame_are_cut_and_counted(score):
    files = json.dumps([ROW | {"bbox": [10, 10, 200, 20]}]).encode(), json.dumps(TRUTH).encode()
    code, out, _ = score(*files, task="grounding", names=("p.json", "r.json"), extra=["--protocol", "coco"])
    assert code == 0 and "1 out of frame (images with a box that reaches out" in " ".join(out.split())


REPORT = {"sample_id": "q1", "report": "There is a small left pleural effusion. No pneumothorax."}


@pytest.mark.parametrize("text", ["effusion, " * 100_000, "no effusion or pneumothorax and " * 30_000, "x" * 10**6])
def test_a_megabyte_long_report_is_scored_in_seconds(score, text):
    rows = [{"sample_id": "q1", "prediction": text}]
    code, out, _ = score(rows, [REPORT], task="report", extra=["--protocol", "findings", "chexpert", "entities"])
    assert code == 0 and "report, protocol entities" in out
