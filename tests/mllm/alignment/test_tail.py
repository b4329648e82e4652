"""Running the end of a model on cached states is running the model."""

import pytest
import torch

from mllm.alignment import AlignSettings, CachedStates, align_routers, cache_states, nearest, routed_layers
from mllm.alignment.tail import answer_logits, entering, run
from mllm.common.errors import UserError
from tests.mllm.alignment.helpers import MOLES, NATIVES, tiny, tiny_mole, token_rows

FOUR = range(4)


def cached(model, data, folder, **options):
    first = routed_layers(model, 1)[0].depth
    cache_states(model, data, folder, **({"first_layer": first, "batch_size": 4} | options))
    return CachedStates(folder, side=data.side)


@pytest.mark.parametrize("kind", [*MOLES, *NATIVES])
@pytest.mark.parametrize("side", ["right", "left"])
def test_cached_equals_uncached_bit_for_bit_in_the_same_batch(kind, side, tmp_path):
    model, data = tiny(kind), token_rows(4, side)
    states = cached(model, data, tmp_path)
    with torch.no_grad():
        whole, cut = (answer_logits(model, *each.batch(FOUR)[:2]) for each in (data, states))
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


def test_in_another_batch_the_logits_are_equal_to_six_decimals(tmp_path):
    model, data = tiny("olmoe"), token_rows(8)
    states = cached(model, data, tmp_path)
    with torch.no_grad():
        for rows in ([5], [7, 0, 3]):
            whole, cut = (answer_logits(model, *each.batch(rows)[:2])[0] for each in (data, states))
            torch.testing.assert_close(
                cut, whole, rtol=0, atol=1e-6
            )  # measured: at most 8.6e-8 over every kind of model here


def test_training_on_cached_states_gives_the_weights_of_training_without(tmp_path):
    data = token_rows(12)
    neighbours = nearest(torch.nn.functional.normalize(torch.randn(12, 4), dim=1), k=2)
    settings, weights = AlignSettings(layers=1), []
    for use_cache in (False, True):
        model = tiny_mole()
        rows = cached(model, data, tmp_path) if use_cache else data
        weights.append(align_routers(model, rows, settings, neighbours=neighbours, steps=4, batch_size=4).weights())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5)


def test_bf16_states_of_an_fp32_model_are_rounded_and_of_a_bf16_model_are_not(tmp_path):
    data = token_rows(4)
    for name, model, worst in (("half", tiny("olmoe").to(torch.bfloat16), 0.0), ("whole", tiny("olmoe"), 0.05)):
        states = cached(model, data, tmp_path / name, dtype=torch.bfloat16)
        with torch.no_grad():
            whole, cut = (answer_logits(model, *each.batch(FOUR)[:2])[0] for each in (data, states))
        assert (whole - cut).abs().max() <= worst * whole.abs().max()


def test_a_model_is_whole_again_afterwards(tmp_path):
    model, data = tiny_mole(), token_rows(4)
    inputs, labels, _ = data.batch(FOUR)
    with torch.no_grad():
        before = answer_logits(model, inputs, labels)[0]
        entering(model, inputs, 2)
        answer_logits(model, *cached(model, data, tmp_path).batch(FOUR)[:2])
        assert torch.equal(answer_logits(model, inputs, labels)[0], before)


def test_shards_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.alignment.tail.SHARD_TOKENS", 10)
    model, data = tiny_mole(), token_rows(9)
    states = cached(model, data, tmp_path, batch_size=2)
    assert len(list(tmp_path.glob("0/*.safetensors"))) > 2
    with torch.no_grad():
        for row in (8, 0, 5):
            wanted = entering(model, data.batch([row])[0], 2)["hidden_BSD"]
            torch.testing.assert_close(states.batch([row])[0]["hidden_BSD"], wanted)
            assert torch.equal(states.batch([row])[1], data.batch([row])[1])
            assert states.batch([row])[2] == data.batch([row])[2]


def test_parts_of_several_processes_are_one(tmp_path):
    model, data = tiny_mole(), token_rows(6)
    cache_states(model, data, tmp_path, first_layer=2, rows=[0, 2, 4], part="0")
    cache_states(model, data, tmp_path, first_layer=2, rows=[1, 3, 5], part="1")
    states = CachedStates(tmp_path)
    assert len(states) == 6
    assert all(torch.equal(states.batch([row])[0]["input_ids"], data.batch([row])[0]["input_ids"]) for row in range(6))


def test_states_are_kept_for_the_same_stamp_and_made_anew_for_another(tmp_path):
    model, data = tiny_mole(), token_rows(4)
    made = []
    for stamp in ("one", "one", "two"):
        cache_states(model, data, tmp_path, first_layer=2, stamp=stamp)
        made.append((tmp_path / "0" / "index.json").stat().st_ino)
    assert made[0] == made[1] != made[2]


def test_a_model_that_cannot_be_cut_is_refused(tmp_path):
    model = tiny_mole()
    decoder = model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: (
            (args, kwargs | {"inputs_embeds": 2 * kwargs["inputs_embeds"]})
            if kwargs.get("inputs_embeds") is not None
            else None
        ),
        with_kwargs=True,
    )
    with pytest.raises(UserError, match="without a cache"):
        cache_states(model, token_rows(4), tmp_path, first_layer=2)
    assert not (tmp_path / "0").exists()


def test_an_empty_folder_and_a_layer_too_far_are_refused(tmp_path):
    with pytest.raises(UserError, match="no cached states"):
        CachedStates(tmp_path)
    with pytest.raises(UserError, match="first_layer=3"):
        entering(tiny_mole(), token_rows(2).batch([0])[0], 3)


def test_without_positions_no_logits_are_made():
    assert run(tiny_mole(), token_rows(2).batch([0])[0], None) is None
