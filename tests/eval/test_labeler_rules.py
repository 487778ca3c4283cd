"""The rules of the labeler, topic by topic, and changes of a text that must change nothing."""

import random

import pytest

from eval.labeler import label

# Written before the rules were: what a reader would say of each. "PE-" says that an effusion is denied, "+" that it is
# there, "?" that it may be; what is not listed is not spoken of.
BEFORE_THE_RULES = [
    ("No pleural effusion or pneumothorax.", "PE- PX-"),
    ("No focal consolidation, pleural effusion, or pneumothorax.", "CO- PE- PX-"),
    ("Small left pleural effusion without pneumothorax.", "PE+ PX-"),
    ("There is no evidence of pneumonia, but a small effusion is present.", "PN- PE+"),
    ("Pneumonia cannot be excluded.", "PN?"),
    ("We cannot exclude a small pneumothorax.", "PX?"),
    ("The previously seen pneumothorax has resolved.", "PX-"),
    ("Pleural effusion has not resolved.", "PE+"),
    ("The study is not without atelectasis.", "AT+"),
    ("Possible pneumonia versus atelectasis.", "PN? AT?"),
    ("Bibasilar opacities may represent atelectasis or pneumonia.", "LO+ AT? PN?"),
    ("History of pneumonia.", ""),
    ("No change in the small right pleural effusion.", "PE+"),
    ("Heart size is normal.", "CM-"),
    ("The heart is mildly enlarged.", "CM+"),
    ("The cardiac silhouette is not enlarged.", "CM-"),
    ("No acute cardiopulmonary process.", ""),
    ("The cardiomediastinal silhouette is within normal limits.", "EC-"),
    ("Neither effusion nor pneumothorax is seen.", "PE- PX-"),
    ("Effusion, pneumothorax, and consolidation are absent.", "PE- PX- CO-"),
    ("No pneumothorax. Stable cardiomegaly.", "PX- CM+"),
    ("No pneumothorax, stable cardiomegaly.", "PX- CM+"),
    ("Left basilar opacity, likely atelectasis.", "LO+ AT?"),
    ("Right internal jugular catheter terminates in the SVC without pneumothorax.", "SD+ PX-"),
    ("Lungs are clear of focal airspace disease.", "LO-"),
    ("No displaced rib fracture.", "FR-"),
    ("No findings suspicious for pneumonia.", "PN-"),
    ("Findings are suspicious for pneumonia.", "PN?"),
    ("No pneumothorax and the heart is enlarged.", "PX- CM+"),
    ("Interval resolution of the pulmonary edema.", "ED-"),
]

