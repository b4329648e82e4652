import pytest
import torch

from mllm.common.errors import UserError
from mllm.routing import RoutingContext, route

IMAGE = 9


def routing(tokens, requires_grad=False):
    return route(torch.randn(tokens, 3, requires_grad=requires_grad), top_k=1, gate="none")


def test_tokens_are_known_from_the_ids_and_a_two_dimensional_mask():
    context = RoutingContext(IMAGE)
    context.begin(
        input_ids=torch.tensor([[1, IMAGE, 2], [IMAGE, IMAGE, 3]]), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]])
    )
    assert context.is_image_T.tolist() == [False, True, False, True, True, False]
    assert context.is_pad_T.tolist() == [True, False, False, False, False, False]
    assert context.sample_T.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_decode_step_reads_the_last_columns_of_the_longer_mask():
    context = RoutingContext(IMAGE)
    context.begin(input_ids=torch.tensor([[5], [6]]), attention_mask=torch.tensor([[0, 1, 1], [1, 1, 0]]))
    assert context.is_pad_T.tolist() == [False, True]


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 1, 3, 3)])
def test_without_a_two_dimensional_mask_nothing_is_padding(mask):
    context = RoutingContext(IMAGE)
    context.begin(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=mask)
    assert context.is_pad_T.tolist() == [False] * 6


def test_records_are_taken_between_begin_and_end_only():
    context = RoutingContext()
    context.record("early", routing(2), trainable=True)
    context.begin(input_ids=torch.ones(1, 2, dtype=torch.long))
    context.record("in time", routing(2), trainable=True)
    context.end()
    context.record("late", routing(2), trainable=True)
    assert context.layers == ["in time"]


def test_the_next_forward_drops_the_last_records():
    context = RoutingContext()
    for _ in range(2):
        context.begin(input_ids=torch.ones(1, 2, dtype=torch.long))
        context.record("layer", routing(2), trainable=True)
    assert context.stack("router_probs_TX").shape == (1, 2, 3)
    context.begin(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert context.layers == []


def test_a_record_without_gradient_in_training_is_refused_unless_the_router_is_frozen():
    context = RoutingContext()
    context.begin(input_ids=torch.ones(1, 2, dtype=torch.long), expects_gradient=True)
    context.record("learned", routing(2, requires_grad=True), trainable=True)
    context.record("frozen", routing(2), trainable=False)
    with pytest.raises(UserError, match="re-entrant"):
        context.record("lost", routing(2), trainable=True)


def test_a_layer_that_sees_other_tokens_than_the_model_is_refused():
    context = RoutingContext()
    context.begin(input_ids=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(UserError, match=r"layer routed 4 tokens.*2 x 3"):
        context.record("layer", routing(4), trainable=False)


def test_recording_ends_when_the_forward_fails():
    class Failing(torch.nn.Module):
        def forward(self, input_ids):
            raise RuntimeError("inside")

    context, model = RoutingContext(), Failing()
    context.attach(model)
    with pytest.raises(RuntimeError, match="inside"):
        model(torch.ones(1, 2, dtype=torch.long))
    context.record("after", routing(2), trainable=False)
    assert context.layers == []
    assert context.sequence_length == 2


def test_domains_stay_until_told_otherwise_and_beam_search_repeats_them():
    context = RoutingContext()
    context.set_domains(["general", "document"])
    context.begin(input_ids=torch.ones(2, 3, dtype=torch.long))
    assert context.domain_of_row() == ["general", "document"]
    context.begin(input_ids=torch.ones(4, 1, dtype=torch.long))  # two beams a row, side by side
    assert context.domain_of_row() == ["general", "general", "document", "document"]
    context.begin(input_ids=torch.ones(3, 1, dtype=torch.long))
    with pytest.raises(UserError, match="2 domains were set for a batch of 3 rows"):
        context.domain_of_row()
    context.set_domains(None)
    context.begin(input_ids=torch.ones(2, 1, dtype=torch.long))
    with pytest.raises(UserError, match="set_domains"):
        context.domain_of_row()


def test_modality_is_0_for_text_1_for_pictures_and_unknown_from_embeddings():
    context = RoutingContext(IMAGE)
    context.begin(input_ids=torch.tensor([[1, IMAGE]]))
    assert context.modality_T.tolist() == [0, 1]
    context.begin(inputs_embeds=torch.randn(1, 2, 4))
    assert context.token_ids_T is None
    with pytest.raises(UserError, match="call it with input_ids"):
        _ = context.modality_T


def test_a_model_without_pictures_has_text_alone_even_from_embeddings():
    context = RoutingContext(image_token_id=None)
    context.begin(inputs_embeds=torch.randn(1, 2, 4))
    assert context.modality_T.tolist() == [0, 0]
