"""However a question set is answered, at once, in pieces, after a kill or by two ranks: the same answers and report."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from peft import get_peft_model

from mllm.build import load, write_base_card
from mllm.evaluation.answers import collect_answers
from mllm.evaluation.questions import read_questions
from mllm.evaluation.recipe import Recipe
from mllm.inference.answering import ResumableAnswers
from mllm.inference.evaluate import evaluate_arms, stamp
from mllm.mole import MoleConfig
from mllm.routing.stats import RoutingStats
from tests.mllm.inference.questions import write_questions
from tests.mllm.inference.test_generate import lively_llava
from train.launch import free_port

PATIENCE = 120  # seconds
RECIPE = Recipe(set="s", split="test", n=3, rows="0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Base, adapter and questions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("place")
    for part in lively_llava():
        part.save_pretrained(folder / "base")
    model, _ = load(folder / "base")
    get_peft_model(model, MoleConfig(r=2, num_experts=3)).save_pretrained(folder / "mole")
    write_base_card(folder / "mole", model, folder / "base")
    write_questions(folder)
    return folder


def evaluate(place, out, **options):
    options = {"batch_size": 2, "max_new_tokens": 4} | options
    return evaluate_arms(
        str(place / "base"), {"base": None, "mole": place / "mole"}, place / "test.json", out, **options
    )


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """The folder of an evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("alone")
    evaluate(place, out)
    return out


