"""The contract of a stage's file, tried on every file there is; and the names that stages once had."""

import inspect
from typing import get_args

import pytest

from mllm.common.errors import UserError
from train import stages
from train.check import differences
from train.config import Section, load_config, renamed

RUN = "run: {output_dir: out, steps: 3}\n"


@pytest.mark.parametrize("name", stages.names())
def test_every_stage_has_settings_a_check_and_a_run(name):
    stage = stages.find(name)
    assert issubclass(stage.Config, Section)
    assert get_args(stage.Config.model_fields["stage"].annotation) == (name,)
    assert "ranks" in inspect.signature(stage.check).parameters
    assert callable(stage.run)
    assert name in (stage.__doc__ or "").split(":")[0]


def test_an_unknown_and_a_missing_stage_are_refused_with_the_known_ones(tmp_path):
    (tmp_path / "c.yaml").write_text("stage: instrukt\n" + RUN)
    with pytest.raises(UserError, match=r"no stage 'instrukt' \(did you mean instruct\? known: .*projector"):
        load_config(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(RUN)
    with pytest.raises(UserError, match="stage is missing"):
        load_config(tmp_path / "c.yaml")


def test_old_names_of_stages_sections_and_configs_are_taken_with_a_hint(tmp_path, capsys):
    text = f"stage: align_routers\nmodel: {{path: base, start_from: a}}\ndata: {{mixture: m.yaml}}\n{RUN}"
    (tmp_path / "c.yaml").write_text(text + "align: {layers: 2}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.stage, config.routers.layers) == ("routers", 2)
    hints = capsys.readouterr().err
    assert "stage align_routers is called routers now" in hints
    assert "section align is called routers now" in hints
    assert load_config("align", ["run.output_dir=out"]).stage == "projector"
    assert load_config("train/configs/align_routers.yaml").stage == "routers"


def test_a_run_of_old_goes_on_under_the_new_names(tmp_path):
    text = f"stage: projector\nmodel: {{path: base}}\ndata: {{mixture: m.yaml}}\n{RUN}"
    (tmp_path / "c.yaml").write_text(text)
    now = load_config(tmp_path / "c.yaml").model_dump(mode="json")
    then = now | {"stage": "align", "align": {"layers": 5}}
    then["optim"] = now["optim"] | {"part_lr": {"projector": None, "router": None}}  # before there were more parts
    assert differences(renamed(then, quiet=True), now) == []
