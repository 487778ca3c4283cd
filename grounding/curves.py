"""The log of a training run: a line of JSON a step, TensorBoard where it is asked for, and curves as a picture."""

import json
from pathlib import Path

import numpy as np

from configs import ConfigError
from grounding.training_state import cut_log

NOT_PARTS = ("step", "loss", "lr", "seconds")
COLUMNS = 4  # panels beside each other
SMOOTHED = 50  # points a smoothed curve has at least, where there are so many steps


class TrainingLog:
    """``out``/train_log.jsonl, and with ``tensorboard`` events in ``out``/tensorboard; rows from step ``start`` on are
    dropped, since a resumed run writes them again. Raises ConfigError where TensorBoard is asked for and not there."""

    def __init__(self, out: Path, start: int, tensorboard: bool):
        self.path = out / "train_log.jsonl"
        cut_log(self.path, start)
        self.writer = open_tensorboard(out / "tensorboard", start) if tensorboard else None

    def add(self, row: dict[str, float]) -> None:
        with self.path.open("a") as log:
            log.write(json.dumps(row) + "\n")
        if self.writer:
            for name in row.keys() - {"step"}:
                kind = "loss_parts/" if name not in NOT_PARTS else "training/"
                self.writer.add_scalar(kind + name, row[name], row["step"])

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def open_tensorboard(folder: Path, start: int):
    """A SummaryWriter. Raises ConfigError where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard=true needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=start or None)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Column → (steps,) float64 of a train_log.jsonl; columns that some row lacks are left out."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: np.array([row[name] for row in rows], float) for name in names}


def draw_curves(log: Path, picture: Path) -> None:
    """PNG: the loss, each of its parts and the learning rate by step; nothing where the log is empty."""
    columns = read_log(log)
    if not columns:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in ("loss", *sorted(columns.keys() - {*NOT_PARTS}), "lr") if name in columns]
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for k, name in enumerate(names):
        axes = figure.add_subplot(rows, COLUMNS, k + 1, title=name)
        axes.plot(columns["step"], columns[name], linewidth=0.6, alpha=0.4 if name != "lr" else 1)
        if name != "lr":
            axes.plot(columns["step"], smoothed(columns[name]), linewidth=1.4)
    partial = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(partial, format="png", dpi=100)
    partial.replace(picture)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred running mean of the same length; at the ends over what there is."""
    width = max(1, len(values) // SMOOTHED)
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
