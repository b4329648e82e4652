"""What is control and what is somebody's words: the one place that tells, for writing prompts and for reading replies.

A chat template marks turns with special tokens. Text that was typed, or stands in a data row, may spell the same marks:
it is encoded as the characters it consists of, so that nobody writes a turn that was not his, and no answer that quotes
the end token teaches the model to stop there. A template made of plain words ("USER:") cannot be guarded in this way.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mllm.common.errors import UserError

InText = Literal["text", "tokens"]  # what a special token in a turn's text is: its characters, or the token
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # a tokenizer's own; `extra_special_tokens` are vocabulary

# Stands for special tokens while a template is rendered and tokenised. Private-use characters around a number that
# nobody can guess, so that nobody can type it.
_PRIVATE = secrets.randbelow(10**18)


class SpecialTokens:
    """The special tokens of a tokenizer and a chat template, by what they are for.

    *Control* are those that the tokenizer names (`NAMED`), the image token, and those that the template writes. Other
    special tokens, `<loc1>` say, are vocabulary. Control is hidden in replies and everything else in them is shown.
    Text of users and system prompts holds no special token. An answer may hold vocabulary, since the model is to learn
    it, but no control.

    Attributes:
        control: id -> text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        written: Iterable[str] = (),
        *,
        image_token: str | None = None,
        in_text: InText = "text",
    ) -> None:
        """
        Args:
            written: what the template writes around turns without any special token in them.
            in_text: "tokens" lets text hold special tokens as a template does, all but the image token.
        """
        self._tokenizer = tokenizer
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        any_added = _any_of(added.values())
        seen = {found[0] for text in written for found in any_added.finditer(text)}
        named = {getattr(tokenizer, f"{name}_token") for name in NAMED} | {image_token}
        self.control: dict[int, str] = {
            id: token.content
            for id, token in added.items()
            if token.content in named or (token.special and token.content in seen)
        }
        # Templates also write added tokens that are not special, as <think>: answers may hold them, questions may not.
        # A token "yes" that is special, but that letters make up as well, is a word; a single letter always is.
        json_text = tokenizer.backend_tokenizer.to_str()
        words = _words(json_text)
        guarded = [
            token
            for token in added.values()
            if (token.content in named | seen and len(token.content) > 1)
            or (token.special and token.content not in words)
        ]
        image = [token for token in guarded if token.content == image_token]
        in_answers = [token for token in guarded if token.content in self.control.values()]
        self._not_in_questions = _any_of(guarded if in_text == "text" else image)
        self._not_in_answers = _any_of(in_answers if in_text == "text" else image)
        self._in_template = _any_of(guarded)
        texts = [token.content for token in guarded]
        self._token_marks = {text: f"\ue000{_PRIVATE}.{number}\ue001" for number, text in enumerate(texts)}
        self._text_marks = {text: f"\ue002{_PRIVATE}.{number}\ue003" for number, text in enumerate(texts)}
        self._texts = {mark: text for text, mark in self._text_marks.items()}
        self._token_mark = f"\ue000{_PRIVATE}."
        self._text_mark = re.compile(f"\ue002{_PRIVATE}\\.[0-9]+\ue003")
        self._reader = _renamed(json_text, tuple(self._token_marks.items()))
        unknown = tokenizer.unk_token  # which ordinary characters may become
        self._ids = np.array([id for id, token in added.items() if token in guarded and token.content != unknown])
        self._unknown_mark = self._token_marks.get(unknown)

    def typed(self, text: str, *, answer: bool = False) -> str:
        """Text for a template to write; what it spells, `encode` takes as the class says."""
        forbidden = self._not_in_answers if answer else self._not_in_questions
        return forbidden.sub(lambda found: self._text_marks[found[0]], text)

    def vocabulary_in(self, text: str) -> set[str]:
        """Special tokens that are not control and that `typed` would not leave in a question."""
        return set(self._not_in_questions.findall(text)) - set(self.control.values())

    def settle(self, text: str) -> str:
        """Text as a template wrote it, made ready for `encode`. Pieces of a text may be settled one by one."""
        text = self._in_template.sub(lambda found: self._token_marks[found[0]], text)
        return self._text_mark.sub(lambda found: self._texts[found[0]], text)

    def encode(self, settled: str) -> Encoding:
        """Token ids and their offsets in `settled`, with begin and end of sequence as the tokenizer adds them; no
        begin, if one is written there.

        Raises UserError for a tokenizer that takes ordinary characters for a special token all the same.
        """
        begin = self._token_marks.get(self._tokenizer.bos_token)
        has_begin = begin is not None and settled.startswith(begin)
        encoding = self._reader.encode(settled, add_special_tokens=not has_begin)
        expected = settled.count(self._token_mark) - (settled.count(self._unknown_mark) if self._unknown_mark else 0)
        ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
        found = int((np.isin(encoding.ids, self._ids) & (ends > 0)).sum())
        if found != expected:
            raise UserError(
                f"The tokenizer reads {found} special tokens in a text with {expected}, so that it cannot keep them "
                "apart from what people write. Use another tokenizer.json."
            )
        return encoding

    def text_ids(self, text: str) -> list[int]:
        """Ids of somebody's words alone, without begin and end of sequence."""
        return self._reader.encode(self.settle(self.typed(text)), add_special_tokens=False).ids

    def spelt(self, text: str) -> str:
        """A user's text for a tokenizer of which nothing is known: an unseen character parts what spells a token."""
        return self._not_in_questions.sub(lambda found: f"{found[0][0]}\u2060{found[0][1:]}", text)

    def hidden(self, ends: Iterable[int] = ()) -> frozenset[int]:
        """Ids that a reader of replies does not see: control, and tokens that end a reply, if they are special."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset(self.control) | {id for id in ends if id in added and added[id].special}


class Reply:
    """Reads replies, for scoring and chat alike. Called like a tokenizer, so that a streamer takes it for one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: frozenset[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden

    def decode(self, ids: Sequence[int] | Tensor, **_: Any) -> str:
        """Text of one reply without its hidden tokens; what is not a token of the tokenizer has no text."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return self._tokenizer.decode([id for id in ids if id not in self._hidden], skip_special_tokens=False)


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Finds the longest of them at each place, as tokenizers do; nothing, if there are none."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    return re.compile("|".join(map(_pattern, longest_first)) or "(?!)")


def _pattern(token: AddedToken) -> str:
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text


@lru_cache(maxsize=8)
def _words(tokenizer_json: str) -> frozenset[str]:
    """What a tokenizer's model itself makes of letters, its added tokens aside."""
    model = json.loads(tokenizer_json)["model"]
    if "merges" in model:
        letters = {word for word in model["vocab"] if len(word) == 1}
        return frozenset(letters | {"".join(pair) for pair in _pairs(model["merges"])})
    return frozenset(model["vocab"] if isinstance(model["vocab"], Mapping) else (word for word, _ in model["vocab"]))


def _pairs(merges: list[str] | list[list[str]]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


@lru_cache(maxsize=8)
def _renamed(tokenizer_json: str, names: tuple[tuple[str, str], ...]) -> Tokenizer:
    """The same tokenizer with some tokens under other names, so that their old names are ordinary characters.

    `split_special_tokens` of transformers would split those that a template writes as well, and leaves it to the
    vocabulary whether "</s>" is one of its words.
    """
    new = dict(names)
    parts = json.loads(tokenizer_json)
    parts["truncation"] = parts["padding"] = None
    for token in parts["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    model: dict[str, Any] = parts["model"]
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {new.get(word, word): id for word, id in model["vocab"].items()}
    else:  # Unigram: pairs of a word and its score
        model["vocab"] = [[new.get(word, word), score] for word, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in _pairs(model["merges"]) if not new.keys() & {*pair, "".join(pair)}]
    return Tokenizer.from_str(json.dumps(parts, ensure_ascii=False))
