import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from eval.meteor import corpus_meteor, meteor_values
from eval.ngrams import bleu_sums, count_ngrams, read_corpus
from eval.text import NAMES, corpus_bleu, text_scores
from eval.tokens import NO_JAVA, has_java, ptb_tokens, word_tokens
from eval.types import Score, ScoreError

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "nlg-eval" / "vectors.json"
NLG_NAMES = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}
WORDS = "a small large lesion in the left right temporal lobe naïve é ß İ 肺 結節 🫁 1.5 mm . , - x ' \u00a0"
GAPS = [" "] * 8 + ["  ", "\n", "\t", "\u2028", " \x1c"]

needs_java = pytest.mark.skipif(not has_java(), reason=NO_JAVA)
needs_vectors = pytest.mark.skipif(
    not VECTORS.exists(), reason=f"{VECTORS.name} of nlg-eval is not beside the repository"
)


@pytest.fixture
def pairs():
    return draw(40, seed=3)


def draw(count, seed):
    """Texts of other scripts, with repeated words, odd white space, and empty ones on both sides."""
    rng = random.Random(seed)
    words = WORDS.split(" ")

    def text():
        chosen = rng.choices(words, k=rng.choice([0, 1, 2, 3, 5, 8, 13, 20]))
        gap = (lambda: rng.choice(GAPS)) if rng.random() < 0.3 else lambda: " "
        return "".join(word + gap() for word in chosen)[:-1]

    hypotheses = {f"s{k:04}": text() for k in range(count)}
    references = {i: [text() if rng.random() < 0.7 else said for _ in range(rng.choice([1, 1, 2, 3]))]
                  for i, said in hypotheses.items()}  # fmt: skip
    return hypotheses | {"s0005": ""}, references | {"s0005": [""]}


def score(hypotheses, references, **options):
    return text_scores(hypotheses, references, **{"tokenizer": "none", "meteor": False, **options})


def only_scores(result):
    return {name: value for name, value in result.items() if isinstance(value, Score)}


def values(score):
    return [row["value"] for row in score.per_sample]


def test_equal_to_pycocoevalcap_on_random_pairs():
    hypotheses, references = draw(1200, seed=1)
    scores = score(hypotheses, references)
    gts, res = {i: references[i] for i in hypotheses}, {i: [text] for i, text in hypotheses.items()}
    bleu, sentences = Bleu(4).compute_score(gts, res, verbose=0)
    for k, name in enumerate(NAMES[:4]):
        assert scores[name].value == pytest.approx(bleu[k], abs=1e-12)
        assert values(scores[name]) == pytest.approx(sentences[k], abs=1e-12)
    for name, metric in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        value, all_values = metric.compute_score(gts, res)
        assert scores[name].value == pytest.approx(value, abs=1e-12)
        assert values(scores[name]) == pytest.approx(list(all_values), abs=1e-12)


def test_large_token_numbers_count_alike():
    """With more n-grams than fit a packed number, counting takes another way to the same sums."""
    hypotheses, references = draw(60, seed=2)
    corpus = read_corpus(
        [text.split() for text in hypotheses.values()], [[t.split() for t in row] for row in references.values()]
    )
    far = corpus.words * (1 << 56)
    spread = type(corpus)(corpus.rows, far, corpus.lengths, corpus.sample, corpus.predicted, corpus.vocabulary)
    assert (bleu_sums(spread, count_ngrams(spread, 1))[:, 0] == bleu_sums(corpus, count_ngrams(corpus, 1))[:, 0]).all()


def test_bleu_from_sums_is_bleu(pairs):
    sums = np.array([4, 3, 2, 1, 6, 5, 4, 3, 6, 8.0])
    expected = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25 * np.exp(1 - 8 / 6)
    assert corpus_bleu(sums, 4) == pytest.approx(expected, rel=1e-6)
    for name, s in only_scores(score(*pairs)).items():
        if s.ci95:
            assert s.ci95[0] < s.value < s.ci95[1], name


def test_order_changes_nothing(pairs):
    hypotheses, references = pairs
    turned = score(dict(reversed(hypotheses.items())), dict(reversed(references.items())))
    assert turned == score(hypotheses, references)


