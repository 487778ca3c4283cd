"""Who may import whom, and what a source file may be called and grow to."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bridges", "configs", "downstream", "eval", "grounding")
VOCABULARY = ("grounding.types", "grounding.boxes", "grounding.labels")
# What each may import of ours, beside itself. A prefix covers the modules below it; the longest key that fits counts.
ALLOWED = {
    **{module: ("configs", *VOCABULARY) for module in VOCABULARY},
    "configs": (),
    "eval": ("configs", *VOCABULARY),
    "bridges": ("configs", *VOCABULARY),
    "grounding": ("configs", "eval"),
    "downstream": PACKAGES,
}
FORBIDDEN_NAMES = ("utils.py", "common.py", "helpers.py")
MAX_LINES = 450
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def within(module, prefixes):
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source, module, is_package=False):
    """All that `source` imports, also inside functions; `from a import b` counts as a.b, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def violations(source, module, is_package=False):
    """The imports in `source` that `module` may not have."""
    owner = max((key for key in ALLOWED if within(module, [key])), key=len)
    own = () if owner in VOCABULARY else (owner,)
    return [
        name
        for name in imported_modules(source, module, is_package)
        if within(name, PACKAGES) and not within(name, (*ALLOWED[owner], *own))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    module = module_name(path)
    found = violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, f"{module} may not import {', '.join(found)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_a_telling_name_and_stay_short(path):
    assert path.name not in FORBIDDEN_NAMES
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; split it by what it does"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("configs", "from eval.types import Score"),
        ("grounding.types", "import grounding.model"),
        ("grounding.types", "from grounding import model"),
        ("grounding.boxes", "from . import train"),
        ("grounding.labels", "from .model import MedGLIP"),
        ("grounding.train", "import downstream.cli"),
        ("grounding.train", "def f():\n    from bridges.routes import pick"),
        ("eval.vqa", "from grounding.train import main"),
        ("eval.vqa", "from grounding import store"),
        ("eval.vqa", "import importlib\nimportlib.import_module('downstream.train')"),
        ("bridges.routes", "from eval import vqa"),
        ("bridges.routes", "from grounding.typesetting import x"),
    ],
)
def test_the_check_finds_a_violation(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("grounding.types", "import numpy\nfrom configs import write_atomic\nfrom .boxes import iou"),
        ("grounding.train", "from eval.grounding import score\nfrom grounding.model import MedGLIP"),
        ("eval.vqa", "from grounding.types import RegionSet\nfrom . import types"),
        ("bridges.projector", "from grounding.types import RegionTokens"),
        ("downstream.cli", "import bridges, eval, grounding, configs"),
    ],
)
def test_the_check_accepts_what_is_allowed(module, source):
    assert not violations(source, module)


def test_relative_imports_are_resolved():
    assert list(imported_modules("from . import a", "eval.vqa")) == ["eval.a"]
    assert list(imported_modules("from . import a", "eval.bench", is_package=True)) == ["eval.bench.a"]
    assert list(imported_modules("from ..text import a", "eval.bench.run")) == ["eval.text.a"]
    assert list(imported_modules("from ..text import a", "eval.bench", is_package=True)) == ["eval.text.a"]
