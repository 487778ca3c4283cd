"""Clinical agreement of reports without weights, for `evaluate`: works without a hub.

evaluate.load("eval/metrics/clinical").compute(predictions=["No effusion."], references=["Small left effusion."])
"""

from collections.abc import Sequence

import datasets
import evaluate

from eval.protocols import PROTOCOLS, Given
from eval.table import scores_in

NOT_CLINICAL = ("full", "r2gen", "r2gen-mimic", "radfact", "grounded-findings", "citations", "cited-regions")


class Clinical(evaluate.Metric):
    """Reports against one reference report each."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: texts. protocols: "
            + ", ".join(name for name in PROTOCOLS["report"] if name not in NOT_CLINICAL),
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], protocols: Sequence[str] = ("chexpert", "entities")
    ) -> dict[str, float | None]:
        """{"protocol metric": value}; None where undefined."""
        unknown = [name for name in protocols if name not in PROTOCOLS["report"] or name in NOT_CLINICAL]
        if unknown:
            raise ValueError(f"unknown protocol {unknown[0]!r}; see inputs_description")
        said = {f"{k:09d}": text for k, text in enumerate(predictions)}
        rows = [{"sample_id": f"{k:09d}", "references": [text]} for k, text in enumerate(references)]
        given = Given(said, rows)
        results = {name: PROTOCOLS["report"][name](given) for name in protocols}
        return {" ".join(path): score.value for path, score in scores_in(results)}
