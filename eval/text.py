"""BLEU-1..4, ROUGE-L, CIDEr and METEOR as pycocoevalcap computes them, ROUGE-1/2/L as Google's rouge_score does.

Corpus BLEU (Papineni et al. 2002; "closest" reference length), ROUGE-L with beta 1.2 (Lin 2004), CIDEr (Vedantam et al.
2015; document frequencies of the references that are passed), METEOR 1.5 (Denkowski & Lavie 2014; needs Java). Two
protocols say what text they are computed on; their numbers must not stand in one table (`check_same_protocol`):

full: the whole texts, with a tokenizer of choice.
r2gen: what https://github.com/cuhksz-nlp/R2Gen scores: reports cleaned by its rules, the full stop a token, and cut.
    max_seq_length (60 for iu_xray, 100 for mimic_cxr) counts the begin mark of a reference, so that of a reference 59
    or 99 words are left, and of a prediction 60 or 100 (modules/datasets.py, trainer.py, att_model.py). Words that its
    training reports seldom have are "<unk>" there, in references too; here that is so only where the training reports
    are given. Its defects: what a long report says at its end is not scored, and decimal points are lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from rapidfuzz.distance import LCSseq

from eval.meteor import corpus_meteor, meteor_values
from eval.ngrams import Corpus, bleu_sums, cider_values, count_ngrams, read_corpus
from eval.rouge import rouge
from eval.statistics import bootstrap_interval, mean_score
from eval.tokens import NO_JAVA, R2GEN, TOKENIZERS, has_java, r2gen_tokens, r2gen_vocabulary
from eval.types import Score, ScoreError

VERSION = "pycocoevalcap-1.2"
PROTOCOLS = {"full": "1", "r2gen": "1"}
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "METEOR")

_BETA = 1.2

Tokens = Mapping[str, list[str]]


def text_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    patients: Mapping[str, str] | None = None,
    tokenizer: str | None = None,
    meteor: bool = True,
    protocol: str = "full",
    dataset: str = "iu_xray",
    train_reports: Iterable[str] | None = None,
) -> dict[str, Any]:
    """All metrics over the sample ids of `references`; a missing prediction counts as an empty text.

    references: sample_id → one or more texts. patients: sample_id → cluster of the interval (default: each sample).
    tokenizer: "ptb" (needs Java), "r2gen", "words", "none" (texts are tokens joined by spaces); None takes "ptb" where
    Java is, else "words". meteor: False leaves METEOR out (its tables take seconds to load).
    protocol: "full" or "r2gen"; dataset and train_reports (for "<unk>") are r2gen's, which has its own tokenizer.
    Returns {"protocol", "version", "tokenizer", **{name: Score}}, r2gen also {"dataset", "unknown_words"}.
    Raises ScoreError for a choice that does not exist, no reference text, or a PTB tokenizer that does not run.
    """
    ids = sorted(references)
    empty = [i for i in ids if not references[i]]
    if empty:
        raise ScoreError(f"sample {empty[0]!r} has no reference text ({len(empty)} such); give it one or leave it out")
    clusters = [(patients or {}).get(i, i) for i in ids]
    said, true = {i: predictions.get(i, "") for i in ids}, {i: list(references[i]) for i in ids}
    if protocol == "r2gen":
        head, hyp, ref = _r2gen(said, true, tokenizer, dataset, train_reports)
        return head | _scores(hyp, ref, clusters, meteor)
    if protocol not in PROTOCOLS:
        raise ScoreError(f"unknown protocol {protocol!r} for text; choose from {', '.join(PROTOCOLS)}")
    tokenizer = tokenizer or ("ptb" if has_java() else "words")
    if tokenizer not in TOKENIZERS:
        raise ScoreError(f"unknown tokenizer {tokenizer!r}; choose from {', '.join(TOKENIZERS)}")
    hyp, ref = _tokenise([{i: [text] for i, text in said.items()}, true], tokenizer)
    head = {"protocol": protocol, "version": PROTOCOLS[protocol], "tokenizer": tokenizer}
    return head | _scores(hyp, ref, clusters, meteor) | rouge(said, true, dict(zip(ids, clusters, strict=True)))


def check_same_protocol(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ScoreError where results of `text_scores` (system → result) must not stand in one table: they differ in
    protocol, its version, tokenizer, or R2Gen's data set and vocabulary."""
    keys = ("protocol", "version", "tokenizer", "dataset", "unknown_words")
    kinds = {name: tuple(result.get(key) for key in keys) for name, result in results.items()}
    first = next(iter(kinds), None)
    for name, kind in kinds.items():
        if kind != kinds[first]:
            parts = [f"{key} {a} and {b}" for key, a, b in zip(keys, kinds[first], kind, strict=True) if a != b]
            raise ScoreError(f"{first} and {name} cannot share a table: {', '.join(parts)}; score both the same way")


