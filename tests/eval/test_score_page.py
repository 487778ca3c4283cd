"""The page of a scored file: what it holds, and that it draws and filters itself in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess

import nibabel
import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
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
    shown = {"box": [100, 200, 500, 600], "label": "liver", "place": True, "score": 0.9, "path": ""}
    assert data["samples"][0]["said"] == [shown]
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


def test_page_of_grounded_reports_says_why(folder):
    (folder / "images").mkdir()
    Image.new("L", (60, 60), 90).save(folder / "images" / "a.png")
    left, right = [0.6, 0.6, 0.9, 0.9], [0.1, 0.6, 0.4, 0.9]
    truth = [{"text": "Small left pleural effusion.", "boxes": [left]}, {"text": "Heart is enlarged."}]
    said = [{"text": "Right pleural effusion.", "boxes": [right]}, {"text": "Pneumothorax.", "boxes": []}]
    text = {name: " ".join(row["text"] for row in rows) for name, rows in (("report", truth), ("prediction", said))}
    write("r.jsonl", [{"sample_id": "r1", "image": "a", "report": text["report"], "sentences": truth}])
    write("p.jsonl", [{"sample_id": "r1", "prediction": text["prediction"], "sentences": said}])
    protocols = ["--protocol", "radfact", "grounded-findings", "chexpert"]
    files = ["--predictions", "p.jsonl", "--references", "r.jsonl", "--html", "page.html", "--images", "images"]
    assert main(["score", "report", *files, *protocols]) == 0
    _, data = parsed(folder / "page.html")
    (sample,) = data["samples"]
    told = {
        metric["name"]: (metric["verdict"], note) for metric, note in zip(data["metrics"], sample["notes"], strict=True)
    }
    assert told["chexpert · f1-14 · micro"][1] == "hallucinated: Pneumothorax; missing: Cardiomegaly"
    assert told["grounded-findings · misplaced"] == (False, "effusion, right (side)"), "no errors are no wrong verdict"
    assert "predicted and not entailed: Right pleural effusion. | Pneumothorax." in told["radfact · logical · f1"][1]
    assert sample["truth"][0]["box"] == [600, 600, 900, 900] and sample["said"][0]["label"] == "Right pleural effusion."


def test_page_of_regions(folder):
    truth = RegionSet([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], ["brain/lesion", "brain"], (10, 10))
    write_regions("r.jsonl", {"a": truth, "b": truth})
    write_regions("p.jsonl", {"a": RegionSet(truth.boxes[:1], truth.labels[:1], (10, 10), [0.5])})
    files = ["--predictions", "p.jsonl", "--references", "r.jsonl", "--html", "page.html"]
    assert main(["score", "grounding", *files]) == 0
    _, data = parsed(folder / "page.html")
    assert data["samples"][0]["prediction"] == "brain lesion 0.50" and data["samples"][1]["prediction"] is None
    named = dict(zip([metric["name"] for metric in data["metrics"]], data["samples"][0]["values"], strict=True))
    assert named["coco · overall · acc@0.5"] == 0.5, "the mean over the classes of the image"
    table = data["samples"][0]["classes"]
    k = 1 + table["metrics"].index("acc@0.5")
    assert [(row[0], row[k]) for row in table["rows"]] == [("brain", 0.0), ("lesion", 1.0)]
    verdicts = {metric["name"] for metric in data["metrics"] if metric["verdict"]}
    assert "regions · overall · acc@0.5" in verdicts and not any("errors" in name for name in verdicts)


def encoded(rows, columns, size=(40, 80)):
    mask = np.zeros(size, np.uint8, order="F")
    mask[rows, columns] = 1
    coded = rle.encode(mask)
    return {"size": list(size), "counts": coded["counts"].decode()}


SQUARE = encoded(slice(10, 30), slice(20, 60))


@pytest.fixture
def masked(folder):
    """One image with a mask on either side, and a region without."""
    (folder / "images").mkdir()
    Image.new("L", (80, 40), 90).save(folder / "images" / "a.png")
    boxes = [[0.25, 0.25, 0.75, 0.75], [0, 0, 0.1, 0.1]]
    write_regions("r.jsonl", {"a": RegionSet(boxes, ["brain", "x"], (40, 80), masks=[SQUARE, None])})
    half = encoded(slice(10, 30), slice(20, 40))
    write_regions("p.jsonl", {"a": RegionSet([[0.25, 0.25, 0.5, 0.75]], ["brain"], (40, 80), [0.5], [half])})
    return ["score", "grounding", "--predictions", "p.jsonl", "--references", "r.jsonl", "--html", "page.html"]


def corners(path):
    return {tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path)}


def test_masks_are_drawn_as_outlines(masked, folder):
    assert main([*masked, "--images", "images"]) == 0
    (sample,) = parsed(folder / "page.html")[1]["samples"]
    points = np.array(sorted(corners(sample["truth"][0]["path"])))
    assert points.min(0) == pytest.approx([250, 250], abs=3) and points.max(0) == pytest.approx([750, 750], abs=3)
    assert np.array(sorted(corners(sample["said"][0]["path"])))[:, 0].max() == pytest.approx(500, abs=3)
    assert sample["truth"][1]["path"] == "" and sample["truth"][1]["box"] == [0, 0, 100, 100]


def test_a_mask_that_cannot_be_read(masked, folder, capsys):
    """In regions.jsonl it is an error with its line; in the evidence of an answer its box is drawn."""
    rows = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    rows[0]["regions"][0]["mask"]["counts"] = "0"
    write("p.jsonl", rows)
    assert main(masked) == 1
    assert "p.jsonl:1: a mask cannot be read: its run lengths do not add up to the image" in capsys.readouterr().err
    write("r.jsonl", [{"sample_id": "q", "image": "a", "question": "?", "answer": "no", "answer_type": "closed"}])
    write("p.jsonl", [{"sample_id": "q", "prediction": "no", "evidence": rows[0]}])
    assert main(["score", "vqa", *masked[2:], "--images", "images"]) == 0
    (region,) = parsed(folder / "page.html")[1]["samples"][0]["said"]
    assert region["path"] == "" and region["box"] == [250, 250, 500, 750]


def pixels(data, k=0):
    code = data["images"][k].partition("base64,")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("L")).astype(int)


def test_dicom_and_nifti_are_shown_as_a_viewer_shows_them(folder):
    """MONOCHROME1 turned round; a slice with superior up and in true proportions: voxels 1 mm wide and 3 mm high."""
    (folder / "images").mkdir()
    write_dicom(folder / "images" / "film.dcm", np.tile(np.arange(64, dtype=np.uint16), (32, 1)), "MONOCHROME1")
    volume = np.zeros((20, 24, 10), np.float32)
    volume[:, :, 5:] = 100.0
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), folder / "images" / "vol.nii.gz")
    names = ("film", "vol.nii.gz@coronal:12", "vol@coronal:99", "vol.nii.gz")
    rows = [{"sample_id": f"q{k}", "image_id": name, "question": "?"} for k, name in enumerate(names)]
    write("r.jsonl", [{**row, "answer": "no", "answer_type": "closed"} for row in rows])
    write("p.jsonl", [{"sample_id": row["sample_id"], "prediction": "no"} for row in rows])
    files = ["--predictions", "p.jsonl", "--references", "r.jsonl", "--protocol", "strict"]
    assert main(["score", "vqa", *files, "--html", "page.html", "--images", "images"]) == 0
    _, data = parsed(folder / "page.html")
    assert [sample["image"] for sample in data["samples"]] == [0, 1, None, None]
    film, coronal = pixels(data, 0), pixels(data, 1)
    assert film.shape == (32, 64) and film[16, 2] > 240 and film[16, 61] < 15
    assert coronal.shape[0] / coronal.shape[1] == pytest.approx(30 / 20, rel=0.1)
    assert coronal[0].mean() > 200 and coronal[-1].mean() < 50, "superior is up"
    facts = dict(data["facts"])
    assert "2 cannot be read (vol.nii.gz: coronal slice 99 does not exist; choose one from 0 to 23)" in facts["images"]
    assert str(folder) not in facts["images"]


def write_dicom(path, values, photometric):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    file.Modality, file.PatientName, file.PhotometricInterpretation = "DX", "Nobody", photometric
    file.Rows, file.Columns = values.shape
    file.SamplesPerPixel, file.PixelRepresentation = 1, 0
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.PixelData = values.tobytes()
    file.save_as(path, enforce_file_format=True)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_regions_are_drawn_named_and_hidden_in_a_browser(masked, folder):
    assert main([*masked, "--images", "images"]) == 0
    act = """
    const seen = node => getComputedStyle(node).display !== "none";
    const shown = kind => [...document.querySelectorAll(kind)].filter(seen).length;
    const count = () => [".said .mask", ".truth .mask", ".truth .box"].map(shown).join(" ");
    const said = [count()];
    document.querySelector("[data-layer=masks]").click(); said.push(count());
    document.querySelector("[data-layer=truth]").click(); said.push(shown(".region.truth"));
    document.querySelector(".region.said").dispatchEvent(new FocusEvent("focus"));
    said.push(document.querySelector(".readout").textContent);"""
    assert 'id="said">1 1 1; 0 0 2; 0; predicted: brain 0.50<' in in_browser(folder, act)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_draws_and_filters_itself_in_a_browser(questions, folder):
    assert main([*questions, "--images", "images", "--protocol", "strict"]) == 0
    act = """
    const names = () => [...document.querySelectorAll(".sample h3")].map(node => node.textContent).join(" ");
    const press = name => [...document.querySelectorAll("#filters button")].find(b => b.textContent === name).click();
    const said = [names(), document.querySelectorAll(".region.said").length + " box"];
    for (const name of ["right", "wrong", "nothing said"]) { press(name); said.push(name + ": " + names()); }"""
    dom = in_browser(folder, act)
    assert "owned" not in re.search(r"<title>(.*?)</title>", dom)[1]
    assert 'id="said">q1 q2 q3; 1 box; right: q1; wrong: q2 q3; nothing said: q3<' in dom


def in_browser(folder, act):
    """The page's DOM after a script that leaves what it saw in the list `said`."""
    page = (folder / "page.html").read_text(encoding="utf-8")
    tell = 'Object.assign(document.createElement("pre"), {id: "said", textContent: said.join("; ")})'
    script = f"<script>{act}\ndocument.body.append({tell});</script></body>"
    (folder / "page.html").write_text(page.replace("</body>", script), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'page.html'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
