"""What must hold for detection whatever the weights are, shown on tiny random checkpoints made on the spot."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from grounding import detect
from grounding.boxes import pairwise_iou
from grounding.detect import Grounder, load_grounder
from grounding.images import ImageError, read_image
from grounding.labels import load_label_tree
from grounding.masks import encode_inside
from grounding.model import MedGLIPConfig, build_model, save_checkpoint
from grounding.phrases import PhraseError
from grounding.tiles import merge, whole_in, windows
from grounding.types import RegionSet

VOCABULARY = ("chest/lung/left_lung", "chest/lung/right_lung", "gastrointestinal_tract/polyp", "eye/retina/optic_disc")
PHRASES = ("left lung", "right lung", "polyp", "optic disc")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text encoder with random weights, one token a word: thousands of phrases take a moment."""
    folder = tmp_path_factory.mktemp("words")
    every = [
        *("left", "right", "lung", "polyp", "optic", "disc", "lesion"),
        *map(str, range(3000)),
    ]
    vocabulary = {word: k for k, word in enumerate(["[UNK]", "[PAD]", *every])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(words):
    return MedGLIPConfig(
        trunk="tiny", image_size=64, width=32, region_width=24, text_encoder=words, text_width=32,
        vocabulary=VOCABULARY, phrases=PHRASES, modalities=("xray", "endoscopy"),
        thresholds=dict.fromkeys(VOCABULARY, 0.06),
    )  # fmt: skip


def grounder_of(config, tmp_path, bias=-1.0):
    model = build_model(config, seed=0)
    model.bias.data[:] = bias  # of an untrained model nothing would be found
    save_checkpoint(tmp_path, model.config, model.state_dict())
    return load_grounder(tmp_path)


@pytest.fixture(scope="module")
def grounder(config, tmp_path_factory):
    return grounder_of(config, tmp_path_factory.mktemp("checkpoint"))


def picture(height=96, width=128, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def same(a: RegionSet, b: RegionSet):
    assert a.labels == b.labels and a.masks == b.masks and a.queries == b.queries
    assert np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)


def test_three_thousand_phrases_in_one_pass_in_parts_and_one_alone(config, tmp_path, monkeypatch):
    grounder = grounder_of(dataclasses.replace(config, mask_head=False), tmp_path, bias=-4.0)
    phrases = [("polyp", VOCABULARY[2]), *((f"lesion {k}", None) for k in range(2999))]
    (whole,) = grounder.detect([picture()], phrases, "endoscopy")
    assert len(whole.found.queries) == 3000 and len(set(whole.candidates.labels)) > 1000
    monkeypatch.setattr(detect, "LOGITS", 84 * 700)  # 84 locations
    (parts,) = grounder.detect([picture()], phrases, "endoscopy")
    assert parts.candidates.labels == whole.candidates.labels and parts.found.queries == whole.found.queries
    assert np.abs(parts.candidates.boxes - whole.candidates.boxes).max() < 1e-5
    assert np.abs(parts.candidates.scores - whole.candidates.scores).max() < 1e-5
    (alone,) = grounder.detect([picture()], phrases[:1], "endoscopy")
    mine = whole.candidates.select([k for k, x in enumerate(whole.candidates.labels) if x == VOCABULARY[2]])
    assert len(alone.candidates) == len(mine) > 0
    assert np.abs(alone.candidates.scores - mine.scores).max() < 1e-4


def test_an_empty_list_and_empty_phrases_are_refused(grounder):
    with pytest.raises(PhraseError, match="no phrase was given"):
        grounder.detect([picture()], [])
    with pytest.raises(PhraseError, match="no phrase was given"):
        grounder.resolve([])
    with pytest.raises(PhraseError, match="empty phrase"):
        grounder.resolve(["polyp", " "])


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((20, 30), np.nan),
        np.zeros((20, 30), np.uint16),
        np.zeros((20, 30, 4), np.uint8),
        np.zeros((0, 30), np.uint8),
        np.zeros((2, 20, 30, 3), np.uint8),
    ],
    ids=["nan", "16 bits", "alpha", "empty", "video"],
)
def test_pixels_that_are_no_8_bit_image_are_named(grounder, pixels):
    with pytest.raises(ImageError, match="image 1: .*read_image") as error:
        grounder.detect([picture(), pixels])
    assert ("not a number" in str(error.value)) == (pixels.dtype.kind == "f")


