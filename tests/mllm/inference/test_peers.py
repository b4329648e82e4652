"""Other vision-language models in the same table: Qwen2-VL and Idefics3, tiny and random, asked in their own way."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from mllm.build import load
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.inference.evaluate import evaluate_arms
from mllm.inference.generate import answer
from mllm.inference.peers import PeerPrompts, is_peer, load_peer
from tests.mllm.inference.peers import FAMILIES
from tests.mllm.inference.questions import write_questions
from tests.tiny import tiny_image, write_tiny_llava

QUESTIONS = [("red", 40, "What colour?"), ("blue", 60, "How many cells are there in this?"), (None, 0, "One and one?")]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def peer(folder):
    return load_peer(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pictures, rows = tmp_path_factory.mktemp("pictures"), []
    for number, (colour, size, question) in enumerate(QUESTIONS):
        images = (pictures / f"{colour}.png",) if colour else ()
        for path in images:
            tiny_image(colour, size).save(path)
        turns = (Turn("user", "<image>\n" * len(images) + question), Turn("assistant", "never shown"))
        rows.append(Conversation(id=str(number), turns=turns, images=images, where=f"row {number}"))
    return rows


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA far from zero."""
    torch.manual_seed(0)
    path, (model, _) = tmp_path_factory.mktemp("lora"), load_peer(folder)
    config = LoraConfig(r=2, target_modules=r".*(language_model|text_model).*q_proj", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(path)
    return path


def test_batched_replies_equal_those_one_by_one_with_and_without_pictures(peer, rows):
    for blank in (False, True):
        batched = answer(*peer, rows, batch_size=3, max_new_tokens=6, blank=blank, progress=False)
        assert batched == [answer(*peer, [row], max_new_tokens=6, blank=blank, progress=False)[0] for row in rows]
        assert len(set(batched)) == len(rows)  # replies that were the same would hide a wrong order


def test_the_prompt_is_what_the_models_own_processor_makes_of_the_chat(peer, rows):
    processor = peer[1]
    content = [{"type": "image", "image": tiny_image("red", 40)}, {"type": "text", "text": "What colour?"}]
    own = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    ours = PeerPrompts(processor)(rows[:1])
    assert set(ours) == set(own)
    for key, values in own.items():
        assert torch.equal(ours[key], values), key


def test_special_tokens_in_a_question_to_a_peer_are_not_the_tokens(peer):
    tokenizer = peer[1].tokenizer
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    asked, plain = (
        PeerPrompts(peer[1])([Conversation(id="", turns=(Turn("user", text, pieces=(text,)),))])["input_ids"][0]
        for text in (" ".join(["Hello", *special]), "Hello")
    )
    ids = set(tokenizer.convert_tokens_to_ids(special))
    assert [id for id in asked.tolist() if id in ids] == [id for id in plain.tolist() if id in ids]


def test_a_peer_hears_what_the_system_says(peer):
    turns = (Turn("system", "Be brief."), Turn("user", "Hello?"))
    ids = PeerPrompts(peer[1])([Conversation(id="", turns=turns)])["input_ids"][0]
    assert "Be brief." in peer[1].tokenizer.decode(ids)


def test_blanking_changes_the_pixels_and_no_token(peer, rows):
    seen, blanked = (PeerPrompts(peer[1])(rows, blank=blank) for blank in (False, True))
    assert torch.equal(seen["input_ids"], blanked["input_ids"])
    assert seen["pixel_values"].shape == blanked["pixel_values"].shape
    assert not torch.equal(seen["pixel_values"], blanked["pixel_values"])


def test_a_peft_adapter_changes_the_replies(folder, peer, rows, adapter):
    tuned = load_peer(folder, adapter=adapter)
    plain, with_adapter = (answer(*each, rows, max_new_tokens=6, progress=False) for each in (peer, tuned))
    assert plain != with_adapter


def test_an_adapter_for_another_model_is_refused_with_both_names(folder, tmp_path):
    model, _ = load(write_tiny_llava(tmp_path / "llava"))
    get_peft_model(model, LoraConfig(r=2, target_modules=["linear_1"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter .*adapter does not fit"):
        load_peer(folder, adapter=tmp_path / "adapter")


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    model, processor = load_peer(folder)
    processor.chat_template = processor.tokenizer.chat_template = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_peer(tmp_path)


def test_a_peer_and_its_adapter_stand_in_the_table_beside_a_llava(folder, adapter, tmp_path):
    base = write_tiny_llava(tmp_path / "llava")
    report = evaluate_arms(
        str(base), {"base": None}, write_questions(tmp_path), tmp_path / "out", max_new_tokens=2,
        peers={"peer": (str(folder), None), "tuned": (str(folder), adapter)},
    )  # fmt: skip
    assert list(report["arms"]) == ["base", "peer", "tuned"]
    assert {arm["mean"]["n"] for arm in report["arms"].values()} == {7}
    recipes = [report["recipes"][arm["recipe"]] for arm in report["arms"].values()]
    assert recipes[0]["template"] != recipes[1]["template"] == recipes[2]["template"]
    assert len({recipe["prompt"] for recipe in recipes}) == 1


def test_a_llava_is_not_a_peer_and_neither_is_nothing(folder, tmp_path):
    assert is_peer(folder)
    assert not is_peer(write_tiny_llava(tmp_path))
    assert not is_peer(tmp_path / "nowhere")


def test_the_embedded_base_is_told_from_a_peer_without_asking_the_hub(monkeypatch):
    asked = []
    read = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda path, **kw: asked.append(path) or read(path, **kw))
    assert not is_peer("miniworld")
    assert all(Path(path).is_dir() for path in asked)