def corpus_bleu(totals: np.ndarray, order: int) -> np.ndarray:
    """(..., 10) sums [correct 1-4, guessed 1-4, length, reference length] → (...) BLEU of that order."""
    precisions = (totals[..., :order] + 1e-15) / (totals[..., 4 : 4 + order] + 1e-9)
    ratio = (totals[..., 8] + 1e-15) / (totals[..., 9] + 1e-9)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return precisions.prod(-1) ** (1 / order) * brevity


def sample_values(hyp: Tokens, ref: Tokens) -> tuple[np.ndarray, list[float], np.ndarray]:
    """(S, 10) sums for `corpus_bleu`, ROUGE-L of each sample, (S,) CIDEr of each sample, in the order of `ref`.

    hyp: id → [tokens]; ref: id → token strings; tokens joined by spaces.
    """
    corpus = read_corpus([hyp[i][0].split() for i in ref], [[text.split() for text in ref[i]] for i in ref])
    counts = count_ngrams(corpus)
    return bleu_sums(corpus, counts), _rouge_l_values(hyp, ref, corpus), cider_values(corpus, counts)


def bleu(sums: np.ndarray, clusters: Sequence[str], ids: Sequence[str]) -> dict[str, Score]:
    """Corpus BLEU-1..4. Per sample: sentence BLEU. The interval resamples the sums that corpus BLEU is made of, not the
    sentence scores."""
    scores = {}
    for order, name in enumerate(NAMES[:4], 1):
        formula = partial(corpus_bleu, order=order)
        interval = bootstrap_interval(sums, clusters, formula)
        rows = _per_sample(ids, formula(sums), sums)
        scores[name] = _score(name, formula(sums.sum(0)), clusters, interval, rows)
    return scores


def cider(values: Sequence[float], clusters: Sequence[str], ids: Sequence[str]) -> Score:
    """Mean CIDEr. Undefined for one pair: all word weights are then zero, and so is the score.

    The interval keeps the document frequencies of all references: it resamples the samples' values, not the weights.
    """
    if len(ids) < 2:
        return _undefined("CIDEr", "needs more than one pair: its word weights come from the other references")
    return mean_score("CIDEr", VERSION, values, clusters, _per_sample(ids, values))


def meteor_score(hyp: Tokens, ref: Tokens, clusters: Sequence[str]) -> Score:
    """Corpus METEOR, with an interval from the sums it is made of. Undefined, with the reason, without Java."""
    if not has_java():
        return _undefined("METEOR", NO_JAVA)
    try:
        value, values, sums = meteor_values(hyp, ref)
    except ScoreError as error:
        return _undefined("METEOR", str(error))
    interval = bootstrap_interval(sums, clusters, corpus_meteor)
    return _score("METEOR", value, clusters, interval, _per_sample(list(ref), values, sums))


def _scores(hyp: Tokens, ref: Tokens, clusters: Sequence[str], meteor: bool) -> dict[str, Score]:
    if not ref:
        return {name: _undefined(name, "no samples") for name in NAMES}
    ids = list(ref)
    sums, overlap, consensus = sample_values(hyp, ref)
    return {
        **bleu(sums, clusters, ids),
        "ROUGE-L": mean_score("ROUGE-L", VERSION, overlap, clusters, _per_sample(ids, overlap)),
        "CIDEr": cider(consensus.tolist(), clusters, ids),
        "METEOR": meteor_score(hyp, ref, clusters) if meteor else _undefined("METEOR", "left out"),
    }


