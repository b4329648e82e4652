"""Routers that read the row's picture: what they are told, what they start from, what they are taught."""

import pytest
import torch
from peft import get_peft_model

from mllm.common.errors import UserError
from mllm.mole import MoleConfig, routing_context, routing_loss, start_routers
from mllm.mole.start import ROWS_OF_A_DOMAIN, clusters, linear_discriminant, share_told, start_rows
from tests.mllm.mole.helpers import wake
from tests.tiny import tiny_image, tiny_language_model, tiny_llava

PATCHES = 9
DOMAINS = ["cold", "warm"]
TAUGHT = {"r": 2, "num_experts": 2, "expert_domains": DOMAINS, "modules_to_save": []}


@pytest.fixture
def llava():
    """A function that gives a tiny LLaVA with experts, and a function that makes its inputs."""
    base, processor = tiny_llava()
    processor.tokenizer.padding_side = "left"

    def make(**adapter):
        torch.manual_seed(0)
        return wake(get_peft_model(base, MoleConfig(**TAUGHT | adapter)))

    def inputs(*colours, prompt="USER: <image>\nWhat colour is the square? ASSISTANT:"):
        prompts = [f"{prompt}{' red' * number}" for number in range(len(colours))]  # of different lengths
        images = [tiny_image(colour) for colour in colours]
        return processor(images=images, text=prompts, padding=True, return_tensors="pt")

    yield make, inputs
    if hasattr(base, "peft_config"):
        del base.peft_config


def pictures(model, inputs):
    """[N, D] what the rows' pictures are embedded as, by the model's own way to do so."""
    base = model.get_base_model()
    return torch.stack(list(base.get_image_features(inputs["pixel_values"]).pooler_output)).mean(1)


# -- what the router reads -------------------------------------------------------------------------------------------


def test_every_token_is_told_the_mean_embedding_of_its_rows_picture(llava):
    make, inputs = llava
    model, batch = make(), inputs("red", "blue")
    model(**batch)
    context = routing_context(model)
    torch.testing.assert_close(context.picture_TD, pictures(model, batch)[context.sample_T])


def test_a_row_without_a_picture_is_told_zeros(llava):
    make, _ = llava
    model = make()
    model(input_ids=torch.arange(20, 32).reshape(2, 6))
    assert not routing_context(model).picture_TD.any()


def test_two_pictures_of_a_row_are_told_by_their_mean(llava):
    make, inputs = llava
    model, batch = make(), inputs("red", "blue")
    both = {"input_ids": batch["input_ids"].flatten()[None], "pixel_values": batch["pixel_values"]}
    model(**both)
    torch.testing.assert_close(routing_context(model).picture_TD[0], pictures(model, batch).mean(0))


@pytest.mark.parametrize("reads", ["picture", "both"])
def test_a_decode_step_is_told_the_pictures_of_its_prompt(llava, reads):
    make, inputs = llava
    model, batch = make(router_reads=reads), inputs("red", "blue")
    context, steps = routing_context(model), []
    hook = model.get_base_model().register_forward_hook(lambda *_: steps.append(context.picture_TD.clone()))
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    hook.remove()
    assert [len(step) for step in steps[1:]] == [2, 2]
    for step in steps[1:]:
        torch.testing.assert_close(step, pictures(model, batch))


def test_beam_search_repeats_the_pictures_with_the_rows(llava):
    make, inputs = llava
    model, batch = make(router_reads="picture"), inputs("red", "blue")
    model.generate(**batch, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False)
    torch.testing.assert_close(routing_context(model).picture_TD, pictures(model, batch).repeat_interleave(2, 0))


@pytest.mark.parametrize("reads", ["picture", "both"])
def test_generation_with_a_cache_equals_full_recomputation(llava, reads):
    make, inputs = llava
    model, batch = make(router_reads=reads), inputs("red", "blue")
    ways = [
        model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*ways)


def test_the_next_prompt_forgets_the_pictures_of_the_last(llava):
    make, inputs = llava
    model = make()
    model(**inputs("red"))
    model(input_ids=torch.arange(20, 26)[None])
    assert not routing_context(model).picture_TD.any()


def test_the_picture_router_sends_all_tokens_of_a_row_one_way(llava):
    make, inputs = llava
    model = make(router_reads="picture")
    model(**inputs("red", "blue"))
    context = routing_context(model)
    for routing in context.routings.values():
        for row in range(2):
            assert len(routing.expert_ids_TK[context.sample_T == row].unique()) == 1


def test_a_language_model_alone_reads_the_token():
    model = get_peft_model(tiny_language_model(), MoleConfig(r=2))
    assert model.peft_config["default"].router_reads == "token"
    with pytest.raises(UserError, match="LlamaForCausalLM takes no pictures"):
        get_peft_model(tiny_language_model(), MoleConfig(r=2, router_reads="picture"))


