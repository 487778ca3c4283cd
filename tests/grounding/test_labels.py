import pytest
from pydicom.sr._concepts_dict import concepts

from configs import ConfigError
from grounding.labels import load_label_tree, normalise, parse_side, split_negation

LEFT = "brain/frontal_lobe/left_frontal_lobe"


@pytest.fixture(scope="module")
def tree():
    return load_label_tree()


@pytest.mark.parametrize(
    ("phrase", "side"),
    [
        ("left temporal lobe", -1),
        ("Right-sided lesion", 1),
        ("lesion in the LT. thalamus", -1),
        ("left and right lung", 0),
        ("brain", 0),
        ("bright cleft leftover", 0),
    ],
)
def test_side_is_read_from_whole_words(phrase, side):
    assert parse_side(phrase) == side


@pytest.mark.parametrize(
    ("phrase", "rest"),
    [
        ("no lesion", "lesion"),
        ("No lesions are seen.", "lesions"),
        ("There is no evidence of a lesion in the left thalamus", "a lesion in the left thalamus"),
        ("without any lesion", "lesion"),
        ("absence of lesion", "lesion"),
        ("left temporal lobe without lesion", "left temporal lobe lesion"),
        ("lesion is not seen", "lesion"),
    ],
)
def test_negation_is_taken_out(phrase, rest):
    assert split_negation(phrase) == (rest, True)


@pytest.mark.parametrize(
    "phrase", ["nodule", "normal brain", "abnormal knot", "notch", "denote", "no", "innominate vein"]
)
def test_negation_needs_a_whole_word_and_something_negated(phrase):
    assert split_negation(phrase) == (phrase, False)


def test_ids_of_the_brain_set(tree):
    for id in ("brain", "brain/lesion", "brain/frontal_lobe", "brain/frontal_lobe/lesion", LEFT, f"{LEFT}/lesion"):
        assert id in tree.ids
    assert tree.phrase(f"{LEFT}/lesion") == "left frontal lobe lesion"
    assert tree.modalities(f"{LEFT}/lesion") == ("mri",)
    assert tree.laterality(LEFT) == tree.laterality(f"{LEFT}/lesion") == "left"
    assert tree.laterality("brain/frontal_lobe") is None
    assert tree.is_finding("brain/lesion") and not tree.is_finding(LEFT)


def test_path_relations(tree):
    assert tree.parent("brain") is None
    assert tree.parent(f"{LEFT}/lesion") == LEFT
    assert tree.ancestors(f"{LEFT}/lesion") == [LEFT, "brain/frontal_lobe", "brain"]
    assert LEFT in tree.children("brain/frontal_lobe")
    assert all(parent in tree.ids for id in tree.ids for parent in tree.ancestors(id))


def test_broader_labels_hold_for_the_same_region(tree):
    assert tree.broader(f"{LEFT}/lesion") == ["brain/frontal_lobe/lesion", "brain/lesion"]
    assert tree.broader(LEFT) == ["brain/frontal_lobe"]
    assert tree.broader("brain/frontal_lobe") == tree.broader("brain/lesion") == []


@pytest.mark.parametrize(
    ("phrase", "id"),
    [
        (LEFT, LEFT),
        ("Left Frontal Lobe", LEFT),
        ("the lt. frontal region", LEFT),
        ("lesion in the left frontal lobe", f"{LEFT}/lesion"),
        ("left_frontal_lobe mass", f"{LEFT}/lesion"),
        ("lesion", "brain/lesion"),
        ("caudate nucleus", "brain/caudate"),
        ("kidney", None),
    ],
)
def test_find_by_name_synonym_or_path(tree, phrase, id):
    assert tree.find(phrase) == id


def test_every_label_is_found_by_its_own_phrase_and_synonyms(tree):
    for id in tree.ids:
        assert all(tree.find(name) == id for name in (tree.phrase(id), *tree.synonyms(id))), id


def test_unknown_names_get_suggestions_and_unknown_ids_raise(tree):
    assert "left frontal lobe" in tree.closest("left fronal lobe")
    with pytest.raises(KeyError):
        tree.phrase("brain/spleen")


def test_codes_are_in_the_dicom_dictionary(tree):
    known = {f"{scheme}:{value}" for scheme, names in concepts.items() for values in names.values() for value in values}
    codes = {tree.code(id) for id in tree.ids} - {None}
    assert codes and codes <= known


def test_another_tree_with_parts_below_a_sided_place(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text(
        "findings: {nodule: {synonyms: [coin lesion]}, fracture: }\n"
        "places:\n"
        "  chest:\n    modalities: [xray, ct]\n    parts:\n"
        "      lung: {sided: true, findings: [nodule], parts: {upper_lobe: {modalities: [ct]}}}\n"
        "      rib: {findings: [fracture]}\n"
    )
    tree = load_label_tree(path)
    lobe = "chest/lung/left_lung/left_upper_lobe"
    assert tree.find("nodule in the left upper lobe") == tree.find("left upper lobe coin lesion") == f"{lobe}/nodule"
    assert tree.modalities(f"{lobe}/nodule") == ("ct",) and tree.modalities("chest/rib/fracture") == ("xray", "ct")
    assert tree.broader(f"{lobe}/nodule") == ["chest/lung/left_lung/nodule", "chest/lung/nodule"]
    assert "chest/lung/fracture" not in tree.ids and tree.find("nodule") is None


@pytest.mark.parametrize("text", ["places: {brain: {sides: true}}", "places: {brain: {findings: [tumour]}}"])
def test_bad_tree_names_file_and_place(tmp_path, text):
    path = tmp_path / "labels.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.yaml.*brain.*(sides|tumour)"):
        load_label_tree(path)


def test_normalise_spells_out_sides_and_drops_articles():
    assert normalise("The Lt. Frontal-Lobe") == "left frontal lobe"
