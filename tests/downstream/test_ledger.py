"""Citations of answers, and what a sentence rests on, read from text and labels alone."""

import numpy as np
import pytest
import torch

from downstream.citations import (
    cite_answer,
    sentence_of_characters,
    split_answer,
    split_report,
    supporting,
    with_masks,
)
from downstream.ledger import answer_with_support, sentences_with_support
from grounding.labels import load_label_tree
from grounding.types import NOT_FOUND_LEVEL, RegionSet, RegionTokens

TREE = load_label_tree()
LEFT, RIGHT = "brain/insula/left_insula/lesion", "brain/insula/right_insula/lesion"
THALAMUS = "brain/thalamus/right_thalamus/lesion"
PLACE = "brain/insula/left_insula"


def tokens(labels: list[str], missing: int = 0) -> RegionTokens:
    """The slots of a prompt; the last `missing` were looked for and not found."""
    n = len(labels)
    return RegionTokens(
        features=torch.zeros(1, n, 8),
        boxes=torch.zeros(1, n, 4),
        scores=torch.ones(1, n),
        labels=[list(labels)],
        label_vectors=torch.zeros(1, n, 12),
        levels=torch.where(torch.arange(n) < n - missing, 0, NOT_FOUND_LEVEL)[None],
        valid=torch.ones(1, n, dtype=torch.bool),
        queries=[[]],
    )


@pytest.mark.parametrize(
    ("question", "answer", "labels", "expected"),
    [
        ("Is there a lesion?", "yes", [LEFT, PLACE, RIGHT], [0, 2]),
        ("Is there a lesion?", "no", [LEFT], []),
        ("Where is the lesion?", "left insula", [RIGHT, LEFT, PLACE], [1]),
        ("Where is the lesion?", "left insula", [THALAMUS], []),
        ("Does the insula contain a lesion?", "yes", [THALAMUS, RIGHT], [1]),
        ("Which structure contains the largest lesion?", "right thalamus", [THALAMUS, RIGHT, THALAMUS], [0]),
        ("Is the lesion on the left or on the right?", "right", [LEFT, RIGHT, THALAMUS], [1, 2]),
        ("How many lesions are there?", "0", [LEFT], []),
        ("Is the left insula shown?", "yes", [LEFT, PLACE], [1]),
        ("What is the weather?", "fine", [LEFT], []),
        ("Where is it?", "left", ["a free phrase"], []),
    ],
)
def test_which_regions_support_an_answer(question, answer, labels, expected):
    assert supporting(question, answer, labels, TREE, "mri") == expected


def test_answers_are_marked_for_training_and_read_back():
    slots = tokens([RIGHT, LEFT, PLACE, THALAMUS], missing=1)
    assert cite_answer("left insula.", "Where is the lesion?", slots, TREE) == "left insula [r1]."
    assert cite_answer("right thalamus", "Where is the lesion?", slots, TREE) == "right thalamus"  # it was not found
    assert split_answer("left insula [r1] [r3].", slots) == (
        "left insula.",
        [{"text": "left insula.", "region_ids": [1], "dropped": 1}],
    )
    assert split_answer("yes", slots) == ("yes", None)


@pytest.mark.parametrize(
    "text",
    [
        "Findings: A lesion in the left insula [r0]. Another [r1] one [r0]. Impression: Two lesions.",
        "A lesion. [r0] [r1]",
        "[r0]",
        "No end",
        "A lesion [r7].  Two!",
    ],
)
def test_each_character_of_a_report_belongs_to_its_sentence(text):
    text, sentences = split_report(text, tokens([LEFT, RIGHT]))
    owners = sentence_of_characters(text)
    said = ["".join(c for c, o in zip(text, owners, strict=True) if o == n) for n in range(max(owners, default=-1) + 1)]
    assert said == [sentence["text"] for sentence in sentences if sentence["text"].strip()]


EVIDENCE = {
    "regions": [
        {"box": [0.1, 0.1, 0.2, 0.2], "label": LEFT, "score": 0.9},
        {"box": [0.6, 0.1, 0.7, 0.2], "label": RIGHT, "score": 0.8},
    ]
}
QUERIES = [
    {"phrase": "lesion", "label": "brain/lesion", "presence": 0.03},
    {"phrase": "insula", "label": "brain/insula", "presence": 1.0},
]


def supports(text: str, queries=QUERIES) -> list[dict]:
    return sentences_with_support(split_report(text, tokens([LEFT, RIGHT]))[1], EVIDENCE, queries, TREE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A lesion in the left insula [r0].", ["cited"]),
        ("A lesion in the left insula [r9].", ["uncited"]),
        ("A lesion in the left insula [r1]. Impression: A lesion in the left insula.", ["disagrees", "uncited"]),
        ("A lesion in the left insula [r1] [r0].", ["cited"]),
        ("As shown here [r1].", ["cited"]),
        ("A lesion in the left insula [r0]. Impression: Single lesion in the left insula.", ["cited", "repeated"]),
        ("A lesion in the left insula [r0]. A lesion in the right insula.", ["cited", "uncited"]),
        (
            "A lesion in the left insula [r0]. Lesions in the left insula and right insula.",
            ["cited", "uncited"],
        ),
        ("No lesion is seen.", ["absent"]),
        ("No haemorrhage is seen.", ["uncited"]),
        ("The brain is symmetrical. Normal study.", ["no finding", "no finding"]),
        ("", []),
    ],
)
def test_each_sentence_is_borne_out_or_marked(text, expected):
    assert [row["support"] for row in supports(text)] == expected


def test_the_ledger_goes_from_sentence_to_phrase_to_region():
    first, last = supports("A lesion in the left insula [r0] [r1]. Impression: One lesion in the left insula.")
    assert first["rests_on"] == last["rests_on"] == [0, 1] and first["states"] == ["lesion, left insula"]
    assert first["regions"][0]["agrees"]
    assert first["regions"][1] == {
        "region": 1,
        "phrase": "right insula lesion",
        "label": RIGHT,
        "box": [0.6, 0.1, 0.7, 0.2],
        "score": 0.8,
        "agrees": False,  # it is the other side's
    }
    (absent,) = supports("No lesion is seen.")
    assert absent["looked_for"] == [QUERIES[0]] and absent["regions"] == []


def test_an_answer_rests_on_what_it_cites_or_names():
    def support(question, answer, sentences=None, queries=QUERIES[:1]):
        row = answer_with_support(question, answer, sentences, EVIDENCE, queries, TREE, "mri")
        return row["support"], row["rests_on"]

    cited = [{"text": "yes", "region_ids": [1], "dropped": 0}]
    assert support("Is there a lesion?", "yes", cited) == ("cited", [1])
    assert support("Where is the lesion?", "left insula") == ("named", [0])
    assert support("Is there a lesion in the right thalamus?", "no") == ("absent", [])
    assert support("Is there a lesion in the right thalamus?", "yes") == ("uncited", [])
    assert support("Is there a lesion?", "no") == ("uncited", [])  # two are in the prompt


def test_evidence_gets_the_masks_of_the_same_regions():
    def regions(boxes, labels, masks=None):
        return RegionSet(np.array(boxes, np.float32), labels, (10, 10), masks=masks)

    a, b = [0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]
    mask = {"size": [10, 10], "counts": "abc"}
    found = regions([b, a, a], [RIGHT, PLACE, LEFT], [None, {"size": [10, 10], "counts": "other"}, mask])
    assert with_masks(regions([a, b], [LEFT, RIGHT]), found).masks == [mask, None]
    assert with_masks(regions([b], [LEFT]), found).masks is None
