"""Answering question sets and streaming chat, under a tiny LLaVA with random weights."""

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.data.special_tokens import Reply
from mllm.data.template import ConversationEncoder
from mllm.inference.generate import THREAD_NAME, WholeSettings, answer, evaluating, set_aside, stream
from mllm.mole import MoleConfig, routing_context
from mllm.routing.stats import RoutingStats
from tests.tiny import tiny_image, tiny_llava

QUESTIONS = [
    ("red", "What colour is the square?", "general"),
    ("blue", "How many cells are there, and are there more of them than there are circles?", "biomedical"),
    (None, "What is one and one?", "general"),
    ("green", "Total?", "document"),
    ("white", "Is there a circle left of the square?", "general"),
]


def lively_llava():
    """Tiny random weights hardly look at the prompt; larger ones give each prompt a reply of its own."""
    model, processor = tiny_llava()
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model, processor


@pytest.fixture(scope="module")
def llava():
    return lively_llava()


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number, (colour, question, domain) in enumerate(QUESTIONS):
        images = ()
        if colour:
            images = (folder / f"{colour}.png",)
            tiny_image(colour).save(images[0])
        turns = (Turn("user", "<image>\n" * len(images) + question), Turn("assistant", "never shown to the model"))
        rows.append(Conversation(id=str(number), turns=turns, images=images, domain=domain, where=f"row {number}"))
    return rows


def generating_threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def seen_pixels(model, monkeypatch):
    """Records the pixel_values that `model.generate` is called with."""
    seen, generate = [], model.generate

    def spy(**inputs):
        seen.append(inputs["pixel_values"])
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    return seen


# -- answer ----------------------------------------------------------------------------------------------------------


def test_batched_replies_equal_those_one_by_one_in_the_order_given(llava, conversations):
    batched = answer(*llava, conversations, batch_size=3, max_new_tokens=8, progress=False)
    alone = [answer(*llava, [row], max_new_tokens=8, progress=False)[0] for row in conversations]
    assert batched == alone
    assert len(set(batched)) == len(QUESTIONS)  # replies that were the same would hide a wrong order


def test_a_reply_holds_new_tokens_only(llava, conversations):
    model, processor = llava
    reply = answer(model, processor, conversations[:1], max_new_tokens=3, progress=False)[0]
    prompt = ConversationEncoder(processor).encode_prompt(conversations[0])
    inputs = {key: prompt[key][None] for key in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, pixel_values=prompt["pixel_values"], max_new_tokens=3, do_sample=False)
    assert reply == processor.decode(ids[0, prompt["input_ids"].shape[0] :], skip_special_tokens=True).strip()


def test_the_answer_of_the_row_does_not_change_the_reply(llava, conversations):
    row = conversations[0]
    unanswered = Conversation(id=row.id, turns=row.turns[:1], images=row.images)
    replies = [answer(*llava, [each], max_new_tokens=8, progress=False) for each in (row, unanswered)]
    assert replies[0] == replies[1]


def test_a_reply_ends_at_the_end_token(llava, conversations, monkeypatch):
    model, processor = llava
    ids = []
    decode = Reply.decode
    monkeypatch.setattr(Reply, "decode", lambda self, new: ids.append([new]) or decode(self, new))
    answer(model, processor, conversations[:1], max_new_tokens=8, progress=False)
    new = ids[0][0].tolist()
    end = next(position for position in range(1, 8) if new[position] not in new[:position])
    monkeypatch.setattr(model.generation_config, "eos_token_id", new[end])
    answer(model, processor, conversations[:1], max_new_tokens=8, progress=False)
    assert ids[1][0].tolist() == new[: end + 1]


def test_a_checkpoints_own_sampling_habits_do_not_reach_the_replies(llava, conversations, monkeypatch):
    greedy = answer(*llava, conversations, max_new_tokens=8, progress=False)
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "num_beams": 2}.items():
        monkeypatch.setattr(llava[0].generation_config, name, value)
    assert answer(*llava, conversations, max_new_tokens=8, progress=False) == greedy


