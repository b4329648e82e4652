"""Mistakes of the user's: told in words with status 2, and nothing left behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mllm.common.errors import UserError
from mllm.data.images import ImageError
from mllm.data.mixture import load_mixture
from tests.train.data import write_config
from train.__main__ import main, original_message
from train.check import check_batch, differences, find_checkpoint, micro_batch, tell_of_checkpoint
from train.config import RunSection, load_config
from train.launch import main as launch_main
from train.run import prepare_folder
from train.stages import check


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main")
    write_config(folder)
    return folder


@pytest.fixture
def folder(healthy, tmp_path):
    """A copy of settings and rows that a test may spoil; base and pictures are shared."""
    rows = json.loads((healthy / "train.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "mixture.yaml").write_text(f"sources: [{{path: rows.json, image_root: {healthy}/images}}]\n")
    (tmp_path / "config.yaml").write_text(
        (healthy / "config.yaml").read_text().replace(f"{healthy}/run", f"{tmp_path}/run")
    )
    return tmp_path


def refused(folder, capfd, monkeypatch, *overrides: str) -> str:
    """Runs `python -m train` in this process as the only rank; returns what it said on stderr."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    status = main([str(folder / "config.yaml"), "--local_rank=0", f"data.mixture={folder}/mixture.yaml", *overrides])
    said = capfd.readouterr().err
    assert status == 2
    assert "Traceback" not in said
    assert not (folder / "run").exists()
    return said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepz=3", "unknown key run.stepz (did you mean steps?"),
        ("model.adapter.rank=4", "unknown key model.adapter.rank"),
        ("model.path=nowhere", "nowhere"),
        ("model.start_from=nowhere", "model.start_from: nowhere"),
        ("data.mixture=nowhere.yaml", "nowhere.yaml"),
        ("run.seed=-1", "run.seed"),
        ("run.resume=nowhere", "run.resume: nowhere"),
    ],
)
def test_a_wrong_setting_is_told_by_key(folder, capfd, monkeypatch, override, message):
    assert message in refused(folder, capfd, monkeypatch, override)


def test_malformed_json_is_told_with_its_place(folder, capfd, monkeypatch):
    (folder / "rows.json").write_text('[{"id": "1",}]')
    assert "rows.json: malformed JSON at line 1" in refused(folder, capfd, monkeypatch)


def test_a_turn_without_answer_is_told_by_row(folder, capfd, monkeypatch):
    rows = json.loads((folder / "rows.json").read_text())
    rows[5]["conversations"].pop()
    (folder / "rows.json").write_text(json.dumps(rows))
    assert "row 6 (id 5)" in refused(folder, capfd, monkeypatch)


def test_the_launcher_is_not_started_on_a_wrong_setting(folder, capfd):
    assert launch_main([str(folder / "config.yaml"), "--ranks", "2", "run.stepz=3"]) == 2
    assert "did you mean steps" in capfd.readouterr().err
    assert not (folder / "run").exists()


def test_a_folder_with_another_run_is_not_gone_on_with(folder):
    config = load_config(folder / "config.yaml")
    write_checkpoint(folder / "run", 2)
    config.save(folder / "run" / "config.yaml")
    assert find_checkpoint(config).name == "checkpoint-2"
    changed = load_config(folder / "config.yaml", ["run.seed=5", "data.workers=1"]).model_dump(mode="json")
    assert differences(config.model_dump(mode="json"), changed) == ["run.seed: 0, now 5"]
    with pytest.raises(ValueError, match=r"run\.seed: 0, now 5"):
        find_checkpoint(load_config(folder / "config.yaml", ["run.seed=5"]))


