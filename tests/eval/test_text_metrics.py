import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from eval.text import NAMES, _meteor_program, corpus_bleu, text_scores
from eval.tokens import NO_JAVA, has_java, ptb_tokens, word_tokens
from eval.types import ScoreError

VECTORS = Path(__file__).parents[3] / "shared" / "vectors" / "nlg-eval" / "vectors.json"
NLG_NAMES = {"Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4", "ROUGE_L": "ROUGE-L"}

needs_java = pytest.mark.skipif(not has_java(), reason=NO_JAVA)
needs_vectors = pytest.mark.skipif(
    not VECTORS.exists(), reason=f"{VECTORS.name} of nlg-eval is not beside the repository"
)


@pytest.fixture
def pairs():
    rng = random.Random(3)
    words = ["a", "small", "large", "bright", "dark", "lesion", "in", "the", "left", "right", "temporal", "lobe"]

    def text(shortest=1):
        return " ".join(rng.choices(words, k=rng.randint(shortest, 14)))

    hypotheses = {f"s{k:02}": text() for k in range(40)}
    hypotheses["s05"] = ""
    return hypotheses, {i: [text(3) for _ in range(rng.randint(1, 3))] for i in hypotheses}


def score(hypotheses, references, **options):
    return text_scores(hypotheses, references, **{"tokenizer": "none", "meteor": False, **options})


def test_equal_to_pycocoevalcap(pairs):
    hypotheses, references = pairs
    scores = score(hypotheses, references)
    gts, res = {i: references[i] for i in hypotheses}, {i: [text] for i, text in hypotheses.items()}
    bleu, sentences = Bleu(4).compute_score(gts, res, verbose=0)
    for k, name in enumerate(NAMES[:4]):
        assert scores[name].value == bleu[k]
        assert [row["value"] for row in scores[name].per_sample] == sentences[k]
    for name, metric in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        value, values = metric.compute_score(gts, res)
        assert scores[name].value == pytest.approx(value, abs=1e-15)
        assert [row["value"] for row in scores[name].per_sample] == pytest.approx(list(values), abs=1e-15)


def test_bleu_from_sums_is_bleu(pairs):
    sums = np.array([4, 3, 2, 1, 6, 5, 4, 3, 6, 8.0])
    expected = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25 * np.exp(1 - 8 / 6)
    assert corpus_bleu(sums, 4) == pytest.approx(expected, rel=1e-6)
    for name, s in score(*pairs).items():
        if name != "tokenizer" and s.ci95:
            assert s.ci95[0] < s.value < s.ci95[1], name


def test_order_changes_nothing(pairs):
    hypotheses, references = pairs
    turned = score(dict(reversed(hypotheses.items())), dict(reversed(references.items())))
    assert turned == score(hypotheses, references)


def test_perfect_predictions_score_one():
    texts = {f"s{k}": f"a {k} mm lesion in the left lobe" for k in range(5)}
    scores = score(texts, {i: [text] for i, text in texts.items()})
    for name in ("BLEU-1", "BLEU-4", "ROUGE-L"):
        assert scores[name].value == pytest.approx(1.0, abs=1e-8)
    assert scores["CIDEr"].value == pytest.approx(10.0)


def test_missing_and_empty_predictions_are_zero_not_an_error():
    scores = score({"b": ""}, {"a": ["one lesion"], "b": ["no lesion"]})
    assert [scores[name].value for name in ("ROUGE-L", "CIDEr")] == [0.0, 0.0]
    assert scores["BLEU-1"].value == pytest.approx(0, abs=1e-6)


def test_undefined_is_not_zero():
    one = score({"a": "a lesion"}, {"a": ["a lesion"]})
    assert one["CIDEr"].value is None and "more than one pair" in one["CIDEr"].reason
    assert all(s.value is None for name, s in score({}, {}).items() if name != "tokenizer")


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
def test_ptb_tokens_are_those_of_pycocoevalcap(capfd):
    texts = ["The lesion, 15 mm.", "", "Naïve — café: (y) don't!", "a  b\tc", "one\r\ntwo\u2028three", "[r0] 1.5 cm"]
    ours = ptb_tokens(texts)
    assert capfd.readouterr() == ("", "")
    clean = [" ".join(text.split()) for text in texts]
    theirs = PTBTokenizer().tokenize({k: [{"caption": text}] for k, text in enumerate(clean)})
    assert ours == [theirs[k][0] for k in range(len(texts))]


def test_word_tokens():
    assert word_tokens(["The left-sided lesion, 1.5 cm.", ""]) == ["the left-sided lesion 1.5 cm", ""]


def test_without_java_the_rest_runs_and_says_so(monkeypatch, tmp_path, pairs):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = text_scores(*pairs)
    assert scores["tokenizer"] == "words"
    assert str(scores["METEOR"]) == f"undefined ({NO_JAVA})"
    assert scores["BLEU-4"].value is not None


def test_a_java_that_does_not_start_is_no_java(monkeypatch, tmp_path):
    stub = tmp_path / "java"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert not has_java()


def test_a_java_that_stops_is_said(monkeypatch, tmp_path, pairs):
    stub = tmp_path / "java"
    stub.write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr("eval.text._meteor_program", cache(_meteor_program.__wrapped__))
    assert str(score(*pairs, meteor=True)["METEOR"]).startswith("undefined (the Java program stopped")
    with pytest.raises(ScoreError, match="PTB tokenizer failed"):
        text_scores(*pairs)


def _numbered(vector):
    hypotheses = {str(k): text for k, text in enumerate(vector["hyp"])}
    return hypotheses, {str(k): texts for k, texts in enumerate(vector["refs"])}
