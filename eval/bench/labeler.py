"""Reports a second of the rule labelers, on one core.

    python -m eval.bench.labeler [--reports indiana_reports.csv] [--repeats 3]

Without --reports, the OpenI reports under shared/data are read. Sentences that were read once are remembered; "no
memory" forgets them before each report, so it is what reports without a sentence in common would take. CPU seconds do
not count what else runs on the machine.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

from eval import entities, labeler
from eval.clinical import chexpert_scores, entity_scores

SHARED = Path(__file__).resolve().parents[3] / "shared/data/iu-xray-text/indiana_reports.csv"


def read_reports(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [f"{row['findings']}\n{row['impression']}".strip() for row in csv.DictReader(file)]


def rate(work: Callable[[], object], count: int, repeats: int) -> tuple[float, float]:
    """(reports a wall second, reports a CPU second), the best of the repeats."""
    walls, cpus = [], []
    for _ in range(repeats):
        labeler._read_sentence.cache_clear()
        entities._read_sentence.cache_clear()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return count / min(walls), count / min(cpus)


def forgetful(read: Callable[[str], object], cache_clear: Callable[[], None], reports: list[str]) -> None:
    for report in reports:
        cache_clear()
        read(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=SHARED)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    reports = read_reports(options.reports)
    labeler.label("x"), entities.read_entities("x", "xray")  # tables are built once
    same = {str(k): report for k, report in enumerate(reports)}
    work: dict[str, Callable[[], object]] = {
        "14 labels": lambda: [labeler.label(report) for report in reports],
        "14 labels, no memory": lambda: forgetful(labeler.label, labeler._read_sentence.cache_clear, reports),
        "entities": lambda: [entities.read_entities(report, "xray") for report in reports],
        "entities, no memory": lambda: forgetful(entities.read_entities, entities._read_sentence.cache_clear, reports),
        "chexpert_scores": lambda: chexpert_scores(same, same),
        "entity_scores": lambda: entity_scores(same, same, modality="xray"),
    }
    words = sum(len(report.split()) for report in reports) / len(reports)
    print(f"{len(reports):,} reports of {words:.0f} words; best of {options.repeats}")
    print(f"{'':24}{'reports/s':>12}{'a CPU second':>14}{'over 1,000/s':>14}")
    for name, run in work.items():
        wall, cpu = rate(run, len(reports), options.repeats)
        print(f"{name:24}{wall:12,.0f}{cpu:14,.0f}{cpu / 1000:13.1f}x")


if __name__ == "__main__":
    main()
