"""BLEU, ROUGE-L, CIDEr and METEOR of reports, for `evaluate`: works without a hub.

evaluate.load("eval/metrics/report_text").compute(
    predictions=["No lesion."], references=["No lesion is seen."], tokenizer="words", meteor=False)
"""

from collections.abc import Sequence

import datasets
import evaluate

from eval.table import scores_in
from eval.text import text_scores


class ReportText(evaluate.Metric):
    """Reports against reference reports."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=(
                "predictions: texts. references: a text or a list of texts each. tokenizer: ptb (needs Java), words, "
                "none. meteor: whether METEOR is computed (needs Java)."
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
        tokenizer: str | None = None,
        meteor: bool = True,
    ) -> dict[str, float | str | None]:
        """{metric: value}; None where undefined; "tokenizer" says which one was used."""
        said = {f"{k:09d}": text for k, text in enumerate(predictions)}
        truth = {f"{k:09d}": [texts] if isinstance(texts, str) else list(texts) for k, texts in enumerate(references)}
        results = text_scores(said, truth, tokenizer=tokenizer, meteor=meteor)
        values = {" ".join(path): score.value for path, score in scores_in(results)}
        return values | {"tokenizer": results["tokenizer"]}
