"""Clinical metrics that need weights, from the packages of those who made them, in a process of their own.

    chexbert   F1CheXbert (Smit et al. 2020)           med-glip[chexbert]   labels, scored by eval/clinical.py
    radgraph   RadGraph-XL F1 (Delbrouck et al. 2024)  med-glip[radgraph]   simple, partial, complete
    ratescore  RaTEScore (Zhao et al. 2024)            med-glip[ratescore]
    green      GREEN (Ostmeier et al. 2024)            med-glip[radeval]    a judge of 7 billion parameters
    radcliq    RadCliQ-v1 (Yu et al. 2023)             med-glip[radeval]    lower is better

Nothing is installed or imported until one is asked for; the packages download their weights from the hub themselves.
Where their pins do not go with this environment (radeval wants torchvision), install the package in another one and
name its interpreter: `python=".../bin/python"`.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.statistics import mean_score
from eval.types import Score, ScoreError

__all__ = ["MODELS", "model_scores"]

VERSION = "1"
MODELS = {  # name → (extra of this package, what it installs)
    "chexbert": ("chexbert", "f1chexbert"),
    "radgraph": ("radgraph", "radgraph"),
    "ratescore": ("ratescore", "RaTEScore medspacy pandas"),
    "green": ("radeval", "radeval"),
    "radcliq": ("radeval", "radeval"),
}

_WORKER = Path(__file__).with_name("report_models_worker.py")


def model_scores(
    name: str,
    predictions: Mapping[str, str],
    references: Mapping[str, str],
    patients: Mapping[str, str] | None = None,
    python: str | Path | None = None,
) -> dict[str, Any]:
    """One of MODELS over the sample ids of `references`; a missing prediction is an empty report.

    python: interpreter of the environment that has the package (default: this one). Returns {"protocol", "version":
    that of the package, ...Scores}: of `chexbert` what `eval.clinical.label_scores` returns, of the others one Score a
    value, with per_sample. Raises ScoreError where the name is not known, the package is not there, or it fails.
    """
    if name not in MODELS:
        raise ScoreError(f"unknown metric {name!r}; choose one of {', '.join(MODELS)}")
    ids = sorted(references)
    if not ids:
        return {"protocol": name, name: Score(name, VERSION, None, 0, reason="no reports")}
    said, truth = [predictions.get(i, "") for i in ids], [references[i] for i in ids]
    answer = _ask({"name": name, "predictions": said, "references": truth}, str(python or sys.executable))
    protocol = {"protocol": name, "version": answer["version"]}
    clusters = [(patients or {}).get(i, i) for i in ids]
    if name == "chexbert":
        from eval.clinical import label_scores

        labels = (dict(zip(ids, answer[side], strict=True)) for side in ("predictions", "references"))
        return label_scores(*labels, patients) | protocol
    scores = {}
    for key, values in answer["values"].items():
        rows = [{"sample_id": i, "value": value} for i, value in zip(ids, values, strict=True)]
        scores[key] = mean_score(key, answer["version"], values, clusters, rows, "no reports")
    return protocol | scores


def _ask(question: Mapping[str, Any], python: str) -> dict[str, Any]:
    """Runs the worker in a folder of its own, and gives back its answer."""
    name = question["name"]
    extra, packages = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", _WORKER.read_text(encoding="utf-8"), str(Path(folder) / "answer.json")]
        try:
            done = subprocess.run(
                command, input=json.dumps(question), capture_output=True, text=True, cwd=folder, check=False
            )
        except OSError as error:
            raise ScoreError(f"{name}: {python} does not start ({error.strerror}); name a Python interpreter") from None
        answer = Path(folder) / "answer.json"
        result = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if "missing" in result:
        raise ScoreError(
            f"{name}: no module {result['missing']!r}: pip install 'med-glip[{extra}]', or {packages} in an "
            "environment of its own whose interpreter you name; the package downloads its weights at the first use"
        )
    if "error" in result or not result:
        last = result.get("error") or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        package = packages.split()[0]
        raise ScoreError(f"{name}: {package} failed: {last}; its weights come from the hub, so check the network")
    return result
