import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from configs import CONFIG_DIR, ConfigError, cache_dir, load_config, save_run_info, write_atomic


@dataclass(frozen=True)
class Example:
    data: Path
    lr: float = 1e-3
    steps: int = 10
    seed: int = 0
    amp: bool = False
    name: str = "x"
    limit: int | None = None
    labels: tuple[str, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def written(tmp_path, text):
    path = tmp_path / "example.yaml"
    path.write_text(text)
    return path


def test_yaml_values_are_cast_by_annotation(tmp_path):
    text = "# comment\ndata: d\nlr: 1e-4\namp: true\nname: no\nlimit: null\nlabels: [brain, 007]\nweights: [1, 2e-1]\n"
    config = load_config(Example, written(tmp_path, text))
    assert config == Example(
        Path("d"), lr=1e-4, amp=True, name="no", limit=None, labels=("brain", "007"), weights=(1.0, 0.2)
    )


def test_overrides_win_and_take_lists_nulls_and_equals_signs(tmp_path):
    path = written(tmp_path, "data: d\nlimit: 3\n")
    config = load_config(Example, path, ["data=a=b", "limit=null", "labels=a, b", "weights=[1,2]", "name="])
    assert config == Example(Path("a=b"), labels=("a", "b"), weights=(1.0, 2.0), name="")
    assert load_config(Example, None, ["data=d"]) == Example(Path("d"))


def test_a_list_of_one_and_an_empty_list(tmp_path):
    config = load_config(Example, written(tmp_path, "data: d\nlabels: brain\nweights: []\n"))
    assert (config.labels, config.weights) == (("brain",), ())


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: d\nlerning: 1\nlr_: 2\n", [], r"example.yaml:2: unknown key 'lerning'"),
        ("data: d\n", ["step=2"], r"override: unknown key 'step'; nearest: steps"),
        ("data: d\n", ["steps"], r"'steps': an override has the form key=value"),
        ("data: d\nsteps: 1.5\n", [], r"example.yaml:2: steps: expected int, got '1.5'"),
        ("data: d\nsteps: true\n", [], r"expected int"),
        ("data: d\nlr: nan\n", [], r"lr: expected float, got 'nan'"),
        ("data: d\namp: 1\n", [], r"expected true or false, got '1'"),
        ("data: d\nsteps:\n", [], r"steps: expected int, got null"),
        ("data: d\nsteps: [1]\n", [], r"steps: expected int, got a list"),
        ("data: d\nsteps: {a: 1}\n", [], r"a configuration is flat"),
        ("data: d\nsteps: 1\nsteps: 2\n", [], r"example.yaml:3: 'steps' is given twice"),
        ("lr: 1\n", [], r"example.yaml: missing data; .*data=VALUE"),
        ("data: d\nsteps: 0\n", [], r"example.yaml: steps must be at least 1"),
        ("- a\n", [], r"expected a mapping"),
        ("a: [\n", [], r"not valid YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Example, written(tmp_path, text), overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read \(No such file"):
        load_config(Example, tmp_path / "absent.yaml")


def test_run_info_reloads_to_the_same_config(tmp_path):
    config = Example(Path("a b"), lr=1e-5, name="null", labels=("a", "yes"), seed=7)
    save_run_info(config, tmp_path / "run", scores={"ap": 0.5})
    assert load_config(Example, tmp_path / "run" / "config.yaml") == config
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["seed"] == 7 and run["scores"] == {"ap": 0.5} and run["versions"]["torch"]
    assert set(run) >= {"git_commit", "command"}


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_text() == "two"
    path.with_suffix(".dir").mkdir()
    with pytest.raises(OSError):
        write_atomic(path.with_suffix(".dir"), "a folder is in the way")
    assert sorted(item.name for item in path.parent.iterdir()) == ["file.dir", "file.txt"]


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDGLIP_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MEDGLIP_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "med-glip"


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_yaml_parses_and_opens_with_its_comment(path):
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict | list)
    assert text.startswith("#")
