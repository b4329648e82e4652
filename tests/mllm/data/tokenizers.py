"""Tiny tokenizers of every kind that language models have, with <s>, </s>, <pad>, <unk> and ChatML's marks."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

TEXT = ["USER: How many? ASSISTANT: red < / s > | im _ end > pad unk 0 1 2 yes no a b c d e f g h i j k l m n o p"] * 2
NAMED = ["<unk>", "<s>", "</s>", "<pad>"]
MARKS = ["<|im_start|>", "<|im_end|>"]


def byte_level(add_prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **_SPECIAL))


def sentencepiece(prepend_scheme):
    """As Llama's: bytes for unknown characters; a blank before the text "always", "first", "never", or as it was."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend_scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = {"special_tokens": NAMED + bytes_, "show_progress": False}
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, **special))
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in NAMED]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer)


def spelling():
    """Its merges make "</s>" of its letters."""
    tokenizer = sentencepiece("never")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"]["vocab"] |= {"</": 600, "s>": 601}
    parts["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    return _wrapped(Tokenizer.from_str(json.dumps(parts)))


def word_level():
    """Its vocabulary holds "</s>" as a word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(tokenizer, trainers.WordLevelTrainer(**_SPECIAL))


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, **_SPECIAL))


def unigram():
    """Any piece of its vocabulary may be found in a text, "</s>" too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _trained(tokenizer, trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", **_SPECIAL))


def flagged():
    """Added tokens with every flag."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([
        AddedToken("<mask>", lstrip=True, special=True, normalized=False),
        AddedToken("<sep>", rstrip=True, special=True, normalized=True),
        AddedToken("yes", single_word=True, special=True, normalized=False),
        AddedToken("<think>", special=False, normalized=False),
    ])  # fmt: skip
    return tokenizer


_SPECIAL = {"special_tokens": NAMED, "show_progress": False}


def _trained(tokenizer, trainer):
    tokenizer.train_from_iterator(TEXT, trainer)
    return _wrapped(tokenizer)


def _wrapped(tokenizer):
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    return wrapped


KINDS = {
    "byte level": byte_level,
    "byte level, blank before": lambda: byte_level(add_prefix_space=True),
    **{f"sentencepiece, {scheme}": lambda scheme=scheme: sentencepiece(scheme)
       for scheme in ("always", "first", "never", "legacy")},
    "merges that spell </s>": spelling,
    "word level": word_level,
    "word piece": word_piece,
    "unigram": unigram,
    "flagged": flagged,
}  # fmt: skip
