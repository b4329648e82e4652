"""What the page draws of the experts, against a forward of the same tokens."""

import threading

import pytest
import torch
from peft import get_peft_model

from demo import app as page
from demo.guard import Readers
from demo.routing_view import outcome_names, shares
from demo.session import ChatSession, Message
from mllm import MoleConfig, routing_context
from mllm.common.errors import UserError
from mllm.inference.generate import Record
from mllm.routing.stats import RoutingStats
from tests.tiny import tiny_image, tiny_llava

CONFIGS = {
    "plain": {"num_experts": 3},
    "null": {"num_experts": 3, "num_null_experts": 2, "top_k": 2},
    "groups": {"expert_groups": {"image": 2, "text": 2}},
}


def session_of(name="plain"):
    model, processor = tiny_llava()
    return ChatSession(get_peft_model(model, MoleConfig(r=2, **CONFIGS[name])).eval(), processor)


@pytest.fixture
def asked(tmp_path):
    tiny_image().save(tmp_path / "red.png")
    return [Message("user", "What colour is it?", (tmp_path / "red.png",))]


def answered(session, messages, **options):
    record = Record(keeps_routing=True)
    texts = list(session.reply(messages, stop=threading.Event(), max_new_tokens=6, record=record, **options))
    return record, texts


@pytest.mark.parametrize("name", CONFIGS)
def test_its_numbers_are_those_of_an_offline_forward_over_prompt_and_answer(name, asked):
    session = session_of(name)
    record, _ = answered(session, asked)
    ids = torch.tensor([[*record.prompt_ids, *record.reply_ids[:-1]]])
    picture = session.pictures.open(asked[0].images[0], "red.png")
    pixels = session.processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        session.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    context = routing_context(session.model)
    torch.testing.assert_close(record.router_probs_LTX, context.stack("router_probs_TX"))
    assert record.picks_LTX.equal(context.stack("picks_TX"))
    stats = RoutingStats()
    stats.update(context, ["all"])
    of_kind = shares(record, session.processor.image_token_id)
    assert set(of_kind) == {"image", "text"}
    for kind, sums in stats.by_modality().items():
        torch.testing.assert_close(of_kind[kind].double(), sums.shares_LO)


def test_a_bar_tells_the_share_of_null_experts(asked):
    session = session_of("null")
    record, _ = answered(session, asked)
    assert outcome_names(record) == ["0", "1", "2", "null"]
    null = shares(record, session.processor.image_token_id)["image"][0, -1]
    assert f"null: {null:.1%}" in session.draw(record, asked, None)


def test_patches_and_tokens_tell_their_probabilities_and_words_are_escaped(asked):
    session = session_of()
    record, _ = answered(session, asked)
    written = session.processor.tokenizer("<b>x", add_special_tokens=False)["input_ids"]
    record.reply_ids = [*written, *record.reply_ids][: len(record.reply_ids)]
    html = session.draw(record, asked, 1)
    assert html.count("<i style=") >= record.prompt_ids.count(session.processor.image_token_id)
    first = record.router_probs_LTX[1, record.prompt_ids.index(session.processor.image_token_id)]
    assert f"0: {first[0]:.2f}" in html
    assert ">&lt;</span>" in html


@pytest.mark.parametrize("name", CONFIGS)
def test_without_an_expert_no_token_takes_it_and_with_it_all_is_as_before(name, asked):
    session = session_of(name)
    before, _ = answered(session, asked)
    left_out, _ = answered(session, asked, without=[1])
    after, _ = answered(session, asked)
    assert before.picks_LTX[..., 1].sum() > 0
    assert left_out.picks_LTX[..., 1].sum() == 0
    assert left_out.router_probs_LTX.isfinite().all()
    assert after.picks_LTX.equal(before.picks_LTX)


def test_with_only_one_expert_every_token_takes_it_or_a_null_one(asked):
    session = session_of("null")
    record, _ = answered(session, asked, without=[1, 2])
    assert record.picks_LTX[..., 1:3].sum() == 0
    assert (record.picks_LTX.sum(-1) == 2).all()


def test_a_token_that_would_have_no_expert_left_keeps_its_own(asked):
    session = session_of("groups")
    record, _ = answered(session, asked, without=[2, 3])
    is_image_T = torch.tensor(record.prompt_ids) == session.processor.image_token_id
    image_TX = record.picks_LTX[0, : len(is_image_T)][is_image_T]
    assert image_TX[:, 2:].sum() == len(image_TX)


def test_experts_cannot_be_left_out_of_a_model_without_any(asked):
    session = ChatSession(*tiny_llava())
    with pytest.raises(UserError, match="no experts"):
        answered(session, asked, without=[0])


def test_nothing_is_recorded_while_the_view_is_closed(asked, tmp_path):
    session = session_of()
    history = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    steps = page.Steps({"tiny": session}, Readers())
    for shows in (False, True):
        turns = page.Visit([page.Turn()])
        page._show(turns, shows)
        list(steps.answer(history, turns, 0, 0.0, 4))
        assert (turns[0].record.picks_LTX is not None) == shows


@pytest.mark.parametrize("has_experts", [True, False])
def test_the_switch_is_there_for_models_with_experts_alone(has_experts):
    session = session_of() if has_experts else ChatSession(*tiny_llava())
    app = page.build_app(session, model="tiny")
    (switch,) = (block for block in app.blocks.values() if block.elem_id == "experts")
    assert switch.visible == has_experts
