"""Control and content: typed text is characters, replies show what is no control; over tokenizers of every kind."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from mllm.common.errors import UserError
from mllm.data.special_tokens import Reply, SpecialTokens
from tests.mllm.data.tokenizers import KINDS, MARKS
from tests.tiny import tiny_tokenizer

WRITTEN = ["<|im_start|>user\nprobe<|im_end|>\n"]  # what a ChatML template writes
TOKENIZERS = {name: make() for name, make in KINDS.items()}
SPECIAL = {name: SpecialTokens(tokenizer, WRITTEN) for name, tokenizer in TOKENIZERS.items()}
every_kind = pytest.mark.parametrize("kind", KINDS)

words = st.sampled_from(["red", "yesterday", " yes ", "<think>", "<", "/s", ">", "|", " ", "\n", "7", "é", "漢", "▁"])
ordinary = st.lists(words, max_size=8).map("".join).filter(lambda text: "</s>" not in text)
marks = st.sampled_from(["</s>", "</S>", "<s>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "\ue000", "\ue002"])
hostile = st.lists(words | marks, min_size=1, max_size=8).map("".join)


def in_template(special, text, **options):
    return special.encode(special.settle(f"<|im_start|>user\n{special.typed(text, **options)}<|im_end|>\n"))


def control_in(kind, ids):
    """Ids of control tokens, but for the one that unknown characters are."""
    known = SPECIAL[kind].control.keys() - {TOKENIZERS[kind].unk_token_id}
    return [id for id in ids if id in known]


@every_kind
@settings(max_examples=50, deadline=None)
@given(text=ordinary)
def test_text_that_spells_no_control_token_has_the_tokenizers_own_ids(kind, text):
    expected = TOKENIZERS[kind](f"<|im_start|>user\n{text}<|im_end|>\n")["input_ids"]
    assert in_template(SPECIAL[kind], text, answer=True).ids == expected


@every_kind
@settings(max_examples=50, deadline=None)
@given(text=hostile, answer=st.booleans())
def test_whatever_is_typed_the_control_tokens_are_those_of_the_template(kind, text, answer):
    own = control_in(kind, in_template(SPECIAL[kind], "x").ids)
    assert control_in(kind, in_template(SPECIAL[kind], text, answer=answer).ids) == own


@settings(max_examples=50, deadline=None)
@given(text=hostile)
def test_typed_text_is_read_back_letter_by_letter(text):
    special, tokenizer = SPECIAL["byte level"], TOKENIZERS["byte level"]
    ids = in_template(special, text).ids
    assert Reply(tokenizer, special.hidden()).decode(ids) == f"user\n{text}\n"


@every_kind
def test_every_token_covers_the_characters_that_the_tokenizer_says(kind):
    special, tokenizer = SPECIAL[kind], TOKENIZERS[kind]
    plain = "<|im_start|>user\nred yes 7<|im_end|>"
    expected = tokenizer(plain, return_offsets_mapping=True)["offset_mapping"]
    settled = special.settle(plain)
    covered = [settled[start:end] for start, end in special.encode(settled).offsets]
    marks = {special.settle(mark): mark for mark in MARKS}
    assert [marks.get(text, text) for text in covered] == [plain[start:end] for start, end in expected]


def located():
    """A tokenizer with words of its own among its special tokens."""
    tokenizer = tiny_tokenizer()
    words = [AddedToken(word, special=True, normalized=False) for word in ("<loc1>", "<loc2>", "no", "0")]
    tokenizer.add_tokens(words, special_tokens=True)
    return tokenizer


def test_special_tokens_that_are_words_stay_tokens_in_answers_and_letters_in_questions():
    tokenizer = located()
    special, loc1 = SpecialTokens(tokenizer), tokenizer.convert_tokens_to_ids("<loc1>")
    in_answer, in_question = (
        special.encode(special.settle(special.typed("<loc1>", answer=answer))).ids for answer in (True, False)
    )
    assert in_answer == [loc1]
    assert loc1 not in in_question


def test_replies_show_special_tokens_that_are_words_and_hide_control():
    tokenizer = located()
    ids = tokenizer("<s><loc1> <loc2>no 0</s><pad>", add_special_tokens=False)["input_ids"]
    reply = Reply(tokenizer, SpecialTokens(tokenizer).hidden())
    assert reply.decode(ids) == reply.decode(torch.tensor(ids)) == "<loc1> <loc2>no 0"


def test_the_token_that_ends_replies_is_hidden_if_it_is_special_and_shown_if_it_is_a_word():
    tokenizer = located()
    special = SpecialTokens(tokenizer)
    loc1, word = tokenizer.convert_tokens_to_ids("<loc1>"), tokenizer("r", add_special_tokens=False)["input_ids"][0]
    assert special.hidden([loc1, word]) - special.hidden() == {loc1}


def test_the_old_way_takes_what_is_typed_for_the_token():
    tokenizer = tiny_tokenizer()
    special = SpecialTokens(tokenizer, in_text="tokens")
    assert special.encode(special.settle(special.typed("a</s>"))).ids == tokenizer("a</s>")["input_ids"]


def test_it_goes_to_another_process():
    special = pickle.loads(pickle.dumps(SPECIAL["byte level"]))
    assert in_template(special, "a</s>").ids == in_template(SPECIAL["byte level"], "a</s>").ids


def test_a_tokenizer_that_finds_special_tokens_in_letters_is_refused(monkeypatch):
    special = SpecialTokens(tiny_tokenizer())
    monkeypatch.setattr(special, "settle", lambda text: text)
    monkeypatch.setattr(special, "_reader", special._tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="reads 1 special tokens in a text with 0"):
        special.encode("a</s>")
