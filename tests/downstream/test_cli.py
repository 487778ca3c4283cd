"""``medglip`` on a picture of the user's own, and what it says when something is wrong: the real command line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from downstream.assistant import load_assistant
from downstream.brain_qa import build_questions
from downstream.cli import main
from grounding.calibrate import calibrate
from grounding.detect import load_grounder
from grounding.model import MedGLIPConfig, build_model, save_checkpoint
from grounding.predict import PredictConfig, write_predictions
from grounding.store import open_store

ROOT = Path(__file__).resolve().parents[2]


def _train(module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Regions of these images are remembered here, not among the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDGLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def home(brain_store, tmp_path_factory) -> Path:
    """What ``medglip demo`` leaves, from tiny random models trained for a few steps: it works, and knows nothing."""
    home = tmp_path_factory.mktemp("home")
    sizes = ("steps=4", "batch_size=4", "warmup=1")
    _train("grounding.train", f"store={brain_store}", f"out={home / 'grounder'}", "trunk=tiny", "calibration=8", *sizes)
    store, grounder = open_store(brain_store), load_grounder(home / "grounder")
    for kind in ("predicted", "annotated"):
        write_predictions(grounder, store, PredictConfig(home / "grounder", brain_store, home / kind, kind))
    build_questions(brain_store, brain_store.parent, seed=0, n_questions=20, n_reports=8)
    tokens = [f"{kind}={home / kind / 'region_tokens.safetensors'}" for kind in ("predicted", "annotated")]
    bridge = ("base=tiny", "max_answer=480", "route=tokens", f"data={brain_store.parent}", f"out={home / 'tokens'}")
    _train("downstream.train", *bridge, *tokens, *sizes)
    return home


@pytest.fixture(scope="module")
def slice_png(brain_store, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "slice.png"
    path.write_bytes(open_store(brain_store)[20].image)
    return path


def _as_dicom(png: Path, path: Path) -> Path:
    pixels = np.array(Image.open(png)).astype(np.uint16) * 4
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.SOPClassUID, data.SOPInstanceUID = data.file_meta.MediaStorageSOPClassUID, generate_uid()
    data.Modality, data.PatientName, data.PatientID = "MR", "Secret^Patient", "SECRET-ID"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelSpacing = [1.0, 1.0]
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def _as_nifti(png: Path, path: Path) -> str:
    axial = np.array(Image.open(png)).astype(np.float32)
    volume = np.repeat(np.flip(axial, (0, 1)).T[:, :, None], 3, 2)  # patient's left on the image's right, anterior up
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1.0, 1.0, 1.0, 1.0])), path)
    return f"{path}@axial:1"


@pytest.fixture(params=["png", "jpeg", "dicom", "nifti"])
def own_image(request, slice_png, tmp_path) -> str:
    if request.param == "dicom":
        return str(_as_dicom(slice_png, tmp_path / "slice.dcm"))
    if request.param == "nifti":
        return _as_nifti(slice_png, tmp_path / "slice.nii.gz")
    path = tmp_path / f"slice.{request.param}"
    Image.open(slice_png).resize((300, 300)).save(path)
    return str(path)


def test_ground_ask_and_report_work_on_own_images(own_image, home, tmp_path, capsys):
    common = ("--checkpoint", str(home), "--modality", "mri")
    out, picture = tmp_path / "regions.json", tmp_path / "overlay.png"
    assert (
        main(["ground", own_image, "lesion", "left insula", *common, "--out", str(out), "--overlay", str(picture)]) == 0
    )
    regions = json.loads(out.read_text())
    assert [query["phrase"] for query in regions["queries"]] == ["lesion", "left insula"]
    assert all("lesion" in row["label"] or "left_insula" in row["label"] for row in regions["regions"])
    assert Image.open(picture).size[0] > 500
    answer = tmp_path / "answer.json"
    assert main(["ask", own_image, "Is there a lesion?", *common, "--out", str(answer)]) == 0
    said = json.loads(answer.read_text())
    assert said["question"] == "Is there a lesion?" and said["asked_for"][0]["label"] == "brain/lesion"
    page = tmp_path / "report.html"
    assert main(["report", own_image, *common, "--out", str(page)]) == 0
    assert "<html" in page.read_text().lower()
    shown = capsys.readouterr().out + out.read_text() + answer.read_text() + page.read_text()
    assert "not a medical device" in shown.lower()
    assert "SECRET" not in shown.upper()


def test_a_radiologists_regions_take_the_detectors_place(slice_png, home, tmp_path):
    regions = tmp_path / "regions.jsonl"
    row = {"box": [0.5, 0.3, 0.6, 0.4], "label": "lesion"}
    regions.write_text(json.dumps({"image_id": "x", "image_size": [192, 192], "regions": [row]}) + "\n")
    answer = tmp_path / "answer.json"
    arguments = ["ask", str(slice_png), "Where is the lesion?", "--checkpoint", str(home), "--modality", "mri"]
    assert main([*arguments, "--regions", str(regions), "--out", str(answer)]) == 0
    (evidence,) = json.loads(answer.read_text())["evidence"]["regions"]
    assert evidence["box"] == pytest.approx(row["box"]) and evidence["label"] == "brain/lesion"


@pytest.fixture(scope="module")
def volume(brain_store, tmp_path_factory) -> Path:
    """Twelve slices of 1 mm: the same picture, moved a little from slice to slice."""
    path = tmp_path_factory.mktemp("volume") / "head.nii.gz"
    axial = np.array(Image.open(io.BytesIO(open_store(brain_store)[20].image)).convert("L")).astype(np.float32)
    slices = [np.roll(np.flip(axial, (0, 1)).T, k, 0) for k in range(12)]
    nibabel.save(nibabel.Nifti1Image(np.stack(slices, 2), np.diag([-1.0, 1.0, 1.0, 1.0])), path)
    return path


def test_a_volume_is_asked_about_as_one(volume, home, tmp_path, capsys):
    common = ("--checkpoint", str(home), "--modality", "mri")
    out = tmp_path / "answer.json"
    assert main(["ask", str(volume), "Is there a lesion?", *common, "--out", str(out)]) == 0
    said = json.loads(out.read_text())
    assert said["slices"] == 12 and 0 <= said["slice"] < 12 and said["mm_from_slice_to_slice"] == 1.0
    assert said["asked_for"][0]["label"] == "brain/lesion"
    assert len(said["tracks"]) == len(said["evidence"]["regions"])
    for track in said["tracks"]:
        assert 0 <= track["first"] <= track["slice"] <= track["last"] < 12
        assert track["depth_mm"] == track["last"] - track["first"] + 1 >= 3
    page = tmp_path / "report.html"
    assert main(["report", str(volume), *common, "--out", str(page)]) == 0
    assert "<html" in page.read_text().lower()
    assert main(["ask", str(volume), "Is there a lesion?", *common, "--regions", "x.jsonl"]) == 1
    assert "is a volume; give a slice of it" in capsys.readouterr().err


def test_an_image_seen_before_costs_no_look_at_it(slice_png, volume, home, tmp_path, monkeypatch):
    """Neither pass of the image model, nor check of its kind; and the answer is the same."""
    monkeypatch.setenv("MEDGLIP_CACHE", str(tmp_path))
    assistant, passes = load_assistant(home, "tokens"), []
    trunk = assistant.grounder.model.trunk
    maps = trunk.feature_maps
    monkeypatch.setattr(trunk, "feature_maps", lambda pixels: passes.append(1) or maps(pixels))
    for path in (slice_png, volume):
        first, _ = assistant.ask(str(path), "Where is the lesion?", "mri")
        assert passes
        passes.clear()
        again, _ = assistant.ask(str(path), "Where is the lesion?", "mri")
        report, _ = assistant.report(str(path), "mri")
        assert again == first and report["looked_for"] and not passes
    moved = tmp_path / "moved.png"
    Image.fromarray(np.roll(np.array(Image.open(slice_png)), 3, 0)).save(moved)
    assistant.ask(str(moved), "Where is the lesion?", "mri")
    assert passes


def test_a_damaged_cache_is_no_error(slice_png, home, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGLIP_CACHE", str(tmp_path))
    assistant = load_assistant(home, "tokens")
    first, _ = assistant.ask(str(slice_png), "Where is the lesion?", "mri")
    (file,) = (tmp_path / "regions").rglob("*.safetensors")
    file.write_bytes(b"damaged")
    assert assistant.ask(str(slice_png), "Where is the lesion?", "mri")[0] == first


def test_an_answer_is_chosen_among_options_and_explained(slice_png, home, tmp_path, capsys):
    common = ("--checkpoint", str(home), "--modality", "mri", "--out", str(tmp_path / "answer.json"))
    assert main(["ask", str(slice_png), "Is there a lesion?", "--options", "--why", *common]) == 0
    said = json.loads((tmp_path / "answer.json").read_text())
    assert list(said["options"]) == ["yes", "no"] and sum(said["options"].values()) == pytest.approx(1)
    assert said["answer"] == max(said["options"], key=said["options"].get)
    assert 0 <= said["why"]["confidence"] <= 1 and said["why"]["regions"]
    shown = capsys.readouterr().out
    assert f"yes: probability {said['options']['yes']:.2f}" in shown and "drop" in shown
    assert main(["ask", str(slice_png), "Where is it?", "--options", "left", "right", *common]) == 0
    assert json.loads((tmp_path / "answer.json").read_text())["answer"] in ("left", "right")
    assert main(["ask", str(slice_png), "Where is it?", *common, "--options"]) == 1
    assert "has no options of its own; give them: --options yes no" in capsys.readouterr().err


def test_a_report_by_section(slice_png, home, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["report", str(slice_png), "--checkpoint", str(home), "--modality", "mri", "--sections"]
    assert main([*arguments, "--out", str(out)]) == 0
    text = json.loads(out.read_text())["report"]
    assert text.startswith("Findings: ") and text.count("Findings:") == 1 and text.count("Impression:") <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ground", "missing.png", "lesion"), "missing.png: no such file"),
        (("ground", "{empty}", "lesion"), "empty file"),
        (("ground", "{text}", "lesion"), "not an image"),
        (
            ("ground", "{slice}", "lesion", "--modality", "xray"),
            "modality 'xray' is not one this checkpoint was trained on",
        ),
        (("ground", "{slice}", "lesion", "--modality", "sonar"), "modality 'sonar' is not a modality; it knows: mri"),
        (("ground", "{slice}", "pneumonia", "--modality", "mri"), "phrase 'pneumonia' is unknown to this checkpoint"),
        (("ground", "{slice}", "", "--modality", "mri"), "empty phrase"),
        (("ask", "{slice}", "  "), "empty question"),
        (("ask", "{slice}", "Where?", "--route", "text"), "not a bridge checkpoint"),
        (("ask", "missing.nii.gz", "Where?"), "missing.nii.gz: no such file"),
        (("report", "{folder}"), "no DICOM image in this folder"),
        (("ask", "{slice}", "Where?", "--checkpoint", "nowhere"), "nowhere: no grounding checkpoint there"),
        (("report", "{slice}", "--out", "report.pdf"), "reports are written as .html or .json"),
        (("report", "{slice}", "--out", "/proc/none/report.json"), "/proc/none"),
    ],
)
def test_bad_input_is_one_line(arguments, says, home, slice_png, tmp_path, capsys):
    files = {"slice": slice_png, "empty": tmp_path / "empty.png", "text": tmp_path / "text.png"}
    files["empty"].write_bytes(b"")
    files["folder"] = tmp_path / "folder"
    files["folder"].mkdir()
    files["text"].write_text("this is no picture")
    arguments = [argument.format(**files) for argument in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", str(home)]
    before = set(tmp_path.iterdir())
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1, error
    assert set(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def real_trunk(brain_store, tmp_path_factory) -> Path:
    """A grounder with the ImageNet trunk, not trained but calibrated: it knows what its images look like."""
    folder = tmp_path_factory.mktemp("trunk")
    model = build_model(MedGLIPConfig(vocabulary=("brain", "brain/lesion"), phrases=("brain", "brain lesion")), seed=0)
    store = open_store(brain_store)
    config, familiar = calibrate(model.eval(), [store[k] for k in range(16)])
    save_checkpoint(folder, config, model.state_dict() | {"familiar": familiar})
    return folder


@pytest.mark.parametrize("kind", ["noise", "chest film", "polyp", "skin lesion"])
def test_an_image_of_another_kind_is_refused(kind, real_trunk, tmp_path, capsys):
    data = ROOT.parent / "shared" / "data"
    folders = {
        "chest film": "cxr-lungboxes/images",
        "polyp": "kvasir-seg/Kvasir-SEG/images",
        "skin lesion": "isic2018-512/data512",
    }
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    if kind != "noise":
        found = sorted(p for p in (data / folders[kind]).rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))
        if not found:
            pytest.skip(f"no real {kind} at hand (../shared/data)")
        path = found[0]
    assert main(["ground", str(path), "lesion", "--checkpoint", str(real_trunk)]) == 1
    error = capsys.readouterr().err
    assert "does not look like those this checkpoint was trained on (mri, brain)" in error
    assert len(error.strip().splitlines()) == 1


def test_an_image_of_the_known_kind_is_taken(slice_png, real_trunk):
    assert main(["ground", str(slice_png), "lesion", "--checkpoint", str(real_trunk)]) == 0


def test_another_version_of_a_checkpoint_is_refused(home, slice_png, tmp_path, capsys):
    config = json.loads((home / "grounder" / "config.json").read_text()) | {"format_version": 99}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["ground", str(slice_png), "lesion", "--checkpoint", str(tmp_path)]) == 1
    assert "checkpoint of format 99" in capsys.readouterr().err


def test_wrong_use_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["grond", "x.png"])
    assert stopped.value.code == 2
    assert main(["demo", "--out", "unused", "sed=1"]) == 2
    assert "unknown key 'sed'; nearest: seed" in capsys.readouterr().err
    assert not Path("unused").exists()


@pytest.mark.parametrize("command", ["demo", "ground", "ask", "report", "score"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"medglip {command}" in capsys.readouterr().out.split("example:")[1]


@pytest.mark.slow
def test_a_small_demo_runs_and_is_reused(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "downstream.cli", "demo", "--config", "configs/demo/small.yaml", "--out", str(out)]
    command.append("jobs=2")
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["vqa"]["tokens/shuffled"]["overall"]["n"] == 24
    assert "<html" in (out / "index.html").read_text().lower()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("reused from") >= 6
    repeated = json.loads((out / "scores.json").read_text())
    assert {k: v for k, v in repeated.items() if k != "run"} == {k: v for k, v in scores.items() if k != "run"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path):
    results = []
    for name in ("a", "b"):
        command = [sys.executable, "-m", "downstream.cli", "demo", "--config", "configs/demo/small.yaml"]
        command += ["--out", str(tmp_path / name), "systems=[none,tokens/predicted]"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        results.append(json.loads((tmp_path / name / "scores.json").read_text()))
    for part in ("grounding", "vqa", "report", "tables"):
        assert results[0][part] == results[1][part]