def test_more_references_never_lower_bleu_matches_or_rouge():
    one = score({"a": "the left lobe", "b": "x"}, {"a": ["the right lobe"], "b": ["y"]})
    two = score({"a": "the left lobe", "b": "x"}, {"a": ["the right lobe", "in the left lobe"], "b": ["y"]})
    for name in ("BLEU-1", "BLEU-2", "ROUGE-L", "rouge1", "rouge2", "rougeL"):
        assert values(two[name])[0] > values(one[name])[0], name


def test_intervals_are_clustered_by_patient(pairs):
    hypotheses, references = pairs
    alone, together = score(*pairs), score(*pairs, patients={i: i[:-1] for i in hypotheses})
    for name, s in only_scores(together).items():
        if s.ci95:
            assert s.value == alone[name].value and s.clusters == 4 and s.ci95 != alone[name].ci95
    assert score(*pairs, patients=dict.fromkeys(hypotheses, "one"))["BLEU-4"].ci95 is None


def test_perfect_predictions_score_one():
    texts = {f"s{k}": f"a {k} mm lesion in the left lobe" for k in range(5)}
    scores = score(texts, {i: [text] for i, text in texts.items()})
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L", "rouge1", "rouge2", "rougeL"):
        assert scores[name].value == pytest.approx(1.0, abs=1e-8)
    assert scores["CIDEr"].value == pytest.approx(10.0)


def test_missing_and_empty_predictions_are_zero_not_an_error():
    scores = score({"b": ""}, {"a": ["one lesion"], "b": ["no lesion"]})
    assert [scores[name].value for name in ("ROUGE-L", "CIDEr", "rougeL")] == [0.0, 0.0, 0.0]
    assert scores["BLEU-1"].value == pytest.approx(0, abs=1e-6)


def test_undefined_is_not_zero():
    one = score({"a": "a lesion"}, {"a": ["a lesion"]})
    assert one["CIDEr"].value is None and "more than one pair" in one["CIDEr"].reason
    assert all(s.value is None for s in only_scores(score({}, {})).values())
    with pytest.raises(ScoreError, match="'b' has no reference text"):
        score({}, {"a": ["x"], "b": []})


def test_a_megabyte_long_answer_is_scored():
    long = " ".join(f"w{k % 5000}" for k in range(170_000))
    scores = score({"a": long, "b": "x"}, {"a": ["w1 w2 w3"], "b": ["x"]})
    assert len(long) > 900_000 and 0 < values(scores["ROUGE-L"])[0] < 0.001


@needs_vectors
@pytest.mark.parametrize("case", range(3))
def test_nlg_eval_vectors(case):
    vector = json.loads(VECTORS.read_text())[case]
    scores = score(*_numbered(vector))
    for theirs, ours in NLG_NAMES.items():
        assert scores[ours].value == pytest.approx(vector["expect"][theirs], abs=1e-5)
    if len(vector["hyp"]) > 1:
        assert scores["CIDEr"].value == pytest.approx(vector["expect"]["CIDEr"], abs=1e-5)


@needs_vectors
@needs_java
@pytest.mark.slow  # the Java program loads its tables for ten seconds
def test_nlg_eval_meteor():
    for vector in json.loads(VECTORS.read_text()):
        meteor = score(*_numbered(vector), meteor=True)["METEOR"]
        assert meteor.value == pytest.approx(vector["expect"]["METEOR"], abs=1e-5)
        assert len(meteor.per_sample) == len(vector["hyp"])


@needs_java
@pytest.mark.slow  # two Java programs
def test_meteor_equals_pycocoevalcap_and_its_own_sums():
    hypotheses, references = draw(1000, seed=4)
    ref = {i: [" ".join(text.split()) for text in references[i]] for i in hypotheses}  # it reads a line a text
    hyp = {i: [" ".join(text.split())] for i, text in hypotheses.items()}
    value, samples, sums = meteor_values(hyp, ref)
    expected, all_expected = Meteor().compute_score(ref, hyp)
    assert value == pytest.approx(expected, abs=1e-12) and samples == pytest.approx(all_expected, abs=1e-12)
    assert corpus_meteor(sums.sum(0)) == pytest.approx(value, abs=1e-12)
    assert corpus_meteor(sums) == pytest.approx(samples, abs=1e-12)


