import pytest
import torch

from mllm.data import Collator
from mllm.data.template import IGNORED

sides = pytest.mark.parametrize("side", ["right", "left"])


def for_model(batch):
    return {key: value for key, value in batch.items() if key not in ("domains", "wheres")}


@pytest.fixture
def samples(encoder, conversation):
    """Without pictures, of different lengths."""
    return [
        encoder.encode(conversation("Hello? Is anybody there, or am I alone in this place?", "yes", source="a")),
        encoder.encode(conversation("Well?", "no", source="b")),
    ]


@pytest.mark.parametrize(("side", "padding"), [("right", slice(None, 3)), ("left", slice(-3, None))])
def test_padding_goes_to_the_side_asked_for(processor, encoder, conversation, side, padding):
    samples = [encoder.encode(conversation("<image>" + text, "x", image="red.png")) for text in ("a", "a b c d e")]
    batch = Collator(processor, side=side)(samples)
    length = len(samples[0]["input_ids"])
    kept = batch["attention_mask"][0].bool()
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(samples[1]["input_ids"]))
    assert torch.equal(batch["input_ids"][0][kept], samples[0]["input_ids"])
    assert torch.equal(batch["labels"][0][kept], samples[0]["labels"])
    assert kept[padding].all()
    assert kept.sum() == length
    assert (batch["input_ids"][0][~kept] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][0][~kept] == IGNORED).all()


def test_pictures_follow_one_another_in_the_order_of_the_rows(processor, encoder, conversation):
    samples = [encoder.encode(conversation("<image>", "x", image=f"{colour}.png")) for colour in ("red", "blue")]
    samples.insert(1, encoder.encode(conversation("Hello?", "hi")))
    pixel_values = Collator(processor)(samples)["pixel_values"]
    assert torch.equal(pixel_values, torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]]))


def test_batch_names_domains_and_rows(processor, samples):
    batch = Collator(processor)(samples)
    assert batch["domains"] == ["a", "b"]
    assert batch["wheres"] == ["data.json: row 7"] * 2


@sides
def test_batch_without_pictures_gets_a_blank_one_in_its_padding(processor, samples, side):
    batch = Collator(processor, side=side)(samples)
    is_image = batch["input_ids"] == processor.image_token_id
    assert batch["pixel_values"].shape == (1, 3, 24, 24)
    assert not batch["pixel_values"].any()
    assert is_image.sum() == 9
    assert not batch["attention_mask"][is_image].any()
    assert (batch["labels"][is_image] == IGNORED).all()
    assert [int(row.sum()) for row in batch["attention_mask"]] == [len(sample["input_ids"]) for sample in samples]


@sides
def test_a_blank_picture_makes_room_where_rows_are_equally_long(processor, samples, side):
    batch = Collator(processor, side=side)([samples[1], samples[1]])
    assert batch["input_ids"].shape == (2, len(samples[1]["input_ids"]) + 9)


@sides
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_blank_picture_leaves_loss_and_gradients_as_those_of_the_text(llava, samples, side, attention):
    model, processor = llava
    model.model.language_model.set_attn_implementation(attention)
    batch = for_model(Collator(processor, side=side)(samples))

    def gradients(**inputs):
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters()}

    loss, grads = gradients(**batch)
    text = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, 2)}
    del text["pixel_values"]
    text_loss, text_grads = gradients(**text)
    assert torch.allclose(loss, text_loss, rtol=0, atol=1e-6)
    for name, grad in grads.items():
        if "multi_modal_projector" in name:
            assert grad is not None
            assert not grad.any()
        elif text_grads[name] is not None:
            assert torch.allclose(grad, text_grads[name], rtol=1e-5, atol=1e-7), name
