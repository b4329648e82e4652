"""The command line: what users type, what they get, and how their mistakes are told."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from mllm.build import load, write_base_card
from mllm.cli import app, parse_arm, parse_arms
from mllm.errors import UserError
from tests.tiny import tiny_image, write_tiny_llava
from train.launch import main as launch

ANSWERS = {"red": "red", "blue": "blue", "green": "green"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    write_base_card(folder, model, base)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Six rows in two domains, as LLaVA JSON with pictures beside it."""
    rows = []
    for domain in ("general", "document"):
        for colour, answer in ANSWERS.items():
            tiny_image(colour).save(tmp_path / f"{domain}-{colour}.png")
            turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": answer}]
            about = {"source": f"{domain}-squares", "domain": domain, "metric": "exact_match", "answers": [answer]}
            row = {"id": f"{domain}-{colour}", "image": f"{domain}-{colour}.png", "conversations": turns}
            rows.append(row | about)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def run(*arguments: object) -> tuple[int, str]:
    """Exit status and everything printed, in one line: messages are wrapped to the terminal's width."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def spoil(data: Path, index: int, **changes: object) -> None:
    rows = json.loads(data.read_text())
    rows[index] |= changes
    data.write_text(json.dumps(rows))


def test_eval_scores_every_arm_per_domain_beside_blind_and_blanked(base, adapter, data, tmp_path):
    out = tmp_path / "report"
    status, printed = run(
        "eval", "--model", base, "--arm", "base", "--arm", f"lora={adapter}", "--questions", data, "--train", data,
        "--out", out, "--max-new-tokens", 2,
    )  # fmt: skip
    assert status == 0, printed
    report = json.loads((out / "report.json").read_text())
    for arm in ("base", "lora"):
        assert set(report["arms"][arm]["domains"]) == {"general", "document"}
        for figures in report["arms"][arm]["domains"].values():
            assert figures["n"] == 3
            assert {"score", "ci_low", "ci_high", "blind", "blanked"} <= set(figures)
    assert report["arms"]["base"]["domains"]["general"]["blind"] == pytest.approx(1 / 3)
    assert len((out / "answers" / "lora.jsonl").read_text().splitlines()) == 6
    assert (out / "report.png").stat().st_size > 1000
    assert "general" in printed


def test_limit_counts_by_source(base, data, tmp_path):
    run("eval", "--model", base, "--questions", data, "--out", tmp_path / "r", "--limit", 1, "--max-new-tokens", 1)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert [figures["n"] for figures in report["arms"]["base"]["sources"].values()] == [1, 1]


def test_an_arm_is_a_name_and_a_folder():
    assert parse_arm("mole=runs/mole/adapter") == ("mole", "runs/mole/adapter")
    assert parse_arm("base") == ("base", None)
    with pytest.raises(UserError, match="NAME=ADAPTER_FOLDER"):
        parse_arm("runs/mole/adapter")


def test_an_arm_name_given_twice_is_refused():
    assert list(parse_arms(["base", "a=x", "b=y"])) == ["base", "a", "b"]
    with pytest.raises(UserError, match="already"):
        parse_arms(["mole=x", "mole=y"])


def test_a_missing_adapter_is_named_before_any_arm_answers(base, data, tmp_path):
    arms = ("--arm", "base", "--arm", f"mole={tmp_path / 'gone'}")
    status, printed = run("eval", "--model", base, *arms, "--questions", data, "--out", tmp_path / "out")
    assert status == 2
    assert "gone" in printed
    assert "questions/s" not in printed


def test_messages_are_shown_as_they_are_not_as_markup(base, tmp_path):
    status, printed = run("eval", "--model", base, "--questions", tmp_path / "data[v2].json", "--out", tmp_path / "out")
    assert status == 2
    assert "data[v2].json" in printed


# What is wrong with the data, and what the message must hold.
BAD_ROWS = {
    "missing image": ({"image": "gone.png"}, ["row 2", "gone.png"]),
    "question without answer": (
        {"conversations": [{"from": "human", "value": "<image>\nWhat colour?"}]},
        ["row 2", "answer"],
    ),
    "more places than pictures": (
        {"conversations": [{"from": "human", "value": "<image><image>\nWhat?"}, {"from": "gpt", "value": "red"}]},
        ["row 2", "<image>"],
    ),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_named_by_eval_and_nothing_is_written(fault, base, data, tmp_path):
    changes, words = BAD_ROWS[fault]
    spoil(data, 1, **changes)
    status, printed = run("eval", "--model", base, "--questions", data, "--out", tmp_path / "out")
    assert status == 2
    assert all(word in printed for word in words), printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_a_bad_row_is_named_by_train_and_nothing_is_written(fault, base, data, tmp_path, capfd):
    changes, words = BAD_ROWS[fault]
    spoil(data, 1, **changes)
    assert launch(train_arguments(base, data, tmp_path)) == 2
    printed = capfd.readouterr().err
    assert all(word in printed for word in words), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def train_arguments(base: Path, data: Path, tmp_path: Path, *more: str) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text("stage: instruct\nmodel: {path: x, adapter: {type: mole}}\ndata: {mixture: x}\nrun: {steps: 1}\n")
    settings = [f"model.path={base}", f"data.mixture={data}", f"run.output_dir={tmp_path / 'run'}"]
    return [str(config), *settings, "run.batch_size=2", "run.micro_batch_size=1", *more]


def test_a_truncated_picture_is_named_by_check_and_by_eval(base, data, tmp_path):
    picture = data.parent / "general-blue.png"
    picture.write_bytes(picture.read_bytes()[:60])
    status, printed = run("check", data, "--model", base)
    assert status == 1
    assert "general-blue.png" in printed
    status, printed = run("eval", "--model", base, "--questions", data, "--out", tmp_path / "out")
    assert status == 2
    assert "row 2" in printed
    assert "general-blue.png" in printed
    assert not (tmp_path / "out").exists()


def test_check_passes_good_rows(base, data):
    status, printed = run("check", data, "--model", base)
    assert status == 0, printed


def test_malformed_json_is_named_by_line(base, data, tmp_path, capfd):
    data.write_text(data.read_text().replace('"domain"', "domain", 1))
    status, printed = run("eval", "--model", base, "--questions", data, "--out", tmp_path / "out")
    assert status == 2
    assert "rows.json" in printed
    assert "line 1" in printed
    assert launch(train_arguments(base, data, tmp_path)) == 2
    assert "line 1" in capfd.readouterr().err


def test_an_unknown_key_gets_the_nearest_name(base, data, tmp_path, capfd):
    assert launch(train_arguments(base, data, tmp_path, "run.batchsize=4")) == 2
    printed = capfd.readouterr().err
    assert "run.batchsize" in printed
    assert "batch_size" in printed
    assert not (tmp_path / "run").exists()


def test_an_unknown_adapter_field_gets_the_nearest_name(base, data, tmp_path, capfd):
    assert launch(train_arguments(base, data, tmp_path, "model.adapter.num_expert=4")) == 2
    assert "num_experts" in capfd.readouterr().err


def test_an_adapter_for_another_base_is_refused_with_both_names(adapter, data, tmp_path):
    other = write_tiny_llava(tmp_path / "other", seed=1)
    status, printed = run(
        "eval", "--model", other, "--arm", f"lora={adapter}", "--questions", data, "--out", tmp_path / "out"
    )
    assert status == 2
    assert str(other.name) in printed
    assert "base" in printed
    assert not (tmp_path / "out").exists()


def test_no_such_checkpoint_is_said_in_words(data, tmp_path, capfd):
    status, printed = run("eval", "--model", tmp_path / "nowhere", "--questions", data, "--out", tmp_path / "out")
    assert status == 2
    assert "nowhere" in printed
    assert launch(train_arguments(tmp_path / "nowhere", data, tmp_path)) == 2
    assert "nowhere" in capfd.readouterr().err
