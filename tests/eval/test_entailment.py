import pytest

from eval.entailment import rule_entailment

ENTAILS = rule_entailment()


@pytest.mark.parametrize(
    ("hypothesis", "evidence"),
    [
        ("Heart size is normal for this projection.", "The heart size is normal."),
        ("Normal cardiac silhouette.", "The heart is not enlarged."),
        ("The heart is unremarkable.", "The heart, lungs and mediastinum are normal."),
        ("The heart is unremarkable.", "Cardiomediastinal silhouette is within normal limits."),
        ("The left lung is clear.", "The lungs are clear."),
        ("Lungs are clear.", "The lungs are well expanded and clear."),
        ("No fractures are noted.", "There is no osseous abnormality."),
        ("No focal opacity.", "Lungs are clear."),
        ("No effusions.", "There is no pleural effusion."),
        ("No pneumothoraces.", "No pneumothorax is seen."),
        ("There is no rib fracture on the left.", "No fracture."),
        ("No displaced fracture.", "No fracture."),
        ("Lungs are free of acute infiltrates.", "The lungs are free of active infiltrate or mass."),
        ("Left pleural effusion.", "There are small bilateral pleural effusions."),
        ("Opacity in the right lung.", "Right middle lobe consolidation."),
        ("There is a lesion in the brain.", "A 10 mm lesion in the left temporal lobe."),
        ("A trace effusion.", "Small effusion on the right."),
        ("Fracture of the 6th rib.", "Sixth and seventh rib fractures."),
        ("The trachea is midline.", "Trachea is midline."),
    ],
)
def test_entailed(hypothesis, evidence):
    assert ENTAILS(hypothesis, [evidence])


@pytest.mark.parametrize(
    ("hypothesis", "evidence"),
    [
        ("Normal heart size.", "An enlarged heart."),
        ("There is a pleural effusion.", "There is no pleural effusion."),
        ("No pleural effusion.", "Small effusion."),
        ("There is a left pleural effusion.", "There is a right pleural effusion."),
        ("Small bilateral pleural effusions.", "Small left pleural effusion."),
        ("A moderate left pleural effusion.", "There are small bilateral pleural effusions."),
        ("A left temporal lobe lesion.", "A lesion in the brain."),
        ("Right 8th rib fracture.", "Right 10th rib fracture."),
        ("There is no fracture.", "No displaced fracture."),
        ("No fracture.", "No fracture of the left ribs."),
        ("There is no pneumothorax.", "Lungs are clear."),
        ("There is no pneumonia.", "The lungs are normally inflated."),
        ("Pulmonary vascularity is unremarkable.", "Lungs are clear."),
        ("Lungs are well expanded and clear.", "The lungs are within normal limits."),
        ("Lungs are clear.", "Right lower lobe is clear."),
        ("Lungs are clear.", "The remaining lungs are clear."),
        ("Lungs are clear.", "Lungs are not clear."),
        ("Lungs are clear.", "The lungs are well expanded."),
        ("The trachea is midline.", "The trachea is deviated."),
        ("肺部清晰。", "心脏正常。"),
        ("", "Lungs are clear."),
        ("Lungs are clear.", ""),
    ],
)
def test_not_entailed(hypothesis, evidence):
    assert not ENTAILS(hypothesis, [evidence])


def test_facts_may_come_from_several_sentences():
    evidence = ["There is a left effusion.", "The heart is normal.", "There is a right effusion."]
    assert ENTAILS("There is a right effusion. There is a left effusion.", evidence)
    assert not ENTAILS("There is a right effusion. There is a left effusion.", evidence[:2])
    assert not ENTAILS("Lungs are clear.", [])
    assert ENTAILS("肺部清晰。", ["肺部清晰"])
