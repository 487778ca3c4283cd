"""BLEU-1..4, ROUGE-L, CIDEr and METEOR as pycocoevalcap computes them, with intervals and per-sample results.

Corpus BLEU (Papineni et al. 2002; "closest" reference length), ROUGE-L with beta 1.2 (Lin 2004), CIDEr (Vedantam et al.
2015; document frequencies of the references that are passed), METEOR 1.5 (Denkowski & Lavie 2014; needs Java).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

from eval.statistics import bootstrap_interval, mean_score
from eval.tokens import NO_JAVA, has_java, ptb_tokens, word_tokens
from eval.types import Score

VERSION = "pycocoevalcap-1.2"
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR")

TOKENIZERS: dict[str, Callable[[Sequence[str]], list[str]]] = {"ptb": ptb_tokens, "words": word_tokens, "none": list}

_BETA = 1.2

Tokens = Mapping[str, list[str]]


def text_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    patients: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    meteor: bool = True,
) -> dict[str, Any]:
    """All seven metrics over the sample ids of `references`; a missing prediction counts as an empty text.

    references: sample_id → one or more texts. patients: sample_id → cluster of the interval (default: each sample).
    tokenizer: "ptb" (needs Java), "words", "none" (texts are tokens joined by spaces); None takes "ptb" where Java is.
    meteor: False leaves METEOR out (its tables take seconds to load). Returns {"tokenizer", **{name: Score}}.
    """
    java = has_java()
    tokenizer = tokenizer or ("ptb" if java else "words")
    ids = sorted(references)
    hypotheses = {i: [predictions.get(i, "")] for i in ids}
    hyp, ref = _tokenise([hypotheses, {i: list(references[i]) for i in ids}], tokenizer)
    clusters = [(patients or {}).get(i, i) for i in ids]
    without = None if java and meteor else NO_JAVA if meteor else "left out"
    return {
        "tokenizer": tokenizer,
        **bleu(hyp, ref, clusters),
        "ROUGE-L": rouge_l(hyp, ref, clusters),
        "CIDEr": cider(hyp, ref, clusters),
        "METEOR": _undefined("METEOR", without) if without else meteor_score(hyp, ref),
    }


def bleu(hyp: Tokens, ref: Tokens, clusters: Sequence[str]) -> dict[str, Score]:
    """Corpus BLEU-1..4. hyp: id → [tokens]; ref: id → token strings. Per sample: sentence BLEU.

    The interval resamples the sums that corpus BLEU is made of, not the sentence scores.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    if not ref:
        return {name: _undefined(name, "no samples") for name in NAMES[:4]}
    scorer = BleuScorer(n=4)
    for i in ref:
        scorer += (hyp[i][0], ref[i])
    values, sentences = scorer.compute_score(option="closest", verbose=0)
    sums = np.array([_bleu_sums(row) for row in scorer.ctest], dtype=float)
    scores = {}
    for k, name in enumerate(NAMES[:4]):
        interval = bootstrap_interval(sums, clusters, partial(corpus_bleu, order=k + 1))
        scores[name] = _score(name, values[k], clusters, interval, _per_sample(ref, sentences[k]))
    return scores


def corpus_bleu(totals: np.ndarray, order: int) -> np.ndarray:
    """(..., 10) sums [correct 1-4, guessed 1-4, length, reference length] → (...) BLEU of that order."""
    precisions = (totals[..., :order] + 1e-15) / (totals[..., 4 : 4 + order] + 1e-9)
    ratio = (totals[..., 8] + 1e-15) / (totals[..., 9] + 1e-9)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return precisions.prod(-1) ** (1 / order) * brevity


def rouge_l(hyp: Tokens, ref: Tokens, clusters: Sequence[str]) -> Score:
    """Mean ROUGE-L; the subsequence length comes from rapidfuzz on token ids, hundreds of times faster."""
    values = [_rouge_l(hyp[i][0], ref[i]) for i in ref]
    return mean_score("ROUGE-L", VERSION, values, clusters, _per_sample(ref, values))


def cider(hyp: Tokens, ref: Tokens, clusters: Sequence[str]) -> Score:
    """Mean CIDEr. Undefined for one pair: all word weights are then zero, and so is the score."""
    from pycocoevalcap.cider.cider import Cider

    if len(ref) < 2:
        return _undefined("CIDEr", "needs more than one pair: its word weights come from the other references")
    _, values = Cider().compute_score(dict(ref), dict(hyp))
    return mean_score("CIDEr", VERSION, [float(v) for v in values], clusters, _per_sample(ref, values))


def meteor_score(hyp: Tokens, ref: Tokens) -> Score:
    """Corpus METEOR (no interval: the Java program does not give away the sums it is made of)."""
    if not ref:
        return _undefined("METEOR", "no samples")
    program = _meteor_program()
    try:
        value, values = program.compute_score(dict(ref), dict(hyp))
    except (OSError, ValueError):
        program.lock.release()  # compute_score holds it still, and the destructor would wait for it for ever
        _meteor_program.cache_clear()
        return _undefined("METEOR", "the Java program stopped; it needs 2 GB of memory")
    return Score("METEOR", VERSION, float(value), len(ref), per_sample=_per_sample(ref, values))


@cache
def _meteor_program():
    """One Java process for all calls, since its tables take ten seconds to load; it ends with this process."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def _tokenise(groups: Sequence[Tokens], tokenizer: str) -> list[dict[str, list[str]]]:
    """Tokenises all texts of all groups in one go (the PTB tokenizer is a process)."""
    texts = [text for group in groups for row in group.values() for text in row]
    done = iter(TOKENIZERS[tokenizer](texts))
    return [{i: [next(done) for _ in row] for i, row in group.items()} for group in groups]


def _bleu_sums(row: Mapping) -> list[float]:
    length = row["testlen"]
    closest = min((abs(n - length), n) for n in row["reflen"])[1]
    return [*row["correct"], *row["guess"], length, closest]


def _rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    """Best precision and best recall over the references, which need not come from the same one."""
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(w, len(vocabulary)) for w in text.split(" ")] for text in (hypothesis, *references)]
    common = [LCSseq.similarity(ids[0], other) for other in ids[1:]]
    precision = max(common) / len(ids[0])
    recall = max(n / len(other) for n, other in zip(common, ids[1:], strict=True))
    if not precision or not recall or not hypothesis:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _score(name: str, value: float, clusters: Sequence[str], interval, per_sample: list[dict]) -> Score:
    return Score(name, VERSION, float(value), len(clusters), interval, len(set(clusters)), per_sample)


def _per_sample(ref: Tokens, values: Sequence[float]) -> list[dict]:
    return [{"sample_id": i, "value": float(value)} for i, value in zip(ref, values, strict=True)]


def _undefined(name: str, reason: str) -> Score:
    return Score(name, VERSION, None, 0, reason=reason)
