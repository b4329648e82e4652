"""The command line of the study."""

import pytest
from typer.testing import CliRunner

from mllm.cli import app
from studies.conflict.__main__ import main
from tests.studies.conflict.toy import write_rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["train/configs/conflict.yaml", "run.arms=[moel]"], "did you mean mole?"),
        (["train/configs/conflict.yaml", "own_arms={x: {topk: 2}}", "run.arms=[x]"], "own_arms.x.topk"),
        (["train/configs/conflict_real.yaml"], "no such mixture file: train.yaml"),
        (["train/configs/conflict.yaml", "run.out=nowhere", "--report"], "holds no study.json"),
        (["--report-all", "nowhere"], "no summary.json"),
    ],
)
def test_a_mistake_is_told_in_words_with_status_2(words, said, capsys, tmp_path):
    scenes = {"data.miniworld.folder": tmp_path, "data.miniworld.scenes": "{train: 1, val: 1, test: 1}"}
    drawn = [f"{key}={value}" for key, value in scenes.items()] if "own_arms" in "".join(words) else []
    assert main([*words, *drawn]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_one_of_config_and_report_all_is_needed(capsys):
    for words in ([], ["train/configs/conflict.yaml", "--report-all", "x"]):
        with pytest.raises(SystemExit):
            main(words)


def test_rows_of_one_domain_are_refused_before_anything_is_written(tmp_path, capsys):
    paths = {split: write_rows(tmp_path, split, domain="general") for split in ("train", "val", "test")}
    words = [f"data.{split}={path}" for split, path in paths.items()]
    assert main(["train/configs/conflict.yaml", "data.miniworld=null", f"run.out={tmp_path}/out", *words]) == 2
    assert "one domain only (general)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mllm_conflict_becomes_the_module_with_all_that_was_typed(monkeypatch, kept_environment):
    class Started(SystemExit):
        """What would have replaced this process."""

    def start(_, words):
        raise Started(words)

    monkeypatch.setattr("mllm.cli.os.execv", start)
    for line in (["a.yaml", "run.seeds=2", "--report"], ["--report-all", "runs"]):
        assert CliRunner().invoke(app, ["conflict", *line]).exception.code[1:] == ["-m", "studies.conflict", *line]