def test_without_having_seen_the_embeddings_there_is_no_picture_to_tell(llava):
    make, _ = llava
    model = make()
    context = routing_context(model)
    context.begin(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(UserError, match="language model was not called through the model that holds it"):
        context.picture_TD  # noqa: B018


# -- what it is taught -----------------------------------------------------------------------------------------------


def test_the_domain_loss_is_minus_log_of_the_domains_experts_over_real_ones(llava):
    make, inputs = llava
    model = make(num_experts=3, num_null_experts=2, top_k=2)  # experts 0 and 2 are cold, 1 is warm
    batch = inputs("red", "blue")
    context = routing_context(model)
    context.set_domains(["warm", "cold"])
    model(**batch)
    due = {"cold": [0, 2], "warm": [1]}
    slow = [
        -torch.log(probs[due[domain]].sum() / probs[:3].sum())
        for routing in context.routings.values()
        for probs, row, padded in zip(routing.router_probs_TX, context.sample_T, context.is_pad_T, strict=True)
        if not padded
        for domain in [["warm", "cold"][row]]
    ]
    _, losses = routing_loss(model)
    assert context.is_pad_T.any()
    torch.testing.assert_close(losses["domain_loss"], torch.stack(slow).mean())


def test_of_routers_that_read_the_picture_it_reaches_every_one_and_nothing_else(llava):
    make, inputs = llava
    model = make(balance="none", router_reads="picture", modules_to_save=None).train()
    routing_context(model).set_domains(["warm", "cold"])
    model(**inputs("red", "blue"))
    loss, _ = routing_loss(model)
    loss.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached == {name for name, _ in model.named_parameters() if "mole_router" in name}


@pytest.mark.parametrize("told", [None, ["warm", "cold"]])
def test_without_labels_or_weight_there_is_no_domain_loss(llava, told):
    make, inputs = llava
    model = make(domain_loss_weight=0.0 if told else 1.0)
    routing_context(model).set_domains(told)
    model(**inputs("red", "blue"))
    _, losses = routing_loss(model)
    assert "domain_loss" not in losses


def test_a_domain_that_no_expert_is_meant_for_is_named(llava):
    make, inputs = llava
    model = make()
    routing_context(model).set_domains(["warm", "hot"])
    model(**inputs("red", "blue"))
    with pytest.raises(UserError, match="No expert is meant for domain 'hot'"):
        routing_loss(model)


# -- what it starts as -----------------------------------------------------------------------------------------------


def two_kinds(rows=40, width=32, seed=0):
    """Features of two classes that differ in one direction, hidden under a larger variation in another."""
    generator = torch.Generator().manual_seed(seed)
    features_ND = 0.1 * torch.randn(rows, width, generator=generator)
    features_ND[:, 0] += 3 * torch.randn(rows, generator=generator)
    class_N = torch.arange(rows) % 2
    features_ND[:, 1] += class_N.float()
    return features_ND, class_N


def test_the_discriminant_tells_classes_apart_whose_means_lie_close():
    features_ND, class_N = two_kinds()
    weight_CD, bias_C = linear_discriminant(features_ND, class_N, 2)
    fresh_ND, fresh_N = two_kinds(seed=1)
    assert torch.equal((fresh_ND @ weight_CD.T + bias_C).argmax(1), fresh_N)


def test_two_classes_of_one_covariance_have_the_log_odds_of_bayes_rule():
    generator = torch.Generator().manual_seed(0)
    class_N = torch.arange(40_000) % 2
    features_ND = torch.randn(len(class_N), 3, generator=generator) + class_N[:, None] * torch.tensor([1.0, -1.0, 0.5])
    weight_CD, bias_C = linear_discriminant(features_ND, class_N, 2)
    odds = (weight_CD[1] - weight_CD[0], bias_C[1] - bias_C[0])
    shrunk = 1.1  # the covariance is one, and the discriminant adds a tenth of it
    torch.testing.assert_close(odds[0], torch.tensor([1.0, -1.0, 0.5]) / shrunk, atol=0.05, rtol=0)
    torch.testing.assert_close(odds[1], torch.tensor(-2.25 / 2) / shrunk, atol=0.05, rtol=0)


@pytest.mark.parametrize("reads", ["picture", "both"])
def test_started_routers_send_each_domain_to_its_experts_at_once(llava, reads):
    make, inputs = llava
    model = make(router_reads=reads)
    seen = torch.cat([pictures(model, inputs(colour)) for colour in ("red", "blue") * 4])
    jitter = seen + 1e-3 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    assert start_routers(model, jitter, ["warm", "cold"] * 4).right == 1.0
    model(**inputs("red", "blue"))
    context = routing_context(model)
    for routing in context.routings.values():
        right = (routing.expert_ids_TK[:, 0] == 1 - context.sample_T).float().mean()
        assert right > (0.99 if reads == "picture" else 0.8)


def test_rows_that_look_alike_leave_the_routers_as_they_were(llava):
    make, _ = llava
    model = make()
    before = {name: weight.clone() for name, weight in model.named_parameters() if "mole_router" in name}
    noise_ND = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    assert start_routers(model, noise_ND, DOMAINS * 30).right < 0.75
    assert start_routers(model, torch.zeros(60, 32), DOMAINS * 30).right <= 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)


