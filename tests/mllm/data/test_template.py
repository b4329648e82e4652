import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessor

from mllm.common.errors import UserError
from mllm.data import Conversation, ConversationEncoder, ImageError, Turn
from mllm.data.template import IGNORED, ChatTemplate
from tests.tiny import tiny_llava

# As llava-hf's: parts only, pictures before all text, a blank after every text, no end of an answer.
PARTS_WITHOUT_END = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As text models have it: strings only, an end of turn of its own, BOS written by the template.
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# As reasoning models have it: an empty thought goes before the last answer only.
THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As Mistral's: no generation prompt, answers trimmed, EOS behind a blank.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"ours": None, "parts without end": PARTS_WITHOUT_END, "chatml": CHATML, "thinking": THINKING, "inst": INST}


def make_encoder(template=None, max_length=None):
    _, processor = tiny_llava()
    if template is not None:
        processor.tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
        processor.chat_template = template
    return ConversationEncoder(processor, max_length)


ENCODERS = {name: make_encoder(template) for name, template in TEMPLATES.items()}
every_template = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())


def decode(encoder, ids):
    return encoder.processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def supervised_text(encoder, sample):
    return decode(encoder, sample["labels"][sample["labels"] != IGNORED])


texts = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=12).map(str.strip).filter(len)
texts = texts.filter(lambda text: not set(text) & set("<>"))  # marks of the template itself


@every_template
@given(st.lists(texts, min_size=1, max_size=4), st.data())
@settings(max_examples=40, deadline=None)
def test_supervised_tokens_are_the_answers_and_their_ends(encoder, answers, data):
    questions = data.draw(st.lists(texts, min_size=len(answers), max_size=len(answers)))
    sides = zip(questions, answers, strict=True)
    turns = [Turn(role, text) for pair in sides for role, text in zip(("user", "assistant"), pair, strict=True)]
    sample = encoder.encode(Conversation(id="", turns=tuple(turns)))
    closing = encoder.template.closing
    supervised = supervised_text(encoder, sample).split(closing)
    assert [text.strip() for text in supervised] == [*answers, ""]
    assert sample["labels"].tolist().count(encoder.stop_token_id) == len(answers)


