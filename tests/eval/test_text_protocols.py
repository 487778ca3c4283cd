import random
from collections import Counter

import pytest

from eval.rouge import rouge, rouge_tokens
from eval.text import check_same_protocol, text_scores
from eval.tokens import R2GEN, r2gen_tokens
from eval.types import Score, ScoreError

REPORT = "1. The heart is normal.. 2. Lungs are CLEAR, 1.5 cm nodule (left-sided). 3. No effusion\nor 'edema'."


def scores(predictions, references, **options):
    return text_scores(predictions, references, **{"meteor": False, "tokenizer": None, **options})


def only_scores(result):
    return {name: value for name, value in result.items() if isinstance(value, Score)}


def test_r2gen_cleaning_by_hand():
    assert r2gen_tokens([REPORT]) == [
        "the heart is normal . lungs are clear 15 cm nodule left-sided . no effusion or edema ."
    ]
    assert r2gen_tokens(["", "  ", "a < b > c @ d = e"], "iu_xray") == [".", ".", "a b c d e ."]
    assert r2gen_tokens(["one. \n2. two"], "mimic_cxr") == ["one . two ."]
    assert r2gen_tokens(["one. \n2. two"], "iu_xray") == ["one . 2 . two ."]


@pytest.mark.parametrize("dataset", R2GEN)
def test_r2gen_cleaning_twice_is_cleaning_once(dataset):
    once = r2gen_tokens([REPORT, "no acute disease", ""], dataset)
    assert r2gen_tokens(once[:2], dataset) == once[:2]


@pytest.mark.parametrize(("dataset", "said", "true"), [("iu_xray", 60, 59), ("mimic_cxr", 100, 99)])
def test_r2gen_cuts_a_reference_one_word_shorter_than_a_prediction(dataset, said, true):
    words = [f"w{k}" for k in range(150)]

    def first(prediction_words, reference_words):
        texts = {"a": " ".join(words[:prediction_words])}, {"a": [" ".join(words[:reference_words])]}
        return scores(*texts, protocol="r2gen", dataset=dataset)["BLEU-1"].value

    assert first(150, 150) == pytest.approx(true / said)
    assert first(150, 150) == first(said, true)
    assert first(150, 150) != first(150, true - 20)


def test_the_end_of_a_long_report_counts_in_full_only():
    start = " ".join(f"w{k}" for k in range(100))
    texts = {"a": start + " normal"}, {"a": [start + " tumour"]}
    assert scores(*texts, protocol="r2gen")["ROUGE-L"].value > 0.99
    assert scores(*texts, tokenizer="words")["ROUGE-L"].value < 0.995


def test_rare_words_become_unknown_where_training_reports_are_given():
    texts = {"a": "a xylophone"}, {"a": ["a zither"]}
    known = scores(*texts, protocol="r2gen", train_reports=["a b"] * 3)
    assert known["unknown_words"] == "<unk>" and known["ROUGE-L"].value == pytest.approx(1)
    assert scores(*texts, protocol="r2gen")["ROUGE-L"].value < 1
    twice = scores(*texts, protocol="r2gen", train_reports=["a zither"] * 2 + ["a"])
    assert twice["ROUGE-L"].value == pytest.approx(1), "a word of two training reports is unknown; three are needed"


def test_a_result_names_version_and_tokens():
    texts = {"a": "x y", "b": "z"}, {"a": ["x"], "b": ["z"]}
    full, r2gen = scores(*texts, tokenizer="words"), scores(*texts, protocol="r2gen", dataset="mimic_cxr")
    assert (full["protocol"], full["version"], full["tokenizer"]) == ("full", "1", "words")
    assert (r2gen["protocol"], r2gen["tokenizer"], r2gen["dataset"]) == ("r2gen", "r2gen", "mimic_cxr")
    assert {"BLEU-4", "ROUGE-L", "CIDEr", "rouge1"} <= set(full) and "rouge1" not in r2gen


