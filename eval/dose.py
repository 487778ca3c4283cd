"""Dose and response: does the answer get better as the regions that it rests on get better?

The same samples are answered with regions of several qualities (the doses). The slope of the line through the means of
the doses is itself a mean over samples, so that its interval is a bootstrap over patients, with the doses held fixed.
Dimension key: n samples, L doses.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.statistics import mean_score
from eval.types import Score

VERSION = "1"


def dose_response(doses: Sequence[float], values: np.ndarray, clusters: Sequence[Any]) -> dict[str, Any]:
    """doses: (L,), such as AP50 of the regions; values: (n, L), each sample's score at each dose; clusters: (n,).

    Returns {"slope": Score, least squares, of the mean value a unit of dose, with its clustered interval; "rises": the
    share of the pairs of unequal doses of which the higher has the higher mean (0.5 for equal means), None without}.
    The slope is undefined where there are no two different doses. Raises ValueError where the shapes disagree.
    """
    dose, table = np.asarray(doses, float), np.asarray(values, float)
    if table.shape != (len(clusters), len(dose)):
        raise ValueError(f"values are {table.shape}, not ({len(clusters)} samples, {len(dose)} doses)")
    centred = dose - dose.mean() if len(dose) else dose
    spread = float((centred**2).sum())
    if not spread or not len(table):
        reason = "no samples" if spread else "needs two different doses"
        return {"slope": Score("slope", VERSION, None, len(table), reason=reason), "rises": None}
    slope = mean_score("slope", VERSION, (table @ (centred / spread)).tolist(), clusters)
    return {"slope": slope, "rises": _rises(dose, table.mean(0))}


def _rises(dose: np.ndarray, mean: np.ndarray) -> float:
    lower, higher = np.nonzero(dose[:, None] < dose[None])
    gain = mean[higher] - mean[lower]
    return float(((gain > 0) + 0.5 * (gain == 0)).mean())