# A value for every field of a generation config that changes replies, or ends a run, if it comes through.
HABITS = {
        "suppress_tokens": list(range(5, 300)), "begin_suppress_tokens": list(range(5, 300)), "bad_words_ids": [[60]],
        "sequence_bias": [[[60], 99.0]], "exponential_decay_length_penalty": (0, 50.0), "guidance_scale": 3.0,
        "encoder_repetition_penalty": 5.0, "stop_strings": ["e"], "prompt_lookup_num_tokens": 3, "min_length": 200,
        "forced_bos_token_id": 7, "forced_eos_token_id": 7, "no_repeat_ngram_size": 1, "num_return_sequences": 2,
        "return_dict_in_generate": True, "output_scores": True, "penalty_alpha": 0.6, "token_healing": True,
        "dola_layers": "low", "max_time": 1e-9, "cache_implementation": "static", "watermarking_config": {"bias": 9.0},
        "renormalize_logits": True, "low_memory": True, "something_of_its_own": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", HABITS)
def test_no_field_of_a_checkpoints_generation_config_reaches_scoring_or_chat(llava, conversations, monkeypatch, field):
    def replies():
        return answer(*llava, conversations[:2], max_new_tokens=4, progress=False), list(chat(llava, max_new_tokens=4))

    plain = replies()
    monkeypatch.setattr(llava[0].generation_config, field, HABITS[field], raising=False)
    assert replies() == plain


def test_of_all_fields_that_transformers_knows_only_those_listed_are_kept(llava):
    model = copy.copy(llava[0])
    settings = WholeSettings(max_new_tokens=4, eos_token_id=[1], pad_token_id=2, do_sample=False)
    model.generation_config = GenerationConfig()
    expected, _ = model._prepare_generation_config(settings)
    for name, value in GenerationConfig().to_dict().items():
        if value is None or isinstance(value, bool | int | float):
            setattr(model.generation_config, name, 0.5)
    found, passed_on = model._prepare_generation_config(settings)
    assert found.to_dict() == expected.to_dict()
    assert passed_on == {}


def test_what_a_checkpoint_is_not_followed_in_is_listed(llava, monkeypatch):
    assert set_aside(llava[0]) == {}
    monkeypatch.setattr(llava[0].generation_config, "top_p", 0.4)
    assert set_aside(llava[0]) == {"top_p": 0.4}


def test_a_reply_made_of_special_tokens_is_read_in_scoring_and_chat(monkeypatch):
    model, processor = tiny_llava()
    processor.tokenizer.add_tokens(["<loc1>", "yes"], special_tokens=True)
    said = processor.tokenizer("<loc1> yes</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]

    def say(**inputs):
        if "streamer" in inputs:
            inputs["streamer"].put(inputs["input_ids"])
            for id in said[0]:
                inputs["streamer"].put(id[None])
            inputs["streamer"].end()
        return torch.cat([inputs["input_ids"], said], 1)

    monkeypatch.setattr(model, "generate", say)
    asked = [Conversation(id="1", turns=(Turn("user", "Where?"),))]
    assert answer(model, processor, asked, progress=False) == ["<loc1> yes"]
    assert "".join(chat((model, processor))) == "<loc1> yes"


def test_blank_pictures_are_the_mean_colour_and_nothing_else_changes(llava, conversations, monkeypatch):
    model, processor = llava
    seen = seen_pixels(model, monkeypatch)
    answer(model, processor, conversations[:2], max_new_tokens=2, progress=False)
    answer(model, processor, conversations[:2], max_new_tokens=2, blank=True, progress=False)
    given, blanked = seen
    assert given.abs().sum() > 0
    assert torch.equal(blanked, torch.zeros_like(given))


def test_blanked_replies_do_not_depend_on_the_picture(llava, conversations):
    row, other = conversations[0], conversations[1]
    repainted = Conversation(id="x", turns=row.turns, images=other.images)
    seen, blind = (
        [answer(*llava, [each], max_new_tokens=8, blank=blank, progress=False) for each in (row, repainted)]
        for blank in (False, True)
    )
    assert seen[0] != seen[1]
    assert blind[0] == blind[1]


def test_the_longest_prompts_go_first(llava, conversations, monkeypatch):
    model, processor = llava
    widths, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: widths.append(inputs["input_ids"].shape[1]) or generate(**inputs)
    )
    answer(model, processor, conversations, batch_size=1, max_new_tokens=1, progress=False)
    lengths = [
        len(ConversationEncoder(processor).encode_prompt(row)["input_ids"]) for row in conversations if row.images
    ]
    assert widths[: len(lengths)] == sorted(lengths, reverse=True)


def test_training_mode_is_put_aside_and_restored(llava, conversations, monkeypatch):
    model, processor = llava
    modes, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: modes.append(model.training) or generate(**inputs))
    model.train()
    try:
        answer(model, processor, conversations[:1], max_new_tokens=1, progress=False)
        assert modes == [False]
        assert model.training
    finally:
        model.eval()