@pytest.mark.parametrize(
    ("settings", "is_free"),
    [
        ({"stage": "instruct", "model": {}}, True),
        ({"stage": "pretrain_moma", "model": {"preset": "4t4i"}}, False),
        ({"stage": "pretrain_moma", "model": {"preset": "1t1i"}}, True),
        ({"stage": "pretrain_moma", "model": {"preset": "1t1i", "fields": {"mixture_of_depths": 0.5}}}, False),
        ({"stage": "upcycle", "model": {"preset": "4t4i", "fields": {"routing": "token_choice"}}}, True),
        ({"stage": "train_causal_routers", "model": {"preset": "4t4i"}}, False),
    ],
)
def test_the_micro_batch_is_free_unless_something_is_chosen_among_it(settings, is_free):
    old, new = (settings | {"run": {"micro_batch_size": size}} for size in (2, 8))
    assert differences(old, new) == ([] if is_free else ["run.micro_batch_size: 2, now 8"])


def test_the_newest_checkpoint_is_taken_by_number_not_by_name(folder):
    config = load_config(folder / "config.yaml")
    for step in (9, 10):
        write_checkpoint(folder / "run", step)
    config.save(folder / "run" / "config.yaml")
    assert find_checkpoint(config).name == "checkpoint-10"


def write_checkpoint(run: Path, step: int, ranks: int = 1) -> Path:
    """A checkpoint's files, empty, as Trainer and DeepSpeed leave them on so many ranks."""
    folder = run / "checkpoints" / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / "latest").write_text(f"global_step{step}")
    (folder / "trainer_state.json").touch()
    for rank in range(ranks):
        (folder / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth")).touch()
    return folder


def test_what_is_no_whole_checkpoint_is_passed_over_and_named(folder, capsys):
    config = load_config(folder / "config.yaml")
    good = write_checkpoint(folder / "run", 3)
    (good.parent / "checkpoint-abc").mkdir()
    (good.parent / "checkpoint-12").mkdir()
    (good.parent / "checkpoint-13").touch()
    (write_checkpoint(folder / "run", 14) / "global_step14").rmdir()
    assert find_checkpoint(config, ranks=1) == good
    tell_of_checkpoint(config, good)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    for name in ("abc", "12", "13", "14"):
        assert any(f"checkpoint-{name} is not a whole checkpoint" in line for line in said)


def test_with_no_whole_checkpoint_a_run_begins_anew_and_leaves_what_is_not_its_own(folder):
    config = load_config(folder / "config.yaml")
    for name in ("checkpoint-abc", "checkpoint-12"):
        (folder / "run" / "checkpoints" / name).mkdir(parents=True)
    assert find_checkpoint(config, ranks=1) is None
    prepare_folder(config, fresh=True)
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["checkpoint-abc"]


def test_a_folder_that_is_no_checkpoint_is_refused_where_it_is_asked_for_by_name(folder):
    half = folder / "checkpoint-4"
    half.mkdir()
    (half / "trainer_state.json").touch()
    with pytest.raises(UserError, match=r"run\.resume: .*checkpoint-4 is no checkpoint"):
        find_checkpoint(load_config(folder / "config.yaml", [f"run.resume={half}"]))


@pytest.mark.parametrize("resume", ["auto", "by name"])
@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (8, 4)])
def test_another_number_of_ranks_is_refused_with_both_numbers(folder, before, now, resume):
    checkpoint = write_checkpoint(folder / "run", 3, before)
    overrides = [f"run.resume={checkpoint}"] if resume == "by name" else []
    config = load_config(folder / "config.yaml", overrides)
    assert find_checkpoint(config, ranks=before) == checkpoint
    with pytest.raises(UserError, match=rf"saved by {before} rank.* now there are {now}.*--ranks {before}"):
        find_checkpoint(config, ranks=now)


def test_without_zero_nothing_is_split_and_any_number_of_ranks_goes_on(folder):
    checkpoint = write_checkpoint(folder / "run", 3, 2)
    assert find_checkpoint(load_config(folder / "config.yaml", ["deepspeed.zero=0"]), ranks=1) == checkpoint