@needs_java
@pytest.mark.slow
def test_meteor_has_an_interval_and_does_not_mind_the_order(pairs):
    hypotheses, references = pairs
    meteor = score(*pairs, meteor=True)["METEOR"]
    assert meteor.ci95[0] < meteor.value < meteor.ci95[1]
    turned = score(dict(reversed(hypotheses.items())), dict(reversed(references.items())), meteor=True)["METEOR"]
    assert turned == meteor


@needs_java
def test_ptb_tokens_are_those_of_pycocoevalcap(capfd):
    texts = ["The lesion, 15 mm.", "", "Naïve — café: (y) don't!", "a  b\tc", "one\r\ntwo\u2028three", "[r0] 1.5 cm"]
    ours = ptb_tokens(texts)
    assert capfd.readouterr() == ("", "")
    clean = [" ".join(text.split()) for text in texts]
    theirs = PTBTokenizer().tokenize({k: [{"caption": text}] for k, text in enumerate(clean)})
    assert ours == [theirs[k][0] for k in range(len(texts))]


@needs_java
def test_half_a_character_is_not_a_traceback():
    assert len(ptb_tokens(["lesion \ud800", "x"])) == 2


def test_word_tokens():
    assert word_tokens(["The left-sided lesion, 1.5 cm.", "", "右肺结节15mm"]) == [
        "the left-sided lesion 1.5 cm",
        "",
        "右 肺 结 节 15 mm",
    ]


def test_without_java_the_rest_runs_and_says_so(monkeypatch, tmp_path, pairs):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = text_scores(*pairs)
    assert scores["tokenizer"] == "words"
    assert str(scores["METEOR"]) == f"undefined ({NO_JAVA})"
    assert scores["BLEU-4"].value is not None
    with pytest.raises(ScoreError, match="needs Java"):
        text_scores(*pairs, tokenizer="ptb")


def test_a_java_that_does_not_start_is_no_java(monkeypatch, tmp_path):
    _stub(monkeypatch, tmp_path, "exit 1")
    assert not has_java()


def test_a_java_that_stops_is_said(fresh_meteor, monkeypatch, tmp_path, pairs):
    _stub(monkeypatch, tmp_path, '[ "$1" = -version ]')
    assert "stopped at sample 's0000'" in score(*pairs, meteor=True)["METEOR"].reason
    with pytest.raises(ScoreError, match="PTB tokenizer failed"):
        text_scores(*pairs)


@pytest.mark.parametrize("last", ["", "echo Error: out of memory", "echo 1.0 2.0"])
def test_a_java_that_dies_midway_is_said_with_the_sample(fresh_meteor, monkeypatch, tmp_path, pairs, last):
    sums = " ".join(["1.0"] * 23)
    _stub(monkeypatch, tmp_path, f'[ "$1" = -version ] && exit\nfor k in 1 2 3; do read x; echo {sums}; done\n{last}')
    for _ in range(2):  # a new program each time
        meteor = score(*pairs, meteor=True)["METEOR"]
        assert meteor.value is None and "stopped at sample 's0003'" in meteor.reason


def test_a_java_that_dies_at_the_end_is_said(fresh_meteor, monkeypatch, tmp_path, pairs):
    sums = " ".join(["1.0"] * 23)
    _stub(monkeypatch, tmp_path, f'[ "$1" = -version ] && exit\nfor k in $(seq 40); do read x; echo {sums}; done')
    assert "stopped at the end" in score(*pairs, meteor=True)["METEOR"].reason


@pytest.fixture
def fresh_meteor():
    """No program of an earlier test, and none left for a later one."""
    from eval.meteor import _program

    _program.cache_clear()
    yield
    _program.cache_clear()


def _stub(monkeypatch, folder, script):
    stub = folder / "java"
    stub.write_text(f"#!/bin/sh\n{script}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")


def _numbered(vector):
    hypotheses = {str(k): text for k, text in enumerate(vector["hyp"])}
    return hypotheses, {str(k): texts for k, texts in enumerate(vector["refs"])}