@pytest.mark.parametrize("tiles", [1, 3])
def test_deep_grey_floats_with_nan_and_one_pixel_files_are_looked_at(grounder, tmp_path, tiles):
    grey = np.random.default_rng(0).integers(0, 4000, (90, 120)).astype(np.uint16)
    holes = grey.astype(np.float32)
    holes[10:40] = np.nan
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(holes).save(tmp_path / "holes.tiff")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "one.png")
    for name, size in (("grey.png", (90, 120)), ("holes.tiff", (90, 120)), ("one.png", (1, 1))):
        (detection,) = grounder.detect([read_image(tmp_path / name).pixels], tiles=tiles)
        assert detection.candidates.image_size == size and len(detection.candidates)
        assert np.isfinite(detection.candidates.scores).all() and detection.tokens.features.isfinite().all()


def test_a_huge_image_in_tiles_stays_inside_its_frame(grounder):
    image = np.zeros((9000, 12000), np.uint8)
    image[4000:4200, 6000:6300] = 255
    (detection,) = grounder.detect([image], [("polyp", VOCABULARY[2])], "endoscopy", tiles=4)
    assert detection.candidates.image_size == (9000, 12000) and len(detection.candidates) > 6
    for box, mask in zip(detection.candidates.boxes, detection.candidates.masks, strict=True):
        x, y, w, h = rle.toBbox(mask)
        x1, y1, x2, y2 = box * [12000, 9000, 12000, 9000]
        if w and h:  # a mask may be empty
            assert x >= x1 - 1 and y >= y1 - 1 and x + w <= x2 + 1 and y + h <= y2 + 1


def test_a_tile_alone_gives_the_boxes_of_its_crop(grounder):
    """Boxes and masks of a tile are those of the crop, moved: to the last pixel."""
    image, phrases = picture(160, 160), [grounder.book.sought("polyp", VOCABULARY[2])]
    window = (40, 60, 100, 80)
    crop = image[40:140, 60:140]
    with torch.no_grad():
        _, _, (own,) = grounder._candidates([crop], phrases, ["endoscopy"])
        _, _, (moved,) = grounder._candidates([crop], phrases, ["endoscopy"], [((160, 160), window)])
    expected = (own.boxes * [80, 100, 80, 100] + [60, 40, 60, 40]) / 160
    assert np.abs(moved.boxes - expected).max() < 1e-6
    for a, b in zip(own.masks, moved.masks, strict=True):
        whole = rle.decode(b)
        assert np.array_equal(whole[40:140, 60:140], rle.decode(a)) and whole.sum() == rle.decode(a).sum()


def test_tiles_leave_presence_tokens_and_what_is_once_alone(grounder):
    (plain,), (tiled,) = (grounder.detect([picture(200, 300)], tiles=tiles) for tiles in (1, 3))
    assert tiled.found.queries == plain.found.queries
    sided = {"chest/lung/left_lung", "chest/lung/right_lung"}
    rows = [[k for k, x in enumerate(d.candidates.labels) if x in sided] for d in (plain, tiled)]
    same(plain.candidates.select(rows[0]), tiled.candidates.select(rows[1]))
    (small,), (again,) = (grounder.detect([picture(60, 60)], tiles=tiles) for tiles in (1, 3))
    same(small.candidates, again.candidates)  # no larger than the input: tiles would show nothing more


@pytest.mark.parametrize("size", [(9000, 12000), (100, 5000), (97, 131), (3000, 3000)])
@pytest.mark.parametrize("tiles", [2, 5])
def test_windows_cover_the_image_and_overlap(size, tiles):
    seen = np.zeros(size, np.uint8)
    cuts = windows(size, tiles, 64)
    for top, left, h, w in cuts:
        assert top >= 0 and left >= 0 and top + h <= size[0] and left + w <= size[1]
        seen[top : top + h, left : left + w] = 1
    assert seen.all()
    along = sorted({left if size[1] >= size[0] else top for top, left, _, _ in cuts})
    assert len(along) == tiles
    assert windows(size, 1, 64) == [] and windows((60, 50), tiles, 64) == []


