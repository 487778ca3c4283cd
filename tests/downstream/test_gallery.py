import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from downstream.gallery import Case, Reader, contour, judge_report, write_gallery
from grounding.labels import load_label_tree
from grounding.types import RegionSet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = """</script><img src=x onerror="document.title='owned'"><!--<script>"""
LEFT, LESION = "brain/temporal_lobe/left_temporal_lobe", "brain/temporal_lobe/left_temporal_lobe/lesion"
TRUE = "Findings: A 15 mm bright, solid, round lesion with a sharp margin in the left temporal lobe. Impression: One."


def encoded(mask):
    found = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def regions(labels=(LEFT, LESION), scores=(0.9, 0.75), masks=True):
    boxes = np.array([[0.5, 0.25, 0.9, 0.75], [0.6, 0.5, 0.7, 0.6]])[: len(labels)]
    drawn = []
    for x1, y1, x2, y2 in (boxes * 40).round().astype(int):
        drawn.append(np.zeros((40, 40), bool))
        drawn[-1][y1:y2, x1:x2] = True
    return RegionSet(boxes, list(labels), (40, 40), scores, [encoded(mask) for mask in drawn] if masks else None)


def case(image_id="test-0-axial", question="Is there a lesion?", ids=(1, 7), text="yes"):
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 40), 60, np.uint8)).save(stream, "PNG")
    evidence = regions(masks=False)
    answers = {
        "none": {"text": "no", "right": False, "evidence": None},
        "tokens/predicted": {"text": text, "right": True, "evidence": evidence},
    }
    asked = {"question": question, "reference": "yes", "question_type": "presence", "needs": "feature"}
    sentences = [{"text": TRUE.partition(" Impression")[0], "region_ids": list(ids), "dropped": 0}]
    systems = {
        "none": {"sentences": None, "evidence": None, "text": "Findings: No lesion is seen."},
        "tokens/predicted": {"sentences": sentences, "evidence": evidence, "text": "…"},
    }
    report = {"reference": TRUE, "systems": systems}
    return Case(image_id, stream.getvalue(), regions(), regions(scores=None), [{**asked, "answers": answers}], report)


TABLE = {"title": "Questions", "columns": ["system", "n", "accuracy", "95 %"], "rows": [["none", 3, 0.5, [0.25, 0.75]]]}


def written(tmp_path, cases=(), tables=(TABLE,), run=None, notes=()):
    path = tmp_path / "index.html"
    write_gallery(path, {"tables": list(tables), "run": run or {}}, list(cases), list(notes))
    page = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    return page, data


def test_page_is_self_contained(tmp_path):
    page, _ = written(tmp_path, [case()])
    assert not re.search(r"https?://|<script src|<link|@import|url\(", page)
    assert "Research use only; not a medical device." in page
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_hostile_text_stays_data(tmp_path):
    hostile = case(image_id=HOSTILE, question=HOSTILE, text=HOSTILE)
    page, data = written(tmp_path, [hostile], [TABLE | {"title": HOSTILE}], {HOSTILE: HOSTILE}, [HOSTILE])
    assert "<img src" not in page and page.count("</script>") == 2
    assert data["cases"][0]["id"] == data["notes"][0] == data["tables"][0]["title"] == HOSTILE
    assert data["cases"][0]["questions"][0]["question"] == HOSTILE
    assert data["run"] == [[HOSTILE, HOSTILE]]


def test_cells(tmp_path):
    row = ["none", 3, 0.5, None, float("nan"), [0.25, 0.75], [None, 1.0], "0.03"]
    _, data = written(tmp_path, tables=[TABLE | {"rows": [row]}])
    texts = ["none", "3", "0.500", "undefined", "undefined", "0.250 to 0.750", "undefined", "0.03"]
    assert [cell["text"] for cell in data["tables"][0]["rows"][0]] == texts


def test_run_facts_are_flattened(tmp_path):
    _, data = written(tmp_path, run={"seconds": {"all": 3.0}, "detector": None, "systems": ["none", "text"]})
    assert data["run"] == [["seconds / all", "3.0"], ["detector", "undefined"], ["systems", "none, text"]]


def test_sentence_ids_resolve_or_are_dropped(tmp_path):
    _, data = written(tmp_path, [case(ids=(1, 7, -1))])
    shown = data["cases"][0]
    (sentence,) = shown["report"]["systems"][1]["sentences"]
    ((number, row),) = sentence["cites"]
    assert number == 1 and shown["regions"][row]["id"] == LESION
    assert shown["views"][shown["report"]["systems"][1]["view"]]["regions"][number] == row


