"""Split a region store so that no patient, volume, sequence or picture is on two sides, and each side has its share of
every source and label."""

import hashlib
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from configs import ConfigError
from eval.leakage import audit
from grounding.audit import SAME_PICTURE, images_of
from grounding.store import Store, StoreWriter, open_store, replace_folder


def split_store(store: Store, shares: dict[str, float], out: Path, seed: int) -> dict[str, Store]:
    """Writes `out`/NAME for each NAME of `shares`, stratified by source and labels; the stores. Rows come in a seeded
    order, so that the first or last of them are a fair sample. Raises ConfigError where the shares do not sum to 1."""
    if not np.isclose(sum(shares.values()), 1) or min(shares.values()) <= 0:
        raise ConfigError(f"shares {shares} must be positive and sum to 1")
    side = np.array(split_by_group(groups_of(store), strata_of(store), shares, seed))
    order = np.random.default_rng(seed).permutation(len(store))
    stores = {}
    for name in shares:
        rows = order[side[order] == name]
        partial = out / f".{name}.part-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        writer = StoreWriter(partial)
        for block in store.remapped(writer, rows):
            writer.add_block(block)
        writer.close()
        writer.describe(f"# Data card\n\nThe part {name!r} of a split by patient. Of the whole:\n\n{store.card}")
        replace_folder(partial, out / name)
        stores[name] = open_store(out / name)
    return stores


def split_by_group(groups: Sequence[str], strata: Sequence[str], shares: dict[str, float], seed: int) -> list[str]:
    """A side (a key of `shares`) for each row; rows of one group have one side.

    Greedy: groups from large to small, each to the side that lacks most of what the group holds. The order of rows
    changes nothing.
    """
    held: dict[str, Counter[str]] = defaultdict(Counter)
    for group, stratum in zip(groups, strata, strict=True):
        held[group][stratum] += 1
    totals = Counter(strata)
    missing = {name: {s: share * total for s, total in totals.items()} for name, share in shares.items()}
    side = {}
    for group in sorted(held, key=lambda g: (-held[g].total(), hashlib.sha256(f"{seed}/{g}".encode()).digest())):
        wants = {name: sum(n * lack[s] / totals[s] for s, n in held[group].items()) for name, lack in missing.items()}
        side[group] = max(wants, key=wants.__getitem__)
        for stratum, n in held[group].items():
            missing[side[group]][stratum] -= n
    return [side[group] for group in groups]


def groups_of(store: Store) -> list[str]:
    """What must stay together: images that a chain of common patients, studies and pictures connects. Pictures are
    compared where the store was built with fingerprints."""
    patients, studies = store.column("patient_id"), store.column("study_id")
    names: dict[tuple[str, str], int] = {}
    nodes = [
        (names.setdefault(("patient", p), len(names)), names.setdefault(("study", s or p), len(names)))
        for p, s in zip(patients, studies, strict=True)
    ]
    a, b = np.array(nodes, int).reshape(-1, 2).T
    twice = np.array(_same_picture(store), int).reshape(-1, 2)
    ends = np.concatenate([a, a[twice[:, 0]]]), np.concatenate([b, a[twice[:, 1]]])
    links = coo_array((np.ones(len(ends[0])), ends), (len(names), len(names)))
    return connected_components(links, directed=False)[1][a].astype(str).tolist()


def _same_picture(store: Store) -> list[tuple[int, int]]:
    """Rows of pictures that an audit would find to be the same: public sets hold one under two names, and their patient
    ids do not tell."""
    if store.table.column("thumbnail").null_count:
        return []
    rows = {image_id: k for k, image_id in enumerate(store.image_ids)}
    leaks = audit(images_of(store, str(store.folder)), None)
    return [(rows[leak.id_a], rows[leak.id_b]) for leak in leaks if leak.kind in SAME_PICTURE]


def strata_of(store: Store) -> list[str]:
    """Source and labels of each image."""
    strata = []
    for row in map(store.metadata, range(len(store))):
        labels = sorted({store.labels[label] for label in row.labels.tolist()})
        strata.append(f"{row.source}: {', '.join(labels)}")
    return strata
