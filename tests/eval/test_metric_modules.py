"""The modules in eval/metrics load with `evaluate.load` from their folder, in a process without a hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, sys
import evaluate

def load(name):
    return evaluate.load(f"{sys.argv[1]}/eval/metrics/{name}")

region = {"image_size": [9, 9], "regions": [{"box": [0, 0, 0.5, 0.5], "label": "brain/lesion", "score": 0.5}]}
nothing = {"image_size": [9, 9], "regions": []}
regions, empty = json.dumps(region), json.dumps(nothing)
vqa, report, lesion = load("medical_vqa"), load("report_text"), "A lesion in the left insula."
print(json.dumps({
    "vqa": vqa.compute(predictions=["Yes.", "16mm"], references=["yes", "15 mm"], patients=["a", "b"]),
    "several": vqa.compute(predictions=["CT"], references=[["ct", "computed tomography"]]),
    "report": report.compute(predictions=[lesion] * 2, references=[lesion, "None."], tokenizer="words", meteor=False),
    "clinical": load("clinical").compute(predictions=[lesion], references=[lesion]),
    "grounding": load("grounding").compute(predictions=[regions, empty], references=[regions, regions]),
}))
"""


def test_metric_modules_load_and_compute_without_a_hub(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert (scores["vqa"]["overall"], scores["vqa"]["closed"], scores["vqa"]["open"]) == (0.5, 1.0, 0.0)
    assert scores["several"]["overall"] == 1.0 and scores["several"]["closed"] is None
    assert scores["report"]["tokenizer"] == "words" and 0 < scores["report"]["ROUGE-L"] < 1
    assert scores["clinical"]["entities report"] == 1.0
    assert scores["grounding"]["acc@0.5"] == 0.5