def test_cut_boxes_go_and_one_thing_seen_twice_stays_once():
    size = (100, 200)

    def regions(boxes, scores):
        return RegionSet(
            np.array(boxes) / [200, 100, 200, 100], ["a"] * len(boxes), size, np.array(scores), queries=[{}]
        )

    tile = regions([[100, 20, 140, 60], [110, 30, 130, 50], [180, 80, 200, 100]], [0.9, 0.8, 0.7])
    assert whole_in(tile, (0, 100, 100, 100)).scores.tolist() == np.array([0.8, 0.7], np.float32).tolist()
    whole = regions([[111, 31, 131, 51], [10, 10, 20, 20]], [0.5, 0.4])
    merged = merge([whole, whole_in(tile, (0, 100, 100, 100))], lambda label: 10)
    assert np.allclose(merged.scores, [0.8, 0.7, 0.4]) and merged.queries == [{}]
    assert len(merge([whole, tile], lambda label: 1)) == 1


def test_places_and_superlatives_filter_candidates(grounder):
    names = ["polyp", "polyp at the bottom", "polyp in the upper left part", "largest polyp", "left-most polyp"]
    (detection,) = grounder.detect([picture()], grounder.resolve(names), "endoscopy")
    found = detection.found
    assert [query["phrase"] for query in found.queries] == names
    own = {name: found.boxes[[k for k, x in enumerate(found.texts) if x == name]] for name in names}
    assert len(own["polyp"]) > 1 and len(own["polyp at the bottom"])
    centre = (own["polyp at the bottom"][:, 1] + own["polyp at the bottom"][:, 3]) / 2
    assert (centre >= 0.5).all()
    corner = own["polyp in the upper left part"]
    assert ((corner[:, :2] + corner[:, 2:]) / 2 <= 0.5).all()
    assert len(own["largest polyp"]) == len(own["left-most polyp"]) == 1
    x = (own["polyp"][:, 0] + own["polyp"][:, 2]) / 2
    assert (own["left-most polyp"][0, 0] + own["left-most polyp"][0, 2]) / 2 == pytest.approx(x.min())
    presence = {query["phrase"]: query["presence"] for query in found.queries}
    assert presence["polyp at the bottom"] <= presence["polyp"] == presence["largest polyp"]
    (plain,) = grounder.detect([picture()], grounder.resolve(["polyp"]), "endoscopy")
    rows = [k for k, x in enumerate(found.texts) if x == "polyp"]
    assert np.abs(found.boxes[rows] - plain.found.boxes).max() < 1e-5 and plain.found.texts is None


def test_presence_of_another_modality_is_none(grounder):
    (detection,) = grounder.detect([picture()], modality="endoscopy")
    presence = {query["label"]: query["presence"] for query in detection.found.queries}
    assert presence["chest/lung/left_lung"] == 0 and presence["gastrointestinal_tract/polyp"] > 0


def test_labels_have_offsets_of_their_own_and_boxes_at_most(config, tmp_path, grounder):
    changed = dataclasses.replace(config, presence_offsets={VOCABULARY[2]: 2.0}, most_boxes={VOCABULARY[2]: 12})
    other = grounder_of(changed, tmp_path)
    before, after = (g.detect([picture()], [("polyp", VOCABULARY[2])], "endoscopy")[0] for g in (grounder, other))
    p, q = (d.found.queries[0]["presence"] for d in (before, after))
    assert np.log(q / (1 - q)) - np.log(p / (1 - p)) == pytest.approx(2, abs=0.01)
    assert len(before.candidates) == 6 < len(after.candidates) <= 12


def test_top_boxes_are_the_best_of_each_phrase(grounder):
    rows = [("polyp", VOCABULARY[2]), ("lesion 3", None)]
    (tops,) = grounder.top_boxes([picture()], rows)
    assert tops.texts == ["polyp", "lesion 3"] or tops.texts == ["lesion 3", "polyp"]
    (detection,) = grounder.detect([picture()], rows)
    for label, box in zip(tops.labels, tops.boxes, strict=True):
        best = detection.candidates.boxes[detection.candidates.labels.index(label)]
        assert pairwise_iou(torch.tensor(box)[None], torch.tensor(best)[None]) > 0.999


