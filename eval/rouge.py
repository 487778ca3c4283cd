"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) as Google's rouge_score computes them (F measure, beta 1).

Facts from https://github.com/google-research/google-research/tree/master/rouge: tokens are runs of a-z and 0-9 of the
lower-case text, those longer than three letters stemmed (Porter) where asked; of several references the one with the
highest F counts, for each of the three alone. Its defects: other scripts have no tokens and score 0, and "1.5" is two
tokens. Its ROUGE-L is not pycocoevalcap's, which weighs recall more and splits at blanks.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from rapidfuzz.distance import LCSseq

from eval.ngrams import count_ngrams, read_corpus
from eval.statistics import mean_score
from eval.types import Score

VERSION = "rouge-score-0.1.2"
NAMES = ("rouge1", "rouge2", "rougeL")

_TOKEN = re.compile("[a-z0-9]+")


def rouge(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    patients: Mapping[str, str] | None = None,
    stemmer: bool = False,
) -> dict[str, Score]:
    """{"rouge1", "rouge2", "rougeL"}: mean F measure over the sample ids of `references`, a missing prediction being
    an empty text. Rows of per_sample also have "precision" and "recall".

    The corpus value is the plain mean; rouge_score's BootstrapAggregator gives a median of resampled means instead.
    """
    ids = sorted(references)
    clusters = [(patients or {}).get(i, i) for i in ids]
    version = VERSION + (" stemmer" if stemmer else "")
    pairs = [(k, text) for k, i in enumerate(ids) for text in references[i]]
    tokens = [rouge_tokens(predictions.get(i, ""), stemmer) for i in ids]
    owner = np.array([k for k, _ in pairs], dtype=np.int64)
    parts = _parts([tokens[k] for k, _ in pairs], [rouge_tokens(text, stemmer) for _, text in pairs])
    scores = {}
    for name, (common, said, true) in zip(NAMES, parts, strict=True):
        precision, recall = common / np.maximum(said, 1), common / np.maximum(true, 1)
        f = 2 * precision * recall / np.where(common > 0, precision + recall, 1)
        best = _best(f, owner, len(ids))
        columns = (f[best].tolist(), precision[best].tolist(), recall[best].tolist())
        keys = ("sample_id", "value", "precision", "recall")
        rows = [dict(zip(keys, row, strict=True)) for row in zip(ids, *columns, strict=True)]
        scores[name] = mean_score(name, version, columns[0], clusters, rows)
    return scores


def rouge_tokens(text: str, stemmer: bool = False) -> list[str]:
    """rouge_score's default tokens."""
    words = _TOKEN.findall(text.lower())
    return [_stem(word) if len(word) > 3 else word for word in words] if stemmer else words


@cache
def _porter():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@cache
def _stem(word: str) -> str:
    return _porter().stem(word)


def _parts(said: Sequence[list[str]], true: Sequence[list[str]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each of the three: (common, in the prediction, in the reference), (P,) numbers each for the P pairs."""
    corpus = read_corpus(said, [[text] for text in true])
    lengths = corpus.lengths.reshape(-1, 2)
    parts = []
    for k, order in enumerate(count_ngrams(corpus, 2)):
        pair = corpus.sample[order.text[order.groups[:-1]]]
        common = np.bincount(pair, np.minimum(order.predicted, order.referred), len(lengths))
        parts.append((common, *np.maximum(0, lengths - k).T))
    longest = [LCSseq.similarity(a, b) for a, b in zip(corpus.rows[::2], corpus.rows[1::2], strict=True)]
    return [*parts, (np.array(longest, dtype=float), *lengths.T)]


def _best(f: np.ndarray, owner: np.ndarray, samples: int) -> np.ndarray:
    """(samples,) the pair with the highest F of each sample, the first of several."""
    order = np.lexsort((np.arange(len(f)), -f, owner))
    return order[np.searchsorted(owner, np.arange(samples))]
