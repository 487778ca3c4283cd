"""The protocols of `medglip score`, by task: name → function. A literal table; what is heavy is imported when called.

vqa and report protocols take what was `Given`, grounding ones the `RegionFiles`; each returns nested dicts of Scores.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from eval.entailment import Entails
from eval.findings import finding_scores
from eval.grounding import grounding_scores, scores_by_source
from eval.region_files import RegionFiles
from eval.report_models import MODELS
from eval.text import text_scores
from eval.vqa import vqa_accuracy
from eval.vqa_protocols import PROTOCOLS as VQA_PROTOCOLS
from eval.vqa_slices import cluster_of
from grounding.labels import load_label_tree
from grounding.types import RegionSet

Results = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What answers and reports are scored from.

    said: sample_id → text. rows: the references, each with sample_id and references. lines: sample_id → the whole
    row of the prediction (a report's sentences and regions). training: rows of the training set, None if not given.
    model_python: interpreter of the environment that holds the packages of metrics with weights (default: this one).
    entails: what decides in radfact (default: by rule).
    """

    said: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    lines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Sequence[Mapping[str, Any]] | None = None
    model_python: str | None = None
    entails: Entails | None = None

    @property
    def patients(self) -> dict[str, str]:
        """sample_id → what it is not independent of."""
        return {row["sample_id"]: cluster_of(row) for row in self.rows}

    @property
    def first(self) -> dict[str, str]:
        """sample_id → the first reference."""
        return {row["sample_id"]: row["references"][0] for row in self.rows}


def _vqa(protocol: Callable[..., Results], given: Given) -> Results:
    return protocol(given.said, given.rows)


def _full(given: Given) -> Results:
    return text_scores(given.said, {row["sample_id"]: row["references"] for row in given.rows}, given.patients)


def _r2gen(dataset: str, given: Given) -> Results:
    """With the training set, words that it seldom has are "<unk>", as R2Gen has it."""
    references = {row["sample_id"]: row["references"] for row in given.rows}
    known = None if given.training is None else [text for row in given.training for text in row["references"][:1]]
    chosen = {"protocol": "r2gen", "dataset": dataset, "train_reports": known}
    return text_scores(given.said, references, given.patients, **chosen)


def _findings(given: Given) -> Results:
    return finding_scores(given.said, given.first, given.patients)


def _chexpert(given: Given) -> Results:
    from eval.clinical import chexpert_scores

    return chexpert_scores(given.said, given.first, given.patients)


def _entities(given: Given) -> Results:
    """A modality that the label tree does not have ("x-ray" is its "xray") tells nothing."""
    from eval.clinical import entity_scores

    known = {modality for node in load_label_tree().nodes.values() for modality in node.modalities}
    named = {row["sample_id"]: re.sub(r"\W", "", str(row.get("modality") or "").lower()) for row in given.rows}
    return entity_scores(given.said, given.first, given.patients, {k: m for k, m in named.items() if m in known})


def _model(name: str, given: Given) -> Results:
    from eval.report_models import model_scores

    return model_scores(name, given.said, given.first, given.patients, given.model_python)


def _grounded(given: Given) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predictions and references in forms that `sentences_of` reads: sentences with boxes, a line, or a text."""
    said = {key: _sentences(given.lines.get(key, {"prediction": text})) for key, text in given.said.items()}
    truth = {row["sample_id"]: _sentences({**row, "prediction": row["references"][0]}) for row in given.rows}
    return said, truth


def _sentences(row: Mapping[str, Any]) -> Any:
    """A list of {"text", "boxes"} where the row has one, else the row."""
    sentences = row.get("sentences")
    with_boxes = isinstance(sentences, list) and any(isinstance(s, dict) and "boxes" in s for s in sentences)
    return sentences if with_boxes else row


def _radfact(given: Given) -> Results:
    from eval.grounded_reports import radfact_scores

    return radfact_scores(*_grounded(given), given.entails, given.patients)


def _grounded_findings(given: Given) -> Results:
    from eval.report_findings import finding_errors

    return finding_errors(*_grounded(given), patients=given.patients)


def _citations(given: Given) -> Results:
    from eval.report_findings import citation_scores

    return citation_scores(*_grounded(given), patients=given.patients)


def _cited_regions(given: Given) -> Results:
    from eval.citation_scores import cited_region_scores

    rows = {row["sample_id"]: row.get("regions") or [] for row in given.rows}
    annotated = {key: RegionSet.from_dict({"image_size": (1, 1), "regions": regions}) for key, regions in rows.items()}
    return cited_region_scores(given.lines, annotated, given.patients)


def _coco(regions: RegionFiles) -> Results:
    scores = grounding_scores(regions.predictions, regions.references, regions.patients, coco=regions.coco)
    return scores | {"by_source": scores_by_source(regions)} if regions.sources else scores


def _regions(regions: RegionFiles) -> Results:
    from eval.regions import region_scores

    return region_scores(
        regions.predictions,
        regions.references,
        regions.patients,
        coco=regions.coco,
        sources=regions.sources,
        modalities=regions.modalities,
        labelled=regions.labelled,
        spacing=regions.spacing,
    )


def _heatmaps(regions: RegionFiles) -> Results:
    from eval.heatmap_results import heatmap_results

    assert regions.heatmaps is not None
    tables = {"sources": regions.sources, "modalities": regions.modalities}
    return heatmap_results(regions.heatmaps, regions.references, regions.patients, **tables)


PROTOCOLS: dict[str, dict[str, Callable[..., Results]]] = {
    "vqa": {"strict": partial(_vqa, vqa_accuracy), **{name: partial(_vqa, f) for name, f in VQA_PROTOCOLS.items()}},
    "report": {
        "full": _full,
        "findings": _findings,
        "chexpert": _chexpert,
        "entities": _entities,
        "r2gen": partial(_r2gen, "iu_xray"),
        "r2gen-mimic": partial(_r2gen, "mimic_cxr"),
        "radfact": _radfact,
        "grounded-findings": _grounded_findings,
        "citations": _citations,
        "cited-regions": _cited_regions,
        **{name: partial(_model, name) for name in MODELS},
    },
    "grounding": {"coco": _coco, "regions": _regions, "heatmaps": _heatmaps},
}

# What is scored where no protocol is named: of reports not what needs regions or weights, nor a second cleaning of the
# same words. Heat maps are scored where they are given.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "vqa": tuple(PROTOCOLS["vqa"]),
    "report": ("full", "findings", "chexpert", "entities"),
    "grounding": ("coco", "regions"),
}
