"""One image or volume of the user's own: ground phrases, answer a question, write a report, each with its evidence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridges.routes import labels_in
from downstream.answerer import Answerer, evidence_of, load_answerer
from downstream.citations import found_slots, split_answer, split_report, with_masks
from downstream.decoding import GREEDY, Decoding, options_of
from downstream.predict import Answer, answer
from downstream.prompts import PICTURED, REPORT_QUESTION
from downstream.region_cache import Remembered, key_of, recall, remember
from downstream.sources import RegionSource, TokenTable
from downstream.tracks import Track, best_slice, look_through
from downstream.volumes import Volume, read_any
from grounding.detect import Detection, Grounder, load_grounder
from grounding.images import MedicalImage
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
class View:
    """What a question is asked about. ``image``: of a volume the slice that is shown to the language model. ``found``:
    with masks. ``tracks``: of a volume, one for each of the first of ``tokens``."""

    image: MedicalImage
    tokens: RegionTokens
    source: RegionSource
    found: RegionSet
    tracks: Sequence[Track] = ()
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Assistant:
    """A grounder and a bridge that work together."""

    grounder: Grounder
    answerer: Answerer

    def ask(
        self,
        path: str,
        question: str,
        modality: str | None = None,
        regions: Path | None = None,
        options: Sequence[str] | None = None,
        why: bool = False,
    ) -> tuple[dict, MedicalImage]:
        """The answer to one question as JSON data, and the image (of a volume, the slice that was looked at).

        ``regions``: a regions.jsonl to take instead of the detector's. ``options``: the answer is the likeliest of
        these, each with its probability; none given ([]): of those of the question (see `decoding.options_of`).
        ``why``: with the answer's probability without each region (see `downstream.causal`). Raises ImageError,
        PhraseError, RegionError, or ValueError for an empty question or one without options.
        """
        if not question.strip():
            raise ValueError("empty question; ask something about the image")
        choices = () if options is None else options_of(question, options)
        if options is not None and len(choices) < 2:
            raise ValueError(f"{question!r} has no options of its own; give them: --options yes no")
        view = self._view(path, modality, regions, question)
        modality = self.grounder.modality(modality or view.image.modality)
        said = self._say(view, question, modality, choices)
        text = split_answer(said.text, said.slots)[0] if self.answerer.cite_answers else said.text
        asked = labels_in(question, self.answerer.tree, modality)
        row = {
            "image": str(path),
            "question": question,
            "answer": text,
            **_evidence(view, said.slots),
            "asked_for": [query for query in view.tokens.queries[0] if query["label"] in asked],
            **self._provenance(),
            **view.about,
            **({"options": said.options} if said.options else {}),
        }
        return (row | {"why": self._why(view, question, said, modality)} if why else row), view.image

    def report(self, path: str, modality: str | None = None, regions: Path | None = None) -> tuple[dict, MedicalImage]:
        """A report as JSON data, each sentence with the ids of the regions that it cites, and the image."""
        view = self._view(path, modality, regions, REPORT_QUESTION)
        said = self._say(view, REPORT_QUESTION)
        text, sentences = split_report(said.text, said.slots)
        tree = self.answerer.tree
        queries = view.tokens.queries[0]
        return {
            "image": str(path),
            "report": text,
            "sentences": sentences,
            **_evidence(view, said.slots),
            "looked_for": [q for q in queries if q["label"] in tree.nodes and tree.is_finding(q["label"])],
            **self._provenance(),
            **view.about,
        }, view.image

    def _view(self, path: str, modality: str | None, regions: Path | None, question: str) -> View:
        image = read_any(path)
        if isinstance(image, Volume):
            if regions is not None:
                raise ValueError(f"{regions}: holds regions of one image, and {path} is a volume; give a slice of it")
            return self._through(image, modality, question)
        if regions is None:
            seen, found = self._look(image, modality)
            return View(image, seen.tokens, self._source(seen, self.grounder.hash), found)
        self.grounder.check_modality(modality or image.modality)
        given = _only(read_regions(regions), regions)
        tokens = self.grounder.given([image.pixels], [given])[0]
        return View(image, tokens, self._source(Remembered(tokens, self.grounder.label_table(), {}), None), given)

    def _look(self, image: MedicalImage, modality: str | None) -> tuple[Remembered, RegionSet]:
        """The regions of an image; from the cache where it was looked at before."""
        key = key_of(image.pixels, self.grounder, modality)
        seen = recall(key)
        if seen is None:
            detection = look(self.grounder, image, modality)
            seen = Remembered(detection.tokens, self.grounder.label_table(), {"found": detection.found.to_dict()})
            remember(key, seen)
        else:
            self.grounder.check_modality(modality or image.modality)
        return seen, RegionSet.from_dict(seen.notes["found"])

    def _through(self, volume: Volume, modality: str | None, question: str) -> View:
        """The same for a volume, with the slice that shows best what is asked for."""
        key = key_of(volume.slices, self.grounder, modality)
        seen = recall(key)
        if seen is None:
            through = look_through(self.grounder, volume, modality)
            notes = {"tracks": [asdict(track) for track in through.tracks]}
            seen = Remembered(through.tokens, self.grounder.label_table(), notes)
            remember(key, seen)
        tracks = [Track(**track) for track in seen.notes["tracks"]]
        tree = self.answerer.tree
        named = labels_in(question, tree, self.grounder.modality(modality or volume.modality))
        k = best_slice(tracks, named, tree, len(volume.slices))
        about = {"slices": len(volume.slices), "slice": k, "mm_from_slice_to_slice": volume.step}
        nothing = RegionSet(np.zeros((0, 4)), [], volume.slices.shape[1:3])
        if self.answerer.route in PICTURED:
            seen = replace(seen, tokens=_on_slice(seen.tokens, tracks, k))
        source = self._source(seen, self.grounder.hash)
        return View(volume.image(k), seen.tokens, source, nothing, tracks, about)

    def _source(self, seen: Remembered, detector: str | None) -> RegionSource:
        return RegionSource(TokenTable({IMAGE: 0}, seen.tokens, detector, seen.vocabulary))

    def _say(self, view: View, question: str, modality: str | None = None, options: Sequence[str] = ()) -> Answer:
        image = view.image
        return answer(self.answerer, image.pixels, view.source, IMAGE, question, _extent(image), modality, options)

    def _why(self, view: View, question: str, said: Answer, modality: str | None) -> dict:
        from downstream.causal import Fixed, why

        def prompt(some: RegionTokens):
            return self.answerer.prompt(
                question, Fixed(some), IMAGE, _extent(view.image), modality, [view.image.pixels]
            )

        return why(self.answerer, question, said.text, said.slots, prompt, modality)

    def _provenance(self) -> dict:
        return {
            "route": self.answerer.route,
            "detector": self.grounder.hash,
            "model": self.answerer.hash,
            "notice": NOTICE,
        }


def _evidence(view: View, slots: RegionTokens) -> dict[str, Any]:
    """The regions of a prompt, with masks; of a volume, `tracks` says from which slice to which each goes."""
    evidence = with_masks(evidence_of(slots, view.image.pixels.shape[:2]), view.found).to_dict()
    if not view.about:
        return {"evidence": evidence}
    step = view.about["mm_from_slice_to_slice"]
    spans = [_span(_track_of(view, slots, i), step) for i in found_slots(slots)]
    return {"evidence": evidence, "tracks": [{"region": k, **span} for k, span in enumerate(spans)]}


def _track_of(view: View, slots: RegionTokens, i: int) -> Track:
    """Of slot ``i``: a slot is a copy of one of the view's regions."""
    tokens = view.tokens
    return next(
        track
        for t, track in enumerate(view.tracks)
        if tokens.labels[0][t] == slots.labels[0][i]
        and torch.equal(tokens.boxes[0, t], slots.boxes[0, i])
        and torch.equal(tokens.scores[0, t], slots.scores[0, i])
    )


