"""The command ``medglip``. Heavy packages are imported by the command that needs them, so that ``--help`` is quick."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

from downstream.data_cli import EXAMPLES
from downstream.data_cli import add_commands as add_data_commands
from downstream.score_cli import EXAMPLES as SCORE_EXAMPLES
from downstream.score_cli import add_commands as add_score_commands

HOME = Path("runs/demo")
IMAGE_OR_VOLUME = "an image, or a volume: vol.nii.gz, vol.nii.gz@coronal, a folder with one DICOM series"


def parser() -> argparse.ArgumentParser:
    """All commands; each has its own ``--help`` with an example."""
    top = argparse.ArgumentParser(
        prog="medglip",
        description="Answers about medical images that point at the picture. Research use only; not a medical device.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return _add(commands, name, summary, example)

    demo = add("demo", "train and measure the whole chain on the embedded brain set", "medglip demo --out runs/demo")
    demo.add_argument("--out", type=Path, default=HOME)
    demo.add_argument("--full", action="store_true", help="all routes and sources, more questions (about an hour)")
    demo.add_argument("--config", type=Path, help="YAML file instead of configs/demo/{quick,full}.yaml")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="settings of configs/demo, such as seed=1")
    demo.set_defaults(run=run_demo)

    ground = add(
        "ground", "find phrases in an image", "medglip ground slice.png 'lesion' 'left insula' --overlay o.png"
    )
    ground.add_argument("image", metavar="IMAGE", help="PNG, JPEG, TIFF, BMP, DICOM, or vol.nii.gz@axial:87")
    ground.add_argument("phrases", metavar="PHRASE", nargs="+")
    ground.add_argument("--out", type=Path, help="regions as JSON")
    ground.add_argument("--overlay", type=Path, help="PNG with the regions drawn")
    ground.add_argument(
        "--tiles",
        type=int,
        default=1,
        help="look again in overlapping tiles, so many along the longer side, for small lesions in large images",
    )
    ground.add_argument("--masks", metavar="SAM", help="folder or hub id of a SAM-family model that makes the masks")
    ground.set_defaults(run=run_ground)

    ask = add(
        "ask", "answer a question about an image", "medglip ask slice.png 'Where is the lesion?' --out answer.json"
    )
    ask.add_argument("image", metavar="IMAGE", help=IMAGE_OR_VOLUME)
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument(
        "--options",
        nargs="*",
        metavar="ANSWER",
        help="choose among these answers, with the probability of each; none given: those of the question",
    )
    ask.add_argument("--why", action="store_true", help="how probable the answer is without each region")
    ask.add_argument("--out", type=Path, help="answer and evidence as JSON")
    ask.set_defaults(run=run_ask)

    report = add("report", "write a report about an image", "medglip report slice.png --out report.html")
    report.add_argument("image", metavar="IMAGE", help=IMAGE_OR_VOLUME)
    report.add_argument("--sections", action="store_true", help="write findings, then the impression that follows")
    report.add_argument("--out", type=Path, help="report.html or report.json")
    report.set_defaults(run=run_report)

    for command in (ground, ask, report):
        command.add_argument("--modality", help="what kind of image it is; believed, not checked")
        command.add_argument(
            "--checkpoint", type=Path, default=HOME, help=f"default: {HOME}, which `medglip demo` makes"
        )
    for command in (ask, report):
        command.add_argument("--route", default="tokens", choices=("none", "text", "overlay", "crop", "tokens"))
        command.add_argument("--regions", type=Path, help="a regions.jsonl with one image, instead of the detector's")

    data = add("data", "build, count, describe and audit region stores", EXAMPLES["build"])
    add_data_commands(data.add_subparsers(dest="data_command", required=True, metavar="COMMAND"), _add)

    score = add("score", "score predictions against references, compare systems", SCORE_EXAMPLES["vqa"])
    add_score_commands(score.add_subparsers(dest="task", required=True, metavar="TASK"), _add)
    return top


def _add(commands: argparse._SubParsersAction, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    raw, example = argparse.RawDescriptionHelpFormatter, f"example:\n  {example}"
    return commands.add_parser(name, help=summary, description=summary, epilog=example, formatter_class=raw)


def run_demo(options: argparse.Namespace) -> None:
    from downstream.demo import run

    run(options.out, options.full, options.config, options.overrides)


def run_ground(options: argparse.Namespace) -> None:
    from configs import write_atomic
    from downstream.assistant import grounder_dir, look
    from grounding.detect import load_grounder
    from grounding.images import read_image
    from grounding.overlay import overlay

    _check_outputs(options.out, options.overlay)
    image = read_image(options.image)
    grounder = load_grounder(grounder_dir(options.checkpoint))
    found = look(grounder, image, options.modality, options.phrases, options.tiles).found
    if options.masks:
        from grounding.box_masks import add_masks, load_sam

        found = add_masks(found, image.pixels, load_sam(options.masks))
    for query in found.queries:
        print(f"looked for {query['phrase']}: present with probability {query['presence']:.2f}")
    _print_regions(found.to_dict(), image.pixels.shape[:2])
    if options.out:
        row = {"image_id": Path(options.image).name, **found.to_dict(), "detector": grounder.hash}
        write_atomic(options.out, json.dumps(row, indent=1) + "\n")
    if options.overlay:
        overlay(image.pixels, found, options.overlay, grounder.tree)


def run_ask(options: argparse.Namespace) -> None:
    from configs import write_atomic
    from downstream.assistant import load_assistant

    _check_outputs(options.out)
    _check_readable(options)
    if not options.question.strip():
        raise ValueError("empty question; ask something about the image")
    assistant = load_assistant(options.checkpoint, options.route)
    given = (options.modality, options.regions, options.options, options.why)
    answer, image = assistant.ask(options.image, options.question, *given)
    print(f"\n{answer['answer']}\n")
    for text, probability in answer.get("options", {}).items():
        print(f"{text}: probability {probability:.2f}")
    for query in answer["asked_for"]:
        print(f"looked for {query['phrase']}: present with probability {query['presence']:.2f}")
    _print_regions(answer["evidence"], image.pixels.shape[:2], answer.get("tracks"))
    if options.why:
        from downstream.causal import why_lines

        print("\n".join(why_lines(answer["why"])))
    print(answer["notice"])
    if options.out:
        write_atomic(options.out, json.dumps(answer, indent=1) + "\n")


def run_report(options: argparse.Namespace) -> None:
    from configs import write_atomic
    from downstream.assistant import load_assistant
    from downstream.decoding import GREEDY, SECTIONS, Decoding
    from downstream.ledger import SUPPORT_NOTES, sentences_with_support
    from grounding.labels import load_label_tree

    if options.out and options.out.suffix not in (".html", ".json"):
        raise ValueError(f"{options.out}: reports are written as .html or .json")
    _check_outputs(options.out)
    _check_readable(options)
    decoding = Decoding(sections=tuple(SECTIONS)) if options.sections else GREEDY
    assistant = load_assistant(options.checkpoint, options.route, decoding)
    report, image = assistant.report(options.image, options.modality, options.regions)
    print()
    rows = sentences_with_support(report["sentences"], report["evidence"], report["looked_for"], load_label_tree())
    for sentence, row in zip(report["sentences"], rows, strict=True):
        cited = " ".join(f"[r{k}]" for k in sentence["region_ids"])
        print(*filter(None, [sentence["text"], cited, SUPPORT_NOTES[row["support"]]]))
    print()
    _print_regions(report["evidence"], image.pixels.shape[:2], report.get("tracks"))
    print(report["notice"])
    if options.out and options.out.suffix == ".json":
        write_atomic(options.out, json.dumps(report, indent=1) + "\n")
    elif options.out:
        from downstream.pages import write_report_page

        write_report_page(options.out, report, image)


def _check_readable(options: argparse.Namespace) -> None:
    """Reads the image before the models are loaded: a wrong path should not cost ten seconds."""
    from downstream.volumes import check_readable

    check_readable(options.image)


def _check_outputs(*paths: Path | None) -> None:
    """Raises OSError before any work is done where a result could not be written."""
    for path in filter(None, paths):
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK) or path.is_dir():
            raise PermissionError(f"{path}: cannot be written; choose another file")


def _print_regions(regions: dict, size: tuple[int, int], tracks: list[dict] | None = None) -> None:
    from grounding.labels import load_label_tree

    spans = {row["region"]: f", slices {row['first']}-{row['last']}" for row in tracks or []}
    tree, (height, width) = load_label_tree(), size
    for k, region in enumerate(regions["regions"]):
        x1, y1, x2, y2 = region["box"]
        label = tree.phrase(region["label"]) if region["label"] in tree.nodes else region["label"]
        box = f"x {x1 * width:.0f}-{x2 * width:.0f}, y {y1 * height:.0f}-{y2 * height:.0f}"
        print(f"  [r{k}] {label:<36} {region.get('score', 1.0):.2f}  {box}{spans.get(k, '')}")
    if not regions["regions"]:
        print("  no region found")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 1 where something failed, 2 for wrong use; an error is one line that names the thing."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their own developers
    from configs import ConfigError

    try:
        options.run(options)
    except ConfigError as error:
        print(f"medglip {options.command}: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:  # ours name what is wrong; others at least the command
        print(f"medglip {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nmedglip {options.command}: stopped; run it again to go on where it was", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