def _rouge_l_values(hyp: Tokens, ref: Tokens, corpus: Corpus) -> list[float]:
    """The subsequence length comes from rapidfuzz on token numbers, a hundred times faster."""
    texts = [text for i in ref for text in (*hyp[i], *ref[i])]
    numbers = dict(corpus.vocabulary)
    rows = [_spaced(text, row, numbers) for text, row in zip(texts, corpus.rows, strict=True)]
    bounds = [*np.flatnonzero(corpus.predicted).tolist(), len(rows)]
    return [_rouge_l(rows[a], rows[a + 1 : b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def _r2gen(
    said: Mapping[str, str], true: Tokens, tokenizer: str | None, dataset: str, train_reports: Iterable[str] | None
) -> tuple[dict[str, str], dict[str, list[str]], dict[str, list[str]]]:
    if tokenizer not in (None, "r2gen"):
        raise ScoreError(f"protocol r2gen has its own tokenizer, not {tokenizer!r}; leave it out or choose full")
    if dataset not in R2GEN:
        raise ScoreError(f"unknown dataset {dataset!r} for protocol r2gen; choose from {', '.join(R2GEN)}")
    known = None if train_reports is None else r2gen_vocabulary(train_reports, dataset)
    longest = R2GEN[dataset].longest

    def cut(texts: Sequence[str], words: int) -> list[str]:
        rows = [text.split()[:words] for text in r2gen_tokens(texts, dataset)]
        return [" ".join(word if known is None or word in known else "<unk>" for word in row) for row in rows]

    head = {"protocol": "r2gen", "version": PROTOCOLS["r2gen"], "tokenizer": "r2gen", "dataset": dataset}
    head["unknown_words"] = "kept" if known is None else "<unk>"
    hyp = {i: cut([text], longest) for i, text in said.items()}
    return head, hyp, {i: cut(texts, longest - 1) for i, texts in true.items()}


def _tokenise(groups: Sequence[Tokens], tokenizer: str) -> list[dict[str, list[str]]]:
    """Tokenises all texts of all groups in one go (the PTB tokenizer is a process)."""
    texts = [text for group in groups for row in group.values() for text in row]
    done = iter(TOKENIZERS[tokenizer](texts) if texts else [])
    return [{i: [next(done) for _ in row] for i, row in group.items()} for group in groups]


def _spaced(text: str, row: list[int], numbers: dict[str, int]) -> list[int]:
    """Token numbers as ROUGE-L sees them: it splits at each single blank, so that an empty text is one empty token."""
    if len(row) == text.count(" ") + 1 and text.isprintable():  # the only white space in it is single blanks
        return row
    return [numbers.setdefault(word, len(numbers)) for word in text.split(" ")]


def _rouge_l(hypothesis: list[int], references: Sequence[list[int]]) -> float:
    """Best precision and best recall over the references, which need not come from the same one."""
    common = [LCSseq.similarity(hypothesis, other) for other in references]
    precision = max(common) / len(hypothesis)
    recall = max(n / len(other) for n, other in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _score(name: str, value: float, clusters: Sequence[str], interval, per_sample: list[dict]) -> Score:
    return Score(name, VERSION, float(value), len(clusters), interval, len(set(clusters)), per_sample)


def _per_sample(ids: Sequence[str], values: Sequence[float], sums: np.ndarray | None = None) -> list[dict]:
    """With what a corpus score is made of, so that two systems' files can be compared by the corpus score."""
    rows: list[dict] = [{"sample_id": i, "value": float(value)} for i, value in zip(ids, values, strict=True)]
    return rows if sums is None else [row | {"sums": s} for row, s in zip(rows, sums.tolist(), strict=True)]


def _undefined(name: str, reason: str) -> Score:
    return Score(name, VERSION, None, 0, reason=reason)