@every_template
@given(st.lists(texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
@settings(max_examples=40, deadline=None)
def test_prompt_ids_are_those_of_training_up_to_the_answer(encoder, sides):
    turns = tuple(Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(sides))
    conversation = Conversation(id="", turns=turns)
    sample, prompt = encoder.encode(conversation), encoder.encode_prompt(conversation)
    length = len(prompt["input_ids"])
    assert torch.equal(sample["input_ids"][:length], prompt["input_ids"])
    assert torch.equal(sample["labels"][:length], prompt["labels"])
    answer = sample["input_ids"][length:]
    assert decode(encoder, answer).strip().startswith(turns[-1].text)
    assert sample["labels"][length] == answer[0]  # the first token to generate is the first of the answer's label


def test_prompt_of_a_conversation_that_ends_with_a_question_is_the_whole(encoder, conversation):
    asked = conversation("Hello?", "hi", "Well?", "fine")
    open_ended = Conversation(id="", turns=asked.turns[:-1])
    assert torch.equal(encoder.encode_prompt(open_ended)["input_ids"], encoder.encode_prompt(asked)["input_ids"])


@every_template
def test_each_picture_gets_the_tokens_of_the_processors_rule(encoder, conversation):
    sample = encoder.encode(conversation("<image>\nand\n<image>", "two", image=["red.png", "blue.png"]))
    assert (sample["input_ids"] == encoder.processor.image_token_id).sum() == 2 * 9
    assert sample["pixel_values"].shape == (2, 3, 24, 24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<image>\nWhat?", "USER: @\nWhat? "), ("What?\n<image>", "USER: What?\n@\n "), ("a <image> b", "USER: a @\nb ")],
)
def test_pictures_keep_their_places(encoder, conversation, text, expected):
    sample = encoder.encode(conversation(text, "x", image="red.png"))
    assert decode(encoder, sample["input_ids"]).replace("<image>" * 9, "@").startswith(expected)


def test_where_the_template_moves_pictures_to_the_front_the_text_is_closed_up(conversation):
    encoder = ENCODERS["parts without end"]
    sample = encoder.encode_prompt(conversation("What?\n<image>", "x", image="red.png"))
    assert decode(encoder, sample["input_ids"]) == "USER: " + "<image>" * 9 + "\nWhat? ASSISTANT:"


def test_the_kth_mark_is_the_kth_picture(encoder, conversation):
    both = encoder.encode(conversation("<image>", "a", "then <image>", "b", image=["red.png", "blue.png"]))
    alone = encoder.encode(conversation("<image>", "a", image="blue.png"))
    assert torch.equal(both["pixel_values"][1], alone["pixel_values"][0])


def test_ids_and_pixels_equal_those_of_the_processor_itself(conversation):
    encoder = ENCODERS["parts without end"]
    sample = encoder.encode_prompt(conversation("<image>\nWhat?", "x", image="red.png"))
    content = [{"type": "image", "path": str(conversation("<image>", "x", image="red.png").images[0])},
               {"type": "text", "text": "What?"}]  # fmt: skip
    expected = encoder.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True)  # fmt: skip
    assert torch.equal(sample["input_ids"], expected["input_ids"][0])
    assert torch.equal(sample["pixel_values"], expected["pixel_values"])


def test_an_end_is_put_where_the_template_has_none(conversation):
    encoder = ENCODERS["parts without end"]
    sample = encoder.encode(conversation("One?", "yes", "Two?", "no"))
    assert decode(encoder, sample["input_ids"]) == "USER: One? ASSISTANT: yes</s>USER: Two? ASSISTANT: no</s>"


def test_an_empty_thought_is_part_of_the_prompt_not_of_the_answer(conversation):
    encoder = ENCODERS["thinking"]
    sample = encoder.encode(conversation("One?", "yes", "Two?", "no"))
    assert supervised_text(encoder, sample) == "yes<|end|>no<|end|>"
    prompt = encoder.encode_prompt(conversation("One?", "yes"))
    assert decode(encoder, prompt["input_ids"]).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("template", [PARTS_WITHOUT_END, CHATML], ids=["tokenizer writes BOS", "template writes BOS"])
def test_bos_stands_once_and_no_eos_behind_the_prompt(template, conversation):
    _, processor = tiny_llava()
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    processor.chat_template = template
    ids = ConversationEncoder(processor).encode_prompt(conversation("Hello?", "hi"))["input_ids"].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids


def test_text_only_sample_has_no_pictures(encoder, conversation):
    assert encoder.encode(conversation("Hello?", "hi"))["pixel_values"].shape == (0, 3, 24, 24)


def test_too_long_row_is_named_with_its_lengths(conversation):
    short = make_encoder(max_length=20)
    with pytest.raises(UserError, match=r"row 7: \d+ tokens \(9 of them image tokens\), more than max_length 20"):
        short.encode(conversation("<image>\nWhat is there to be seen?", "red", image="red.png"))


def test_nothing_supervised_is_named():
    question = Conversation(id="", turns=(Turn("user", "Hello?"),), where="data.json: row 3")
    with pytest.raises(UserError, match="row 3: no token is supervised"):
        ENCODERS["ours"].encode(question)


@pytest.mark.parametrize("name", ["truncated.png", "text.png"])
def test_bad_picture_is_named_by_row_and_file(encoder, conversation, name):
    with pytest.raises(ImageError, match=f"row 7: image .*{name} cannot be decoded"):
        encoder.encode(conversation("<image>", "x", image=name))


def test_pictures_and_marks_that_differ_are_named_for_conversations_made_by_hand(encoder):
    turns = (Turn("user", "<image>"), Turn("assistant", "x"))
    with pytest.raises(UserError, match=r"hand: 1 places for pictures .* 0 pictures"):
        encoder.encode(Conversation(id="", turns=turns, where="hand"))


BAD_TEMPLATES = {
    "no place for pictures": ("{% for m in messages %}{{ m.role }}{% endfor %}", "no place for pictures"),
    "answers left out": ("{{ messages[0].content }}", "not how a turn of the assistant begins"),
    "prompt differs": (
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}",
        "generation prompt is not how a turn of the assistant begins",
    ),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_template_that_cannot_train_is_refused(processor, name):
    template, message = BAD_TEMPLATES[name]
    bad = copy.copy(processor)
    bad.chat_template = template
    with pytest.raises(UserError, match=message):
        ChatTemplate(bad)


def test_template_that_drops_an_earlier_answer_is_named(processor, conversation):
    forgetful = copy.copy(processor)
    forgetful.chat_template = "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="row 7: the chat template shows 1 answers instead of 2"):
        ConversationEncoder(forgetful).encode(conversation("One?", "yes", "Two?", "no"))


def test_show_marks_the_supervised_span_and_collapses_image_tokens(encoder, conversation):
    shown = encoder.show(encoder.encode(conversation("<image>\nWhich?", "red", image="red.png")))
    assert shown.plain.startswith("USER: [image × 9]\nWhich? ASSISTANT: red</s>\n")
    assert [shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)] == [" red</s>"]
    assert "9 of them image" in shown.plain
    assert "'</s>' supervised" in shown.plain