CHANGES = {
    "an answer": r"it read rows\.json: 64 rows .*now there is rows\.json: 64 rows",
    "a row less": r"it read rows\.json: 64 rows .*now there is rows\.json: 63 rows",
    "a weight": r"weight 1, and .*weight 2",
    "a file more": r"it read no more, and now there is more\.json: 64 rows",
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_rows_are_named_and_gone_on_with_only_when_told(folder, change, monkeypatch, capsys):
    config = load_config(folder / "config.yaml", [f"data.mixture={folder}/mixture.yaml"])
    prepare_folder(config, fresh=True, rows=load_mixture(config.data.mixture).contents())
    checkpoint = write_checkpoint(folder / "run", 3)
    assert find_checkpoint(config, data=load_mixture(config.data.mixture).contents) == checkpoint
    rows, mixture = json.loads((folder / "rows.json").read_text()), folder / "mixture.yaml"
    if change == "an answer":
        rows[-1]["conversations"][-1]["value"] = "other"
    elif change == "a row less":
        rows.pop()
    elif change == "a weight":
        mixture.write_text(mixture.read_text().replace("}]", ", weight: 2}]"))
    else:
        (folder / "more.json").write_text(json.dumps(rows))
        mixture.write_text(mixture.read_text().replace("}]", "}, {path: more.json}]"))
    (folder / "rows.json").write_text(json.dumps(rows))
    now = load_mixture(config.data.mixture).contents
    with pytest.raises(UserError, match=f"other rows: .*{CHANGES[change]}"):
        find_checkpoint(config, data=now)
    monkeypatch.setenv("RANK", "0")
    config.run.resume = "data"
    assert find_checkpoint(config, data=now) == checkpoint
    assert "warning: the rows are not those" in capsys.readouterr().out


def test_the_same_rows_elsewhere_are_gone_on_with(folder):
    config = load_config(folder / "config.yaml", [f"data.mixture={folder}/mixture.yaml"])
    prepare_folder(config, fresh=True, rows=load_mixture(config.data.mixture).contents())
    checkpoint = write_checkpoint(folder / "run", 3)
    moved = folder / "renamed.yaml"
    (folder / "mixture.yaml").rename(moved)
    config.data.mixture = moved
    assert find_checkpoint(config, data=load_mixture(moved).contents) == checkpoint
    (folder / "run" / "rows.txt").unlink()  # a run of old: nothing but the name to compare
    with pytest.raises(UserError, match=r"data\.mixture"):
        find_checkpoint(config)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_cannot_be_written_to_is_told_by_key(folder, capfd, monkeypatch, resume):
    (folder / "file").touch()
    said = refused(folder, capfd, monkeypatch, f"run.output_dir={folder}/file/run", f"run.resume={resume}")
    assert "run.output_dir" in said
    assert "is a file" in said


def test_a_batch_is_shared_out_among_ranks_in_the_largest_micro_batches_allowed():
    run = RunSection(output_dir="x", steps=1, batch_size=48, micro_batch_size=16)
    assert [micro_batch(run, ranks) for ranks in (1, 2, 3, 8, 48)] == [16, 12, 16, 6, 1]
    check_batch(run, 8)
    with pytest.raises(UserError, match=r"run\.batch_size=48 is not a multiple of the 5 ranks"):
        check_batch(run, 5)


def test_an_error_from_a_loading_process_is_told_without_that_processs_traceback():
    wrapped = (
        "Caught ImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nOSError: Truncated\n\nThe above exception was the direct cause of the following:\n'
        "mllm.data.images.ImageError: a.json: row 3: image b.png cannot be decoded (OSError: Truncated). Replace it.\n"
    )
    said = original_message(ImageError(wrapped))
    assert said == "a.json: row 3: image b.png cannot be decoded (OSError: Truncated). Replace it."


@pytest.fixture
def finished(folder):
    """A run of five steps with its adapter and a checkpoint at the end."""
    config = load_config(folder / "config.yaml")
    prepare_folder(config, fresh=True)
    write_checkpoint(folder / "run", 5)
    (folder / "run" / "adapter").mkdir()
    return folder / "config.yaml"


@pytest.mark.parametrize("resume", ["auto", "never", "by name"])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_finished_run_is_not_touched_unasked(finished, resume, has_checkpoint):
    checkpoint = finished.parent / "run" / "checkpoints" / "checkpoint-5"
    if not has_checkpoint:
        if resume == "by name":
            return
        shutil.rmtree(checkpoint)
    settings = [f"run.resume={checkpoint if resume == 'by name' else resume}"]
    with pytest.raises(UserError, match=r"holds a finished run.*run\.overwrite=true"):
        find_checkpoint(load_config(finished, settings))
    found = find_checkpoint(load_config(finished, [*settings, "run.overwrite=true"]))
    assert found == (checkpoint if resume == "by name" else None)


def test_a_run_may_not_overwrite_what_it_starts_from(finished):
    start = f"model.start_from={finished.parent / 'run' / 'adapter'}"
    with pytest.raises(UserError, match=r"would remove model\.start_from"):
        find_checkpoint(load_config(finished, [start, "run.overwrite=true"]))


def test_a_finished_run_is_trained_longer_but_not_shorter(finished):
    assert find_checkpoint(load_config(finished, ["run.steps=7"])).name == "checkpoint-5"
    with pytest.raises(UserError, match=r"run\.steps: 5, now 4"):
        find_checkpoint(load_config(finished, ["run.steps=4"]))


@pytest.mark.parametrize("fresh", [True, False])
def test_an_adapter_is_never_beside_settings_of_another_run(finished, fresh):
    run = finished.parent / "run"
    prepare_folder(load_config(finished, ["run.steps=7"]), fresh=fresh)
    assert not (run / "adapter").exists()
    assert load_config(run / "config.yaml").run.steps == 7


def test_a_finished_image_tokenizer_is_not_trained_anew_unasked(tmp_path):
    (tmp_path / "run" / "image_tokenizer").mkdir(parents=True)
    settings = [f"run.output_dir={tmp_path / 'run'}", "run.resume=never"]
    with pytest.raises(UserError, match="holds a finished run"):
        check(load_config("image_tokenizer", settings), ranks=1)
    check(load_config("image_tokenizer", [*settings, "run.overwrite=true"]), ranks=1)


def test_a_start_says_what_it_does(folder, capsys):
    config = load_config(folder / "config.yaml")
    tell_of_checkpoint(config, None, 12)
    tell_of_checkpoint(config, Path("runs/x/checkpoints/checkpoint-6"), 12)
    said = ["starts anew: 12 steps", "goes on from runs/x/checkpoints/checkpoint-6 of 12 steps"]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize(
    "message",
    ["DataLoader worker (pid 17) is killed by signal: Killed. ", "DataLoader worker (pid(s) 3, 4) exited unexpectedly"],
)
def test_a_data_loading_process_that_died_is_told_in_words(folder, capfd, monkeypatch, message):
    def died(*_):
        raise RuntimeError(message)

    monkeypatch.setattr("train.__main__.train", died)
    said = refused(folder, capfd, monkeypatch)
    assert message.rpartition(") ")[2].strip(" .") in said
    assert "lower data.workers" in said


RANK = """
import atexit, builtins, runpy, sys
import train.config
from mllm.common.errors import UserError

class Finalised:
    def __del__(self):
        print("finalised")

def load_config(*_):
    atexit.register(print, "closed")
    raise UserError("wrong")

builtins.kept = Finalised()
train.config.load_config = load_config
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def ended(argument: str) -> tuple[int, list[str]]:
    """Status and words of a process that is `python -m train`, where settings cannot be read."""
    rank = subprocess.run([sys.executable, "-c", RANK, argument], capture_output=True, text=True, check=False)
    return rank.returncode, rank.stdout.split()


def test_a_rank_ends_before_python_is_finalised_and_after_all_else():
    """Or a thread of gloo may abort a run whose work is done."""
    assert ended("config.yaml") == (2, ["closed"])


def test_an_exception_ends_a_rank_as_usual():
    status, words = ended("--help")
    assert (status, words[-1]) == (0, "finalised")
