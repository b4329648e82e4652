"""What every router must do, asked of each file in the folder, and what each one does."""

import importlib
import inspect
import shutil

import pytest
import torch
from torch import nn

from mllm.common.errors import UserError
from mllm.routing import ROUTERS, ExpertLayout, Router, RouterSpec, RoutingContext, find_router, routers

WIDTH, EXPERTS, IMAGE = 4, 3, 9
IDS = torch.tensor([[1, IMAGE, IMAGE, 2, 1], [5, 6, IMAGE, 7, 8]])
DOMAINS = ("general", "document")
HIDDEN = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))


def context(ids=IDS, domains=DOMAINS):
    made = RoutingContext(IMAGE)
    made.set_domains(domains)
    made.begin(input_ids=ids)
    return made


def make(name, layout=None, **options):
    spec = RouterSpec(width=WIDTH, layout=layout or ExpertLayout.of(EXPERTS), domains=DOMAINS, **options)
    return find_router(name)(spec)


# -- every router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_gives_one_fp32_logit_a_token_and_expert(name):
    for hidden in (HIDDEN, HIDDEN.bfloat16()):
        logits = make(name)(hidden, context())
        assert (logits.shape, logits.dtype) == ((10, EXPERTS), torch.float32)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_computes_the_same_under_autocast_and_twice_in_evaluation(name):
    router = make(name, jitter=0.5).eval()
    logits = router(HIDDEN, context())
    assert torch.equal(router(HIDDEN, context()), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(HIDDEN, context()), logits)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_routers_state_makes_a_second_one_equal(name):
    first, second = make(name), make(name)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(HIDDEN, context()), second(HIDDEN, context()))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_has_parameters_exactly_when_it_says_that_it_learns(name):
    router = make(name)
    assert bool(list(router.parameters())) == router.learns
    assert not (router.fixed and router.learns)
    assert router(HIDDEN, context()).requires_grad == router.learns


@pytest.mark.parametrize("name", [name for name in ROUTERS if find_router(name).fixed])
def test_a_router_that_goes_by_a_rule_refuses_null_experts(name):
    with pytest.raises(UserError, match=f"{name!r} decides by rule and cannot choose null experts"):
        make(name, ExpertLayout.of(EXPERTS, None, 1))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_keeps_its_types_when_the_model_is_cast(name):
    router = make(name)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    router.to(torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())
    assert all(value.dtype == torch.float32 for value in router.state_dict().values())


def test_a_router_in_a_file_of_its_own_is_found_by_the_files_name(tmp_path, monkeypatch):
    folder = tmp_path / "folder_of_routers"
    folder.mkdir()
    shutil.copy(inspect.getsourcefile(routers), folder / "__init__.py")
    (folder / "always_first.py").write_text(
        "from mllm.routing.routers.base import Router\n\n\n"
        "class AlwaysFirst(Router):\n"
        "    def forward(self, hidden_TD, context):\n"
        "        return -hidden_TD.new_tensor(range(self.spec.layout.num_experts)).repeat(len(hidden_TD), 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = importlib.import_module(folder.name)
    assert found.ROUTERS == ("always_first",)
    router = found.find_router("always_first")(RouterSpec(width=WIDTH, layout=ExpertLayout.of(EXPERTS)))
    assert isinstance(router, Router)
    assert router(HIDDEN, context()).argmax(1).tolist() == [0] * 10


def test_an_unknown_router_is_refused_with_the_nearest_name_and_all_names():
    with pytest.raises(UserError, match=r"Did you mean 'hash_token'\?.*frozen_random.*learned.*oracle_modality"):
        find_router("hash_tokens")


# -- learned and frozen_random -----------------------------------------------------------------------------------------


def test_the_learned_router_is_a_linear_map_in_fp32_over_the_temperature():
    router = make("learned", temperature=4.0)
    expected = nn.functional.linear(HIDDEN, router.weight, router.bias) / 4
    assert torch.equal(router(HIDDEN, context()), expected)
    hidden = HIDDEN.bfloat16()
    expected = nn.functional.linear(hidden.float(), router.weight, router.bias) / 4
    assert torch.equal(router(hidden, context()), expected)


def test_it_starts_as_a_linear_of_torch_does():
    torch.manual_seed(0)
    router = make("learned")
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, EXPERTS)
    assert torch.equal(router.weight, linear.weight)
    assert torch.equal(router.bias, linear.bias)


def test_frozen_random_is_the_learned_router_at_its_start_and_has_nothing_to_train():
    torch.manual_seed(0)
    learned = make("learned", modality_prior=True)
    torch.manual_seed(0)
    frozen = make("frozen_random", modality_prior=True)
    assert torch.equal(frozen(HIDDEN, context()), learned(HIDDEN, context()))
    frozen.requires_grad_(True)
    assert not frozen(HIDDEN, context()).requires_grad
    assert frozen.state_dict().keys() == learned.state_dict().keys()


