"""How texts become tokens before BLEU, ROUGE-L, CIDEr and METEOR: the tokenisation is half of each of these metrics."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from eval.types import ScoreError

NO_JAVA = "Java not found: install a Java runtime (e.g. apt-get install default-jre-headless)"

_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_CLASS = "edu.stanford.nlp.process.PTBTokenizer"


def has_java() -> bool:
    """Whether a Java runtime starts. The program alone proves nothing: macOS ships a stub that only asks for one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Penn-Treebank tokens without punctuation, lower case, joined by spaces; the tokens of pycocoevalcap's tokenizer.

    Texts go in and out through pipes, so that a read-only installation and any locale will do. Raises ScoreError where
    Java starts but the tokenizer does not finish.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    command = ["java", "-cp", str(_package_folder() / _JAR), _CLASS]
    command += ["-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    lines = "".join(_one_line(text) + "\n" for text in texts)
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    rows = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(rows) != len(texts):
        why = f"{len(rows)} lines for {len(texts)} texts, exit code {done.returncode}"
        raise ScoreError(f"the PTB tokenizer failed ({why}); check that Java runs and has 1 GB of memory")
    return [" ".join(word for word in row.split() if word not in PUNCTUATIONS) for row in rows]


def word_tokens(texts: Sequence[str]) -> list[str]:
    """Words and numbers (15, 1.5, left-sided), lower case, joined by spaces. Scores differ from those on PTB tokens."""
    return [" ".join(re.findall(r"\d+(?:\.\d+)?|\w+(?:[-'’]\w+)*", text.lower())) for text in texts]


def _one_line(text: str) -> str:
    """One text, one line: also \\r, form feeds and Unicode line ends, which Java would split at."""
    return " ".join(text.split())


def _package_folder() -> Path:
    spec = find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))