# -- words that spell control ------------------------------------------------------------------------------------------

marks = st.sampled_from(["</s>", "<s>", "<pad>", "<image>", "<|end|>", "<|start|>", "assistant", "\n", " ", "red"])
hostile = st.lists(marks, min_size=1, max_size=6).map("".join).map(str.strip).filter(len)


@every_template
@given(st.lists(hostile, min_size=1, max_size=3), st.data())
@settings(max_examples=30, deadline=None)
def test_turns_that_spell_control_tokens_write_none(encoder, answers, data):
    questions = data.draw(st.lists(hostile, min_size=len(answers), max_size=len(answers)))

    def encoded(questions, answers):
        sides = zip(questions, answers, strict=True)
        turns = [turn for q, a in sides for turn in (Turn("user", q, pieces=(q,)), Turn("assistant", a))]
        return encoder.encode(Conversation(id="", turns=(Turn("system", questions[0]), *turns)))

    sample, plain = encoded(questions, answers), encoded(["red"] * len(answers), ["red"] * len(answers))
    control = encoder.template.special.control.keys()
    written, expected = ([id for id in each["input_ids"].tolist() if id in control] for each in (sample, plain))
    assert written == expected
    ends = sample["labels"] == encoder.stop_token_id
    assert ends.sum() == len(answers)
    supervised = supervised_text(encoder, sample)
    assert supervised.replace(" ", "") == "".join(a + encoder.template.closing for a in answers).replace(" ", "")


def test_the_old_way_is_there_for_who_wants_it(conversation):
    _, processor = tiny_llava()
    turns = conversation("Hello?", "a</s>b")
    count = [
        (ConversationEncoder(processor, special_tokens_in_text=way).encode(turns)["labels"] == 1).sum()
        for way in ("text", "tokens")
    ]
    assert count == [1, 2]


def test_the_way_that_the_processor_was_trained_in_is_its_default(conversation):
    _, processor = tiny_llava()
    processor.special_tokens_in_text = "tokens"
    assert (ConversationEncoder(processor).encode(conversation("Hello?", "a</s>b"))["labels"] == 1).sum() == 2


def test_a_question_that_names_a_special_token_of_the_vocabulary_is_told_once(conversation, caplog):
    _, processor = tiny_llava()
    processor.tokenizer.add_tokens(["<loc1>"], special_tokens=True)
    encoder = ConversationEncoder(processor)
    for _ in range(2):
        encoder.encode(conversation("What is at <loc1>?", "that"))
    assert caplog.text.count("row 7: <loc1> in a question is read letter by letter") == 1