def test_jitter_changes_logits_in_training_only_and_by_no_more_than_it_says():
    router = make("learned", jitter=0.1)
    nn.init.zeros_(router.bias)
    nn.init.ones_(router.weight)
    hidden = torch.ones(200, WIDTH)
    still = router.eval()(hidden, context())
    jittered = router.train()(hidden, context())
    assert 0.05 < (jittered / still - 1).abs().max() <= 0.1
    assert (jittered / still - 1).mean().abs() < 0.02


def test_a_modality_prior_starts_at_zero_and_moves_the_logits_of_its_own_modality():
    router = make("learned", modality_prior=True)
    before = router(HIDDEN, context())
    assert torch.equal(before, nn.functional.linear(HIDDEN, router.weight, router.bias))
    with torch.no_grad():
        router.prior[1, 2] = 5  # image, expert 2
    moved = router(HIDDEN, context()) - before
    is_image = (IDS == IMAGE).flatten()
    torch.testing.assert_close(moved[is_image], torch.tensor([0.0, 0.0, 5.0]).expand(3, 3))
    assert not moved[~is_image].any()


@pytest.mark.parametrize("name", ["learned", "frozen_random"])
def test_a_shared_null_logit_is_one_logit_copied_for_all_nulls_of_a_set(name):
    layout = ExpertLayout.of(3, {"text": 1, "image": 2}, {"text": 2, "image": 3})
    router = make(name, layout, null_logits="shared")
    assert router.weight.shape == (3 + 2, WIDTH)
    logits = router(HIDDEN, context())
    expected = nn.functional.linear(HIDDEN, router.weight, router.bias)
    assert torch.equal(logits, expected[:, [0, 1, 2, 3, 3, 4, 4, 4]])
    assert make(name, layout).weight.shape == (3 + 5, WIDTH)


# -- controls ----------------------------------------------------------------------------------------------------------


def test_hash_token_gives_equal_ids_equal_experts_wherever_they_stand():
    ids = torch.tensor([[1, 2, 3, 1], [3, 1, 2, 2]])
    first = make("hash_token")(torch.zeros(8, WIDTH), context(ids)).argmax(1)
    by_id = {token: set(first[ids.flatten() == token].tolist()) for token in (1, 2, 3)}
    assert all(len(experts) == 1 for experts in by_id.values())


@pytest.mark.parametrize("num_experts", [2, 3, 8])
def test_hash_token_spreads_ids_evenly(num_experts):
    ids = torch.arange(10, 3010)[None]
    router = make("hash_token", ExpertLayout.of(num_experts))
    counts = router(torch.zeros(3000, WIDTH), context(ids)).argmax(1).bincount(minlength=num_experts)
    assert (counts / 3000 * num_experts - 1).abs().max() < 0.1


def test_hash_token_tells_picture_patches_apart_by_their_number_in_the_row():
    ids = torch.full((2, 30), IMAGE)
    first = make("hash_token")(torch.zeros(60, WIDTH), context(ids)).argmax(1).view(2, 30)
    assert torch.equal(first[0], first[1])
    assert first[0].bincount(minlength=EXPERTS).all()


def test_hash_token_without_ids_is_refused():
    made = RoutingContext()
    made.begin(inputs_embeds=torch.randn(2, 5, WIDTH))
    with pytest.raises(UserError, match="call the model with input_ids"):
        make("hash_token")(HIDDEN, made)


def test_oracle_modality_takes_expert_0_for_text_and_1_for_image():
    first = make("oracle_modality")(HIDDEN, context()).argmax(1)
    assert torch.equal(first, (IDS == IMAGE).flatten().long())


def test_oracle_domain_takes_the_expert_of_the_rows_domain_and_the_next_ones_after_it():
    logits = make("oracle_domain")(HIDDEN, context(domains=["document", "general"]))
    assert logits.argsort(1, descending=True).tolist() == [[1, 2, 0]] * 5 + [[0, 1, 2]] * 5


def test_oracle_domain_asks_for_domains_it_knows():
    with pytest.raises(UserError, match="needs expert_domains"):
        find_router("oracle_domain")(RouterSpec(width=WIDTH, layout=ExpertLayout.of(EXPERTS)))
    with pytest.raises(
        UserError, match=r"No expert is meant for domain 'biomedical'; MoleConfig\.expert_domains are general, document"
    ):
        make("oracle_domain")(HIDDEN, context(domains=["general", "biomedical"]))
    with pytest.raises(UserError, match="nobody has told the rows' domains"):
        make("oracle_domain")(HIDDEN, context(domains=None))
