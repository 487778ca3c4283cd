"""Medical VQA accuracy under a named protocol, for `evaluate`: works without a hub.

evaluate.load("eval/metrics/medical_vqa").compute(
    predictions=["Yes."], references=["yes"], answer_types=["closed"], patients=["p1"], protocol="strict")
"""

from collections.abc import Sequence

import datasets
import evaluate

from eval.protocols import PROTOCOLS, Given
from eval.table import scores_in


class MedicalVQA(evaluate.Metric):
    """Answers against reference answers."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=(
                "predictions: texts. references: a text or a list of accepted texts each. answer_types: open or closed "
                "(default: closed for yes and no). patients: for the intervals. protocol: "
                + ", ".join(PROTOCOLS["vqa"])
            ),
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str] | Sequence[Sequence[str]],
        protocol: str = "strict",
        answer_types: Sequence[str] | None = None,
        patients: Sequence[str] | None = None,
    ) -> dict[str, float | None]:
        """{metric: value}; None where undefined."""
        if protocol not in PROTOCOLS["vqa"]:
            raise ValueError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS['vqa'])}")
        rows = []
        for k, reference in enumerate(references):
            texts = [reference] if isinstance(reference, str) else list(reference)
            closed = texts[0].strip().lower().rstrip(".") in ("yes", "no")
            kind = answer_types[k] if answer_types is not None else "closed" if closed else "open"
            row = {
                "sample_id": f"{k:09d}",
                "question": "",
                "answer": texts[0],
                "references": texts,
                "answer_type": kind,
            }
            rows.append(row | ({} if patients is None else {"patient_id": patients[k]}))
        said = {row["sample_id"]: text for row, text in zip(rows, predictions, strict=True)}
        results = PROTOCOLS["vqa"][protocol](Given(said, rows))
        return {" ".join(path): score.value for path, score in scores_in(results)}