def texts(out, arm="mole"):
    lines = (out / "answers" / f"{arm}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def assert_same_evaluation(out, other):
    """All answers, byte by byte, and all the report holds but what it was measured with."""
    for name in (f"answers/{arm}{kind}.jsonl" for arm in ("base", "mole") for kind in ("", ".blanked")):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert report_of(out) == report_of(other)


def report_of(out):
    report = json.loads((out / "report.json").read_text())
    del report["about"]["measured"]  # the commit may be another by now
    return report


def in_processes(number, place, out, die_after=None):
    """The evaluation on as many ranks as processes; returns how each ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run", "mllm.inference.evaluate"])
    port = str(free_port())
    ranks = [
        context.Process(target=be_rank, args=(rank, number, port, place, out, die_after)) for rank in range(number)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(PATIENCE)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()  # one that waits for another that is gone
    return codes


def be_rank(rank, number, port, place, out, die_after):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    add, added = ResumableAnswers.add, []

    def add_and_die(answers_file, *batch):
        add(answers_file, *batch)
        added.append(batch)
        if len(added) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    ResumableAnswers.add = add_and_die
    evaluate(place, out)


def test_two_ranks_give_the_report_of_one(place, alone, tmp_path):
    assert in_processes(2, place, tmp_path) == [0, 0]
    assert_same_evaluation(tmp_path, alone)


@pytest.mark.parametrize("batches", [2, 10])
def test_a_killed_evaluation_started_again_gives_the_report_of_an_undisturbed_one(
    batches, place, alone, tmp_path, capfd
):
    """Killed in the first arm after 2 of its 8 batches, or in the second; both have pictures and then blanked ones."""
    assert in_processes(1, place, tmp_path, die_after=batches) == [-signal.SIGKILL]
    assert not (tmp_path / "report.json").exists()
    evaluate(place, tmp_path)
    assert_same_evaluation(tmp_path, alone)
    assert f"{'base' if batches == 2 else 'mole'}: 4 of 7 were answered before" in capfd.readouterr().err


def test_one_question_at_a_time_gets_the_answers_of_batches(place, alone, tmp_path):
    evaluate(place, tmp_path, batch_size=1)
    assert texts(tmp_path) == texts(alone)
    assert len(set(texts(alone))) > 4  # or a wrong order would not show


def test_another_batch_size_after_a_kill_asks_only_what_is_left(place, alone, tmp_path, monkeypatch):
    assert in_processes(1, place, tmp_path, die_after=2) == [-signal.SIGKILL]
    asked, add = [], ResumableAnswers.add
    monkeypatch.setattr(ResumableAnswers, "add", lambda self, rows, *rest: asked.append(rows) or add(self, rows, *rest))
    evaluate(place, tmp_path, batch_size=3)
    assert sorted(map(len, asked[:2])) == [1, 2]  # rows 5 and 6 of the second batch of three, and row 7
    assert texts(tmp_path, "base") == texts(alone, "base")


def test_a_resumed_arm_counts_the_routing_of_every_prompt_once(place, alone, tmp_path):
    assert in_processes(1, place, tmp_path, die_after=10) == [-signal.SIGKILL]
    evaluate(place, tmp_path, batch_size=3)
    resumed, undisturbed = (report_of(out)["routing"]["mole"]["domains"] for out in (tmp_path, alone))
    for domain in ("general", "document"):
        for modality in ("text", "image"):
            assert resumed[domain][modality]["tokens"] == undisturbed[domain][modality]["tokens"] > 0


def test_a_finished_evaluation_asks_nothing_again(place, alone, tmp_path, monkeypatch):
    evaluate(place, tmp_path)
    monkeypatch.setattr(ResumableAnswers, "add", lambda *_: pytest.fail("a batch was answered again"))
    evaluate(place, tmp_path)
    assert_same_evaluation(tmp_path, alone)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"max_new_tokens": 3}, "another prompt, template or decoding"), ({"fresh": True}, "a fresh start was asked for")],
)
def test_answers_of_another_recipe_are_moved_aside_and_told_of(change, word, place, tmp_path, capfd):
    evaluate(place, tmp_path, blanked=False)
    before = texts(tmp_path)
    evaluate(place, tmp_path, blanked=False, **change)
    assert f"there were answers, but {word}" in capfd.readouterr().err.replace("they were given with ", "")
    assert texts(tmp_path, "mole.earlier-1") == before
    assert (
        report_of(tmp_path)["arms"]["mole"]["recipe"]
        == json.loads((tmp_path / "answers" / "mole.recipe.json").read_text())["id"]
    )


def test_a_retrained_adapter_is_another_model(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1234")
    before = stamp("base", tmp_path)
    assert stamp("base", tmp_path) == before
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345")
    assert stamp("base", tmp_path) != before
    assert stamp("base", None) != stamp("other", None)


# -- answers that are resumed -----------------------------------------------------------------------------------------


def answers_file(path, origin="a"):
    return ResumableAnswers(path / "arm.jsonl", {"model": origin}, model_id="arm", recipe=RECIPE, fresh=False)


@pytest.fixture
def answers(place):
    return collect_answers(read_questions(place / "test.json"), ["a\u2028b", "", "c", "d", "e", "f", "g"])


def test_what_was_added_is_there_when_opened_again(tmp_path, answers):
    answers_file(tmp_path).add([2, 0], [answers[2], answers[0]], RoutingStats())
    assert answers_file(tmp_path).replies == {2: "c", 0: "a\u2028b"}


def test_a_line_torn_by_a_kill_is_dropped(tmp_path, answers):
    answers_file(tmp_path).add([2], [answers[2]], RoutingStats())
    with (tmp_path / "arm.jsonl").open("a") as file:
        file.write('{"question_id": "row-0", "te')
    again = answers_file(tmp_path)
    assert again.replies == {2: "c"}
    again.add([0], [answers[0]], RoutingStats())
    assert answers_file(tmp_path).replies == {2: "c", 0: "a\u2028b"}


def test_lines_written_but_not_counted_before_a_kill_are_asked_again(tmp_path, answers, monkeypatch):
    first = answers_file(tmp_path)
    first.add([2], [answers[2]], RoutingStats())
    monkeypatch.setattr("mllm.inference.answering.torch.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.add([0], [answers[0]], RoutingStats())
    monkeypatch.undo()
    assert answers_file(tmp_path).replies == {2: "c"}


def test_a_file_that_lost_lines_is_moved_aside(tmp_path, answers, capfd):
    answers_file(tmp_path).add([2, 0], [answers[2], answers[0]], RoutingStats())
    path = tmp_path / "arm.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    assert answers_file(tmp_path).replies == {}
    assert "lines are missing" in capfd.readouterr().err
    assert (tmp_path / "arm.earlier-1.jsonl").exists()


def test_answers_of_unknown_origin_are_moved_aside_each_under_a_name_of_its_own(tmp_path):
    for text in ("one\n", "two\n"):
        (tmp_path / "arm.jsonl").write_text(text)
        assert answers_file(tmp_path).replies == {}
    assert [(tmp_path / f"arm.earlier-{number}.jsonl").read_text() for number in (1, 2)] == ["one\n", "two\n"]


def test_another_model_moves_them_aside(tmp_path, answers, capfd):
    answers_file(tmp_path).add([2], [answers[2]], RoutingStats())
    assert answers_file(tmp_path, origin="b").replies == {}
    assert "another model" in capfd.readouterr().err
