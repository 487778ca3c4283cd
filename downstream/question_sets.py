"""Medical question sets in the layouts that their publishers give them: one small adapter a layout.

An adapter walks the source's lists and yields what it `Found`, and a `Skipped` for each row that cannot be used; it
decodes no image. `downstream.question_build` has the table of the layouts.
"""

import hashlib
import json
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from downstream.question_build import Found, Picture, Pictures, Yield, renamed, sample_of_image
from downstream.samples import VQASample
from grounding.convert.coco import coco as coco_regions
from grounding.convert.record import AnnotationError, Item, Skipped, below
from grounding.convert.slake import slake as slake_regions
from grounding.convert.tables import read_json_list, read_table
from grounding.convert.volume_layouts import modality_of
from grounding.images import read_image
from grounding.types import GroundingSample

PARTS = {"training": "train", "valid": "val", "validate": "val", "validation": "val", "dev": "val"}
SAID = {  # what words of a question or its answer say about the modality
    "ct": re.compile(r"\bcta?\b|computed tomogra", re.I),
    "mri": re.compile(r"\bmr[ia]?\b|\bflair\b|\bt[12]\b|\bdwi\b|magnetic resonance", re.I),
    "xray": re.compile(r"\bx-? ?rays?\b|\bcxr\b|plain film|radiograph|mammogra", re.I),
    "ultrasound": re.compile(r"ultraso|sonogra|doppler", re.I),
}


# What the adapters share


def part_of(word: str) -> str:
    """The publisher's part as train, val or test: of its own word, or of a file name such as `trainset.json`,
    `train-00000-of-00002.parquet`, `VQAMed2019_Test_Questions.txt`; "" where none is named."""
    found = re.search(r"train(?:ing)?|valid(?:ation|ate)?|val(?![a-z])|dev(?![a-z])|test", word.lower())
    return PARTS.get(found[0], found[0]) if found else ""


def text(value: Any, name: str) -> str:
    """A cell as one line of text; numbers are texts, too. Raises ValueError for none."""
    words = "" if value is None or isinstance(value, list | dict) else " ".join(str(value).split())
    if not words:
        raise ValueError(f"no {name}")
    return words


def files_of(root: Path, *choices: Sequence[str]) -> tuple[list[Path], Path]:
    """(files, folder) of the first choice of patterns that a file matches; `root` itself where it is a file."""
    if root.is_file():
        return [root], root.parent
    for patterns in choices:
        files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
        if files:
            return files, root
    return below(root, *(pattern for patterns in choices for pattern in patterns)), root


def rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """(file and row, row) of a JSON list."""
    yield from ((f"{file.name}[{k}]", row) for k, row in enumerate(read_json_list(file)))