def _on_slice(tokens: RegionTokens, tracks: Sequence[Track], k: int) -> RegionTokens:
    """``tokens`` without the tracks that slice ``k`` does not show: what is drawn on a picture must be on it."""
    valid = tokens.valid.clone()
    for t, track in enumerate(tracks):
        valid[0, t] &= track.first <= k <= track.last
    return replace(tokens, valid=valid)


def _span(track: Track, step: float | None) -> dict[str, Any]:
    depth = None if step is None else round((track.last - track.first + 1) * step, 1)
    return {"slice": track.best, "first": track.first, "last": track.last, "depth_mm": depth}


def _only(regions: dict[str, RegionSet], path: Path) -> RegionSet:
    """The one image of a regions.jsonl. Raises ValueError where there are more."""
    if len(regions) != 1:
        raise ValueError(f"{path}: holds {len(regions)} images; give a file with the regions of this one image")
    return next(iter(regions.values()))


def _extent(image: MedicalImage) -> tuple[float, float] | None:
    if image.spacing is None:
        return None
    return image.pixels.shape[0] * image.spacing[0], image.pixels.shape[1] * image.spacing[1]


def load_assistant(checkpoint: Path, route: str, decoding: Decoding = GREEDY) -> Assistant:
    """From a folder that ``medglip demo`` made: its grounder and its bridge of one route.

    Raises CheckpointError where one of them is missing or cannot be used.
    """
    grounder = load_grounder(grounder_dir(checkpoint))
    return Assistant(grounder, replace(load_answerer(checkpoint / route / "checkpoint"), decoding=decoding))