def test_a_prompt_longer_than_the_model_holds_is_refused_by_row(llava, conversations, monkeypatch):
    monkeypatch.setattr(llava[0].config.text_config, "max_position_embeddings", 40)
    with pytest.raises(UserError, match=r"row 1: \d+ tokens of prompt, but the model holds 40"):
        answer(*llava, conversations, max_new_tokens=4, progress=False)


def test_no_questions_give_no_replies(llava):
    assert answer(*llava, [], progress=False) == []


@pytest.fixture
def mole():
    model, processor = lively_llava()
    return get_peft_model(model, MoleConfig(r=2, num_experts=2)).eval(), processor


def test_an_untrained_adapter_answers_as_its_base(llava, mole, conversations):
    base = answer(*llava, conversations, max_new_tokens=8, progress=False)
    assert answer(*mole, conversations, max_new_tokens=8, progress=False) == base


def test_routing_statistics_count_every_prompt_token_once(mole, conversations):
    model, processor = mole
    stats = RoutingStats()
    context = routing_context(model)
    answer(
        model,
        processor,
        conversations,
        batch_size=2,
        max_new_tokens=4,
        progress=False,
        on_batch=lambda domains: stats.update(context, domains),
    )
    encoder = ConversationEncoder(processor)
    for domain, counted in stats.to_json()["domains"].items():
        prompts = [encoder.encode_prompt(row) for row in conversations if row.domain == domain]
        tokens = sum(len(prompt["input_ids"]) for prompt in prompts)
        assert counted["text"]["tokens"] + counted["image"]["tokens"] == tokens
    assert set(stats.shares()) == {"general", "biomedical", "document"}


# -- stream ----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "<image>\nWhat colour is the square?"}]


def chat(llava, stop=None, **options):
    options = {"images": [tiny_image()], "max_new_tokens": 8} | options
    return stream(*llava, options.pop("messages", CHAT), stop=stop or threading.Event(), **options)


def test_the_streamed_pieces_make_the_reply_of_answer(llava, conversations):
    reply = answer(*llava, conversations[:1], max_new_tokens=8, progress=False)[0]
    assert "".join(chat(llava)).strip() == reply


def test_content_as_a_list_of_parts_is_the_same_chat(llava):
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat colour is the square?"}]}]
    assert list(chat(llava, messages=parts)) == list(chat(llava))


def test_a_chat_is_asked_as_the_training_sample_of_the_same_turns(llava, conversations, monkeypatch):
    model, processor = llava
    row = conversations[0]
    turns = (*row.turns[:1], Turn("assistant", "red"), Turn("user", "How many cells are there?"))
    trained = ConversationEncoder(processor).encode_prompt(Conversation(id="0", turns=turns, images=row.images))
    asked, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: asked.append(inputs) or generate(**inputs))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    list(chat(llava, messages=messages, max_new_tokens=1))
    assert asked[0]["input_ids"][0].tolist() == trained["input_ids"].tolist()
    assert torch.equal(asked[0]["pixel_values"], trained["pixel_values"])


