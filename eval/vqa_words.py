"""Words and n-grams as the VQA programs count them: the VQAv2 normaliser, LLaVA-Med's token overlap, NLTK's BLEU."""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_MARKED = re.compile(f"[{re.escape(_MARKS)}]")
_GROUPED = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_A_PASS = int(re.UNICODE)
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}
_NUMBERS |= {"eight": "8", "nine": "9", "ten": "10", "none": "0"}
_WRITTEN = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each is found by its spelling with one apostrophe left out; the last entry is the program's own, the wrong way round.
_CONTRACTIONS = {
    word[:k] + word[k + 1 :]: word for word in _WRITTEN.split() for k, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}

Matches = list[tuple[int, int]]


def vqa_normalise(text: str) -> str:
    """The answer normaliser of the VQAv2 challenge, as LLaVA-Med and MultiMedEval have it; `text` in lower case.

    Source: llava/eval/eval_metrics/glossary.py of https://github.com/microsoft/LLaVA-Med at ad758b6.
    Number words to digits (none → 0), articles out, contractions get their apostrophe. Its quirks, kept:
    - a punctuation mark becomes a space, but is deleted everywhere where it stands beside a space anywhere, and every
      mark is deleted where the text has a comma between digits: "left-sided" → "left sided", "1,000 left-sided" →
      "1000 leftsided";
    - a period stays before a digit only (".5", "a.5"); the regular expression's flag is passed as its count, so that a
      pass removes 32 periods at most;
    - other scripts' punctuation stays.
    """
    out = text
    if _MARKED.search(text):
        grouped = _GROUPED.search(text) is not None
        for mark in _MARKS:
            if mark in text:
                deleted = grouped or mark + " " in text or " " + mark in text
                out = out.replace(mark, "" if deleted else " ")
    if "." in out:
        out = _PERIOD.sub("", out, count=_PERIODS_A_PASS)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_normalise_again(text: str) -> str:
    """A further pass over what `vqa_normalise` returned: nothing but periods can be left over."""
    return vqa_normalise(text) if "." in text else text


def llavamed_overlap(prediction: str, reference: str) -> dict[str, float]:
    """ "exact", "f1", "precision", "recall" of two normalised texts; 0 where either has no words.

    Source: llava/eval/eval_metrics/evaluate_metrics.py of https://github.com/microsoft/LLaVA-Med at ad758b6.
    With c(w) the count of a word in the prediction, r(w) in the reference, S the words of both:
    tp = Σ_S c(w), precision = tp / Σ c, recall = tp / (tp + Σ_{w not in prediction} r(w)), exact = |S| / Σ c.
    """
    said, wanted = Counter(prediction.split()), Counter(reference.split())
    shared = said.keys() & wanted.keys()
    if not shared:
        return {"exact": 0.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    total = said.total()
    hit = sum(said[word] for word in shared)
    missed = sum(count for word, count in wanted.items() if word not in said)
    precision, recall = hit / total, hit / (hit + missed)
    f1 = 2 * precision * recall / (precision + recall)
    return {"exact": len(shared) / total, "f1": f1, "precision": precision, "recall": recall}


def ngram_matches(said: Sequence[str], wanted: Sequence[str], order: int = 4) -> Matches:
    """[(clipped matches, n-grams said, at least 1)] for n = 1 .. order."""
    matches: Matches = []
    for n in range(1, order + 1):
        total = max(1, len(said) - n + 1)
        if matches and not matches[-1][0]:
            matches.append((0, total))  # no shared n-gram, so no shared longer one
            continue
        ours, theirs = (Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (said, wanted))
        matches.append((sum(min(count, theirs[gram]) for gram, count in ours.items()), total))
    return matches


def nltk_bleu(matches: Matches, said: int, wanted: int, weights: Sequence[float]) -> float:
    """NLTK's unsmoothed sentence BLEU of one reference. said, wanted: lengths in words.

    exp(Σ w log p) times the brevity penalty; without a shared word 0, and a p of 0 counts as the smallest positive
    float, so that BLEU-4 of a short answer is 1e-77 or so (https://www.nltk.org/api/nltk.translate.bleu_score.html).
    """
    if not matches[0][0]:
        return 0.0
    logs = (math.log(hit / total if hit else sys.float_info.min) for hit, total in matches)
    penalty = 1.0 if said > wanted else math.exp(1 - wanted / said)
    return penalty * math.exp(math.fsum(weight * value for weight, value in zip(weights, logs, strict=False)))
