from collections import defaultdict

import pytest
from pydicom.sr._concepts_dict import concepts

from configs import ConfigError
from grounding.labels import load_label_tree, normalise, parse_side, split_negation

LEFT = "brain/frontal_lobe/left_frontal_lobe"
MODALITIES = {"xray", "ct", "mri", "ultrasound", "fundus", "endoscopy", "dermoscopy", "microscopy"}
# What data sets annotate, in their own words: (modality, the body regions that these must lead to, words).
DATA_SETS = {
    "chestx-det": (
        "xray",
        "chest",
        "Atelectasis, Calcification, Cardiomegaly, Consolidation, Diffuse Nodule, Effusion, Emphysema, Fibrosis, "
        "Fracture, Mass, Nodule, Pleural Thickening, Pneumothorax",
    ),
    "cxr-lungboxes": ("xray", "chest", "Right Lung, Left Lung"),
    "covid-19 structures": (
        "xray",
        "chest",
        "Left Lung, Right Lung, Cardiomediastinum, Airways, Ground Glass Opacities, Consolidation, Pleural "
        "Effusion, Pneumothorax, Endotracheal Tube, Central Venous Line, Monitoring Probes, Chest Tube, Tubings",
    ),
    "nih": ("xray", "chest", "Atelectasis, Cardiomegaly, Effusion, Infiltrate, Mass, Nodule, Pneumonia, Pneumothorax"),
    "vindr-cxr": (
        "xray",
        "chest",
        "Aortic enlargement, Atelectasis, Calcification, Cardiomegaly, Clavicle fracture, Consolidation, Edema, "
        "Emphysema, Enlarged PA, ILD, Infiltration, Lung cavity, Lung cyst, Lung Opacity, Mediastinal shift, "
        "Nodule/Mass, Pulmonary fibrosis, Pneumothorax, Pleural thickening, Pleural effusion, Rib fracture, Other "
        "lesion",
    ),
    "chexpert": (
        "xray",
        "chest",
        "Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema, Consolidation, Pneumonia, "
        "Atelectasis, Pneumothorax, Pleural Effusion, Pleural Other, Fracture, Support Devices",
    ),
    "padchest-gr": (
        "xray",
        "chest musculoskeletal",
        "aortic elongation, aortic atheromatosis, interstitial pattern, hilar enlargement, costophrenic angle "
        "blunting, hemidiaphragm elevation, hiatal hernia, NSG tube, pacemaker, scoliosis, air trapping, "
        "bronchiectasis, granuloma",
    ),
    "btcv and amos": (
        "ct",
        "abdomen pelvis chest gastrointestinal_tract",
        "spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, aorta, postcava, inferior vena "
        "cava, portal vein and splenic vein, pancreas, right adrenal gland, left adrenal gland, duodenum, bladder, "
        "prostate/uterus",
    ),
    "curvas-ct": ("ct", "abdomen", "liver, kidney, pancreas"),
    "kits and lits": ("ct", "abdomen", "kidney, kidney tumor, kidney cyst, liver, liver tumor"),
    "msd": (
        "ct",
        "abdomen chest gastrointestinal_tract",
        "lung cancer, pancreatic tumour, colon cancer, hepatic vessel, liver tumour",
    ),
    "totalsegmentator": (
        "ct",
        "musculoskeletal chest gastrointestinal_tract neck brain",
        "left hip bone, right femur, sacrum, vertebrae, left rib, right clavicle, left scapula, sternum, trachea, "
        "colon, small bowel, right lung middle lobe, left lung upper lobe, thyroid gland, spinal cord, left atrium, "
        "brain",
    ),
    "bhsd-ct": (
        "ct",
        "brain",
        "epidural haemorrhage, intraparenchymal haemorrhage, intraventricular haemorrhage, subarachnoid "
        "haemorrhage, subdural haemorrhage, EDH, IPH, IVH, SAH, SDH",
    ),
    "lgg-mri and brats": (
        "mri",
        "brain",
        "FLAIR abnormality, glioma, edema, enhancing tumor, necrotic core, non-enhancing tumor, whole tumor, "
        "lesion, mass",
    ),
    "prostate mri": ("mri", "pelvis", "prostate peripheral zone, prostate transition zone, prostate lesion"),
    "busi": ("ultrasound", "breast", "breast lesion, benign breast lesion, malignant breast lesion"),
    "liver-us": ("ultrasound", "abdomen", "liver, liver mass, benign liver mass, malignant liver mass"),
    "tn3k and hc18": ("ultrasound", "neck fetus", "thyroid nodule, nodule, fetal head"),
    "idrid and refuge": (
        "fundus",
        "eye",
        "Microaneurysms, Haemorrhages, Hard Exudates, Soft Exudates, Optic Disc, optic cup, macula, retinal vessels",
    ),
    "kvasir": (
        "endoscopy",
        "gastrointestinal_tract",
        "polyp, polyps, esophagitis, ulcerative colitis, z-line, pylorus, cecum, dyed lifted polyps, dyed resection "
        "margins, instrument, ulcer, bleeding",
    ),
    "isic and ph2": (
        "dermoscopy",
        "skin",
        "skin lesion, lesion, melanoma, nevus, atypical nevus, seborrheic keratosis, basal cell carcinoma, actinic "
        "keratosis, dermatofibroma, vascular lesion, pigment network, negative network, streaks, milia-like cyst, "
        "globules",
    ),
    "bccd": ("microscopy", "blood_smear", "RBC, WBC, Platelets, red blood cell, white blood cell, platelet"),
    "nuclei": ("microscopy", "histology", "nuclei, neoplastic cells, inflammatory cells, gland, mitotic figure"),
}


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
        ("left lung consolidation", "chest/lung/left_lung/consolidation"),
        ("nodule in the right upper lobe", "chest/lung/right_lung/right_upper_lobe/nodule"),
        ("pulmonary nodule", "chest/lung/nodule"),
        ("left pneumothorax", "chest/pleura/left_pleura/pneumothorax"),
        ("lungs", "chest/lung"),
        ("innominate vein", None),
    ],
)
def test_find_by_name_synonym_or_path(tree, phrase, id):
    assert tree.find(phrase) == id


