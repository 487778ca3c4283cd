"""BLEU, ROUGE-L, CIDEr and METEOR beside pycocoevalcap's own classes: same tokens, same run, values compared.

    python -m eval.bench.text [--reports indiana_reports.csv] [--pairs 10000] [--meteor-pairs 2000] [--out scores.json]

References are the Indiana University reports (findings and impression), predictions the same reports perturbed with a
seed: sentences left out, moved or taken from another report, words changed. A patient is a report's uid. Both sides
run in turn; times are the least of --repeats.
"""

import argparse
import csv
import json
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from eval.meteor import corpus_meteor, meteor_values
from eval.statistics import bootstrap_interval
from eval.text import corpus_bleu, sample_values
from eval.tokens import TOKENIZERS, has_java

REPORTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "iu-xray-text" / "indiana_reports.csv"
WARM_UP = 500  # pairs that both METEOR programs score before the clock starts
BLOCK = 500


def read_reports(path: Path) -> dict[str, str]:
    """uid → findings and impression; reports with neither are left out."""
    with path.open(encoding="utf-8", newline="") as file:
        texts = {row["uid"]: f"{row['findings']} {row['impression']}".strip() for row in csv.DictReader(file)}
    return {uid: text for uid, text in texts.items() if text}


def perturbed(text: str, others: list[str], rng: random.Random) -> str:
    """A report such as a model might write: some sentences gone, moved, or another report's; some words changed."""
    sentences = [sentence for sentence in text.split(". ") if rng.random() > 0.2]
    if rng.random() < 0.6:
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(rng.choice(others).split(". ")))
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    words = ". ".join(sentences).split()
    donors = rng.choice(others).split()
    return " ".join(rng.choice(donors) if rng.random() < 0.1 else word for word in words)


