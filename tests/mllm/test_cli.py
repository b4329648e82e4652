"""The command line: what users type, what they get, and how their mistakes are told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import mllm
from mllm.build import load, write_base_card
from mllm.cli import app, parse_arm, parse_arms, parse_files, parse_peers
from mllm.common.errors import UserError
from mllm.common.processes import module_environment
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


def test_routing_lists_every_choice_with_a_line_on_it():
    status, printed = run("routing")
    assert status == 0, printed
    for name in ("router", "gate", "balance", "null_logits", "frozen_random", "straight_through", "global_batch"):
        assert name in printed
    assert "A pick weighs its probability." in printed


# -- answers that are there already ----------------------------------------------------------------------------------


@pytest.fixture
def answered(base, adapter, data, tmp_path) -> Path:
    """The answers folder of an evaluation of two arms."""
    arms = ("--arm", "base", "--arm", f"lora={adapter}")
    run("eval", "--model", base, *arms, "--questions", data, "--out", tmp_path / "r", "--max-new-tokens", 2)
    return tmp_path / "r" / "answers"


@pytest.mark.parametrize("with_questions", [True, False])
def test_score_gives_the_figures_of_eval_without_a_model(with_questions, answered, data, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.inference.evaluate.load", lambda *_, **__: pytest.fail("a model was loaded"))
    options = ("--questions", data) if with_questions else ()
    files = [answered / "base.jsonl", answered / "lora.jsonl"]
    status, printed = run("score", *files, *options, "--out", tmp_path / "again")
    assert status == 0, printed
    before, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("r", "again"))
    assert again["arms"] == before["arms"]  # blanked scores and recipe too
    assert again["recipes"] == before["recipes"]
    assert again["differences"] == before["differences"]


def test_score_grades_llavas_own_answer_files_and_prints_without_out(data, tmp_path):
    replies = {row["id"]: "red" for row in json.loads(data.read_text())}
    lines = [json.dumps({"question_id": name, "text": text}) for name, text in replies.items()]
    (tmp_path / "theirs.jsonl").write_text("\n".join(lines))
    status, printed = run("score", tmp_path / "theirs.jsonl", "--questions", data)
    assert status == 0, printed
    assert "33.3" in printed
    assert "template unknown" in printed


def test_score_of_a_limited_evaluation_takes_the_same_limit(base, data, tmp_path):
    run("eval", "--model", base, "--questions", data, "--out", tmp_path / "r", "--limit", 1, "--max-new-tokens", 1)
    answers = tmp_path / "r" / "answers" / "base.jsonl"
    assert run("score", answers, "--questions", data)[0] == 2
    assert run("score", answers, "--questions", data, "--limit", 1)[0] == 0


def test_compare_tests_two_answer_files_domain_by_domain(answered, tmp_path):
    files = (answered / "base.jsonl", f"tuned={answered / 'lora.jsonl'}")
    status, printed = run("compare", *files, "--out", tmp_path / "versus")
    assert status == 0, printed
    assert "tuned against base" in printed
    assert "McNemar" in printed
    comparison = json.loads((tmp_path / "versus" / "compare.json").read_text())
    assert comparison["names"] == ["base", "tuned"]
    assert set(comparison["domains"]) == {"general", "document"}


def test_compare_of_other_questions_is_refused_in_words(answered, tmp_path):
    lines = (answered / "lora.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[1:]))
    status, printed = run("compare", answered / "base.jsonl", tmp_path / "fewer.jsonl")
    assert status == 2
    assert "5 graded answers" in printed


def test_an_answers_file_may_have_a_name_and_two_of_one_name_are_refused(tmp_path):
    assert parse_files(["a=x/mole.jsonl", "y/mole.jsonl"]) == {"a": Path("x/mole.jsonl"), "mole": Path("y/mole.jsonl")}
    (tmp_path / "lr=1.jsonl").touch()
    assert parse_files([str(tmp_path / "lr=1.jsonl")]) == {"lr=1": tmp_path / "lr=1.jsonl"}
    with pytest.raises(UserError, match=r"already; say NAME=y/mole\.jsonl"):
        parse_files(["x/mole.jsonl", "y/mole.jsonl"])


def test_a_peer_is_a_name_a_model_and_perhaps_an_adapter():
    assert parse_peers(["qwen=Qwen/Qwen2-VL", "t=a,b"]) == {"qwen": ("Qwen/Qwen2-VL", None), "t": ("a", "b")}
    for wrong in (["Qwen/Qwen2-VL"], ["qwen="], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="NAME=MODEL"):
            parse_peers(wrong)


def test_a_peer_named_like_an_arm_is_refused(base, data, tmp_path):
    status, printed = run("eval", "--model", base, "--peer", "base=x", "--questions", data, "--out", tmp_path / "out")
    assert status == 2
    assert "same name" in printed


def test_ranks_start_torchrun_with_the_very_command_line(data, tmp_path, monkeypatch, kept_environment):
    class Started(SystemExit):
        """What would have replaced this process."""

    def start(_, words):
        raise Started(words)

    line = ["eval", "--questions", str(data), "--out", str(tmp_path / "out"), "--ranks", "2"]
    monkeypatch.setattr("mllm.cli.os.execv", start)
    monkeypatch.setattr("sys.argv", ["mllm", *line])
    words = CliRunner().invoke(app, line).exception.code
    assert words[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mllm.cli",
        *line,
    ]


# -- the command itself ----------------------------------------------------------------------------------------------


def imported_by(*words: str) -> tuple[str, set[str]]:
    """What `mllm WORDS` prints, and the modules it imports on the way."""
    command = [sys.executable, "-X", "importtime", "-m", "mllm.cli", *words]
    said = subprocess.run(command, env=module_environment(), capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    names = (line.rpartition("|")[2].strip() for line in said.stderr.splitlines() if line.startswith("import time:"))
    return said.stdout, set(names)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--help"], ["train", "chat", "quickstart"]),
        (["eval", "--help"], ["--ranks", "--peer"]),
        (["train", "--help"], ["--ranks", "section.key=value"]),
        (["conflict", "--help"], ["--report", "--report-all"]),
        (["chat", "--help"], ["--adapter", "--device", "--port", "--share"]),
    ],
)
def test_help_lists_the_options_and_imports_nothing_that_takes_seconds(words, options):
    said, modules = imported_by(*words)
    assert not {name.partition(".")[0] for name in modules} & {
        "torch",
        "transformers",
        "peft",
        "open_clip",
        "deepspeed",
        "gradio",
        "numpy",
    }  # pydantic is imported by typer itself, for its options; that takes milliseconds
    assert all(option in said for option in options), said


def test_every_public_name_is_there_for_whoever_imports_the_package():
    assert all(getattr(mllm, name).__name__.rpartition(".")[2] == name for name in mllm.__all__)
    assert mllm.__getattr__("load") is load
    with pytest.raises(AttributeError, match="nonsense"):
        mllm.__getattr__("nonsense")


@pytest.mark.parametrize("option", ["--ranks", "--limit", "--batch-size", "--max-new-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_count_below_one_is_refused_before_anything_is_loaded(option, value, data, tmp_path):
    status, printed = run("eval", "--questions", data, "--out", tmp_path / "out", option, value)
    assert status == 2
    assert option in printed


def test_an_out_that_cannot_be_a_folder_is_told_before_anything_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.inference.evaluate.load", lambda *_, **__: pytest.fail("a model was loaded"))
    status, printed = run("eval", "--questions", data, "--out", data / "report")
    assert status == 2
    assert "--out" in printed


def test_a_mistake_is_told_before_ranks_are_started(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.cli.become", lambda *_: pytest.fail("ranks were started"))
    arms = ("--arm", f"mole={tmp_path / 'gone'}")
    status, printed = run("eval", *arms, "--questions", data, "--out", tmp_path / "out", "--ranks", 2)
    assert status == 2
    assert "gone" in printed
