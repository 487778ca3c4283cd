"""Runs one metric of eval/report_models.py: question on stdin, answer to the file named as argument.

It is run as text by whatever interpreter has the package, so it imports nothing of ours. The calls are those of
f1chexbert 0.0.2, radgraph 0.1.18, RaTEScore 0.6.0 and radeval 2.2.1, read in their sources.
"""

import importlib.metadata
import json
import sys


def chexbert(predictions, references):
    from f1chexbert import F1CheXbert

    program = F1CheXbert()

    def labels(report):
        values = program.get_label(report.strip(), mode="classification")
        return {name: None if value == "" else value for name, value in zip(program.target_names, values)}  # noqa: B905

    both = {"predictions": predictions, "references": references}
    return {side: [labels(report) for report in reports] for side, reports in both.items()}


def radgraph(predictions, references):
    from radgraph import F1RadGraph

    program = F1RadGraph(reward_level="all", model_type="radgraph-xl")
    _, rewards, _, _ = program(hyps=predictions, refs=references)
    names = ("simple", "partial", "complete")
    return {"values": {name: list(map(float, row)) for name, row in zip(names, rewards)}}  # noqa: B905


def ratescore(predictions, references):
    import torch
    from RaTEScore import RaTEScore

    scores = RaTEScore(use_gpu=torch.cuda.is_available()).compute_score(predictions, references)
    return {"values": {"ratescore": list(map(float, scores))}}


def green(predictions, references):
    return _radeval("green", "green", predictions, references)


def radcliq(predictions, references):
    return _radeval("radcliq", "radcliq_v1", predictions, references)


def _radeval(metric, key, predictions, references):
    from radeval import RadEval

    scores = RadEval(metrics=[metric], per_sample=True, show_progress=False)(refs=references, hyps=predictions)
    return {"values": {metric: list(map(float, scores[key]))}}


METRICS = {
    "chexbert": (chexbert, "f1chexbert"),
    "radgraph": (radgraph, "radgraph"),
    "ratescore": (ratescore, "RaTEScore"),
    "green": (green, "radeval"),
    "radcliq": (radcliq, "radeval"),
}


def main():
    question = json.load(sys.stdin)
    metric, package = METRICS[question["name"]]
    try:
        answer = metric(question["predictions"], question["references"])
        answer["version"] = importlib.metadata.version(package)
    except ModuleNotFoundError as error:
        answer = {"missing": error.name}
    except Exception as error:  # whatever a foreign program raises is its one-line message
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