def test_protocols_never_share_a_table():
    texts = {"a": "x y", "b": "z"}, {"a": ["x"], "b": ["z"]}
    words, raw = scores(*texts, tokenizer="words"), scores(*texts, tokenizer="none")
    r2gen, longer = (scores(*texts, protocol="r2gen", dataset=name) for name in R2GEN)
    check_same_protocol({"ours": words, "theirs": words})
    check_same_protocol({})
    for a, b, why in ((words, r2gen, "protocol full and r2gen"), (words, raw, "tokenizer words and none"),
                      (r2gen, longer, "dataset iu_xray and mimic_cxr")):  # fmt: skip
        with pytest.raises(ScoreError, match=why):
            check_same_protocol({"ours": a, "theirs": b})


def test_wrong_choices_are_said():
    texts = {"a": "x"}, {"a": ["x"]}
    for options, why in (({"protocol": "r2gn"}, "unknown protocol 'r2gn'"), ({"tokenizer": "bpe"}, "unknown tokenizer"),
                         ({"protocol": "r2gen", "tokenizer": "ptb"}, "its own tokenizer"),
                         ({"protocol": "r2gen", "dataset": "padchest"}, "unknown dataset")):  # fmt: skip
        with pytest.raises(ScoreError, match=why):
            scores(*texts, **options)


def test_rouge_equals_a_restatement_on_random_pairs():
    rng = random.Random(5)
    words = ["Opacities", "the", "LEFT-sided", "1.5cm", "lesions", "lesion", "skies", "肺", "é", ".", "İ", ""]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(0, 9)))

    predictions = {f"s{k:04}": text() for k in range(1000)}
    references = {i: [text() for _ in range(rng.randint(1, 3))] for i in predictions}
    ours = rouge(predictions, references)
    for name, measure in (("rouge1", _overlap(1)), ("rouge2", _overlap(2)), ("rougeL", _subsequence)):
        expected = [
            max((measure(rouge_tokens(said), rouge_tokens(true)) for true in references[i]), key=lambda row: row[0])
            for i, said in predictions.items()
        ]
        got = [(row["value"], row["precision"], row["recall"]) for row in ours[name].per_sample]
        assert got == [pytest.approx(row, abs=1e-12) for row in expected]
        assert ours[name].value == pytest.approx(sum(row[0] for row in expected) / 1000, abs=1e-12)


def test_rouge_tokens_and_stems():
    assert rouge_tokens("The LEFT-sided, 1.5cm naïve 肺 opacities") == [
        "the", "left", "sided", "1", "5cm", "na", "ve", "opacities"]  # fmt: skip
    assert rouge_tokens("opacities dying the studies", stemmer=True) == ["opac", "die", "the", "studi"]
    texts = {"a": "small opacities"}, {"a": ["small opacity"]}
    plain, stemmed = rouge(*texts)["rouge1"], rouge(*texts, stemmer=True)["rouge1"]
    assert (plain.value, stemmed.value) == (0.5, 1.0) and plain.version != stemmed.version


def test_rouge_of_nothing_is_undefined_and_of_empty_texts_zero():
    assert all(score.value is None for score in rouge({}, {}).values())
    assert rouge({"a": ""}, {"a": [""]})["rougeL"].value == 0


def test_order_changes_nothing():
    predictions = {f"s{k}": REPORT[k:] for k in range(9)}
    references = {i: [REPORT, text[2:]] for i, text in predictions.items()}
    turned = dict(reversed(predictions.items())), dict(reversed(references.items()))
    assert rouge(predictions, references) == rouge(*turned)
    assert scores(predictions, references, protocol="r2gen") == scores(*turned, protocol="r2gen")


def _f(common, said, true):
    precision, recall = common / max(said, 1), common / max(true, 1)
    return (2 * precision * recall / (precision + recall) if common else 0.0, precision, recall)


def _overlap(n):
    def measure(said, true):
        a, b = (Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1)) for words in (said, true))
        return _f((a & b).total(), a.total(), b.total())

    return measure


def _subsequence(said, true):
    best = [0] * (len(true) + 1)
    for word in said:
        before = best
        best = [0]
        for k, other in enumerate(true):
            best.append(before[k] + 1 if word == other else max(before[k + 1], best[k]))
    return _f(best[-1], len(said), len(true))
