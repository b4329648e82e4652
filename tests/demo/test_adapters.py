"""Several adapters of one base in one chat."""

import threading

import pytest
from peft import LoraConfig, get_peft_model

from demo import app as page
from demo.__main__ import _adapters
from demo.guard import Readers
from demo.scheduler import Places
from demo.session import ChatSession, Message
from mllm import MoleConfig
from mllm.build import share_weights
from mllm.common.errors import UserError
from tests.demo.talker import Talker
from tests.tiny import tiny_llava

HISTORY = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]


def talking(words, **options):
    model, processor = tiny_llava()
    Talker(model, processor, words)
    return ChatSession(model, processor, **options)


@pytest.fixture
def steps():
    places = Places()
    sessions = {"a": talking("red ", places=places), "b": talking("three ", places=places)}
    return page.Steps(sessions, Readers())


def answer(steps, turns):
    turns.append(page.Turn())
    *_, (history, *_), _, _ = steps.answer(HISTORY, turns, len(turns) - 1, 0.0, 12)
    return history[-1]["content"][0]["text"]


def test_the_next_answer_comes_from_the_adapter_that_was_chosen(steps):
    turns = page.Visit()
    assert set(answer(steps, turns).split()) == {"red"}
    page._choose(turns, "b")
    assert "three" in answer(steps, turns)
    page._choose(turns, "no such")
    assert set(answer(steps, turns).split()) == {"red"}


def test_what_one_adapter_began_is_not_continued_by_another(steps):
    turns = page.Visit()
    answer(steps, turns)
    page._choose(turns, "b")
    assert page._go_on(HISTORY, turns)[4] is None


def test_comparing_answers_the_last_question_by_all_side_by_side_and_leaves_the_conversation(steps):
    told = [*HISTORY, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
    *_, last = steps.compare(told, page.Visit(), 12)
    first, second = last["value"].split("</div>")[:2]
    assert 'data-name="a"' in first
    assert "red red" in first
    assert 'data-name="b"' in second
    assert "three" in second
    assert len(told) == 2


def test_words_and_names_in_columns_are_escaped():
    html = page._columns({"<x>": ("<b>", "<i>drawn</i>")})
    assert "&lt;x&gt;" in html
    assert "&lt;b&gt;" in html
    assert "<i>drawn</i>" in html


def test_each_column_has_its_own_routing_where_the_view_is_open():
    model, processor = tiny_llava()
    routed = ChatSession(get_peft_model(model, MoleConfig(r=2, num_experts=3)).eval(), processor)
    turns = page.Visit()
    turns.shows_experts = True
    *_, last = page.Steps({"mole": routed, "base": talking("red ")}, Readers()).compare(HISTORY, turns, 4)
    assert last["value"].count('class="routing"') == 1


def test_adapters_hold_one_base_in_memory_and_answer_as_if_alone():
    configs = {"mole": MoleConfig(r=2, num_experts=2), "lora": LoraConfig(r=2, target_modules="all-linear")}
    questions, said = [Message("user", "Go on.")], {}
    base, processor = tiny_llava()
    held = share_weights(base)
    for name, config in configs.items():
        alone = get_peft_model(tiny_llava()[0], config).eval()
        shared = get_peft_model(tiny_llava()[0], config).eval()
        shared.load_state_dict(alone.state_dict())
        share_weights(shared, held)
        pointers = {parameter.data_ptr() for parameter in shared.parameters()}
        assert {parameter.data_ptr() for parameter in base.parameters()} <= pointers
        for model in (alone, shared):
            texts = ChatSession(model, processor).reply(questions, stop=threading.Event(), max_new_tokens=8)
            said.setdefault(name, []).append(list(texts))
        assert said[name][0] == said[name][1]


def test_an_adapter_is_called_by_its_run_and_several_have_the_base_beside_them():
    assert _adapters([]) == {"base": None}
    assert _adapters(["runs/experts/adapter"]) == {"experts": "runs/experts/adapter"}
    assert _adapters(["a=x", "b=y"]) == {"a": "x", "b": "y", "base": None}


@pytest.mark.parametrize("texts", [["a=x", "a=y"], ["=x"], ["a="], ["base=x"]])
def test_a_name_that_is_missing_or_taken_is_refused(texts):
    with pytest.raises(UserError, match="each name once"):
        _adapters(texts)