def draw(reports: dict[str, str], pairs: int, seed: int, tokenizer: str) -> tuple[dict, dict, list[str]]:
    """(hyp, ref, patients): id → [tokens], and each pair's uid."""
    rng, others = random.Random(seed), list(reports.values())
    uids = [uid for _ in range(-(-pairs // len(reports))) for uid in reports][:pairs]
    said = TOKENIZERS[tokenizer]([perturbed(reports[uid], others, rng) for uid in uids])
    true = TOKENIZERS[tokenizer]([reports[uid] for uid in uids])
    return {k: [text] for k, text in enumerate(said)}, {k: [text] for k, text in enumerate(true)}, uids


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what the call returned)."""
    began = time.perf_counter()
    answer = call()
    return time.perf_counter() - began, answer


def compare_values(hyp: dict, ref: dict, repeats: int) -> dict[str, Any]:
    """Seconds of both sides, in turn, and the largest difference of any value, corpus or sample."""
    calls: dict[str, Callable[[], Any]] = {
        "BLEU": lambda: Bleu(4).compute_score(ref, hyp, verbose=0),
        "ROUGE-L": lambda: Rouge().compute_score(ref, hyp),
        "CIDEr": lambda: Cider().compute_score(ref, hyp),
        "ours": lambda: sample_values(hyp, ref),
    }
    rounds = [{name: timed(call) for name, call in calls.items()} for _ in range(repeats)]
    seconds = {name: min(done[name][0] for done in rounds) for name in calls}
    ours = seconds.pop("ours")
    gap = largest_gap(*(rounds[-1][name][1] for name in calls))
    return {"peers_s": seconds, "ours_s": ours, "ratio": sum(seconds.values()) / ours, "largest_gap": gap}


def largest_gap(bleu: tuple, rouge: tuple, cider: tuple, ours: tuple) -> float:
    """bleu, rouge, cider: (corpus value, values of the samples); ours: the answer of sample_values."""
    sums, overlap, consensus = ours
    gaps = []
    for (value, values), mine in ((rouge, overlap), (cider, consensus)):
        gaps += [abs(np.mean(mine) - value), np.abs(np.array(mine) - values).max()]
    for order in range(1, 5):
        gaps += [abs(corpus_bleu(sums.sum(0), order) - bleu[0][order - 1])]
        gaps += [np.abs(corpus_bleu(sums, order) - bleu[1][order - 1]).max()]
    return float(max(gaps))


def resample(hyp: dict, ref: dict, patients: list[str], resamples: int) -> float:
    """Seconds for the intervals of BLEU-1..4, ROUGE-L and CIDEr, from the samples' sums."""
    sums, overlap, consensus = sample_values(hyp, ref)
    began = time.perf_counter()
    for order in range(1, 5):
        bootstrap_interval(sums, patients, partial(corpus_bleu, order=order), resamples=resamples)
    for values in (overlap, consensus):
        bootstrap_interval(np.stack([values, np.ones(len(values))], 1), patients, resamples=resamples)
    return time.perf_counter() - began


def compare_meteor(hyp: dict, ref: dict, patients: list[str], resamples: int) -> dict[str, float]:
    """Both Java programs warm (each has scored WARM_UP pairs before), in turn on the same blocks of pairs."""
    peer, ids = Meteor(), list(ref)
    warm, *blocks = (ids[:WARM_UP], *(ids[k : k + BLOCK] for k in range(0, len(ids), BLOCK)))
    peer_s, ours_s, gap, sums = 0.0, 0.0, 0.0, []
    for block in (warm, *blocks):
        pairs = {k: ref[k] for k in block}, {k: hyp[k] for k in block}
        theirs, (value, values) = timed(partial(peer.compute_score, *pairs))
        mine, (own, own_values, own_sums) = timed(partial(meteor_values, *reversed(pairs)))
        gap = max(gap, abs(value - own), np.abs(np.array(values) - own_values).max())
        gap = max(gap, abs(corpus_meteor(own_sums.sum(0)) - value))
        if block is not warm:
            peer_s, ours_s, sums = peer_s + theirs, ours_s + mine, [*sums, own_sums]
    interval = partial(bootstrap_interval, np.concatenate(sums), patients, corpus_meteor, resamples=resamples)
    seconds = {"peer_s": peer_s, "ours_s": ours_s, "ratio": ours_s / peer_s, "intervals_s": timed(interval)[0]}
    return seconds | {"largest_gap": float(gap)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, default=REPORTS, help="CSV with uid, findings, impression")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--meteor-pairs", type=int, default=2_000, help="0 leaves METEOR out")
    parser.add_argument("--resamples", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.reports.is_file():
        sys.exit(f"eval.bench.text: {options.reports} is not there; name the reports' CSV with --reports")
    tokenizer = "ptb" if has_java() else "words"
    hyp, ref, patients = draw(read_reports(options.reports), options.pairs, options.seed, tokenizer)
    words = sum(len(rows[0].split()) for side in (hyp, ref) for rows in side.values()) / max(1, 2 * len(ref))
    result: dict[str, Any] = {"pairs": len(ref), "patients": len(set(patients)), "tokenizer": tokenizer, "words": words}
    result["text"] = compare_values(hyp, ref, options.repeats)
    result["resamples"] = options.resamples
    result["resampling_s"] = resample(hyp, ref, patients, options.resamples)
    few = list(ref)[: options.meteor_pairs]
    if few and has_java():
        chosen = ({k: hyp[k] for k in few}, {k: ref[k] for k in few}, patients[: len(few)])
        result["meteor"] = {"pairs": len(few)} | compare_meteor(*chosen, options.resamples)
    print(as_text(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def as_text(result: dict[str, Any]) -> str:
    text, meteor = result["text"], result.get("meteor")
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in text["peers_s"].items())
    lines = [
        f"{result['pairs']:,} report pairs of {result['patients']:,} patients, {result['words']:.0f} tokens on average "
        f"({result['tokenizer']})",
        f"values     pycocoevalcap {sum(text['peers_s'].values()):.2f} s ({parts}); ours {text['ours_s']:.2f} s: "
        f"{text['ratio']:.1f} x; largest difference {text['largest_gap']:.1e}",
        f"intervals  {result['resamples']:,} patient-clustered resamples of BLEU-1..4, ROUGE-L, CIDEr: "
        f"{result['resampling_s']:.2f} s",
    ]
    if meteor is None:
        return "\n".join([*lines, "METEOR     not measured (no Java, or --meteor-pairs 0)"])
    return "\n".join(
        [
            *lines,
            f"METEOR     {meteor['pairs']:,} pairs, warm Java: pycocoevalcap {meteor['peer_s']:.2f} s, ours "
            f"{meteor['ours_s']:.2f} s: {meteor['ratio']:.2f} x its time; largest difference "
            f"{meteor['largest_gap']:.1e}; {result['resamples']:,} resamples {meteor['intervals_s']:.2f} s",
        ]
    )


if __name__ == "__main__":
    main()
