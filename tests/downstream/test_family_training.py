"""Training, prediction and export of bridges on other families of models, through the programs' own doors."""

import json

import pytest

from downstream import export, predict, train
from downstream.samples import read_predictions
from tests.bridges.families import save_checkpoint
from tests.downstream.test_train_predict import data, losses, prediction, settings  # noqa: F401  (data is a fixture)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("qwen2_5_vl", ("lora_kind=dora", "checkpointing=true")),
        ("smolvlm", ("lora_targets=q_proj,v_proj", "route=text")),
        ("llava_next", ("lora_kind=rslora", "route=none")),
        ("paligemma", ()),
    ],
)
def test_a_bridge_on_another_family_trains_resumes_answers_and_merges(name, more, data, tmp_path):  # noqa: F811
    base = save_checkpoint(name, tmp_path / name)
    arguments = settings(data, tmp_path / "run", f"base={base}", "steps=8", "align_steps=3", "lora_layers=1", *more)
    train.main(arguments)
    values = losses(tmp_path / "run")
    assert len(values) == 8 and min(values[-3:]) < values[0]
    weights = (tmp_path / "run/checkpoint/bridge.safetensors").read_bytes()
    train.main(arguments)  # from step 5
    assert losses(tmp_path / "run") == values
    assert (tmp_path / "run/checkpoint/bridge.safetensors").read_bytes() == weights
    predict.main([*prediction(tmp_path / "run", data, tmp_path / "answers"), "limit=3"])
    assert len(read_predictions(tmp_path / "answers/predictions.jsonl")) == 6
    export.main(["--checkpoint", str(tmp_path / "run/checkpoint"), "--out", str(tmp_path / "merged")])
    assert (
        json.loads((tmp_path / "merged/config.json").read_text())["model_type"]
        == json.loads((base / "config.json").read_text())["model_type"]
    )