def test_the_stop_event_ends_the_stream_and_the_thread(llava, monkeypatch):
    model, _ = llava
    forwards, stop = [], threading.Event()

    def count_and_stop(*_):
        forwards.append(1)
        if len(forwards) == 3:
            stop.set()

    hook = model.lm_head.register_forward_hook(count_and_stop)
    try:
        list(chat(llava, stop, max_new_tokens=400))
    finally:
        hook.remove()
    assert len(forwards) == 3
    assert generating_threads() == []


def test_closing_the_stream_ends_the_thread_and_leaves_the_callers_event_alone(llava, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(
        "mllm.inference.generate.TextIteratorStreamer.put", lambda self, _: self.on_finalized_text("piece ")
    )
    pieces = chat(llava, stop, max_new_tokens=400)
    assert next(pieces) == "piece "
    assert len(generating_threads()) == 1
    pieces.close()
    assert generating_threads() == []
    assert not stop.is_set()


def test_an_error_in_the_generating_thread_surfaces_in_the_reader(llava, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llava[0], "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat(llava))
    assert generating_threads() == []


def test_temperature_samples_and_zero_does_not(llava):
    greedy = {"".join(chat(llava)) for _ in range(2)}
    torch.manual_seed(1)
    sampled = {"".join(chat(llava, temperature=2.0)) for _ in range(4)}
    assert len(greedy) == 1
    assert len(sampled) > 1


def test_marks_and_pictures_that_differ_in_number_are_refused(llava):
    with pytest.raises(UserError, match="1 places for pictures in the rendered text, but 2 pictures"):
        list(chat(llava, images=[tiny_image(), tiny_image()]))


def test_a_chat_longer_than_the_model_holds_is_refused(llava):
    with pytest.raises(UserError, match="the model holds 512"):
        list(chat(llava, messages=[{"role": "user", "content": "<image>" + "many words " * 600}]))


def test_a_picture_mark_in_parts_or_in_an_answer_is_a_word(llava):
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat is <image>?"}]},
            {"role": "assistant", "content": "<image> is a mark"}, {"role": "user", "content": "Why?"}]  # fmt: skip
    assert "".join(chat(llava, messages=said))


def test_no_part_of_a_model_in_training_drops_out_while_it_streams(llava):
    model = llava[0]
    model.train()
    model.model.vision_tower.eval()  # frozen parts may be in evaluation all the time
    before = [module.training for module in model.modules()]
    try:
        pieces = chat(llava)
        next(pieces)
        assert not any(module.training for module in model.modules())
        pieces.close()
        assert [module.training for module in model.modules()] == before
    finally:
        model.eval()


def test_a_temperature_below_zero_is_refused(llava):
    with pytest.raises(UserError, match="temperature is 0 or more, got -1"):
        list(chat(llava, temperature=-1))


def test_a_streamed_reply_is_without_dropout_and_leaves_each_module_in_its_mode():
    base, processor = lively_llava()
    torch.manual_seed(0)
    model = get_peft_model(base, MoleConfig(r=4, lora_dropout=0.9, num_experts=2))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_()
    messages = [{"role": "user", "content": "How many cells are there?"}]

    def reply():
        return "".join(stream(model, processor, messages, max_new_tokens=12, stop=threading.Event()))

    expected = (model.eval(), reply())[1]
    model.train()
    model.base_model.model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    assert reply() == expected
    assert [module.training for module in model.modules()] == modes


def test_after_streaming_the_context_holds_the_replys_routing():
    base, processor = lively_llava()
    model = get_peft_model(base, MoleConfig(r=4, num_experts=2))
    model(input_ids=torch.ones(3, 4, dtype=torch.long))
    list(stream(model, processor, [{"role": "user", "content": "Total?"}], max_new_tokens=3, stop=threading.Event()))
    assert routing_context(model).batch_size == 1


def test_overlapping_evaluations_put_the_model_back_when_the_last_is_done():
    model = torch.nn.Dropout()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model.training
    second.__exit__(None, None, None)
    assert model.training
