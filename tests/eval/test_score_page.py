"""The page of a scored file: what it holds, and that it draws and filters itself in a browser."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from downstream.cli import main
from grounding.types import RegionSet, write_regions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = """</script><img src=x onerror="document.title='owned'"><!--<script>"""


def write(name, rows):
    with open(name, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def parsed(path):
    page = path.read_text(encoding="utf-8")
    return page, json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def questions(folder):
    """Three questions on two images: right, wrong, and not answered."""
    (folder / "images").mkdir()
    for name in ("a", "b"):
        Image.new("L", (900, 600), 90).save(folder / "images" / f"{name}.png")
    rows = [
        {"sample_id": "q1", "image_id": "a", "question": "Is there a mass?", "answer": "no", "patient_id": "MRN-1"},
        {"sample_id": "q2", "image_id": "a", "question": HOSTILE, "answer": HOSTILE, "patient_id": "MRN-1"},
        {"sample_id": "q3", "image_id": "../secret", "question": "Where?", "answer": "liver", "patient_id": "MRN-2"},
    ]
    write("r.jsonl", [{**row, "answer_type": "closed" if row["answer"] == "no" else "open"} for row in rows])
    evidence = {"image_size": [600, 900], "regions": [{"box": [0.1, 0.2, 0.5, 0.6], "label": "liver", "score": 0.9}]}
    said = [
        {"sample_id": "q1", "prediction": "No.", "evidence": evidence},
        {"sample_id": "q2", "prediction": HOSTILE[3:]},
    ]
    write("p.jsonl", said)
    Image.new("L", (9, 9)).save(folder / "secret.png")
    return ["score", "vqa", "--predictions", "p.jsonl", "--references", "r.jsonl", "--html", "page.html"]


def test_page_of_answers(questions, folder):
    assert main([*questions, "--images", "images"]) == 0
    page, data = parsed(folder / "page.html")
    assert not re.search(r"https?://|<script src|<link|@import|url\(", page)
    assert "<img src=x" not in page and page.count("</script>") == 2
    assert "MRN" not in page, "patients are not named"
    strict = [metric["name"] for metric in data["metrics"]].index("strict")
    assert [sample["values"][strict] for sample in data["samples"]] == [1.0, 0.0, 0.0]
    assert data["samples"][1]["question"] == HOSTILE and data["samples"][2]["prediction"] is None
    assert [sample["image"] for sample in data["samples"]] == [0, 0, None], "each once, none from outside the folder"
    assert data["samples"][0]["said"] == [[0.1, 0.2, 0.5, 0.6, "liver", 0.9]]
    assert len(data["images"]) == 1 and len(data["images"][0]) < 30_000
    assert any("1 missing" in line for line in data["checks"])


def test_a_bad_image_and_a_bad_folder(questions, folder, capsys):
    (folder / "images" / "a.png").write_bytes(b"no image")
    assert main([*questions, "--images", "images"]) == 0
    _, data = parsed(folder / "page.html")
    assert data["samples"][0]["image"] is None and any("1 cannot be read" in fact for _, fact in data["facts"])
    assert main([*questions, "--images", "nowhere"]) == 1
    assert "nowhere: is no folder" in capsys.readouterr().err


def test_page_of_many_samples_shows_some_and_says_so(folder):
    rows = [{"sample_id": f"q{k:04d}", "question": "?", "answer": "yes", "answer_type": "closed"} for k in range(2500)]
    write("r.jsonl", rows)
    write("p.jsonl", [{"sample_id": row["sample_id"], "prediction": "yes"} for row in rows])
    files = ["--predictions", "p.jsonl", "--references", "r.jsonl"]
    assert main(["score", "vqa", *files, "--protocol", "strict", "--html", "page.html"]) == 0
    _, data = parsed(folder / "page.html")
    assert (len(data["samples"]), data["total"]) == (2000, 2500)
    assert data["samples"][0]["id"] == "q0000" and data["samples"][-1]["id"] > "q2490"


def test_page_of_reports(folder):
    write("r.jsonl", [{"sample_id": "r1", "report": "No lesion. " * 900}, {"sample_id": "r2", "report": "A lesion."}])
    write("p.jsonl", [{"sample_id": "r1", "prediction": "No lesion is seen."}])
    files = ["--predictions", "p.jsonl", "--references", "r.jsonl", "--protocol", "findings", "--html", "page.html"]
    assert main(["score", "report", *files]) == 0
    _, data = parsed(folder / "page.html")
    assert "(9,900 characters)" in data["samples"][0]["references"][0]
    assert data["metrics"] and data["samples"][0]["values"]


def test_page_of_regions(folder):
    truth = RegionSet([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], ["brain/lesion", "brain"], (10, 10))
    write_regions("r.jsonl", {"a": truth, "b": truth})
    write_regions("p.jsonl", {"a": RegionSet(truth.boxes[:1], truth.labels[:1], (10, 10), [0.5])})
    files = ["--predictions", "p.jsonl", "--references", "r.jsonl", "--html", "page.html"]
    assert main(["score", "grounding", *files]) == 0
    _, data = parsed(folder / "page.html")
    assert data["samples"][0]["prediction"] == "brain/lesion 0.50" and data["samples"][1]["prediction"] is None
    assert data["samples"][0]["said"] == [[0, 0, 0.5, 0.5, "brain/lesion", 0.5]]
    named = dict(zip([metric["name"] for metric in data["metrics"]], data["samples"][0]["values"], strict=True))
    assert named["coco · overall · acc@0.5"] == 0.5, "the mean over the classes of the image"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_draws_and_filters_itself_in_a_browser(questions, folder):
    assert main([*questions, "--images", "images", "--protocol", "strict"]) == 0
    page = (folder / "page.html").read_text(encoding="utf-8")
    click = """
    <script>
    const names = () => [...document.querySelectorAll(".sample h3")].map(node => node.textContent).join(" ");
    const press = name => [...document.querySelectorAll("#filters button")].find(b => b.textContent === name).click();
    const said = [names(), document.querySelectorAll("rect.said").length + " box"];
    for (const name of ["right", "wrong", "nothing said"]) { press(name); said.push(name + ": " + names()); }
    document.body.append(Object.assign(document.createElement("pre"), {id: "said", textContent: said.join("; ")}));
    </script>"""
    (folder / "page.html").write_text(page.replace("</body>", click + "</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "owned" not in re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert 'id="said">q1 q2 q3; 1 box; right: q1; wrong: q2 q3; nothing said: q3<' in done.stdout