def test_the_tree_is_of_the_size_that_was_asked_for(tree):
    """Regions, classes (organs, structures and findings, both sides as one) and labels of Med-GLIP at least; and no
    more than can be looked through."""
    classes = {
        tree.nodes[id].finding or id.rpartition("/")[2].removeprefix(f"{tree.laterality(id)}_") for id in tree.ids
    }
    assert len({id.split("/")[0] for id in tree.ids}) >= 6 and len(classes) >= 38
    assert 198 <= len(tree.ids) <= 450
    for modality in MODALITIES:
        places = [id for id in tree.ids if modality in tree.modalities(id) and not tree.is_finding(id)]
        assert places and any(modality in tree.modalities(id) for id in set(tree.ids) - set(places)), modality


def test_a_label_occurs_in_modalities_of_its_place(tree):
    for id in tree.ids:
        assert tree.modalities(id) and set(tree.modalities(id)) <= MODALITIES, id
        if tree.is_finding(id):
            assert set(tree.modalities(id)) <= set(tree.modalities(tree.parent(id))), id


def test_every_label_is_found_by_its_own_phrase_and_synonyms(tree):
    """Only a finding said alone ("lesion", "left mass") may be that of several labels. Then a modality decides, or
    `alone`, or nothing does."""
    named = defaultdict(set)
    for id in tree.ids:
        assert tree.find(tree.phrase(id)) == id
        for name in tree.synonyms(id):
            named[normalise(name)].add(id)
    for name, ids in named.items():
        if len(ids) == 1:
            assert tree.find(name) in ids
            continue
        for id in ids:
            assert name.removeprefix(f"{tree.laterality(id)} ") in map(normalise, tree.nodes[id].said), (id, name)
        assert all(tree.find(name, modality=x) in {None, *ids} for x in (None, *MODALITIES)), name


def test_findings_and_places_have_different_names(tree):
    """Scores are told by the key of a finding: it must not read as a place."""
    places = {
        normalise(name) for id in tree.ids if not tree.is_finding(id) for name in (tree.phrase(id), *tree.synonyms(id))
    }
    assert not places & {node.finding.replace("_", " ") for node in tree.nodes.values() if node.finding}


def test_both_sides_are_there(tree):
    one_sided = "right_middle_lobe"
    for id in tree.ids:
        side = tree.laterality(id)
        if side and one_sided not in id:
            mirrored = id.replace(f"/{side}_", "/right_" if side == "left" else "/left_")
            assert mirrored in tree.ids and tree.laterality(mirrored) not in (None, side)
            assert tree.phrase(id).startswith(side) or f" {side} " in tree.phrase(id)
    assert sum(one_sided in id for id in tree.ids) > 1


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_words_of_real_data_sets_resolve(tree, data_set):
    modality, regions, words = DATA_SETS[data_set]
    for word in words.split(", "):
        id = tree.find(word, modality=modality)
        assert id is not None, word
        assert id.split("/")[0] in regions.split() and modality in tree.modalities(id), (word, id)


