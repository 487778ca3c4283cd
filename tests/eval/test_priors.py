import json
import random
from pathlib import Path

import pytest

from eval.priors import answer_prior, text_only_baseline

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def row(k, question, answer, kind="open", **columns):
    return {"sample_id": f"s{k}", "question": question, "answer": answer, "answer_type": kind, **columns}


TRAIN = [
    *[row(k, f"is there a {word}?", "no", "closed") for k, word in enumerate(("mass", "nodule", "cyst"))],
    *[row(k, "is the heart large?", "yes", "closed") for k in range(3, 5)],
    *[row(k, "which organ is shown?", "lung") for k in range(5, 7)],
]


def test_the_commonest_answer_by_kind():
    test = [row(1, "?", "no", "closed"), row(2, "?", "yes", "closed"), row(3, "?", "lung"), row(4, "?", "liver")]
    scores = answer_prior(test, TRAIN)
    assert scores["always"].value == 0.25 and scores["always"].name == "commonest training answer (no)"
    assert scores["by_answer_type"].value == 0.5
    assert (scores["closed"].value, scores["open"].value, scores["open"].n) == (0.5, 0.5, 2)


def test_counted_in_the_test_itself_it_is_the_highest_that_one_answer_reaches():
    rng = random.Random(0)
    test = [row(k, "?", rng.choice(("yes", "no", "lung"))) for k in range(200)]
    itself = answer_prior(test)["always"]
    assert "test" in itself.name
    for answer in ("yes", "no", "lung"):
        assert itself.value >= answer_prior(test, [row(0, "?", answer)])["always"].value


def test_a_kind_that_training_lacks_gets_the_commonest_of_all():
    train = [row(1, "?", "no", question_type="presence"), row(2, "?", "no", question_type="presence")]
    assert answer_prior([row(3, "?", "no", question_type="size")], train)["by_question_type"].value == 1.0


def test_question_text_alone_answers_what_it_gives_away():
    test = [
        row(1, "Is there a  fracture?", "no", "closed"),
        row(2, "is the heart large?", "yes", "closed"),
        row(3, "which organ is shown here", "lung"),
        row(4, "quelle couleur", "no"),
    ]
    scores = text_only_baseline(TRAIN, test)
    assert (scores["overall"].value, scores["closed"].n, scores["open"].n) == (1.0, 2, 2)
    assert scores["seen"].value == 0.25


def test_order_changes_nothing():
    rng = random.Random(1)
    words = ("is", "the", "there", "a", "mass", "lung", "heart", "left", "large", "what", "where")
    rows = [row(k, " ".join(rng.choices(words, k=4)), rng.choice(("yes", "no", "lung"))) for k in range(400)]
    train, test = rows[:300], rows[300:]
    once = text_only_baseline(train, test)
    assert once == text_only_baseline(rng.sample(train, 300), rng.sample(test, 100))
    assert answer_prior(test, train) == answer_prior(rng.sample(test, 100), rng.sample(train, 300))


def test_nothing_to_learn_from_is_undefined():
    scores = text_only_baseline([], [row(1, "?", "yes")]) | answer_prior([row(1, "?", "yes")], [])
    assert {score.value for score in scores.values()} == {None}
    assert all(score.reason for score in scores.values())
    assert answer_prior([])["always"].value is None


def test_nulls_and_numbers():
    train = [row(1, None, 2), row(2, "how many?", 2), row(3, "?", None)]
    test = [row(4, "how many?", 2), row(5, 7, None), row(6, "x" * 1_000_000, "2")]
    assert text_only_baseline(train, test)["overall"].value == 1.0
    assert answer_prior(test, train)["always"].n == 2


def slake(name: str) -> list[dict]:
    path = DATA / f"slake-json/Slake1.0/{name}.json"
    if not path.exists():
        pytest.skip("no ../shared/data/slake-json")
    return [{**r, "sample_id": r["qid"]} for r in json.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_slake_without_its_images(language):
    """Much of SLAKE is answered by the question alone, in both languages: more than by the commonest answer."""
    train, test = ([r for r in slake(name) if r["q_lang"] == language] for name in ("train", "test"))
    text, prior = text_only_baseline(train, test), answer_prior(test, train)
    assert prior["always"].value < prior["by_question_type"].value < text["overall"].value < 0.9
    assert text["seen"].value > 0.4
