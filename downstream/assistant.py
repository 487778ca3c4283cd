"""One image of the user's own: ground phrases, answer a question, write a report, each with its evidence."""

from dataclasses import dataclass
from pathlib import Path

from bridges.routes import labels_in
from downstream.citations import split_report
from downstream.predict import Answerer, answer, evidence_of, load_answerer
from downstream.prompts import REPORT_QUESTION
from downstream.sources import RegionSource, TokenTable
from grounding.detect import Detection, Grounder, load_grounder
from grounding.images import MedicalImage, read_image
from grounding.types import RegionSet, RegionTokens, read_regions

NOTICE = "Research use only; not a medical device."
IMAGE = "image"


def grounder_dir(checkpoint: Path) -> Path:
    """``checkpoint`` itself, or the grounder of a folder that ``medglip demo`` made."""
    return checkpoint / "grounder" if (checkpoint / "grounder" / "config.json").exists() else checkpoint


def look(
    grounder: Grounder,
    image: MedicalImage,
    modality: str | None,
    phrases: list[str] | None = None,
    tiles: int = 1,
) -> Detection:
    """Checks that the checkpoint knows this kind of image, then looks for ``phrases`` or its own vocabulary.

    ``modality`` given by the user is believed; otherwise the file's own (DICOM) or the look of the image decides.
    ``tiles``: see `Grounder.detect`. Raises PhraseError for a modality, image or phrase that the checkpoint does not
    know.
    """
    grounder.check_modality(modality or image.modality)
    if modality is None:
        grounder.check_familiar(image)
    resolved = None if phrases is None else grounder.resolve(phrases, modality or image.modality)
    more = {"tiles": tiles} if tiles > 1 else {}  # detectors of other families have none
    return grounder.detect([image.pixels], resolved, modality, **more)[0]


@dataclass(frozen=True)
class Assistant:
    """A grounder and a bridge that work together."""

    grounder: Grounder
    answerer: Answerer

    def ask(
        self, path: str, question: str, modality: str | None = None, regions: Path | None = None
    ) -> tuple[dict, MedicalImage]:
        """The answer to one question as JSON data, and the image. ``regions``: a regions.jsonl to take instead of the
        detector's. Raises ImageError, PhraseError, RegionError, or ValueError for an empty question."""
        if not question.strip():
            raise ValueError("empty question; ask something about the image")
        image = read_image(path)
        source, queries = self._source(image, modality, regions)
        modality = self.grounder.modality(modality or image.modality)
        said = self._say(image, source, question, modality)
        evidence = evidence_of(said.slots, image.pixels.shape[:2])
        asked = labels_in(question, self.answerer.tree, modality)
        return {
            "image": str(path),
            "question": question,
            "answer": said.text,
            "evidence": evidence.to_dict(),
            "asked_for": [query for query in queries if query["label"] in asked],
            **self._provenance(),
        }, image

    def report(self, path: str, modality: str | None = None, regions: Path | None = None) -> tuple[dict, MedicalImage]:
        """A report as JSON data, each sentence with the ids of the regions that it cites, and the image."""
        image = read_image(path)
        source, queries = self._source(image, modality, regions)
        said = self._say(image, source, REPORT_QUESTION)
        text, sentences = split_report(said.text, said.slots)
        evidence = evidence_of(said.slots, image.pixels.shape[:2])
        tree = self.answerer.tree
        looked_for = [q for q in queries if q["label"] in tree.nodes and tree.is_finding(q["label"])]
        return {
            "image": str(path),
            "report": text,
            "sentences": sentences,
            "evidence": evidence.to_dict(),
            "looked_for": looked_for,
            **self._provenance(),
        }, image

    def _source(self, image: MedicalImage, modality: str | None, regions: Path | None):
        if regions is None:
            seen = look(self.grounder, image, modality)
            return self._table(seen.tokens, self.grounder.hash), seen.candidates.queries
        self.grounder.check_modality(modality or image.modality)
        given = _only(read_regions(regions), regions)
        tokens = self.grounder.given([image.pixels], [given])[0]
        return self._table(tokens, None), given.queries

    def _table(self, tokens: RegionTokens, detector: str | None) -> RegionSource:
        return RegionSource(TokenTable({IMAGE: 0}, tokens, detector, self.grounder.label_table()))

    def _say(self, image: MedicalImage, source: RegionSource, question: str, modality: str | None = None):
        return answer(self.answerer, image.pixels, source, IMAGE, question, _extent(image), modality)

    def _provenance(self) -> dict:
        return {
            "route": self.answerer.route,
            "detector": self.grounder.hash,
            "model": self.answerer.hash,
            "notice": NOTICE,
        }


def _only(regions: dict[str, RegionSet], path: Path) -> RegionSet:
    """The one image of a regions.jsonl. Raises ValueError where there are more."""
    if len(regions) != 1:
        raise ValueError(f"{path}: holds {len(regions)} images; give a file with the regions of this one image")
    return next(iter(regions.values()))


def _extent(image: MedicalImage) -> tuple[float, float] | None:
    if image.spacing is None:
        return None
    return image.pixels.shape[0] * image.spacing[0], image.pixels.shape[1] * image.spacing[1]


def load_assistant(checkpoint: Path, route: str) -> Assistant:
    """From a folder that ``medglip demo`` made: its grounder and its bridge of one route.

    Raises CheckpointError where one of them is missing or cannot be used.
    """
    return Assistant(load_grounder(grounder_dir(checkpoint)), load_answerer(checkpoint / route / "checkpoint"))
