"""``medglip score vqa | report | grounding | compare``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

EXAMPLES = {
    "vqa": "medglip score vqa --predictions p.jsonl --references r.jsonl --train train.jsonl --html scores.html",
    "report": "medglip score report --predictions p.jsonl --references r.jsonl --protocol full findings --out s.json",
    "grounding": "medglip score grounding --predictions results.json --references truth.json --markdown scores.md",
    "compare": "medglip score compare none.json tokens.json --against best --markdown compare.md",
}
SUMMARIES = {
    "vqa": "answers to questions: accuracy under several protocols side by side",
    "report": "reports: text overlap and clinical findings",
    "grounding": "regions.jsonl, or COCO results against COCO ground truth; heat maps",
}


def add_commands(commands: argparse._SubParsersAction, add: Callable) -> None:
    """``add(commands, name, summary, example)`` makes a parser."""
    for task, summary in SUMMARIES.items():
        command = add(commands, task, summary, EXAMPLES[task])
        command.add_argument("--predictions", type=Path, required=task != "grounding")
        command.add_argument("--references", type=Path, required=True)
        command.add_argument(
            "--protocol", nargs="+", default=[], metavar="NAME", help="a wrong one lists what there is"
        )
        command.add_argument("--out", type=Path, help="scores.json, which `score compare` reads")
        command.add_argument("--markdown", type=Path, help="the tables in Markdown")
        command.add_argument("--html", type=Path, help="one page with tables, plots and every sample")
        command.add_argument("--images", type=Path, metavar="FOLDER", help="images to embed: pictures, DICOM, NIfTI")
        if task == "grounding":
            command.add_argument(
                "--heatmaps", type=Path, help="safetensors of maps by image and phrase (docs/evaluation.md)"
            )
        else:
            command.add_argument("--train", type=Path, help="training set: overlap, answer prior, text-only baseline")
        if task == "report":
            command.add_argument("--model-python", type=Path, help="Python that has radgraph, green, ...")
            command.add_argument(
                "--entails", metavar="MODULE:FUNCTION", help="an NLI model or LLM that decides in radfact"
            )
        command.set_defaults(run=run_score)

    compare = add(
        commands, "compare", "scores.json files of several systems: differences and tests", EXAMPLES["compare"]
    )
    compare.add_argument("files", nargs="+", type=Path, metavar="SCORES.json")
    compare.add_argument("--against", choices=("first", "best"), default="first", help="what the others differ from")
    compare.add_argument(
        "--metric", nargs="+", default=[], metavar="NAME", help="only these, such as overall or BLEU-4"
    )
    compare.add_argument("--by", metavar="SLICE", help="also in each part of a slice, such as answer_type")
    compare.add_argument("--out", type=Path, help="the comparison as JSON")
    compare.add_argument("--markdown", type=Path, help="the table in Markdown")
    compare.set_defaults(run=run_compare)


def run_score(options: argparse.Namespace) -> None:
    from eval.score import run_score as score

    score(options, read_upright)


def read_upright(path: str) -> "np.ndarray":
    """uint8 pixels of a picture, a DICOM file or a NIfTI slice ("vol.nii.gz@axial:87"), in true proportions where the
    file tells the size of a pixel. Raises ImageError."""
    import numpy as np
    from PIL import Image

    from grounding.images import read_image

    image = read_image(path)
    height, width = image.pixels.shape[:2]
    if image.spacing is None or 0.99 < image.spacing[0] / image.spacing[1] < 1.01:
        return image.pixels
    sides = width * image.spacing[1], height * image.spacing[0]
    size = [max(1, round(max(height, width) * side / max(sides))) for side in sides]
    return np.asarray(Image.fromarray(image.pixels).resize(size))


def run_compare(options: argparse.Namespace) -> None:
    from eval.compare import run_compare as compare

    compare(options)
