"""Learned rows and columns of image tokens: which place is whose, with and without a cache."""

import pytest
import torch

from mllm.common.errors import UserError
from mllm.moma.places import places
from mllm.moma.upcycling import upcycle
from tests.mllm.moma.helpers import scores, tiny_config, tiny_moma
from tests.mllm.moma.test_generation import tiny_model
from tests.mllm.moma.test_stream import SIDE, tiny_processor

BEGIN, END, CODE = 22, 23, 24
PICTURE = [BEGIN, CODE, CODE + 1, CODE + 2, CODE + 3, END]
IDS = torch.tensor([[1, *PICTURE, 2, *PICTURE[:4]], [*PICTURE, 3, *PICTURE[:5]]])


def model_with_places(preset="2t2i", **fields):
    return tiny_moma(preset, image_side=2, begin_image_token_id=BEGIN, end_image_token_id=END, **fields)


def slow_places(ids, begin, is_image):
    place, found = None, []
    for id_, is_code in zip(ids, is_image, strict=True):
        place = 0 if id_ == begin else None if place is None else place + 1
        found.append(place - 1 if is_code and place is not None else -1)
    return found


def test_places_count_from_the_last_begin_as_one_would_by_hand():
    ids = torch.randint(1, 40, (5, 60), generator=torch.Generator().manual_seed(1))
    expected = [slow_places(row.tolist(), BEGIN, (row >= CODE).tolist()) for row in ids]
    assert places(ids, BEGIN, ids >= CODE).tolist() == expected
    assert places(IDS, BEGIN, IDS >= CODE)[0].tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, -1, 0, 1, 2]


def test_a_codes_row_and_column_are_added_and_nothing_to_other_tokens():
    model = model_with_places().model
    embed = model.embed_places
    embedded = embed(torch.tensor([[-1, 0, 1, 2, 3, 4]]))[0]
    expected = [embed.rows.weight[r] + embed.columns.weight[c] for r, c in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    torch.testing.assert_close(embedded[1:5], torch.stack(expected))
    assert not embedded[[0, 5]].any()


@pytest.mark.parametrize("fields", [{}, {"mixture_of_depths": 0.5}])
@pytest.mark.parametrize("piece", [1, 3])
def test_with_a_cache_places_are_those_of_the_whole_row(fields, piece):
    model, cache, got = model_with_places(**fields), None, []
    for ids in IDS.split(piece, dim=1):
        with torch.no_grad():
            output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), scores(model, IDS, use_cache=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"guidance_scale": 2.0}, {}])
@pytest.mark.parametrize("fields", [{}, {"mixture_of_depths": 0.5}])
def test_every_kind_of_decoding_gives_with_the_cache_what_it_gives_without(options, fields):
    model = model_with_places(**fields)
    if "guidance_scale" in options:
        options = {**options, "negative_prompt_ids": torch.tensor([[1, BEGIN, CODE]] * 2)}
    options = {**options, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_documents_of_a_row_count_their_own_places():
    model = model_with_places("1t1i")
    documents = [[1, *PICTURE], [2, *PICTURE[:5]]]
    packed = torch.tensor([[*documents[0], *documents[1]]])
    position_ids = torch.tensor([[*range(len(documents[0])), *range(len(documents[1]))]])
    together = scores(model, packed, position_ids=position_ids)
    alone = [scores(model, torch.tensor([document])) for document in documents]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_they_learn_and_an_upcycled_model_keeps_them():
    seed = model_with_places("1t1i").train()
    seed(IDS, labels=IDS).loss.backward()
    for table in (seed.model.embed_places.rows, seed.model.embed_places.columns):
        assert table.weight.grad.abs().sum(1).min() > 0
    grown = upcycle(seed, {"text": 2, "image": 2})
    assert torch.equal(grown.model.embed_places.rows.weight, seed.model.embed_places.rows.weight)


def test_what_cannot_have_places_is_refused():
    with pytest.raises(UserError, match="give its token's id"):
        tiny_config(image_side=2)
    model = model_with_places("4x")
    with pytest.raises(UserError, match="give input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert not model.model.routing_context.is_recording
    with pytest.raises(UserError, match="give input_ids"):
        model(IDS, inputs_embeds=model.get_input_embeddings()(IDS))
    processor = tiny_processor()
    with pytest.raises(UserError, match=f"image_side={SIDE + 1}, the image tokenizer makes {SIDE}"):
        processor.check(tiny_model(processor, image_side=SIDE + 1).config)
    processor.check(tiny_model(processor, image_side=SIDE).config)
