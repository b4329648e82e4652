"""The recipe of `smol`: packing changes no loss, a cut-off stage goes on exactly, and licences are kept."""

import json
import math
from dataclasses import replace
from random import Random

import pytest
import torch

from mllm.bases.smol import merge_trained
from mllm.data.template import IGNORED
from studies.smol import words
from studies.smol.data import Encoder, batches, collate, pack, real_branches, take
from studies.smol.plan import ALPHA, RANK, Stage
from studies.smol.shipping import read_trained, write_trained
from studies.smol.training import Learner, LowRankLinear, train_stage
from studies.smol.validation import blind
from tests.tiny import tiny_image, tiny_llava

COLOURS = {"a": "red", "b": "blue", "c": "green"}


class TinyFeatures:
    """The tower's own features of the three pictures, as LLaVA reads them; not standardised."""

    def __init__(self, model, processor):
        pixels = [
            processor.image_processor([tiny_image(c)], return_tensors="pt")["pixel_values"] for c in COLOURS.values()
        ]
        with torch.no_grad():
            states = model.model.vision_tower(torch.cat(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        self.found = dict(zip(COLOURS, states, strict=True))

    def __call__(self, keys):
        return torch.stack([self.found[key] for key in keys])


@pytest.fixture
def tiny():
    model, processor = tiny_llava()
    encode = Encoder(processor)
    branches = [
        encode(f"What is {n}?", answer, picture=key, source="made", kind="question")
        for key in COLOURS
        for n, answer in enumerate(["red", "three cells", "yes", "no"])
    ]
    branches.append(encode("How many?", "three", picture="", source="speech", kind="speech"))
    return Learner(model, TinyFeatures(model, processor), processor.tokenizer.pad_token_id), branches, processor


def stage(**changes):
    plain = Stage(
        epochs=1, projector_rate=1e-2, adapter_rate=1e-2, tokens=64, captions={}, questions={"made": 1.0}, speech=1.0
    )
    return replace(plain, **changes)


@torch.no_grad()
def test_a_packed_row_has_the_losses_of_its_questions_alone(tiny):
    learner, branches, processor = tiny
    rows = pack(branches, Random(0))
    assert max(map(len, rows)) == 4
    _, losses, _ = learner.run(rows)
    alone = []
    for branch in (branch for row in rows for branch in row):
        ids = torch.tensor([branch.head + branch.ids])
        labels = ids.clone()
        labels[:, : -branch.answer] = IGNORED
        pictures = [tiny_image(COLOURS[branch.picture])] if branch.picture else []
        pixels = processor.image_processor(pictures, return_tensors="pt") if pictures else {}
        logits = learner.model(input_ids=ids, **pixels).logits[0, -branch.answer - 1 : -1]
        alone.append(torch.nn.functional.cross_entropy(logits, ids[0, -branch.answer :], reduction="none"))
    torch.testing.assert_close(losses, torch.cat(alone))


def test_gradients_through_merged_weights_are_loras_own():
    linear, x = LowRankLinear(torch.nn.Linear(6, 5, bias=False)), torch.randn(2, 3, 6, requires_grad=True)
    torch.nn.init.normal_(linear.B)
    wanted, inputs = torch.randn(2, 3, 5), (x, linear.A, linear.B)
    plain = x @ linear.weight.T + ALPHA / RANK * (x @ linear.A.T) @ linear.B.T
    torch.testing.assert_close(linear(x), plain)
    ours = torch.autograd.grad((linear(x) * wanted).sum(), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad((plain * wanted).sum(), inputs))


def test_batches_hold_every_row_once_and_no_more_tokens_than_said(tiny):
    rows = pack(tiny[1], Random(0))
    found = batches(rows, 100, Random(0))
    assert sorted(map(id, (row for batch in found for row in batch))) == sorted(map(id, rows))
    assert all(len(batch) == 1 or collate(batch, 0, -1)["input_ids"].numel() <= 100 for batch in found)


def test_epochs_of_a_part_take_other_branches_in_turn(tiny):
    branches = tiny[1]
    half = stage(questions={"made": 0.5}, speech=0.0)
    first, second = (take(branches, half, epoch) for epoch in (0, 1))
    assert len(first) == 6
    assert {id(branch) for branch in first + second} == {id(branch) for branch in branches[:12]}


def test_a_stage_cut_off_and_taken_up_ends_as_one_that_ran_through(tmp_path, monkeypatch):
    def learned(folder, until):
        model, processor = tiny_llava()
        encode = Encoder(processor)
        branches = [
            encode(f"What {n}?", "red", picture=k, source="made", kind="question") for k in COLOURS for n in "xyz"
        ]
        learner = Learner(model, TinyFeatures(model, processor), processor.tokenizer.pad_token_id)
        torch.manual_seed(0)
        _, done = train_stage(learner, "instruct", stage(epochs=2), branches, [], folder, until=until)
        return done, {name: tensor.detach().clone() for name, tensor in learner.trained().items()}

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    _, whole = learned(tmp_path / "whole", math.inf)
    tries = 1
    while not (result := learned(tmp_path / "parts", 0))[0]:
        tries += 1
    assert tries > 2
    assert all(torch.equal(tensor, result[1][name]) for name, tensor in whole.items())


def test_a_stage_whose_predecessor_went_on_begins_anew(tiny, tmp_path):
    learner, branches, _ = tiny
    steps, _ = train_stage(learner, "settle", stage(), branches, [], tmp_path, after=1)
    assert train_stage(learner, "settle", stage(), branches, [], tmp_path, after=1, until=0) == (steps, True)
    assert train_stage(learner, "settle", stage(), branches, [], tmp_path, after=2, until=0) == (1, False)


def test_training_changes_the_projector_and_the_adapter_alone(tiny, tmp_path):
    learner, branches, _ = tiny
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    train_stage(learner, "instruct", stage(), branches, [], tmp_path)
    after = learner.model.state_dict()
    changed = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if "multi_modal_projector" in n}
    assert all(linear.B.abs().sum() > 0 for linear in learner.adapted.values())
    assert len(learner.adapted) == 14


def test_photos_whose_licence_forbids_commerce_are_left_out(tmp_path):
    def row(image, source, **meta):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
        return {
            "image": image,
            "source": source,
            "qtype": "x",
            "conversations": turns,
            **({"meta": meta} if meta else {}),
        }

    free, paid = row("free.jpg", "coco_mini", licence="CC BY 2.0"), row("nc.jpg", "coco_mini", licence="CC BY-NC 2.0")
    captions = [{**row(r["image"], "coco_mini"), "caption_by": "human"} for r in (free, paid)]
    chart = row("chart.png", "chartqa_owid_oecd")
    (tmp_path / "train.json").write_text(json.dumps([free, paid, chart, row("g.jpg", "grocery")]))
    (tmp_path / "pretrain_captions.json").write_text(json.dumps(captions))
    branches = real_branches(tmp_path, Encoder(tiny_llava()[1]))
    assert [(branch.picture, branch.kind) for branch in branches] == [
        ("free.jpg", "question"), ("g.jpg", "question"), ("free.jpg", "caption")
    ]  # fmt: skip


def test_what_is_shipped_is_what_was_trained(tiny, tmp_path):
    learner, branches, _ = tiny
    features = learner.features
    features.mean, features.std = torch.randn(32), torch.rand(32) + 0.5
    plain = features.found
    features.found = {key: (state - features.mean) / features.std for key, state in plain.items()}
    train_stage(learner, "instruct", stage(epochs=4), branches, [], tmp_path)
    with torch.no_grad():
        _, trained, _ = learner.run(pack(branches, Random(0)))

    base, _ = tiny_llava()
    learned = {name: tensor.detach() for name, tensor in learner.trained().items()}
    write_trained(base, learned, features, tmp_path / "out", {"steps": 4})
    again = read_trained(tmp_path / "out", features)
    assert again.keys() == learned.keys()
    torch.testing.assert_close(again, learned, rtol=0.02, atol=0.02)
    shipped = Learner(merge_trained(tiny_llava()[0], tmp_path / "out"), features, learner.pad)
    features.found = plain
    with torch.no_grad():
        _, losses, _ = shipped.run(pack(branches, Random(0)))
    torch.testing.assert_close(losses, trained, rtol=0.05, atol=0.05)  # kept in bfloat16
    assert (trained - losses).abs().max() < 0.1 * trained.std()


def test_words_said_of_nearly_every_picture_are_no_target(tiny, monkeypatch):
    monkeypatch.setattr(words, "COMMON", 0.5)
    _, _, processor = tiny
    encode = Encoder(processor)
    captions = {"a": "red square", "b": "three square", "c": "total square"}
    branches = [encode("What?", text, picture=key, source="made", kind="caption") for key, text in captions.items()]
    first = {word: processor.tokenizer(f" {word}")["input_ids"][0] for word in ("red", "square")}
    targets = words.said(branches, processor.tokenizer)
    assert all(first["square"] not in tokens for tokens in targets.values())
    assert first["red"] in targets["a"]


def test_the_start_by_words_learns_which_are_said(tiny, monkeypatch):
    monkeypatch.setattr(words, "COMMON", 0.5)
    learner, _, processor = tiny
    encode = Encoder(processor)
    said = zip(COLOURS, ("red", "three", "total"), strict=True)
    branches = [encode("What?", word, picture=key, source="made", kind="caption") for key, word in said]
    losses = [words.start_projector(learner, branches, processor.tokenizer, steps=steps) for steps in (1, 40)]
    assert losses[1] < 0.7 * losses[0]


def test_a_blind_guess_is_the_commonest_answer_to_that_type_of_question(tiny):
    encode = Encoder(tiny[2])

    def asked(qtype, *answers):
        return [encode("What?", a, picture="a", source="made", kind="question", qtype=qtype) for a in answers]

    known = asked("colour", "red", "red", "blue") + asked("count", "three")
    assert blind(known, asked("colour", "red", "blue", "red") + asked("count", "three")) == {"made": 0.75}
