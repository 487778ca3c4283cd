"""Grounding scores (AP, accuracy at IoU 0.5, pointing, Dice), for `evaluate`: works without a hub.

An image is a dict in the form of regions.jsonl, as JSON text: {"image_size": [H, W], "regions": [{"box", "label",
"score", "mask"}]}, boxes xyxy in [0, 1].

evaluate.load("eval/metrics/grounding").compute(predictions=[json.dumps(said)], references=[json.dumps(truth)])
"""

import json
from collections.abc import Sequence

import datasets
import evaluate

from eval.grounding import grounding_scores
from eval.table import scores_in
from grounding.types import RegionSet


class Grounding(evaluate.Metric):
    """Predicted regions against true ones, image by image."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: an image's regions as JSON text. patients: for the intervals.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], patients: Sequence[str] | None = None
    ) -> dict[str, float | None]:
        """{metric: value} of the overall scores; None where undefined."""
        said, truth = (
            {f"{k:09d}": RegionSet.from_dict(json.loads(text)) for k, text in enumerate(texts)}
            for texts in (predictions, references)
        )
        clusters = None if patients is None else dict(zip(truth, map(str, patients), strict=True))
        results = grounding_scores(said, truth, clusters)
        return {" ".join(path): score.value for path, score in scores_in(results["overall"])}