@pytest.mark.parametrize(
    ("phrase", "modality", "id"),
    [
        ("edema", "mri", "brain/peritumoral_oedema"),
        ("edema", "xray", "chest/pulmonary_oedema"),
        ("haemorrhage", "ct", "brain/intracranial_haemorrhage"),
        ("haemorrhage", "fundus", "eye/retina/retinal_haemorrhage"),
        ("haemorrhage", "endoscopy", "gastrointestinal_tract/gastrointestinal_bleeding"),
        ("haemorrhage", None, None),
        ("lesion", "mri", "brain/lesion"),
        ("lesion", "dermoscopy", "skin/skin_lesion"),
        ("lesion", "ct", None),
        ("mass", "mri", "brain/lesion"),
        ("mass", "xray", "chest/lung/mass"),
        ("mass", None, "chest/lung/mass"),
        ("nodule", "ultrasound", "neck/thyroid/thyroid_nodule"),
        ("nodule", None, "chest/lung/nodule"),
        ("tumour", "mri", None),
        ("abnormality", None, "brain/lesion"),
        ("abnormality", "xray", None),
        ("brain lesion", "ct", "brain/lesion"),
        ("liver", "endoscopy", "abdomen/liver"),
    ],
)
def test_modality_tells_findings_apart(tree, phrase, modality, id):
    assert tree.find(phrase, modality=modality) == id


def test_unknown_names_get_suggestions_and_unknown_ids_raise(tree):
    assert "left frontal lobe" in tree.closest("left fronal lobe")
    with pytest.raises(KeyError):
        tree.phrase("brain/spleen")


def test_codes_are_in_the_dicom_dictionary_and_mean_the_label(tree):
    """The dictionary's text shares a word with a name of the label ("Structure of putamen", "Tumor")."""
    meanings: dict[str, str] = {}
    for scheme, names in concepts.items():
        for values in names.values():
            for value, (meaning, _) in values.items():
                meanings[f"{scheme}:{value}"] = f"{meanings.get(f'{scheme}:{value}', '')} {normalise(meaning)}"
    coded = [id for id in tree.ids if tree.code(id)]
    assert len(coded) > len(tree.ids) / 3
    for id in coded:
        words = {
            word
            for name in (tree.phrase(id), *tree.synonyms(id), *tree.nodes[id].said)
            for word in normalise(name).split()
        }
        words -= {"left", "right", "of", "in", "structure", "body", "and"}
        meant = set(meanings[tree.code(id)].split())
        assert {word.rstrip("s") for word in words} & {word.rstrip("s") for word in meant}, (id, tree.code(id))


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
    assert "chest/lung/fracture" not in tree.ids and tree.find("nodule") == "chest/lung/nodule"


def test_findings_of_a_place_alone_and_parts_of_one_side(tmp_path):
    path = tmp_path / "labels.yaml"
    path.write_text(
        "alone: {Cyst: [liver/cyst]}\n"
        "findings:\n"
        "  oedema: {name: pulmonary oedema, synonyms: [oedema], says_place: true}\n"
        "  cyst: {code: 'SCT:367643001'}\n"
        "places:\n"
        "  lung:\n    sided: true\n    plural: lungs\n    adjective: pulmonary\n    modalities: [xray, ct]\n"
        "    findings: {cyst: [ct]}\n    local_findings: [oedema]\n"
        "    parts: {middle_lobe: {side: right}, zone: {modalities: [xray]}}\n"
        "  liver: {modalities: [ct, mri], findings: [cyst]}\n"
    )
    tree = load_label_tree(path)
    assert tree.children("lung/right_lung") == [
        *(
            "lung/right_lung/cyst",
            "lung/right_lung/oedema",
            "lung/right_lung/right_middle_lobe",
            "lung/right_lung/right_zone",
        )
    ]
    assert "lung/left_lung/left_middle_lobe" not in tree.ids
    assert "lung/right_lung/right_zone/cyst" not in tree.ids  # not seen in X-ray
    assert [id for id in tree.ids if id.endswith("oedema")] == [
        "lung/oedema",
        "lung/left_lung/oedema",
        "lung/right_lung/oedema",
    ]
    assert tree.phrase("lung/left_lung/oedema") == "left pulmonary oedema"
    assert tree.find("both lungs") == "lung" and tree.find("left pulmonary cyst") == "lung/left_lung/cyst"
    assert tree.find("cyst") == tree.find("cyst", modality="ct") == tree.find("cyst", modality="mri") == "liver/cyst"
    assert tree.find("cyst", modality="xray") is None and tree.find("oedema", modality="mri") == "lung/oedema"


@pytest.mark.parametrize(
    "text",
    [
        "places: {brain: {sides: true}}",
        "places: {brain: {findings: [tumour]}}",
        "findings: {tumour: }\nplaces: {brain: {modalities: [ct], findings: {tumour: [mri]}}}",
        "findings: {tumour: }\nplaces: {brain: {findings: [tumour], modalities: [ct], parts: {tumour: }}}",
        "findings: {tumour: }\nplaces: {brain: {findings: [tumour], modalities: [ct]}}\nalone: {sides: [brain/tumour]}",
    ],
)
def test_bad_tree_names_file_and_place(tmp_path, text):
    path = tmp_path / "labels.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"labels\.yaml.*brain.*(sides|tumour)"):
        load_label_tree(path)


def test_normalise_spells_out_sides_and_drops_articles():
    assert normalise("The Lt. Frontal-Lobe") == "left frontal lobe"