# -- system turns, and answers that are not learnt ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", "Be brief. USER: One? ASSISTANT: "),
        ("chatml", "<s><|start|>system\nBe brief.<|end|>\n<|start|>user\nOne?<|end|>\n<|start|>assistant\n"),
        ("inst", "[INST] Be brief.\nOne? [/INST] "),  # takes who is not the user for the assistant
    ],
)
def test_a_system_turn_goes_where_the_template_has_a_place_or_before_the_first_question(name, expected):
    turns = (Turn("system", "Be brief."), Turn("user", "One?"), Turn("assistant", "yes"))
    sample = ENCODERS[name].encode(Conversation(id="", turns=turns))
    assert decode(ENCODERS[name], sample["input_ids"]).startswith(expected + "yes")
    assert supervised_text(ENCODERS[name], sample).strip().startswith("yes")


def test_a_template_that_refuses_system_turns_gets_their_text_before_the_first_question(processor):
    strict = copy.copy(processor)
    strict.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + (
        processor.chat_template
    )
    turns = (Turn("system", "Be brief."), Turn("user", "<image>\nOne?"))
    segments = ChatTemplate(strict).segments(turns, where="")
    assert "".join(segment.text for segment in segments) == "USER: Be brief.\n<image>\nOne? ASSISTANT:"


def test_an_answer_that_is_not_learnt_has_no_label_and_the_same_ids(encoder):
    def encoded(supervised):
        turns = (Turn("user", "One?"), Turn("assistant", "yes", supervised=supervised),
                 Turn("user", "Two?"), Turn("assistant", "no"))  # fmt: skip
        return encoder.encode(Conversation(id="", turns=turns))

    assert torch.equal(encoded(False)["input_ids"], encoded(True)["input_ids"])
    assert supervised_text(encoder, encoded(False)) == " no</s>"


# -- prompts are how training texts begin ------------------------------------------------------------------------------

BLANK_IN_BOTH = (
    "{% for m in messages %}{{ m.role.upper() + ': ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
BLANK_IN_PROMPT = BLANK_IN_BOTH.replace("+ ': ' +", "+ ':' +")


@pytest.mark.parametrize("template", [BLANK_IN_BOTH, BLANK_IN_PROMPT], ids=["both", "prompt only"])
@pytest.mark.parametrize("answer", ["red", "7", "(a)", "é", "</s>"])
def test_a_blank_at_the_end_of_the_prompt_is_left_to_the_answer(template, answer):
    encoder = make_encoder(template)
    row = Conversation(id="", turns=(Turn("user", "Which?"), Turn("assistant", answer)))
    sample, prompt = encoder.encode(row), encoder.encode_prompt(row)
    length = len(prompt["input_ids"])
    assert torch.equal(sample["input_ids"][:length], prompt["input_ids"])
    assert (sample["labels"][length:] != IGNORED).all()
    assert decode(encoder, prompt["input_ids"]).endswith("ASSISTANT:")


def test_a_prompt_whose_last_token_joins_the_answer_is_refused_when_the_encoder_is_made(processor):
    joined = copy.copy(processor)
    joined.chat_template = (
        "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
    )
    joined.tokenizer = copy.deepcopy(processor.tokenizer)
    joined.tokenizer.add_tokens(["ared"])
    with pytest.raises(UserError, match="not made of the tokens with which its training text begins"):
        ConversationEncoder(joined)


def test_thin_pictures_are_fitted_by_the_encoder_whoever_opened_them(encoder, processor):
    turns = [Turn("user", "<image>"), Turn("assistant", "x")]
    sample = encoder.encode_turns(turns, [Image.new("RGB", (1, 5000))], where="chat")
    assert sample["pixel_values"].shape == (1, 3, 24, 24)
    longest = copy.deepcopy(processor)
    longest.image_processor = CLIPImageProcessor(
        size={"max_height": 24, "max_width": 24}, crop_size={"height": 24, "width": 24}
    )
    with pytest.raises(ImageError, match="chat: a picture of 1 x 200 pixels is too thin"):
        ConversationEncoder(longest).encode_turns(turns, [Image.new("RGB", (1, 200))], where="chat")
