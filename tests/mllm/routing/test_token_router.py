import pytest
import torch

from mllm.common.errors import UserError
from mllm.routing import Choice, ExpertLayout, RouterSpec, RoutingContext, TokenRouter, route

WIDTH, IMAGE = 4, 9
IDS = torch.tensor([[1, IMAGE, IMAGE, 2], [IMAGE, 3, 4, 5]])


def context(ids=IDS):
    made = RoutingContext(IMAGE)
    made.begin(input_ids=ids)
    return made


def token_router(layout=None, choice=None, **options):
    spec = RouterSpec(width=WIDTH, layout=layout or ExpertLayout.of(3))
    return TokenRouter("learned", spec, choice or Choice(), **options)


def test_it_routes_its_routers_logits_by_its_choice():
    router, hidden = token_router(choice=Choice(top_k=2, gate="softmax")), torch.randn(8, WIDTH)
    routing = router(hidden, context())
    expected = route(router.router(hidden, context()), top_k=2, gate="softmax")
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(routing.expert_weights_TK, expected.expert_weights_TK)


@pytest.mark.parametrize("nulls", [0, 1, {"text": 2, "image": 1}])
def test_with_groups_no_token_has_a_probability_for_another_modalitys_experts(nulls):
    layout = ExpertLayout.of(5, {"text": 2, "image": 2, "shared": 1}, nulls)
    routing = token_router(layout, Choice(top_k=3))(torch.randn(8, WIDTH), context())
    for token, is_image in enumerate((IDS == IMAGE).flatten().tolist()):
        allowed_X = layout.allowed_PX[int(is_image)]
        assert not routing.router_probs_TX[token, ~allowed_X].any()
        assert allowed_X[routing.expert_ids_TK[token]].all()


def test_with_groups_tokens_of_unknown_modality_are_refused():
    made = RoutingContext(IMAGE)
    made.begin(inputs_embeds=torch.randn(2, 4, WIDTH))
    router = token_router(ExpertLayout.of(2, {"text": 1, "image": 1}))
    with pytest.raises(UserError, match="call it with input_ids"):
        router(torch.randn(8, WIDTH), made)


def test_a_selection_bias_is_saved_starts_at_zero_and_moves_the_choice():
    router, hidden = token_router(with_selection_bias=True), torch.randn(8, WIDTH)
    assert "selection_bias" in router.state_dict()
    assert not router.selection_bias.any()
    router.selection_bias[2] = 10
    assert router(hidden, context()).expert_ids_TK.tolist() == [[2]] * 8
    assert "selection_bias" not in token_router().state_dict()


def test_moved_between_devices_and_types_weights_and_bias_keep_fp32():
    router = token_router(ExpertLayout.of(2, {"text": 1, "image": 1}), with_selection_bias=True)
    before = router.router.weight.clone()
    router.to(torch.bfloat16).half()
    assert torch.equal(router.router.weight, before)
    assert router.selection_bias.dtype == torch.float32
    moved = router.to("meta", torch.bfloat16)
    assert (moved.router.weight.device.type, moved.router.weight.dtype) == ("meta", torch.float32)
    assert (moved.allowed_PX.device.type, moved.allowed_PX.dtype) == ("meta", torch.bool)
