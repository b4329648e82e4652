"""What a router reads belongs to the forward, the cache and the thread that it is read in."""

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss
from mllm.mole.layer import RoutingSlot
from tests.mllm.mole.helpers import gradients, wake
from tests.tiny import tiny_image, tiny_llava

PROMPT = "USER: <image>\nWhat colour is the square? ASSISTANT:"
DOMAINS = ["cold", "warm"]


def make(**adapter):
    """A LLaVA with experts whose routers go by the picture, sharply; and its processor."""
    base, processor = tiny_llava()
    processor.tokenizer.padding_side = "left"
    torch.manual_seed(0)
    config = {"r": 2, "num_experts": 3, "modules_to_save": [], "gate": "softmax"} | adapter
    model = wake(get_peft_model(base, MoleConfig(**config))).eval()
    for name, parameter in model.named_parameters():
        if "router" in name and name.endswith("weight"):
            parameter.data[:, -32:] *= 40
    return model, processor


def batch(processor, *colours, prompt=PROMPT):
    images = [tiny_image(colour) for colour in colours]
    return dict(processor(images=images, text=[prompt] * len(colours), padding=True, return_tensors="pt"))


def decode(model, cache, ids):
    """Logits of the next token, from a cache."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


# -- caches ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("adapter", [{}, {"router_reads": "picture"}, {"router": "hash_token", "balance": "none"}])
def test_conversations_decoded_in_turns_are_as_alone(adapter):
    model, processor = make(**adapter)
    prompts, steps = [batch(processor, "red"), batch(processor, "blue")], torch.tensor([[5], [9], [7]])

    def begin(prompt):
        return model(**prompt, use_cache=True).past_key_values

    alone = []
    for prompt in prompts:
        cache = begin(prompt)
        alone.append([decode(model, cache, step[None]) for step in steps])
    caches = [begin(prompt) for prompt in prompts]
    in_turns = [[decode(model, cache, step[None]) for cache in caches] for step in steps]
    for number, expected in enumerate(alone):
        assert all(torch.equal(each[number], logits) for each, logits in zip(in_turns, expected, strict=True))


@torch.no_grad()
def test_a_prompt_prefilled_in_chunks_is_as_in_one_piece_where_the_picture_is_in_one_chunk():
    model, processor = make()
    red, blue = batch(processor, "red"), batch(processor, "blue")
    whole = model(**red, use_cache=True)
    cut = int((red["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1
    first = model(input_ids=red["input_ids"][:, :cut], pixel_values=red["pixel_values"], use_cache=True)
    model(**blue, use_cache=True)  # somebody else's turn
    second = model(input_ids=red["input_ids"][:, cut:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("adapter", [{}, {"router": "hash_token", "balance": "none"}])
def test_a_second_picture_with_a_cache_is_counted_with_the_first_as_without_one(adapter):
    model, processor = make(**adapter)
    red, blue = batch(processor, "red"), batch(processor, "blue")
    ids = torch.cat([red["input_ids"], blue["input_ids"]], 1)
    model(input_ids=ids, pixel_values=torch.cat([red["pixel_values"], blue["pixel_values"]]))
    context, length = routing_context(model), blue["input_ids"].shape[1]
    pictures, numbers = context.picture_TD[-length:], context.patch_number_T[-length:]
    first = model(**red, use_cache=True)
    blue["attention_mask"] = torch.ones_like(ids)
    model(**blue, past_key_values=first.past_key_values)
    torch.testing.assert_close(context.picture_TD, pictures)
    is_image_T = context.is_image_T
    assert torch.equal(context.patch_number_T[is_image_T], numbers[is_image_T])


CHANGES = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), ["blue", "red"]),
    "chosen": (lambda cache: cache.batch_select_indices(torch.tensor([1])), ["blue"]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), ["red", "red", "blue", "blue"]),
    "cropped": (lambda cache: cache.crop(-1), ["red", "blue"]),
    "copied": (copy.deepcopy, ["red", "blue"]),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_pictures_follow_all_that_is_done_with_a_cache(change):
    model, processor = make()
    act, colours = CHANGES[change]
    cache = model(**batch(processor, "red", "blue"), use_cache=True).past_key_values
    if change == "cropped":
        decode(model, cache, torch.tensor([[3], [3]]))
    cache = act(cache) or cache
    model(**batch(processor, "green"), use_cache=True)
    expected = model(**batch(processor, *colours), use_cache=True).past_key_values
    ids = torch.full((len(colours), 1), 5)
    torch.testing.assert_close(decode(model, cache, ids), decode(model, expected, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_static_cache_that_is_reset_forgets_the_pictures():
    model, processor = make()
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    model(**batch(processor, "red"), past_key_values=cache)
    cache.reset()
    model(input_ids=torch.arange(20, 26)[None], past_key_values=cache)
    assert not routing_context(model).picture_TD.any()


@torch.no_grad()
def test_beams_that_change_places_take_their_pictures_along():
    model, processor = make(router_reads="picture")
    prompts = batch(processor, "red", "blue")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False}
    assert torch.equal(*(model.generate(**prompts, **options, use_cache=use) for use in (True, False)))


def cropped_in_a_picture(model, prompt):
    cache = model(**prompt, use_cache=True).past_key_values
    first = int((prompt["input_ids"][0] == model.config.image_token_id).nonzero().min())
    cache.crop(first + 2 - cache.get_seq_length())
    return cache


def filled_without_the_adapter(model, prompt):
    cache = DynamicCache()
    with model.disable_adapter():
        model.get_base_model().get_decoder()(input_ids=prompt["input_ids"], past_key_values=cache)
    return cache


def of_two_rows(model, prompt):
    both = {key: values.repeat(2, *[1] * (values.dim() - 1)) for key, values in prompt.items()}
    return model(**both, use_cache=True).past_key_values


@torch.no_grad()
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cropped_in_a_picture, "in the middle of a picture"),
        (filled_without_the_adapter, "does not know them"),
        (of_two_rows, "pictures of 2 rows, but the model was called with 1"),
        (lambda *_: ((torch.zeros(1),),), "must be a Cache of transformers"),
    ],
)
def test_a_cache_that_does_not_know_the_pictures_is_refused(spoil, said):
    model, processor = make()
    cache = spoil(model, batch(processor, "red"))
    with pytest.raises(UserError, match=said):
        decode(model, cache, torch.tensor([[5]]))


# -- activation checkpointing ------------------------------------------------------------------------------------------

READERS = {
    "pictures": {},
    "groups": {"expert_groups": {"image": 2, "text": 2}, "num_experts": 4},
    "domains": {"router": "oracle_domain", "expert_domains": DOMAINS, "balance": "none"},
    "each linear": {"router_input": "linear", "expert_groups": {"image": 2, "text": 2}, "num_experts": 4},
}


def two_forwards(checkpointing, order, adapter):
    """Gradients of two forwards with other tokens and domains, a forward without gradient between them and backward."""
    model, processor = make(**adapter)
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
    text = {"input_ids": torch.arange(20, 40)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    losses = []
    for domain, inputs in zip(DOMAINS, (batch(processor, "red"), text), strict=True):
        routing_context(model).set_domains([domain])
        losses.append(model(**inputs, labels=inputs["input_ids"]).loss + routing_loss(model)[0])
    with torch.no_grad():
        model(**batch(processor, "blue"))
    routing_context(model).set_domains(None)
    if order == "together":
        sum(losses).backward()
    else:
        for loss in reversed(losses) if order == "reversed" else losses:
            loss.backward()
    return gradients(model)


@pytest.mark.parametrize("order", ["together", "in order", "reversed"])
@pytest.mark.parametrize("reader", READERS)
def test_two_forwards_before_backward_are_recomputed_with_their_own_tokens(reader, order):
    plain, recomputed = two_forwards(None, order, READERS[reader]), two_forwards(False, order, READERS[reader])
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_re_entrant_checkpointing_of_routers_that_do_not_learn_is_right_too():
    plain, recomputed = (two_forwards(way, "reversed", READERS["domains"]) for way in (None, True))
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpointing_that_nobody_could_tell_its_tokens_is_refused():
    model, processor = make()
    block = model.get_base_model().get_decoder().layers[1].mlp
    inner = block.forward
    block.forward = lambda hidden: checkpoint(inner, hidden, use_reentrant=False)
    loss = model.train()(**batch(processor, "red")).logits.sum()
    with pytest.raises(UserError, match="nobody can tell which forward's tokens"):
        loss.backward()


def test_by_such_checkpointing_routers_that_read_the_token_alone_learn():
    model, processor = make(router_reads="token")
    block = model.get_base_model().get_decoder().layers[1].mlp
    inner = block.forward
    block.forward = lambda hidden: checkpoint(inner, hidden, use_reentrant=False)
    model.train()(**batch(processor, "red")).logits.sum().backward()
    assert block.mole_router["default"].router.weight.grad.any()


def test_a_whole_model_under_checkpoint_keeps_its_record_and_its_gradients():
    def step(way):
        model, processor = make()
        inputs = [batch(processor, colour) for colour in ("red", "blue")]
        logits = [way(model.train(), each) for each in inputs]
        before = dict(routing_context(model).routings)
        routing_context(model).mark_read()
        sum(each.square().mean() for each in logits).backward()
        assert all(routing_context(model).routings[layer] is routing for layer, routing in before.items())
        return gradients(model)

    plain = step(lambda model, each: model(**each).logits)
    whole = step(lambda model, each: checkpoint(lambda: model(**each).logits, use_reentrant=False))
    for name, gradient in plain.items():
        torch.testing.assert_close(whole[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_torchs_own_checkpoint_wrapper_is_followed_too():
    def step(wrap):
        model, processor = make()
        layers = model.get_base_model().get_decoder().layers
        for number, layer in enumerate(layers):
            layers[number] = checkpoint_wrapper(layer) if wrap else layer
        losses = [model.train()(**batch(processor, colour)).logits.square().mean() for colour in ("red", "blue")]
        routing_context(model).mark_read()
        sum(losses).backward()
        return list(gradients(model).values())

    for plain, wrapped in zip(step(False), step(True), strict=True):
        torch.testing.assert_close(wrapped, plain, atol=1e-6, rtol=1e-5)


def test_an_unloaded_model_checkpoints_as_before():
    model, processor = make()
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    before = base.get_decoder().layers[0]._gradient_checkpointing_func
    model.train()(**batch(processor, "red"))
    assert base.get_decoder().layers[0]._gradient_checkpointing_func is not before
    assert model.unload().get_decoder().layers[0]._gradient_checkpointing_func is before


# -- threads and devices -----------------------------------------------------------------------------------------------


def test_threads_on_one_model_each_see_their_own_forward():
    model, processor = make()
    prompts = [batch(processor, "red"), batch(processor, "blue", "blue")]
    with torch.no_grad():
        alone = [model(**prompt).logits for prompt in prompts]
    wrong, barrier = [], threading.Barrier(2)

    def work(prompt, expected):
        try:
            barrier.wait()
            for _ in range(8):
                with torch.no_grad():
                    same = torch.allclose(model(**prompt).logits, expected, atol=1e-5)
                if not same or routing_context(model).batch_size != len(expected):
                    wrong.append("another thread's tokens")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=each) for each in zip(prompts, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_without_a_forward_of_its_own_sees_the_newest():
    model, processor = make()
    thread = threading.Thread(target=lambda: model(**batch(processor, "red", "red")))
    thread.start()
    thread.join()
    assert routing_context(model).batch_size == 2


@pytest.mark.parametrize("reader", READERS)
def test_what_is_known_of_tokens_follows_the_layer_to_its_device(reader):
    model, processor = make(**READERS[reader])
    decoder, calls = model.get_base_model().get_decoder(), []
    routing_context(model).set_domains(["cold"])
    decoder.layers[1].mlp.to("meta")  # stands for another device: whatever stayed behind would be refused

    def elsewhere(block, args):
        return (args[0].to("meta"),)

    def back(block, args, output):
        calls.append(output.device.type)
        return torch.zeros(output.shape)

    decoder.layers[1].mlp.register_forward_pre_hook(elsewhere)
    decoder.layers[1].mlp.register_forward_hook(back)
    with torch.no_grad():
        model(**batch(processor, "red"))
    assert calls == ["meta"]


def test_a_blocks_routing_is_seen_by_its_own_thread_alone_and_not_copied():
    slot, seen = RoutingSlot(), []
    slot.routing = "ours"
    thread = threading.Thread(target=lambda: seen.append(slot.routing))
    thread.start()
    thread.join()
    assert seen == [None]
    assert copy.deepcopy(slot).routing is None
