"""Looks at files before they are scored: which samples are missing, repeated, empty, or known from the training set."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.grounding import class_of
from eval.records import RegionFiles, check_ids
from eval.statistics import mean_score
from eval.types import Score
from eval.vqa import modality_name, normalise
from eval.vqa_slices import cluster_of
from grounding.labels import LabelTree, load_label_tree

Rows = Sequence[Mapping[str, Any]]

# What a test sample may share with a training sample. Each gives the value that is compared, None where there is none.
SHARED: dict[str, Callable[[Mapping], Any]] = {
    "id": lambda row: row.get("sample_id") or row.get("study_id"),
    "image": lambda row: _image(row),
    "patient": lambda row: row.get("patient_id") or None,
    "image and question": lambda row: _image_and_question(row),
    "report": lambda row: None if row.get("question") else _text(row),
}

MEANING = {
    "missing": "samples without a prediction, which count as if nothing was said",
    "extra": "predictions of samples that are not among the references, left out",
    "empty": "predictions that say nothing",
    "out of frame": "images with a box that reaches out of them by over a pixel; such boxes are cut",
    "repeated": "samples that repeat image and question of another",
    "unknown modalities": "kinds of image that the label tree does not know; names are then read without them",
    "unknown labels": "predicted labels that the references do not have: misspelt, or of another set",
    "without a map": "images with regions and without a heat map",
    "maps of unknown images": "images that are not among the references, left out",
    "maps of unknown phrases": "phrases of heat maps that no reference has under any name, left out",
    **{f"training: same {what}": f"samples share their {what} with the training set" for what in SHARED},
}


def check_samples(
    predictions: Mapping[str, str], rows: Rows, path: Any, training: Rows | None = None
) -> dict[str, list[str]]:
    """Sample ids by what is odd about them, sorted; the keys are those of MEANING that were looked for.

    training: rows of the training set, where it is given. Raises ScoreError where predictions and references share no
    id.
    """
    checks = check_ids(predictions, [row["sample_id"] for row in rows], path)
    checks["empty"] = sorted(key for key, text in predictions.items() if not text.strip())
    checks["repeated"] = _repeated(rows)
    checks["unknown modalities"] = _unknown_modalities(rows)
    for what, value in SHARED.items():
        if training is not None:
            known = {str(found) for row in training if (found := value(row)) is not None}
            shared = [row["sample_id"] for row in rows if (found := value(row)) is not None and str(found) in known]
            checks[f"training: same {what}"] = sorted(shared)
    return checks


def check_regions(regions: RegionFiles, predictions: Any = None, heatmaps: Any = None) -> dict[str, list[str]]:
    """The same of regions and heat maps; predictions, heatmaps: paths of the files that were given.

    Raises ScoreError where a file and the references share no image.
    """
    tree, truth, checks = load_label_tree(), list(regions.references), {}
    if predictions is not None:
        checks |= check_ids(regions.predictions, truth, predictions)
        checks["empty"] = sorted(key for key, found in regions.predictions.items() if not len(found))
        checks["out of frame"] = sorted(regions.clipped)
        checks["unknown labels"] = [*_unknown_labels(regions, tree), *regions.unknown]
    if regions.heatmaps is not None:
        ids = check_ids(regions.heatmaps, truth, heatmaps)
        checks["without a map"] = [key for key in ids["missing"] if len(regions.references[key])]
        checks["maps of unknown images"] = ids["extra"]
        checks["maps of unknown phrases"] = _unknown_phrases(regions, tree)
    return checks


def scores_by_training(overall: Score, checks: Mapping[str, Sequence[str]], rows: Rows) -> dict[str, Score]:
    """A protocol's overall score apart for samples that share something with the training set, and for the others."""
    seen = {key for name, ids in checks.items() if name.startswith("training:") for key in ids}
    clusters = {row["sample_id"]: cluster_of(row) for row in rows}
    scores = {}
    for name, wanted in (("shares something", True), ("shares nothing", False)):
        kept = [row for row in overall.per_sample or [] if (row["sample_id"] in seen) == wanted]
        values, groups = [row["value"] for row in kept], [clusters[row["sample_id"]] for row in kept]
        reason = "no such samples"
        scores[name] = mean_score(f"{overall.name}, {name}", overall.version, values, groups, reason=reason)
    return scores


def _unknown_labels(regions: RegionFiles, tree: LabelTree) -> list[str]:
    """What is predicted and neither annotated, nor declared as what is annotated, nor of the class of what is."""
    known = {label for truth in regions.references.values() for label in truth.labels}
    known.update(label for labels in regions.labelled.values() for label in labels)
    known.update(str(category["name"]) for category in (regions.coco[0]["categories"] if regions.coco else ()))
    known |= {class_of(label, tree) for label in known}
    said = {label for found in regions.predictions.values() for label in found.labels}
    return sorted(label for label in said if label not in known and class_of(label, tree) not in known)


def _unknown_phrases(regions: RegionFiles, tree: LabelTree) -> list[str]:
    known = {label for truth in regions.references.values() for label in truth.labels}
    known.update(tree.find(label, modality=kind) for label in [*known] for kind in {*regions.modalities.values(), None})
    said = {(phrase, regions.modalities.get(key)) for key, maps in (regions.heatmaps or {}).items() for phrase in maps}
    unknown = {phrase for phrase, kind in said if phrase not in known and tree.find(phrase, modality=kind) not in known}
    return sorted(unknown)


def _unknown_modalities(rows: Rows) -> list[str]:
    known = {modality for node in load_label_tree().nodes.values() for modality in node.modalities}
    named = {str(row["modality"]) for row in rows if row.get("modality")}
    return sorted(name for name in named if modality_name(name) not in known)


def _repeated(rows: Rows) -> list[str]:
    first: dict[Any, str] = {}
    repeats = []
    for row in rows:
        key = _image_and_question(row)
        if key is not None and first.setdefault(key, row["sample_id"]) != row["sample_id"]:
            repeats.append(row["sample_id"])
    return sorted(repeats)


def _image(row: Mapping) -> Any:
    return next((row[key] for key in ("image_id", "img_id", "image_name", "image") if row.get(key)), None)


def _image_and_question(row: Mapping) -> tuple | None:
    image, question = _image(row), str(row.get("question") or "")
    return (str(image), normalise(question)) if image is not None and question.strip() else None


def _text(row: Mapping) -> str | None:
    """A report's words; None for a text so short ("Normal.") that many studies have it."""
    texts = row.get("references") or [row.get("report") or ""]
    text = normalise(str(texts[0]))
    return text if len(text.split()) >= 12 else None