def cells_of(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(file and line, cells) of a CSV file; the reason, a text, in the place of cells that cannot be used."""
    yield from ((f"{file.name}:{row.line}", row.wrong or row.cells) for row in read_table(file, columns))


def each(rows: Iterable[tuple[str, Any]], make: Callable[[str, Any], Found]) -> Yield:
    """`make` of every row; one that it cannot use (ValueError), or that is no object, is skipped with the reason."""
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise ValueError(row if isinstance(row, str) else f"a {type(row).__name__} is no row")
            found = make(where, row)
            json.dumps(asdict(found.sample) | found.more, ensure_ascii=False).encode()  # half characters ("\\ud800")
            yield found
        except ValueError as error:
            yield Skipped(where, str(error))


def modality_said(texts: Iterable[str]) -> str:
    """The modality that most of the texts name, "" where none or two do."""
    votes = Counter(name for words in texts for name, pattern in SAID.items() if pattern.search(words)).most_common(2)
    return votes[0][0] if votes and (len(votes) == 1 or votes[0][1] > votes[1][1]) else ""


def question(
    where: str,
    sample_id: str,
    picture: Picture,
    modality: str,
    row: Mapping[str, Any],
    kind: str = "",
    split: str = "",
    options: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Found:
    """A question about one image. `row`: question, answer and, where the source has it, answer_type ("CLOSED ", too);
    else an answer that is yes, no or one of the options is closed. `options` (letter → text) are put behind the
    question, and kept as such. Raises ValueError where question or answer is missing."""
    asked, answer = text(row.get("question"), "question"), text(row.get("answer"), "answer")
    said = str(row.get("answer_type") or "").strip().lower()
    closed = options or answer.lower().rstrip(".") in ("yes", "no", "是", "否", "不是", "有", "没有")
    if options:
        asked = f"{asked} Options: {'; '.join(f'{letter}: {words}' for letter, words in options.items())}"
    sample = VQASample(
        sample_id=sample_id,
        image_id=picture.image_id,
        patient_id=picture.patient_id,
        image=picture.image_id,
        modality=modality,
        question=asked,
        answer=answer,
        answer_type=said or ("closed" if closed else "open"),
        question_type=" ".join(kind.lower().split()),
        needs="feature",
    )
    return Found(where, sample, (picture,), split, {**({"options": dict(options)} if options else {}), **(more or {})})


# The hub's Parquet files: image (bytes and path), question, answer


def hub_questions(files: Sequence[Path], pictures: Pictures, modality: str) -> Yield:
    """Rows of question, answer and image, whose bytes are its identity, since no row names it."""
    for file in files:
        table = pq.ParquetFile(file)
        if not {"image", "question", "answer"} <= set(table.schema_arrow.names):
            raise AnnotationError(f"{file}: the columns are not image, question, answer; is this the question set?")
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, ["image", "question", "answer"]).to_pylist()
            named = ((f"{file.name}[{group}/{k}]", {**row, "place": (group, k)}) for k, row in enumerate(rows))
            yield from each(named, partial(_hub_question, file, pictures, modality))


def _hub_question(file: Path, pictures: Pictures, modality: str, where: str, row: Mapping[str, Any]) -> Found:
    data = (row["image"] or {}).get("bytes") if isinstance(row["image"], dict) else None
    if not data:
        raise ValueError("no image")
    image_id = f"{pictures.source}/{hashlib.sha256(data).hexdigest()[:16]}"
    make = pictures.make(image_id, image_id, modality)
    item = Item(image_id, partial(_read_cell, file, row["place"], make, image_id))
    picture = Picture(image_id, image_id, image_id, item)
    return question(where, f"{pictures.source}/{where}", picture, modality, row, split=part_of(file.name))


def _read_cell(file: Path, place: tuple[int, int], make: partial, key: str) -> Iterable[GroundingSample | Skipped]:
    data = _images_of(str(file), place[0])[place[1]]["bytes"]
    return sample_of_image(data, read_image(data), (), make, key)


@lru_cache(maxsize=1)
def _images_of(file: str, group: int) -> list[dict]:
    return pq.ParquetFile(file).read_row_group(group, ["image"]).column("image").to_pylist()


# The sets


def vqa_rad(root: Path, source: str, licence: str, images: str = "", modality: str = "") -> Yield:
    """VQA-RAD: `VQA_RAD Dataset Public.json` of osf.io/89kps, or the `trainset.json` and `testset.json` that were made
    of it, rows of qid, image_name, image_organ, question, answer, answer_type, question_type, phrase_type; or the hub's
    Parquet files. OSF's test part are the rows whose phrase_type starts with "test".

    The published parts share images. Chest images are X-rays, abdominal ones CT (Lau et al., 2018,
    doi:10.1038/sdata.2018.251); a head's modality is what its questions say, "" where they do not.
    """
    lists = ("trainset.json", "testset.json", "data/trainset.json", "data/testset.json")
    files, folder = files_of(root, ("*.parquet", "data/*.parquet"), ("VQA_RAD*.json", "*/VQA_RAD*.json"), lists)
    pictures = Pictures(folder / images, source, licence)
    if files[0].suffix == ".parquet":
        yield from hub_questions(files, pictures, modality)
        return
    rows = [row for file in files for row in rows_of(file)]
    heads = _modalities(rows, "image_name")
    by_organ = {"CHEST": "xray", "ABD": "ct"}

    def make(where: str, row: Mapping[str, Any]) -> Found:
        name = text(row.get("image_name"), "image_name")
        kind = modality or by_organ.get(str(row.get("image_organ")).strip().upper(), "") or heads[name]
        phrase, qid = str(row.get("phrase_type") or ""), text(row.get("qid"), "qid")
        split = part_of(where) or ("test" if phrase.startswith("test") else "train")
        more = {"phrase_type": phrase.strip().removeprefix("test_")}
        asked = str(row.get("question_type") or "")
        return question(where, f"{source}/{qid}", pictures(name, kind), kind, row, asked, split, more=more)

    yield from each(rows, make)


def _modalities(rows: Iterable[tuple[str, Any]], column: str) -> Mapping[str, str]:
    """Image → the modality that its questions and answers name; a question that is answered with no says nothing."""
    said: dict[str, list[str]] = defaultdict(list)
    for _, row in rows:
        if isinstance(row, Mapping) and str(row.get("answer", "")).strip().lower() != "no":
            said[str(row.get(column))] += [str(row.get("question", "")), str(row.get("answer", ""))]
    return defaultdict(str, {name: modality_said(texts) for name, texts in said.items()})


def slake(root: Path, source: str, licence: str, language: str = "") -> Yield:
    """SLAKE: `train.json`, `validate.json` or `validation.json`, `test.json`, rows of img_name, question, answer,
    q_lang (en, zh), modality, answer_type, content_type, qid; images and regions as `medglip data build` reads them
    (huggingface.co/datasets/BoKelvin/SLAKE). `language`: en or zh alone."""
    names = ("train.json", "validate.json", "validation.json", "test.json")
    files, folder = files_of(root, (*names, *(f"*/{name}" for name in names)))
    pictures, items = Pictures(folder, source, licence), {i.key: i for i in slake_regions(folder, source, licence)}

    def make(where: str, row: Mapping[str, Any]) -> Found:
        name, spoken = text(row.get("img_name"), "img_name"), text(row.get("q_lang"), "q_lang")
        kind, key = modality_of(str(row.get("modality"))) or "", PurePosixPath(name).parent.name
        item, one = items.get(key) if pictures.file(name) else None, f"{source}/{key}"
        picture = Picture(one, one, name, item and renamed(item, one, one))
        sample_id, asked = f"{source}/{text(row.get('qid'), 'qid')}", str(row.get("content_type") or "")
        return question(where, sample_id, picture, kind, row, asked, part_of(where), more={"language": spoken})

    rows = (row for file in files for row in rows_of(file))
    wanted = (row for row in rows if not language or not isinstance(row[1], dict) or row[1].get("q_lang") == language)
    yield from each(wanted, make)


class _Plain(pickle.Unpickler):
    """Reads lists, dictionaries, texts and numbers; a pickle of anything else could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def path_vqa(root: Path, source: str, licence: str, images: str = "", modality: str = "") -> Yield:
    """PathVQA: `qas/train/train_qa.pkl` and so on, lists of {"image": "train_0422", "question", "answer"}, with
    `images/train/train_0422.jpg` (github.com/UCSD-AI4H/PathVQA); or the hub's Parquet files. Photographs of specimens
    are among the slides: without `modality` it is ""."""
    files, folder = files_of(root, ("*.parquet", "data/*.parquet"), ("**/*_qa.pkl",))
    pictures = Pictures(folder / images, source, licence)
    if files[0].suffix == ".parquet":
        yield from hub_questions(files, pictures, modality)
        return

    def make(where: str, row: Mapping[str, Any]) -> Found:
        picture = pictures(text(row.get("image"), "image"), modality)
        return question(where, f"{source}/{where}", picture, modality, row, split=part_of(where))

    yield from each((row for file in files for row in _pickled(file)), make)


def _pickled(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as stream:
            rows = _Plain(stream).load()
    except Exception as error:  # whatever damaged bytes make of it
        raise AnnotationError(f"{file}: cannot be read ({error}); fetch it again") from error
    if not isinstance(rows, list):
        raise AnnotationError(f"{file}: holds a {type(rows).__name__}, not a list; give the *_qa.pkl files")
    yield from ((f"{file.name}[{k}]", row) for k, row in enumerate(rows))


CATEGORIES = ("modality", "plane", "organ", "abnormality")


def vqa_med(root: Path, source: str, licence: str, images: str = "", modality: str = "") -> Yield:
    """VQA-Med 2019, 2020, 2021: text files of `image|question|answer`, or with the category after the image; or two
    files, `image|question` (named …Questions…) and `image|answer|answer…` (named …ReferenceAnswers…)
    (github.com/abachaa/VQA-Med-2019, -2020, -2021). Of several right answers ("#" or "|" between them) the first is
    the answer, and all are `references`. Files of one category (C1_…) are not read beside one of all."""
    files, folder = files_of(root, ("**/*.txt",))
    files = [f for f in files if "readme" not in f.name.lower() and any("|" in line for line in _lines(f))]
    files = [f for f in files if not re.match(r"C\d_", f.name)] or files
    if not files:
        raise AnnotationError(f"{root}: no text file with | between its columns; is this the folder of VQA-Med?")
    pictures = Pictures(folder / images, source, licence)
    rows = [row for file in files for row in _barred(file, files, folder)]
    kinds = _modalities(rows, "image")

    def make(where: str, row: Mapping[str, Any]) -> Found:
        name = text(row["image"], "image")
        kind = modality or kinds[name]
        several = [" ".join(words.split()) for words in row["answers"] if words.strip()]
        more = {"references": several} if len(several) > 1 else {}
        picture = pictures(name, kind)
        sample_id, row = f"{source}/{where}", {**row, "answer": several[0] if several else None}
        part = part_of(where.rpartition("/")[2]) or part_of(where)
        return question(where, sample_id, picture, kind, row, row["category"], part, more=more)

    yield from each(rows, make)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig", errors="replace").splitlines()


def _barred(file: Path, files: Sequence[Path], folder: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file as image, category, question, answers. A file of answers alone is read with the questions."""
    asks, answers = "question" in file.name.lower(), re.search(r"ref(erence)?_?answers", file.name, re.I)
    if answers and not asks:
        return
    others = [f for f in files if re.search(r"ref(erence)?_?answers", f.name, re.I) and f.parent == file.parent]
    known = {cells[0].strip(): cells[1:] for f in others for cells in (line.split("|") for line in _lines(f))}
    if asks and not answers and any("question" in f.name.lower() for f in others):
        return  # the same questions, with their answers in another file
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            cells, where = line.split("|"), f"{file.relative_to(folder).as_posix()}:{number}"
            category = cells.pop(1).strip() if len(cells) > 3 and cells[1].strip().lower() in CATEGORIES else ""
            if len(cells) < 2:
                yield where, f"{len(cells)} columns, not image|question|answer"
                continue
            said = known.get(cells[0].strip(), []) if len(cells) == 2 else [a for c in cells[2:] for a in c.split("#")]
            row = {"image": cells[0], "question": cells[1], "category": category, "answers": said}
            yield where, row | {"answer": said[0] if said else ""}


LETTERS = ("A", "B", "C", "D")


def pmc_vqa(root: Path, source: str, licence: str, images: str = "", modality: str = "") -> Yield:
    """PMC-VQA: `train.csv`, `test.csv`, `test_clean.csv`, `train_2.csv`, `test_2.csv` with Figure_path, Question,
    Answer (a text, or an option's letter), Choice A to Choice D ("A:Diffuse uptake") and, in some, Answer_label
    (huggingface.co/datasets/xmcmic/PMC-VQA). The article, PMC1064097 of PMC1064097_F1.jpg, stands for the patient."""
    files, folder = files_of(root, ("train*.csv", "test*.csv"))
    pictures = Pictures(folder / images, source, licence)

    def make(where: str, row: Mapping[str, Any]) -> Found:
        name, options = text(row["Figure_path"], "Figure_path"), _options(row, "Choice {}")
        letter = row.get("Answer_label") or row["Answer"]
        asked = {"question": row["Question"], "answer": options.get(letter.strip().upper(), row["Answer"])}
        picture = pictures(name, modality, patient=re.split(r"_", name)[0])
        return question(where, f"{source}/{where}", picture, modality, asked, "", part_of(where), options)

    columns = ("Figure_path", "Question", "Answer", *(f"Choice {letter}" for letter in LETTERS))
    yield from each((row for file in files for row in cells_of(file, columns)), make)


def _options(row: Mapping[str, Any], column: str) -> dict[str, str]:
    """Letter → text, less the letter that leads it."""
    told = {letter: str(row.get(column.format(letter)) or "").strip() for letter in LETTERS}
    return {letter: re.sub(rf"^{letter}\s*[:.)]\s*", "", words) for letter, words in told.items() if words}


def omni_med_vqa(root: Path, source: str, licence: str, images: str = "") -> Yield:
    """OmniMedVQA: `QA_information/**/*.json`, lists of question_id, question_type, question, gt_answer, image_path,
    option_A to option_D, modality_type ("modality" in one file), with image_path below `root`
    (github.com/OpenGVLab/Multi-Modality-Arena, huggingface.co/datasets/foreverbeliever/OmniMedVQA). Modalities that are
    none of ours are "". Patients and parts are not told."""
    files, folder = files_of(root, ("QA_information/**/*.json",), ("*.json",))
    pictures = Pictures(folder / images, source, licence)

    def make(where: str, row: Mapping[str, Any]) -> Found:
        kind = modality_of(str(row.get("modality_type") or row.get("modality") or "")) or ""
        picture = pictures(text(row.get("image_path"), "image_path"), kind)
        sample_id, asked = (
            f"{source}/{text(row.get('question_id'), 'question_id')}",
            str(row.get("question_type") or ""),
        )
        said = {"question": row.get("question"), "answer": row.get("gt_answer")}
        return question(where, sample_id, picture, kind, said, asked, options=_options(row, "option_{}"))

    yield from each((row for file in files for row in rows_of(file)), make)


def csv_questions(
    root: Path, source: str, licence: str, images: str = "", modality: str = "", coco: str = "", labelled: str = ""
) -> Yield:
    """A CSV of your own: image, question, answer and, where you have them, sample_id, patient_id, modality,
    question_type, answer_type, split. `images`: the folder of the images, beside the file where it is not given.
    `coco`: a COCO json beside the file, whose regions come into the store; it wants `modality`. `labelled`: which of
    its categories (comma between them) were looked for in each of its images: only they are known to be absent."""
    files, folder = files_of(root, ("*.csv",))
    pictures, regions = Pictures(folder / images, source, licence), {}
    if coco:
        for item in coco_regions(folder, source, licence, modality, coco, images, labelled):
            if (pictures.folder / item.key).is_file():
                regions[(pictures.folder / item.key).resolve()] = item
            else:
                yield from (found for found in item.read() if isinstance(found, Skipped))

    def make(where: str, row: Mapping[str, Any]) -> Found:
        kind, name = row.get("modality") or modality, text(row["image"], "image")
        picture, file = pictures(name, kind, patient=row.get("patient_id", "")), pictures.file(name)
        if file in regions:
            picture = replace(picture, item=renamed(regions[file], picture.image_id, picture.patient_id))
        asked, split = row.get("question_type", ""), part_of(row.get("split", ""))
        return question(where, f"{source}/{row.get('sample_id') or where}", picture, kind, row, asked, split)

    yield from each((r for file in files for r in cells_of(file, ("image", "question", "answer"))), make)
