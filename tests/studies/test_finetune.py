"""Fine-tuning for a study is the product's model, labels and loss without its machinery."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from mllm.data.sources import Source
from mllm.data.template import ConversationEncoder
from mllm.inference.generate import answer
from mllm.mole import MoleConfig
from studies.finetune import Schedule, cache, finetune, score_answers
from tests.tiny import tiny_image, tiny_llava
from train.config import OptimSection
from train.parts import parameter_groups
from train.trainer import answer_losses

COLOURS = ("red", "green", "blue")
FAST = Schedule(steps=100, batch_size=7, optim=OptimSection(lr=5e-3, warmup_ratio=0.0))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    records = []
    for number, colour in enumerate(COLOURS * 2):
        tiny_image(colour).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is the square?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(number), "image": f"{number}.png", "domain": colour, "conversations": turns})
    turns = [{"from": "human", "value": "How many cells are there?"}, {"from": "gpt", "value": "three"}]
    records.append({"id": "text", "domain": "text", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(records))
    return list(Source(folder / "rows.json"))


def tiny_base():
    """A tiny LLaVA whose frozen head is wide enough for answers to be learned below it."""
    model, processor = tiny_llava()
    model.lm_head.weight.data *= 20
    return model, processor


@pytest.fixture(scope="module")
def learned(rows):
    """A tiny LLaVA that has learned the rows, with experts."""
    base, processor = tiny_base()
    data = cache(base, processor, rows)
    adapter = MoleConfig(r=8, num_experts=3, modules_to_save=[])
    return finetune(base, adapter, data, FAST), processor, data


def test_cached_embeddings_give_the_loss_of_the_pictures(rows):
    model, processor = tiny_llava()
    data, encoder = cache(model, processor, rows), ConversationEncoder(processor)
    for row, conversation in enumerate(rows):
        sample = encoder.encode(conversation)
        labels = sample["labels"][None]
        pixels = {"pixel_values": sample["pixel_values"]} if len(sample["pixel_values"]) else {}
        whole = model(input_ids=sample["input_ids"][None], attention_mask=sample["attention_mask"][None], **pixels)
        wanted = torch.nn.functional.cross_entropy(
            whole.logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="mean"
        )
        inputs, cached_labels, _ = data.batch([row])
        assert torch.equal(cached_labels, labels)
        torch.testing.assert_close(answer_losses(model, inputs, labels).loss_T.mean(), wanted)


def test_finetuning_learns_and_leaves_the_base_as_it_was(rows):
    base, processor = tiny_base()
    data = cache(base, processor, rows)
    before = score_answers(base, data)
    for adapter in (MoleConfig(r=4, modules_to_save=[]), LoraConfig(r=4, target_modules=["up_proj", "down_proj"])):
        model = finetune(base, adapter, data, FAST)
        assert score_answers(model, data).loss.mean() < before.loss.mean() - 0.5
        base = model.unload()
        assert np.array_equal(score_answers(base, data).loss, before.loss)


def test_the_same_seed_gives_the_same_weights(rows):
    weights = []
    for _ in range(2):
        base, processor = tiny_base()
        data = cache(base, processor, rows)
        model = finetune(base, MoleConfig(r=2, modules_to_save=[]), data, Schedule(3, 2, OptimSection(), seed=5))
        weights.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_exact_is_what_greedy_decoding_would_answer(rows, learned):
    model, processor, _ = learned
    texts = answer(model, processor, rows, batch_size=4, max_new_tokens=12, progress=False)
    for words in (None, "red"):  # the answers that were learned, and one answer for all
        asked = rows
        if words:
            asked = [replace(row, turns=(row.turns[0], replace(row.turns[1], text=words))) for row in rows]
        wanted = [conversation.turns[-1].text for conversation in asked]
        exact = score_answers(model, cache(model, processor, asked)).exact
        assert exact.any()
        assert exact.tolist() == [text == right for text, right in zip(texts, wanted, strict=True)]
    assert not exact.all()


@pytest.mark.parametrize("separable", [True, False])
def test_a_rate_of_routers_own_holds_only_where_pictures_tell_them_how_to_start(rows, separable, monkeypatch):
    base, processor = tiny_base()
    data = cache(base, processor, [row for row in rows if row.images] * 4)
    if not separable:
        domains = np.random.default_rng(0).permutation(data.domains).tolist()  # that no picture tells
        data = replace(data, domains=domains)
    rates = {}

    def groups(model, optim):
        rates.update({group["part"]: group["lr"] for group in parameter_groups(model, optim)})
        return parameter_groups(model, optim)

    monkeypatch.setattr("studies.finetune.parameter_groups", groups)
    optim = OptimSection(lr=1e-2, part_lr={"router": 1e-3})
    adapter = MoleConfig(r=2, num_experts=3, expert_domains=list(COLOURS), modules_to_save=[])
    finetune(base, adapter, data, Schedule(steps=1, batch_size=4, optim=optim))
    assert (rates["experts"], rates["router"]) == (1e-2, 1e-3 if separable else 1e-2)


def test_rows_of_one_domain_only():
    order = Schedule(steps=4, batch_size=3, optim=OptimSection(), seed=1).order([4, 5, 7])
    assert {row for batch in order for row in batch} == {4, 5, 7}