def test_the_share_told_is_of_rows_that_the_discriminant_has_not_seen():
    many = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))  # more features than rows: fits any labels
    class_N = torch.arange(40) % 2
    weight_CD, bias_C = linear_discriminant(many, class_N, 2)
    assert torch.equal((many @ weight_CD.T + bias_C).argmax(1), class_N)
    assert share_told(many, class_N, 2) < 0.75


def test_experts_of_a_domain_without_rows_stay_as_they_were(llava):
    make, _ = llava
    model = make(num_experts=3, expert_domains=["absent", *DOMAINS])
    (weight, *_) = (w for name, w in model.named_parameters() if "mole_router" in name and name.endswith("weight"))
    before = weight.clone()
    features_ND, class_N = two_kinds()
    start_routers(model, features_ND, [DOMAINS[c] for c in class_N])
    assert torch.equal(weight[0], before[0])
    assert not torch.equal(weight[1:], before[1:])


def test_experts_of_one_domain_start_alike_on_the_picture_and_apart_on_the_token(llava):
    make, _ = llava
    model = make(num_experts=4)
    features_ND, class_N = two_kinds()
    start_routers(model, features_ND, [DOMAINS[c] for c in class_N])
    (weight, *_) = (w for name, w in model.named_parameters() if "mole_router" in name and name.endswith("weight"))
    assert torch.equal(weight[0, 32:], weight[2, 32:])
    assert not torch.equal(weight[0, :32], weight[2, :32])
    assert not torch.equal(weight[0, 32:], weight[1, 32:])


def test_an_untrained_model_with_started_routers_still_equals_its_base(llava):
    make, inputs = llava
    batch = inputs("red", "blue")
    base, _ = tiny_llava()
    base.requires_grad_(False)
    wanted = base(**batch).logits
    model = get_peft_model(base, MoleConfig(**TAUGHT))
    features_ND, class_N = two_kinds()
    start_routers(model, features_ND, [DOMAINS[c] for c in class_N])
    assert torch.equal(model(**batch).logits, wanted)
    del make


def test_clusters_find_kinds_that_nobody_named(llava):
    generator = torch.Generator().manual_seed(0)
    class_N = torch.arange(60) % 3
    features_ND = torch.randn(60, 32, generator=generator) + 3 * torch.randn(3, 32, generator=generator)[class_N]
    found_N = clusters(features_ND, 3)
    assert len({(a, b) for a, b in zip(class_N.tolist(), found_N.tolist(), strict=True)}) == 3
    make, _ = llava
    model = make(num_experts=3, router_start="clusters", expert_domains=None)
    assert start_routers(model, features_ND, ["unknown"] * 60).right == 1.0


def test_too_few_rows_for_the_clusters_are_refused():
    with pytest.raises(UserError, match="3 clusters need at least as many rows, got 2"):
        clusters(torch.eye(2), 3)


@pytest.mark.parametrize(
    ("adapter", "domains", "said"),
    [
        ({"router_start": "random"}, ["cold", "warm"], "needs a model with MOLE whose routers learn and read pictures"),
        ({"router_reads": "token"}, ["cold", "warm"], "needs a model with MOLE whose routers learn and read pictures"),
        ({"expert_domains": None}, ["cold", "warm"], "needs a model with MOLE whose routers learn and read pictures"),
        ({}, ["cold", "hot"], "got rows of hot, for which no expert is meant; the expert_domains are cold, warm"),
    ],
)
def test_a_start_that_cannot_be_made_is_refused(llava, adapter, domains, said):
    make, _ = llava
    with pytest.raises(UserError, match=said):
        start_routers(make(**adapter), torch.eye(2, 32), domains)


def test_the_first_rows_of_each_domain_are_taken():
    many = ROWS_OF_A_DOMAIN + 36
    rows = start_rows(["a"] * many + ["b"] * 3, range(many + 2, -1, -1))
    assert rows[:3] == [many + 2, many + 1, many]
    assert rows[3:] == list(range(many - 1, 35, -1))
