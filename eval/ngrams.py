"""N-grams of a whole corpus counted with a few sorts; BLEU's and CIDEr's sums follow for all samples at once.

Dimension key: S samples, N texts (S predictions and all their references), T tokens of all texts, G distinct n-grams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

ORDERS = (1, 2, 3, 4)

_SIGMA = 6.0  # of CIDEr's length penalty


@dataclass(frozen=True)
class Corpus:
    """Texts as token numbers; each sample's prediction stands right before its references.

    rows: the N texts' token numbers. words: (T,) all of them in a row. lengths: (N,) tokens of each text.
    sample: (N,) which sample a text is of. predicted: (N,) whether it is the prediction.
    vocabulary: token → number.
    """

    rows: list[list[int]]
    words: np.ndarray
    lengths: np.ndarray
    sample: np.ndarray
    predicted: np.ndarray
    vocabulary: Mapping[str, int]

    @property
    def samples(self) -> int:
        return int(self.predicted.sum())


@dataclass(frozen=True)
class Counts:
    """N-grams of one order, an entry for each distinct n-gram of each text, sorted by n-gram, then text.

    gram, text, count: (E,) each. groups: (P + 1,) where the entries of one n-gram in one sample begin, and E.
    grams: G. predicted, referred: (P,) count in the prediction, largest count in a reference.
    """

    gram: np.ndarray
    text: np.ndarray
    count: np.ndarray
    groups: np.ndarray
    grams: int
    predicted: np.ndarray
    referred: np.ndarray


def read_corpus(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Corpus:
    """predictions: a list of tokens for each sample; references: one or more such lists for each sample."""
    texts = [text for said, true in zip(predictions, references, strict=True) for text in (said, *true)]
    vocabulary: dict[str, int] = {}
    for word in dict.fromkeys(chain.from_iterable(texts)):
        vocabulary[word] = len(vocabulary)
    rows = [[vocabulary[word] for word in text] for text in texts]
    counts = np.array([1 + len(true) for true in references], dtype=np.int64)
    predicted = np.zeros(len(texts), dtype=bool)
    predicted[np.cumsum(counts) - counts] = True
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    words = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    return Corpus(rows, words, lengths, np.repeat(np.arange(len(counts)), counts), predicted, vocabulary)


def count_ngrams(corpus: Corpus, orders: int = len(ORDERS)) -> list[Counts]:
    """Counts of order 1 to `orders`."""
    owner = np.repeat(np.arange(len(corpus.rows)), corpus.lengths)
    left = np.repeat(np.cumsum(corpus.lengths), corpus.lengths) - np.arange(len(owner))  # tokens from here to the end
    gram, counts = np.zeros(len(owner), dtype=np.int64), []
    for order in range(1, orders + 1):
        starts = np.flatnonzero(left >= order)
        keys = gram[starts] * max(1, len(corpus.vocabulary)) + corpus.words[starts + order - 1]
        keys, at = _sorted(keys, starts, len(owner))
        new = _begins(keys)
        rank = np.cumsum(new) - 1
        gram[at] = rank
        counts.append(_entries(corpus, owner[at], rank, new))
    return counts


def bleu_sums(corpus: Corpus, counts: Sequence[Counts]) -> np.ndarray:
    """(S, 10): matched n-grams of order 1-4, n-grams of order 1-4, length, length of the reference that is closest.

    A prediction's n-gram matches as often as it stands in the one reference that has it most often (Papineni et al.
    2002). Of two lengths equally close, the shorter counts.
    """
    sums = np.zeros((corpus.samples, 10))
    length = corpus.lengths[corpus.predicted]
    for k, order in enumerate(counts):
        samples = corpus.sample[order.text[order.groups[:-1]]]
        matched = np.minimum(order.predicted, order.referred)
        sums[:, k] = np.bincount(samples, matched, corpus.samples)
        sums[:, 4 + k] = np.maximum(0, length - k)
    sums[:, 8], sums[:, 9] = length, _closest(corpus, length)
    return sums


def cider_values(corpus: Corpus, counts: Sequence[Counts]) -> np.ndarray:
    """(S,) CIDEr of each sample, from 0 to 10; document frequencies are those of all references of the corpus.

    The variant with clipped counts and a length penalty (sigma 6), mean of the orders 1-4, that Vedantam et al. 2015
    call CIDEr-D. As in pycocoevalcap, a text's length is its number of bigrams.
    """
    said = np.flatnonzero(corpus.predicted)[corpus.sample]  # each text's prediction
    length = np.maximum(0, corpus.lengths - 1)
    penalty = np.exp(-((length[said] - length) ** 2) / (2 * _SIGMA**2))
    similarity = sum(_similarity(corpus, order, said) for order in counts) / len(counts) * penalty
    similarity[corpus.predicted] = 0
    references = np.bincount(corpus.sample) - 1
    return 10 * np.bincount(corpus.sample, similarity, corpus.samples) / references


def _similarity(corpus: Corpus, order: Counts, said: np.ndarray) -> np.ndarray:
    """(N,) clipped cosine of each text's tf-idf vector of one order with its prediction's; 0 where either is empty."""
    held = order.referred > 0
    frequency = np.bincount(order.gram[order.groups[:-1]][held], minlength=order.grams)
    weight = (np.log(corpus.samples) - np.log(np.maximum(1, frequency)))[order.gram]
    value = order.count * weight
    norm = np.sqrt(np.bincount(order.text, value**2, len(corpus.rows)))
    clipped = np.minimum(np.repeat(order.predicted, np.diff(order.groups)) * weight, value)
    dot = np.bincount(order.text, clipped * value, len(corpus.rows))
    scale = norm * norm[said]
    return np.divide(dot, scale, out=np.zeros(len(dot)), where=scale > 0)


def _entries(corpus: Corpus, text: np.ndarray, gram: np.ndarray, new: np.ndarray) -> Counts:
    """From the tokens in the order of their n-grams: text (T',), gram (T',), whether a new n-gram begins (T',)."""
    first = np.flatnonzero(new | _begins(text))
    count = np.diff(first, append=len(text))
    grams = int(gram[-1]) + 1 if len(gram) else 0
    text, gram = text[first], gram[first]
    begins = np.flatnonzero(_begins(gram) | _begins(corpus.sample[text]))
    said = corpus.predicted[text]
    predicted = np.where(said[begins], count[begins], 0)
    referred = np.maximum.reduceat(np.where(said, 0, count), begins) if len(begins) else predicted
    return Counts(gram, text, count, np.append(begins, len(text)), grams, predicted, referred)


def _begins(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it; the first place too."""
    begins = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins


def _sorted(keys: np.ndarray, places: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """keys in order and their places, equal keys by place. Sorting one packed number is twice as fast as argsort."""
    bits = max(1, limit).bit_length()
    if int(keys.max(initial=0)) < 1 << (62 - bits):
        packed = np.sort(keys << bits | places)
        return packed >> bits, packed & ((1 << bits) - 1)
    order = np.argsort(keys, kind="stable")
    return keys[order], places[order]


def _closest(corpus: Corpus, length: np.ndarray) -> np.ndarray:
    """(S,) the reference length that is closest to the prediction's, the shorter of two."""
    true = np.flatnonzero(~corpus.predicted)
    sample, reference = corpus.sample[true], corpus.lengths[true]
    order = np.lexsort((reference, np.abs(reference - length[sample]), sample))
    return reference[order][np.searchsorted(sample, np.arange(corpus.samples))]
