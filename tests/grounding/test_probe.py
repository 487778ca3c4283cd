"""The probe against detectors whose behaviour is known, and through its command on a tiny checkpoint."""

import json

import numpy as np
import pytest
import torch

from grounding import probe as program
from grounding.labels import load_label_tree
from grounding.model import MedGLIPConfig, build_model, save_checkpoint
from grounding.probe import boxes_of, other_names, probe, related, summary, table
from grounding.store import open_store
from grounding.types import RegionSet

TREE = load_label_tree()
LESION, BRAIN = "brain/lesion", "brain"
LEFT, RIGHT = "brain/insula/left_insula", "brain/insula/right_insula"


class Oracle:
    """Finds every annotated label's first box; ``wrong``: those of left and right exchanged; ``deaf``: synonyms find
    nothing."""

    tree = TREE

    def __init__(self, samples, wrong=False, deaf=False):
        self.samples, self.wrong, self.deaf = iter(samples), wrong, deaf

    def vocabulary(self):
        return [(TREE.phrase(x), x) for x in (BRAIN, LESION, LEFT, RIGHT, "chest/lung/left_lung")]

    def top_boxes(self, images, phrases):
        regions = next(self.samples).regions
        rows, queries = [], []
        for text, label in phrases:
            swapped = {LEFT: RIGHT, RIGHT: LEFT}.get(label, label) if self.wrong else label
            boxes = boxes_of(swapped, regions, TREE)
            queries.append(
                {"phrase": text, "label": label, "presence": 0.9 if len(boxes_of(label, regions, TREE)) else 0.1}
            )
            if len(boxes) and not (self.deaf and text != TREE.phrase(label)):
                rows.append((boxes[0].tolist(), label, text))
        boxes, labels, texts = zip(*rows, strict=True) if rows else ((), (), ())
        ones = np.ones(len(rows), np.float32)
        return [RegionSet(np.array(boxes), list(labels), regions.image_size, ones, None, queries, texts=list(texts))]


@pytest.fixture(scope="module")
def samples(brain_store):
    return list(open_store(brain_store))


def values(samples, **kind):
    return summary(probe(Oracle(samples, **kind), samples, 3), seed=0)


def test_a_grounder_that_follows_the_phrase(samples):
    result = values(samples)
    pair = result["swapped"]["by_pair"]["left insula / right insula"]
    assert pair["value"] == 1 and pair["n"] == sum({LEFT, RIGHT} <= set(s.regions.labels) for s in samples)
    assert result["presence"]["auroc_other_modality"]["value"] == 1  # the lung is nowhere
    assert result["presence"]["auroc_same_modality"]["value"] == 1
    assert result["presence"]["ece"]["value"] == pytest.approx(0.1)
    assert result["synonyms"]["all"]["all synonyms"]["value"] == 1
    assert {row["present"] for row in result["presence"]["reliability"]} == {0.0, 1.0}
    assert "left insula / right insula" in table(result)


def test_a_grounder_that_takes_one_side_for_the_other(samples):
    result = values(samples, wrong=True)
    assert result["swapped"]["by_pair"]["left insula / right insula"]["value"] == 0
    assert result["swapped"]["by_kind"]["siblings"]["value"] < 1
    assert result["synonyms"]["all"]["all synonyms"]["value"] == 1  # wrong alike


def test_a_grounder_that_knows_no_synonyms(samples):
    result = values(samples, deaf=True)
    assert result["synonyms"]["all"]["all synonyms"]["value"] == 0
    assert result["swapped"]["by_pair"]["left insula / right insula"]["value"] == 1


def test_which_pairs_can_be_swapped():
    assert related("chest/lung/left_lung", "chest/lung/right_lung", TREE) == "siblings"
    assert related("blood_smear/red_blood_cell", "blood_smear/platelet", TREE) == "siblings"
    assert related("chest/lung", "chest/lung/left_lung", TREE) is None  # the same box, said more narrowly
    assert related("abdomen/liver", "abdomen/kidney/kidney_tumour", TREE) == "image"
    assert related("abdomen/liver", "something else", TREE) == "image"


def test_synonyms_mean_their_label_alone():
    names = other_names(LESION, TREE, 50)
    assert names and all(TREE.find(name) == LESION for name in names)
    assert len(other_names(LESION, TREE, 3)) == 3 and other_names("free phrase", TREE, 3) == []


def test_the_command_on_a_random_checkpoint(brain_store, tmp_path, capsys):
    labels = (BRAIN, LESION, LEFT, RIGHT)
    config = MedGLIPConfig(
        trunk="tiny", image_size=64, width=32, region_width=24,
        vocabulary=labels, phrases=tuple(map(TREE.phrase, labels)),
    )  # fmt: skip
    model = build_model(config, seed=0)
    save_checkpoint(tmp_path / "grounder", model.config, model.state_dict())
    out = tmp_path / "probe"
    program.main(
        [f"checkpoint={tmp_path / 'grounder'}", f"store={brain_store}", f"out={out}", "images=6", "synonyms=2"]
    )
    assert "expected calibration error, same modality" in capsys.readouterr().out
    result = json.loads((out / "probe.json").read_text())
    assert result["images"] == 6 and 0 <= result["presence"]["ece"]["value"] <= 1
    assert result["presence"]["auroc_other_modality"]["value"] is None  # it knows one modality
    assert (out / "probe.png").stat().st_size > 5000 and (out / "run.json").exists()


def test_wrong_settings_are_one_line(tmp_path):
    with pytest.raises(SystemExit) as error:
        program.main([f"checkpoint={tmp_path}", "store=nowhere", f"out={tmp_path / 'out'}"])
    assert "nowhere: not a region store" in str(error.value) and not (tmp_path / "out").exists()


def test_overlap_must_be_with_the_own_box():
    own, other = torch.tensor([[0.0, 0.0, 0.4, 0.4]]), torch.tensor([[0.5, 0.5, 0.9, 0.9]])
    assert program._follows(torch.tensor([0.1, 0.1, 0.4, 0.4]), own, other)
    assert not program._follows(torch.tensor([0.4, 0.4, 0.8, 0.8]), own, other)
    assert not program._follows(torch.tensor([0.42, 0.0, 0.48, 0.1]), own, other)  # on neither
    assert not program._follows(None, own, other)
