"""Settings: read, overridden, refused in words."""

from pathlib import Path

import pytest

import train
from mllm.common.errors import UserError
from studies.conflict.config import load_conflict_config
from train import stages
from train.config import TrainConfig, load_config

# Stages; the settings of a conflict study are checked beside it.
FOLDER = Path(train.__file__).parent / "configs"
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("conflict"))
MINIMAL = """\
stage: align
model: {path: base}
data: {mixture: mixture.yaml}
run: {output_dir: out, steps: 3}
"""


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).stage in stages.names()


def test_an_unknown_key_is_refused_with_the_nearest_known_name(minimal):
    with pytest.raises(UserError, match=r"unknown key run\.micro_batchsize \(did you mean micro_batch_size\?"):
        load_config(minimal, ["run.micro_batchsize=4"])


def test_an_unknown_section_is_refused_with_the_nearest_known_name(minimal):
    with pytest.raises(UserError, match=r"unknown key optimizer \(did you mean optim\?"):
        load_config(minimal, ["optimizer.lr=1"])


def test_a_nested_unknown_key_lists_the_names_of_its_own_section(minimal):
    with pytest.raises(UserError, match=r"optim\.part_lr\.zzz .known: projector, attention, experts, router"):
        load_config(minimal, ["optim.part_lr.zzz=1e-3"])


def test_overrides_are_parsed_as_yaml_and_win_over_the_file(minimal):
    config = load_config(minimal, ["run.steps=7", "optim.betas=[0.8, 0.9]", "optim.lr=1e-4", "model.start_from=null"])
    assert (config.run.steps, config.optim.betas, config.optim.lr, config.model.start_from) == (
        7,
        (0.8, 0.9),
        1e-4,
        None,
    )


@pytest.mark.parametrize("override", ["run.steps", "=3", "run..steps=3", "model.path.deeper=3", "run.steps=[1"])
def test_an_override_of_the_wrong_form_is_refused_by_name(minimal, override):
    with pytest.raises(UserError, match="override"):
        load_config(minimal, [override])


def test_a_value_that_does_not_fit_names_key_and_value(minimal):
    with pytest.raises(UserError, match=r"deepspeed\.zero: .*0, 1, 2 or 3.*got 5"):
        load_config(minimal, ["deepspeed.zero=5"])


def test_epochs_and_steps_together_are_refused(minimal):
    with pytest.raises(UserError, match="run: give exactly one of epochs and steps"):
        load_config(minimal, ["run.epochs=1"])


def test_an_adapter_in_stage_align_is_refused(minimal):
    with pytest.raises(UserError, match="projector alone"):
        load_config(minimal, ["model.adapter={type: mole}"])


def test_stage_instruct_without_anything_to_train_is_refused(minimal):
    with pytest.raises(UserError, match=r"needs model\.adapter"):
        load_config(minimal, ["stage=instruct"])


def test_offload_without_zero_is_refused(minimal):
    with pytest.raises(UserError, match="offload needs zero"):
        load_config(minimal, ["deepspeed.zero=0", "deepspeed.offload=true"])


def test_malformed_yaml_is_told_with_its_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("stage: align\nmodel: {path: [}\n")
    with pytest.raises(UserError, match="line 2"):
        load_config(tmp_path / "bad.yaml")


def test_a_missing_file_is_told_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_shipped_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("experts", ["run.seed=5"]) == load_config(FOLDER / "experts.yaml", ["run.seed=5"])
    assert load_conflict_config("conflict") == load_conflict_config(FOLDER / "conflict.yaml")


def test_a_file_wins_over_a_shipped_config_of_that_name(minimal, monkeypatch):
    minimal.rename(minimal.parent / "experts")
    monkeypatch.chdir(minimal.parent)
    assert load_config("experts").model.path == "base"


@pytest.mark.parametrize("name", ["expert", "train/configs/expert.yaml", "configs/experts.yml"])
def test_an_unknown_config_is_refused_with_the_nearest_shipped_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: no such file.*did you mean experts\?"):
        load_config(name)


def test_saved_settings_load_as_the_same_settings(minimal, tmp_path):
    config = load_config(minimal, ["optim.part_lr.router=3e-4"])
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert isinstance(config, TrainConfig)
