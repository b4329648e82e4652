"""MOLE inside a LLaVA: what is adapted, what the context knows about each token, generation."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss
from mllm.routing import RoutingStats
from tests.mllm.mole.helpers import wake
from tests.tiny import tiny_image, tiny_llava

PATCHES = 9
PROMPTS = ["USER: <image>\nWhat colour is the square? ASSISTANT:", "USER: <image>\nyes no ASSISTANT: red"]


def batch(processor, prompts=PROMPTS):
    processor.tokenizer.padding_side = "left"
    images = [tiny_image("red"), tiny_image("blue")][: len(prompts)]
    return processor(images=images, text=prompts, padding=True, return_tensors="pt")


@pytest.fixture
def llava():
    model, processor = tiny_llava()
    torch.manual_seed(0)
    return wake(get_peft_model(model, MoleConfig(r=2))), processor


def test_only_the_language_model_is_adapted_and_only_the_projector_trained_beside_it(llava):
    model, _ = llava
    adapted = [name for name, _ in model.named_parameters() if "mole_" in name]
    assert adapted
    assert all(".language_model.layers." in name for name in adapted)
    others = {n.split(".default.")[0] for n, p in model.named_parameters() if p.requires_grad and "mole_" not in n}
    assert others == {"base_model.model.model.multi_modal_projector.modules_to_save"}
    assert routing_context(model).image_token_id == model.config.image_token_id


def test_at_initialisation_a_llava_equals_its_base_bit_for_bit():
    model, processor = tiny_llava()
    model.requires_grad_(False)  # a tower with frozen weights takes a fused attention that rounds differently
    inputs = batch(processor)
    base = model(**inputs).logits
    assert torch.equal(get_peft_model(model, MoleConfig())(**inputs).logits, base)


def test_image_and_padding_tokens_are_known(llava):
    model, processor = llava
    inputs = batch(processor)
    model(**inputs)
    context = routing_context(model)
    assert context.is_image_T.view(inputs.input_ids.shape).sum(1).tolist() == [PATCHES, PATCHES]
    assert torch.equal(~context.is_pad_T, inputs.attention_mask.flatten().bool())
    assert context.is_pad_T.any()
    assert context.sample_T.bincount().tolist() == [inputs.input_ids.shape[1]] * 2
    assert context.layers == ["layers.0.mlp", "layers.1.mlp"]


def test_positional_arguments_are_understood(llava):
    model, processor = llava
    inputs = batch(processor)
    model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    assert routing_context(model).is_image_T.sum() == 2 * PATCHES
    assert routing_context(model).is_pad_T.any()


def test_generation_with_a_cache_is_followed_step_by_step(llava):
    model, processor = llava
    inputs = batch(processor)
    context, seen = routing_context(model), []
    hook = model.get_base_model().register_forward_hook(
        lambda *_: seen.append(
            (context.sequence_length, context.is_image_T.sum().item(), context.is_pad_T.sum().item())
        )
    )
    model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    hook.remove()
    length, pads = inputs.input_ids.shape[1], (inputs.attention_mask == 0).sum().item()
    assert seen == [(length, 2 * PATCHES, pads), (1, 0, 0), (1, 0, 0)]


def test_generation_with_and_without_a_cache_agree(llava):
    model, processor = llava
    inputs = batch(processor)
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_called_with_embeddings_the_modality_is_unknown():
    model = get_peft_model(tiny_llava()[0], MoleConfig(r=2, router_reads="token"))
    model(inputs_embeds=torch.randn(2, 5, 32))
    assert routing_context(model).is_image_T is None
    assert routing_context(model).is_pad_T.shape == (10,)


def test_a_router_that_reads_pictures_refuses_embeddings_in_which_nobody_can_find_them(llava):
    model, _ = llava
    with pytest.raises(UserError, match="A router reads the row's picture"):
        model(inputs_embeds=torch.randn(2, 5, 32))


def test_saved_and_loaded_with_its_projector_gives_equal_logits(llava, tmp_path):
    model, processor = llava
    for name, parameter in model.named_parameters():
        if "multi_modal_projector.modules_to_save" in name:
            parameter.data.add_(0.1)
    inputs = batch(processor)
    logits = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    base, _ = tiny_llava()
    assert not torch.equal(base(**inputs).logits, logits)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(**inputs).logits, logits)


def test_unloading_a_llava_gives_the_base_back(llava):
    model, processor = llava
    inputs = batch(processor)
    base, _ = tiny_llava()
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    with torch.no_grad():
        assert torch.equal(unloaded(**inputs).logits, base(**inputs).logits)


def test_padding_changes_neither_routing_losses_nor_statistics(llava):
    model, processor = llava
    model.peft_config["default"].z_loss_weight = 0.1
    results = []
    for pads in (0, 4):
        inputs = batch(processor, PROMPTS[:1])
        blank = torch.zeros(1, pads, dtype=torch.long)
        pad_ids = blank + processor.tokenizer.pad_token_id
        inputs["input_ids"] = torch.cat([pad_ids, inputs["input_ids"]], 1)
        inputs["attention_mask"] = torch.cat([blank, inputs["attention_mask"]], 1)
        model(**inputs)
        stats = RoutingStats()
        stats.update(routing_context(model), ["document"])
        results.append((routing_loss(model), stats))
    (left, left_stats), (right, right_stats) = results
    torch.testing.assert_close(left[0], right[0])
    torch.testing.assert_close(left[1], right[1])
    assert left_stats.shares() == right_stats.shares()
    assert left_stats.to_json()["domains"]["document"]["image"]["tokens"] == PATCHES