MORE = [
    # negation
    ("Without overt edema.", "ED-"),
    ("Negative for pneumothorax, effusion, or consolidation.", "PX- PE- CO-"),
    ("The lungs are free of infiltrate.", "LO-"),
    ("Absence of pleural fluid.", "PE-"),
    ("No definite pleural effusion is identified.", "PE-"),
    ("There is no large effusion.", "PE-"),
    ("Pneumothorax is not seen.", "PX-"),
    ("A pneumothorax is not definitely identified.", "PX-"),
    ("No new consolidation.", "CO-"),
    ("Pneumothorax: none.", "PX-"),
    ("Effusion - absent.", "PE-"),
    ("There are no effusions, no pneumothoraces and no nodules.", "PE- PX- LL-"),
    ("No consolidation, effusion, pneumothorax.", "CO- PE- PX-"),
    ("No consolidation, mild cardiomegaly, or edema.", "CO- CM- ED-"),
    ("No evidence of rib fracture or pulmonary contusion.", "FR-"),
    ("Pneumonia is unlikely.", "PN-"),
    ("The opacity is unlikely to represent pneumonia.", "LO+ PN-"),
    ("The chest tube has been removed.", "SD-"),
    ("Interval removal of the endotracheal tube.", "SD-"),
    ("Pneumonia has been ruled out.", "PN-"),
    ("There is no focal opacity to suggest pneumonia.", "LO- PN-"),
    ("Scarring rather than atelectasis.", "AT-"),
    ("Pleural effusions are no longer seen.", "PE-"),
    ("The heart, lungs, and mediastinum are normal.", "CM- EC-"),
    ("Heart size and mediastinal contours are within normal limits.", "CM- EC-"),
    ("Normal heart size and mediastinal contours.", "CM- EC-"),
    ("Cardiac and mediastinal silhouettes are unremarkable.", "CM- EC-"),
    # scope ends
    ("No pneumothorax but a moderate effusion.", "PX- PE+"),
    ("No pneumothorax; small effusion.", "PX- PE+"),
    ("No pneumothorax, however the effusion persists.", "PX- PE+"),
    ("No acute findings aside from small bilateral effusions.", "PE+"),
    ("Except for mild atelectasis, no abnormality.", "AT+"),
    ("No effusion with stable bibasilar atelectasis.", "PE- AT+"),
    ("No pneumothorax, and there is a small effusion.", "PX- PE+"),
    ("Effusion has resolved and the pneumothorax persists.", "PE- PX+"),
    ("Cardiomegaly without edema, effusion or pneumothorax.", "CM+ ED- PE- PX-"),
    ("Stable cardiomegaly, no effusion.", "CM+ PE-"),
    ("No edema although the heart is enlarged.", "ED- CM+"),
    ("Atelectasis is present and there is no edema.", "AT+ ED-"),
    ("Lungs: Clear. Pleura: Small effusion. No pneumothorax.", "PE+ PX-"),
    # change, doubt, double negation
    ("No significant interval change in bilateral opacities.", "LO+"),
    ("No increase in the size of the pneumothorax.", "PX+"),
    ("The effusion is unchanged.", "PE+"),
    ("The effusion has not changed.", "PE+"),
    ("The consolidation has not significantly improved.", "CO+"),
    ("Near complete resolution of the edema.", "ED+"),
    ("Partially resolved effusion.", "PE+"),
    ("Resolving pneumonia.", "PN+"),
    ("Unresolved pneumothorax.", "PX+"),
    ("A small effusion is difficult to exclude.", "PE?"),
    ("A small effusion is not excluded.", "PE?"),
    ("Pneumothorax is not entirely excluded.", "PX?"),
    ("No large effusion, although a small effusion cannot be excluded.", "PE?"),
    ("Questionable nodule in the right upper lobe.", "LL?"),
    ("This could be a rib fracture.", "FR?"),
    ("Concern for pneumothorax.", "PX?"),
    ("Atelectasis, less likely pneumonia.", "AT+ PN?"),
    ("Atelectasis or pneumonia in the left lower lobe.", "AT? PN?"),
    ("Possible pneumonia without effusion.", "PN? PE-"),
    ("Possible pneumonia with small effusion.", "PN? PE+"),
    ("Consolidation consistent with pneumonia.", "CO+ PN+"),
    ("Borderline cardiomegaly.", "CM?"),
    ("Borderline enlarged heart.", "CM?"),
    ("Fracture is suspected.", "FR?"),
    ("Suspected pneumonia and effusion.", "PN? PE?"),
    # history, request, condition
    ("Status post median sternotomy. History of heart failure.", "SD+"),
    ("Prior history of pneumothorax, now with small effusion.", "PE+"),
    ("INDICATION: Rule out pneumonia.\nFINDINGS: No effusion.", "PE-"),
    ("HISTORY: Pneumothorax, chest tube.\n\nFINDINGS: The lungs are clear.\nIMPRESSION: No effusion.", "PE-"),
    ("COMPARISON: Chest radiograph with effusion. FINDINGS: Mild edema.", "ED+"),
    ("If there is concern for fracture, obtain dedicated rib views.", ""),
    # what a name is, and what it only sounds like
    ("Nodular opacity in the right lung.", "LL+ LO+"),
    ("No acute, displaced rib fractures are demonstrated.", "FR-"),
    ("Borderline heart size.", "CM?"),
    ("Questionable old third and fourth rib fractures.", "FR?"),
    ("Stable heart size, moderately enlarged and tortuous aorta.", ""),
    ("If there is concern for fracture consider rib series.", ""),
    ("Pericardial effusion.", ""),
    ("Soft tissue edema of the ankle.", ""),
    ("Lytic bone lesion of the rib.", ""),
    ("Status post pneumonectomy.", ""),
    ("Portable radiograph.", ""),
    ("Enlargement of the cardiac silhouette.", "CM+"),
    ("The mediastinum is widened.", "EC+"),
    ("No mediastinal widening.", "EC-"),
    ("The heart is normal in size. The aorta is enlarged.", "CM-"),
    ("The heart is normal and the mediastinum is widened.", "CM- EC+"),
    ("Biapical pleural thickening.", "PO+"),
    ("Pulmonary vascular congestion.", "ED+"),
    ("Right-sided PICC line and dual-lead pacemaker in place.", "SD+"),
    ("Right lower lobe collapse.", "AT+"),
    ("Old healed rib fractures.", "FR+"),
    ("Hydropneumothorax on the left.", "PX+ PE+"),
    ("No hydropneumothorax.", "PX- PE-"),
]  # fmt: skip

SENTENCES = [sentence for sentence, _ in BEFORE_THE_RULES + MORE if ":" not in sentence]


@pytest.mark.parametrize(("sentence", "codes"), BEFORE_THE_RULES + MORE)
def test_sentences(read_labels, sentence, codes):
    assert read_labels(sentence) == set(codes.split())


def test_the_order_of_sentences_changes_nothing():
    rng = random.Random(0)
    for _ in range(60):
        chosen = rng.sample(SENTENCES, 5)
        turned = rng.sample(chosen, 5)
        assert label(" ".join(chosen)) == label(" ".join(turned))


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title, lambda text: text.replace(" ", "  ")])
def test_case_and_spaces_change_nothing(change):
    for sentence in SENTENCES:
        assert label(change(sentence)) == label(sentence), sentence


@pytest.mark.parametrize("bullet", ["- {}", "* {}", "• {}", "{n}. {}", "{n}) {}", "({n}) {}", "\t{}"])
def test_bullets_change_nothing(bullet):
    rng = random.Random(1)
    for _ in range(40):
        chosen = rng.sample(SENTENCES, 5)
        lines = "\n".join(bullet.format(text, n=k + 1) for k, text in enumerate(chosen))
        assert label(lines) == label(" ".join(chosen)), lines
        bare = "\n".join(bullet.format(text.rstrip("."), n=k + 1) for k, text in enumerate(chosen))
        assert label(bare) == label(lines), bare