def test_prompt_region_takes_the_contour_of_the_found_one(tmp_path):
    _, data = written(tmp_path, [case()])
    shown = data["cases"][0]
    assert all(region["contour"] for region in shown["regions"])
    assert len(shown["views"]) == 1  # what was found and what both tasks were given is the same list
    assert sorted(task for _, task in shown["views"][0]["uses"]) == ["question 1", "report"]


def test_another_images_regions_are_not_what_opens(tmp_path):
    mine = case()
    other = RegionSet(np.array([[0.0, 0.0, 0.2, 0.2]]), [LESION], (40, 40), [0.5])
    shuffled = {"sentences": [{"text": "A lesion.", "region_ids": [0]}], "evidence": other, "text": ""}
    report = {"reference": TRUE, "systems": {"tokens/shuffled": shuffled}}
    _, data = written(tmp_path, [Case(mine.image_id, mine.png, mine.found, mine.truth, [], report)])
    assert data["cases"][0]["start"] == 0 and data["cases"][0]["views"][0]["found"]


@pytest.mark.parametrize(
    ("image_id", "edges"),
    [("t-1-axial", ["R", "L"]), ("t-1-coronal", ["R", "L"]), ("t-1-sagittal", ["A", "P"]), ("t-1", None)],
)
def test_orientation_marks(tmp_path, image_id, edges):
    _, data = written(tmp_path, [case(image_id)])
    assert data["cases"][0]["edges"] == edges


@pytest.mark.parametrize(
    ("image_id", "edges"), [("vol.nii.gz@axial:87", ["R", "L"]), ("scan-axial", None), ("scan.png", None)]
)
def test_own_image_claims_no_side_from_its_name_and_nothing_generated(tmp_path, image_id, edges):
    page, data = written(tmp_path, [case(image_id)], tables=[])
    assert data["cases"][0]["edges"] == edges and not data["demo"]
    assert "Generated lesions" not in page


def test_no_cases(tmp_path):
    _, data = written(tmp_path)
    assert data["cases"] == []


def test_contour_follows_the_pixel_edges():
    mask = np.zeros((20, 30), bool)
    mask[5:11, 0:8] = True  # touches the image's edge
    points = np.array([pair.split() for pair in re.findall(r"[\d.]+ [\d.]+", contour(encoded(mask)))], float)
    assert points.min(0).tolist() == [0.0, 5.0] and points.max(0).tolist() == [8.0, 11.0]
    assert len(points) < 12


def test_contour_of_an_empty_mask_and_of_two_parts():
    mask = np.zeros((20, 20), bool)
    assert contour(encoded(mask)) == ""
    mask[2:6, 2:6] = mask[12:16, 12:16] = True
    assert contour(encoded(mask)).count("M") == 2


@pytest.mark.parametrize(
    ("sentences", "verdicts", "missed", "right"),
    [
        (["A lesion in the left temporal lobe.", "Impression: One."], [True, None], [], True),
        (["A lesion in the right temporal lobe."], [False], ["left temporal lobe lesion"], False),
        (["No lesion is seen."], [False], ["left temporal lobe lesion"], False),
        (["A lesion in the left temporal lobe."] * 2, [True, False], [], False),
        (["Impression: A lesion in the left temporal lobe."], [None], ["left temporal lobe lesion"], False),
        ([""], [None], ["left temporal lobe lesion"], False),
    ],
)
def test_report_is_judged_sentence_by_sentence(sentences, verdicts, missed, right):
    judged = judge_report(sentences, TRUE, Reader(load_label_tree()))
    assert judged == {"verdicts": verdicts, "missed": missed, "right": right}


def test_normal_report():
    reader, normal = Reader(load_label_tree()), "Findings: No lesion is seen. Impression: Normal study."
    assert judge_report(["No lesion is seen."], normal, reader)["right"]
    assert not judge_report([""], normal, reader)["right"]
    assert judge_report(["No lesion is seen."], "", reader)["right"] is None


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_page_draws_itself_in_a_browser(tmp_path):
    hostile = case("test-1-coronal", question=HOSTILE)
    page, _ = written(tmp_path, [case(), hostile], [TABLE | {"rows": [["none", 3, None, [-0.1, 0.2]]]}])
    click = "<script>document.querySelector('button.sentence').click()</script></body>"
    (tmp_path / "index.html").write_text(page.replace("</body>", click), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *flags, (tmp_path / "index.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    dom = done.stdout
    assert 'data-ready="2"' in dom and "<title>Med-GLIP</title>" in dom
    assert dom.count("<article") == 2 and "2 of 2 cases" in dom
    assert ">undefined</td>" in dom and "-0.100 to 0.200" in dom
    assert "&lt;/script&gt;&lt;img src=x" in dom and '<img src="x' not in dom
    assert re.search(r'<g class="region finding on"', dom) and 'aria-pressed="true"' in dom
    assert "[r1] brain › temporal lobe › left temporal lobe › lesion; score 0.75" in dom
