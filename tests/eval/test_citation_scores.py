import json

import numpy as np
import pytest

from eval.citation_scores import cited_region_scores, drop_scores
from eval.types import plain
from grounding.labels import load_label_tree
from grounding.types import RegionSet

TREE = load_label_tree()
LEFT, RIGHT = "brain/insula/left_insula/lesion", "brain/insula/right_insula/lesion"
A, B, WIDE = [0.1, 0.1, 0.3, 0.3], [0.6, 0.1, 0.8, 0.3], [0.0, 0.0, 1.0, 1.0]
SAID = "A 10 mm lesion in the left insula."


def prediction(text, ids, regions=((A, LEFT),)):
    evidence = {"image_size": [10, 10], "regions": [{"box": box, "label": label} for box, label in regions]}
    return {"prediction": text, "sentences": [{"text": text, "region_ids": list(ids)}], "evidence": evidence}


def annotated(*rows):
    return RegionSet(np.array([box for box, _ in rows], np.float32).reshape(-1, 4), [x for _, x in rows], (10, 10))


@pytest.mark.parametrize(
    ("said", "truth", "precision", "recall"),
    [
        (prediction(SAID, [0]), annotated((A, LEFT)), 1, 1),
        (prediction(SAID, []), annotated((A, LEFT)), None, 0),
        (prediction(SAID, [0]), annotated((B, LEFT)), 0, 0),
        (prediction(SAID, [0], [(WIDE, LEFT)]), annotated((A, LEFT)), 0, 0),
        (prediction(SAID, [0]), annotated((A, RIGHT)), 0, 0),
        (prediction(SAID, [0, 5]), annotated((A, LEFT), (B, RIGHT)), 0.5, 0.5),
        (prediction("The brain is normal.", [0]), annotated((A, LEFT)), 0, 0),
        (prediction(SAID, [0]), annotated((A, "brain/insula/left_insula")), 0, None),  # a place is no finding
        (prediction(SAID, [0]), annotated(), 0, None),
    ],
)
def test_citations_against_annotated_regions(said, truth, precision, recall):
    scores = cited_region_scores({"s": said}, {"s": truth}, tree=TREE)
    assert (scores["precision"].value, scores["recall"].value) == (precision, recall)
    json.dumps(plain(scores), allow_nan=False)


def line(rests_on, drops, sample="a", found=()):
    rows = [{"region": k, "drop": drop, "found": k not in found} for k, drop in enumerate(drops)]
    return {
        "sample_id": sample,
        "sentence": 0,
        "rests_on": list(rests_on),
        "drops": rows,
        "drop": sum(drops[k] for k in rests_on),
    }


def test_drops_of_cited_and_of_other_regions():
    rows = [line([0], [2.0, 0.5, 0.1]), line([1], [1.0, 0.4, 9.0], "b", found=(2,)), line([], [5.0]), line([0], [3.0])]
    scores = drop_scores([*rows, {"sample_id": "c", "sentence": 1, "rests_on": [0]}])
    values = {name: score.value for name, score in scores.items()}
    assert values == pytest.approx(
        {
            "cited": (2 + 0.4 + 3) / 3,
            "cited region": (2 + 0.4 + 3) / 3,
            "other region": (0.3 + 1.0) / 2,  # what was looked for and not found is no region
            "cited first": 0.5,
            "cited first by chance": (1 / 3 + 1 / 2) / 2,
        }
    )
    assert scores["cited first"].n == 2


def test_without_scored_sentences_there_is_no_score():
    scores = drop_scores([line([], [1.0])])
    assert {score.value for score in scores.values()} == {None}
    assert scores["cited"].reason == "no sentence that rests on a region"