def test_without_a_mask_head_there_are_boxes_alone(config, tmp_path):
    (detection,) = grounder_of(dataclasses.replace(config, mask_head=False), tmp_path).detect([picture()], tiles=2)
    assert len(detection.candidates) and detection.candidates.masks is None and detection.found.masks is None


def test_a_checkpoint_of_another_tree_works_with_its_own_names(config, tmp_path, capsys):
    labels = ("thorax/ribs/left_rib", "gastrointestinal_tract/polyp")
    foreign = dataclasses.replace(config, vocabulary=labels, phrases=("left rib", "polyp"), thresholds={})
    grounder = grounder_of(foreign, tmp_path)
    line = capsys.readouterr().err.strip()
    assert "1 of 2 labels are not in this label tree" in line and "thorax/ribs/left_rib" in line and "\n" not in line
    assert grounder.resolve(["left rib", "thorax/ribs/left_rib"]) == [
        ("left rib", "thorax/ribs/left_rib"),
        ("thorax/ribs/left_rib", "thorax/ribs/left_rib"),
    ]
    (detection,) = grounder.detect([picture()])
    assert {query["label"] for query in detection.found.queries} == set(labels)
    assert set(grounder.label_table()) >= set(labels)
    assert json.dumps(detection.found.to_dict())


def test_run_lengths_join_over_full_columns():
    inside = np.ones((7, 5), bool)
    inside[3, 2] = False
    coded = rle.encode(np.asfortranarray(inside.astype(np.uint8)))
    assert encode_inside(inside, 0, 0, (7, 5))["counts"] == coded["counts"].decode()


def test_what_pixels_show_is_thinned_only_in_huge_boxes(monkeypatch):
    from grounding import masks

    logits = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = masks._sampled(logits, range(900), range(700), (900, 700))
    monkeypatch.setattr(masks, "MANY_PIXELS", 900 * 700 // 9)
    thin = masks._sampled(logits, range(900), range(700), (900, 700))
    assert thin.shape == whole.shape and (thin != whole).mean() < 0.01


def test_the_tree_is_asked_before_likeness(config, tmp_path):
    embedded = dataclasses.replace(
        config, text_encoder="embedded", text_width=384, vocabulary=(*VOCABULARY, "abdomen/kidney/kidney_tumour"),
        phrases=(*PHRASES, "kidney tumour"),
    )  # fmt: skip
    grounder = grounder_of(embedded, tmp_path)
    kidney, tree = "abdomen/kidney/kidney_tumour", load_label_tree()
    names = ["renal mass", "renal cell cancer", "largest renal neoplasm", "colon polyps", "right pulmonary field"]
    assert [label for _, label in grounder.resolve(names)] == [kidney] * 3 + [VOCABULARY[2], VOCABULARY[1]]
    assert grounder.book.sought("renal cell cancer", kidney).thing == "kidney tumour"
    assert grounder.book.sought("renal mass", kidney).thing == "renal mass"
    assert grounder.resolve(["kidney cyst"])[0][1] == tree.find(
        "kidney cyst"
    )  # its own label, not the one most like it
    ((_, label),) = grounder.resolve(["nephric mass"])
    assert label == tree.find("nephric mass")  # None as long as the tree does not have it: looked for as it stands
    for phrase in ("dog", "fracture of the femur", "spleen"):
        with pytest.raises(PhraseError, match="is unknown to this checkpoint; nearest it knows"):
            grounder.resolve([phrase])


def test_most_images_get_the_same_phrase_list(grounder, monkeypatch):
    first = grounder.detect([picture()])
    monkeypatch.setattr(grounder.encoder, "encode", lambda texts: pytest.fail("the vectors were at hand"))
    assert grounder._phrase_batch([text for text, _ in grounder.vocabulary()]) is not None
    monkeypatch.undo()
    same(first[0].candidates, grounder.detect([picture()])[0].candidates)


def test_grounder_is_what_load_grounder_makes(grounder):
    assert type(grounder) is Grounder
