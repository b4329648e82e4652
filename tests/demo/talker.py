"""A tiny model that talks on: always the same words, slowly enough to be watched and stopped."""

import threading
import time

import torch

from mllm.inference.generate import THREAD_NAME


class Talker:
    """Makes `model` say `words` over and over, a token every `delay` seconds, and notes what it was asked."""

    def __init__(self, model, processor, words="red three yes ", delay=0.0):
        self.ids = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
        self.delay = delay
        self.num_tokens = 0
        self.most_at_once = self._at_once = 0
        self.prompts = []  # ids the model read before each answer's first token
        self.pictures = []  # pixels its tower looked at, in the same order; nothing for prompts without
        model.register_forward_pre_hook(self._listen, with_kwargs=True)
        model.model.vision_tower.register_forward_pre_hook(self._look, with_kwargs=True)
        model.lm_head.register_forward_hook(self._speak)

    def _listen(self, module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            self.prompts.append(kwargs["input_ids"][0].tolist())

    def _look(self, module, args, kwargs):
        self.pictures.append(args[0] if args else kwargs["pixel_values"])

    def _speak(self, module, args, logits):
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.delay)
        chosen = self.ids[self.num_tokens % len(self.ids)]
        self.num_tokens += 1
        self._at_once -= 1
        return torch.zeros_like(logits).index_fill(-1, torch.tensor([chosen]), 1.0)

    def is_silent(self, during=0.3):
        """Whether no generation thread is left and no token is made for some time."""
        before = self.num_tokens
        time.sleep(during)
        return self.num_tokens == before and not any(thread.name == THREAD_NAME for thread in threading.enumerate())
