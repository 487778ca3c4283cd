"""How texts become tokens before BLEU, ROUGE-L, CIDEr and METEOR: the tokenisation is half of each of these metrics."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from eval.types import ScoreError

NO_JAVA = "Java not found: install a Java runtime (e.g. apt-get install default-jre-headless)"

_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_CLASS = "edu.stanford.nlp.process.PTBTokenizer"

# Scripts without spaces: each character is a token of its own.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"\d+(?:\.\d+)?|[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[-'’][^\W{_UNSPACED}]+)*")


@dataclass(frozen=True)
class Cleaning:
    """What R2Gen does to one data set's reports.

    runs: (text, its replacement, how often in a row). longest: its max_seq_length. rare: a word that the training
    reports have fewer times is "<unk>".
    """

    runs: tuple[tuple[str, str, int], ...]
    longest: int
    rare: int


# https://github.com/cuhksz-nlp/R2Gen: modules/tokenizers.py (runs), run_iu_xray.sh and run_mimic_cxr.sh (the numbers)
R2GEN = {
    "iu_xray": Cleaning((("..", ".", 3),), longest=60, rare=3),
    "mimic_cxr": Cleaning((("\n", " ", 1), ("__", "_", 7), ("  ", " ", 6), ("..", ".", 6)), longest=100, rare=10),
}
_R2GEN_NUMBERS = (
    ("1. ", ""),
    *((f". {k}. ", ". ") for k in range(2, 6)),
    *((f" {k}. ", ". ") for k in range(2, 6)),
)
# Its character class holds the range from ":" to "[", so "<", "=", ">" and "@" go too, while the hyphen stays.
_R2GEN_DROPPED = str.maketrans("", "", ".,?;*!%^&_+()[]{}\"/\\'" + "".join(map(chr, range(ord(":"), ord("[")))))


def has_java() -> bool:
    """Whether a Java runtime starts. The program alone proves nothing: macOS ships a stub that only asks for one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Penn-Treebank tokens without punctuation, lower case, joined by spaces; the tokens of pycocoevalcap's tokenizer.

    Texts go in and out through pipes, so that a read-only installation and any locale will do. Raises ScoreError where
    Java is missing, or starts but the tokenizer does not finish.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    if not has_java():
        raise ScoreError(f"the PTB tokenizer needs Java. {NO_JAVA}, or choose the tokenizer words")
    command = ["java", "-cp", str(package_folder() / _JAR), _CLASS]
    command += ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    lines = "".join(one_line(text) + "\n" for text in texts)
    done = subprocess.run(command, input=lines.encode(errors="replace"), capture_output=True, check=False)
    rows = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(rows) != len(texts):
        why = f"{len(rows)} lines for {len(texts)} texts, exit code {done.returncode}"
        raise ScoreError(f"the PTB tokenizer failed ({why}); check that Java runs and has 1 GB of memory")
    return [" ".join(word for word in row.split() if word not in PUNCTUATIONS) for row in rows]


def word_tokens(texts: Sequence[str]) -> list[str]:
    """Words and numbers (15, 1.5, left-sided), lower case, joined by spaces. Scores differ from those on PTB tokens.

    Chinese and Japanese characters, which no spaces part, are a token each.
    """
    return [" ".join(_WORD.findall(text.lower())) for text in texts]


def r2gen_tokens(texts: Sequence[str], dataset: str = "mimic_cxr") -> list[str]:
    """R2Gen's report cleaning, joined by spaces: lower case, numbering and most punctuation taken out, and " . " after
    each sentence, which counts as a token (https://github.com/cuhksz-nlp/R2Gen/blob/main/modules/tokenizers.py).

    dataset: a key of R2GEN; the two differ only in line breaks and runs of dots, blanks and underscores. An empty
    text becomes ".", as it does there. Numbers lose their point ("1.5" → "15"), since it is punctuation there.
    """
    return [" ".join(_r2gen_clean(text, R2GEN[dataset]).split()) for text in texts]


def r2gen_vocabulary(train_reports: Iterable[str], dataset: str) -> frozenset[str]:
    """The words that R2Gen's tokenizer knows: those that the cleaned training reports have often enough."""
    counts = Counter(word for text in r2gen_tokens(list(train_reports), dataset) for word in text.split())
    return frozenset(word for word, count in counts.items() if count >= R2GEN[dataset].rare)


TOKENIZERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "ptb": ptb_tokens,
    "r2gen": r2gen_tokens,
    "words": word_tokens,
    "none": list,
}


def one_line(text: str) -> str:
    """One text, one line: also \\r, form feeds and Unicode line ends, which Java would split at."""
    return " ".join(text.split())


def package_folder() -> Path:
    """Where pycocoevalcap lies, with its Java programs."""
    spec = find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _r2gen_clean(text: str, cleaning: Cleaning) -> str:
    for old, new, times in cleaning.runs:
        for _ in range(times):
            text = text.replace(old, new)
    for old, new in _R2GEN_NUMBERS:
        text = text.replace(old, new)
    sentences = text.strip().lower().split(". ")
    return " . ".join(sentence.translate(_R2GEN_DROPPED) for sentence in sentences) + " ."
