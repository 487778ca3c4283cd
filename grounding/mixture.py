"""Which images make up a batch: a function of seed, step and rank alone, so that a resumed run goes on as before.

Sources are mixed by temperature sampling (as for languages in Conneau et al., "Unsupervised Cross-lingual
Representation Learning at Scale", 2020): source s with n_s images is drawn with probability n_s^(1/T) / sum of all.
Within a source every image comes once before any comes again.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

CYCLE = 1024  # slots after which every source has had its share


@lru_cache(maxsize=64)
def _permutation(epoch: int, images: int, seed: int) -> list[int]:
    order = list(range(images))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


@lru_cache(maxsize=4)
def _schedule(cycle: int, shares: tuple[int, ...], seed: int) -> np.ndarray:
    """Source of each slot of a cycle, (CYCLE,)."""
    slots = np.repeat(np.arange(len(shares)), shares)
    return np.random.default_rng([seed, cycle]).permutation(slots)


class Mixture:
    """``sources``: the source of each image. ``temperature`` 1 keeps the proportions of the data, a high one draws all
    sources alike. ``old``: the sources of the images after these, which are replayed: together they get ``old_share``
    of the slots (experience replay; Rolnick et al., NeurIPS 2019)."""

    def __init__(
        self,
        sources: Sequence[str],
        temperature: float,
        seed: int,
        old: Sequence[str] = (),
        old_share: float = 0.0,
    ):
        self.seed, self.names = seed, []
        self.members: list[list[int]] = []
        weights = []
        for part, start, share in ((sources, 0, 1 - old_share if old else 1.0), (old, len(sources), old_share)):
            names, codes = np.unique(np.asarray(part, dtype=object).astype(str), return_inverse=True)
            members = [np.flatnonzero(codes == k) + start for k in range(len(names))]
            sizes = np.array([len(rows) for rows in members], float) ** (1 / temperature)
            weights.append(sizes if not old else sizes / sizes.sum() * share)
            self.names += names.tolist()
            self.members += [rows.tolist() for rows in members]
        self.shares = _whole(np.concatenate(weights))

    def indices(self, step: int, batch_size: int, world: int, rank: int) -> list[int]:
        """The images of one process at a step."""
        first = (step * world + rank) * batch_size
        return [self._at(slot) for slot in range(first, first + batch_size)]

    def _at(self, slot: int) -> int:
        cycle, place = divmod(slot, CYCLE)
        schedule = _schedule(cycle, self.shares, self.seed)
        source = int(schedule[place])
        before = cycle * self.shares[source] + int((schedule[:place] == source).sum())
        rows = self.members[source]
        epoch, k = divmod(before, len(rows))
        return rows[_permutation(epoch, len(rows), self.seed)[k]]


def _whole(weights: np.ndarray) -> tuple[int, ...]:
    """Whole shares that sum to CYCLE, each at least 1 (largest remainders)."""
    exact = weights / weights.sum() * (CYCLE - len(weights))
    shares = 1 + np.floor(exact).astype(int)
    for k in np.argsort(np.floor(exact) - exact, kind="stable")[: CYCLE - shares.sum()]:
        shares[k] += 1
    return tuple(shares.tolist())
