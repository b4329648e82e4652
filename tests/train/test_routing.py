"""What a run does about routing: balance over a whole step, statistics, gradients of routers. In one process."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerControl, TrainerState

from mllm.common.errors import UserError
from mllm.data.collate import Collator
from mllm.data.encoded import EncodedMixture
from mllm.data.mixture import load_mixture
from mllm.data.template import ConversationEncoder
from mllm.mole import MoleConfig
from tests.tiny import tiny_llava
from tests.train.data import write_rows
from train.check import check_domains, name_domains
from train.parts import starts_from_adapter
from train.routing import RunRouting, routing_table, start_from_domains
from train.trainer import answer_losses

LAYERS = 2


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    mixture = load_mixture(write_rows(tmp_path_factory.mktemp("routing")))
    return EncodedMixture(mixture, ConversationEncoder(tiny_llava()[1], 256))


@pytest.fixture(scope="module")
def setting(samples):
    """A function that makes a tiny model with MOLE and its RunRouting, and one that makes a batch of some rows."""
    collate = Collator(tiny_llava()[1])

    def model(**adapter) -> tuple[torch.nn.Module, RunRouting]:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llava()[0], MoleConfig(r=2, **{"num_experts": 3} | adapter)).train()
        return model, RunRouting(model, torch.device("cpu"))

    return model, lambda *rows: collate([samples[row] for row in rows])


def forward(model, routing, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The answers' loss of a micro-batch and its routing loss."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    routing.before_forward(batch["domains"])
    answers = answer_losses(model, inputs, batch["labels"])
    return answers.loss_T.sum(), routing.after_forward(batch["domains"])


def begin_step(routing, step=0) -> None:
    routing.on_step_begin(None, TrainerState(global_step=step, max_steps=4), TrainerControl())


def end_step(routing) -> None:
    routing.on_step_end(None, TrainerState(global_step=1, max_steps=4), TrainerControl())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_micro_batch_of_a_step_balances_the_picks_of_all_of_it(setting, checkpointing):
    make, batch = setting
    model, routing = make(balance_loss_weight=1.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pictures, numbers = batch(0, 2), batch(1, 5)
    tokens = [int(one["attention_mask"].sum()) for one in (pictures, numbers)]
    begin_step(routing)
    sum(forward(model, routing, pictures)).backward()
    assert routing.objective.window.counts_LPX.sum() == LAYERS * tokens[0]
    before = routing.objective.window.counts_LPX
    answers, balance = forward(model, routing, numbers)
    (answers + balance).backward()
    counts_LX = routing.objective.window.counts_LPX.sum(1)
    assert counts_LX.sum() == LAYERS * sum(tokens)

    probs_LTX = routing.context.stack("router_probs_TX")
    is_real_T = ~routing.context.is_pad_T
    share_LX = counts_LX / counts_LX.sum(-1, keepdim=True)
    expected = (3 * share_LX * probs_LTX[:, is_real_T].mean(1)).sum(-1).mean()
    torch.testing.assert_close(balance, expected)
    assert (before.sum(1) != counts_LX).any()

    begin_step(routing, step=1)
    forward(model, routing, numbers)
    assert routing.objective.window.counts_LPX.sum() == LAYERS * tokens[1]


def test_the_weight_of_balance_follows_the_share_of_steps_that_are_done(setting):
    make, batch = setting
    model, routing = make(balance_loss_weight=1.0, balance_final_weight=0.0, balance_schedule="linear")

    def loss(step: int) -> torch.Tensor:
        begin_step(routing, step)
        return forward(model, routing, batch(0, 1))[1]

    torch.testing.assert_close(loss(1), 0.75 * loss(0))


def test_the_bias_moves_once_a_step_by_the_picks_of_all_its_micro_batches(setting):
    make, batch = setting
    model, routing = make(balance="bias", bias_update_rate=0.25)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    begin_step(routing)
    picks_LX = torch.zeros(LAYERS, 3)
    for rows in ((0, 2), (1, 5)):
        answers, routing_loss = forward(model, routing, batch(*rows))
        assert routing_loss == 0.0
        picks_LX += (routing.context.stack("picks_TX") * ~routing.context.is_pad_T[:, None]).sum(1)
        answers.backward()
    biases = [value for name, value in model.named_buffers() if name.endswith("selection_bias")]
    assert not any(bias.any() for bias in biases)
    end_step(routing)
    expected_LX = 0.25 * (picks_LX.mean(1, keepdim=True) - picks_LX).sign()
    torch.testing.assert_close(torch.stack(biases), expected_LX)
    assert expected_LX.any()
    end_step(routing)
    torch.testing.assert_close(torch.stack(biases), expected_LX)


def test_an_oracle_by_domain_is_told_the_rows_domains(setting):
    make, batch = setting
    model, routing = make(router="oracle_domain", expert_domains=["numbers", "pictures"], balance="none", num_experts=2)
    forward(model, routing, batch(0, 1))
    shares = routing.stats.shares()
    for layer in routing.stats.layers:
        assert shares["numbers"][layer][:2] == [1.0, 0.0]
        assert shares["pictures"][layer][:2] == [0.0, 1.0]


def test_the_norms_are_those_of_the_gradients_that_routers_got(setting):
    make, batch = setting
    model, routing = make()
    for rows in ((0, 2), (1, 5)):
        sum(forward(model, routing, batch(*rows))).backward()
        squares = [
            sum(parameter.grad.square().sum() for parameter in module.parameters())
            for name, module in model.named_modules()
            if name.endswith("mole_router.default")
        ]
        model.zero_grad()
        norms = routing.gradients.drain(batches=1, device=torch.device("cpu"))
        torch.testing.assert_close(torch.tensor(list(norms.values())), torch.stack(squares).sqrt())
        assert list(norms) == routing.stats.layers
        assert min(norms.values()) > 0


def test_a_router_that_nothing_reaches_has_no_gradient_and_is_warned_of(setting):
    make, batch = setting
    model, routing = make(gate="none", balance="none")
    warnings = []
    for step in range(1, 12):
        answers, _ = forward(model, routing, batch(0, 1))
        answers.backward()
        entry = routing.drain(step)
        assert entry["routing/router_grad_norm"] == 0.0
        warnings += entry.get("warnings", [])
    assert any("gradient" in warning and routing.last.layers[0] in warning for warning in warnings)


def test_a_frozen_router_is_not_expected_to_have_a_gradient(setting):
    make, batch = setting
    model, routing = make(router="frozen_random", balance="none")
    forward(model, routing, batch(0, 1))[0].backward()
    assert "routing/router_grad_norm" not in routing.drain(1)


def test_an_entry_starts_anew_after_the_last_and_the_table_shows_the_last(setting):
    make, batch = setting
    model, routing = make(num_null_experts=3, top_k=2)
    forward(model, routing, batch(0, 2))
    first = routing.drain(1)
    forward(model, routing, batch(1, 5))
    second = routing.drain(2)
    assert {"balance_loss", "routing/load", "routing/null_share", "routing/entropy"} <= first.keys() & second.keys()
    assert first["routing/load"] != second["routing/load"]
    assert routing.batches == 0
    table = routing_table(routing.last)
    layer, load, null_share, *_ = (next(iter(column.cells)) for column in table.columns)
    assert layer == routing.last.layers[0]
    assert load == f"{second[f'routing/load/{layer}']:.2f}"
    assert null_share == f"{second[f'routing/null_share/{layer}']:.2f}"


def test_a_model_without_experts_has_no_routing_to_tell_of(setting):
    _, batch = setting
    model, _ = tiny_llava()
    routing = RunRouting(model, torch.device("cpu"))
    begin_step(routing)
    assert forward(model, routing, batch(0))[1] == 0.0
    end_step(routing)
    assert routing.drain(1) == {}


def test_a_domain_without_an_expert_is_refused_before_the_run():
    adapter = MoleConfig(router="oracle_domain", expert_domains=["numbers"], balance="none")
    check_domains(adapter, SimpleNamespace(domains=["numbers"]))
    with pytest.raises(UserError, match="also holds pictures"):
        check_domains(adapter, SimpleNamespace(domains=["numbers", "pictures"]))


def test_a_run_teaches_the_domains_of_its_mixture_unless_it_is_told_otherwise():
    mixture = SimpleNamespace(domains=["numbers", "pictures"])

    def named(**adapter):
        config = SimpleNamespace(model=SimpleNamespace(adapter={"type": "mole"} | adapter))
        name_domains(config, MoleConfig(**adapter), mixture)
        return config.model.adapter.get("expert_domains")

    assert named() == ["numbers", "pictures"]
    assert named(domain_loss_weight=0.0) is None
    assert named(router_start="clusters") is None
    assert named(router="frozen_random", balance="none") is None
    assert named(expert_domains=["pictures", "numbers", "sounds"]) == ["pictures", "numbers", "sounds"]


def test_routers_start_from_the_mixtures_own_rows(setting, samples):
    make, batch = setting
    model, routing = make(num_experts=2, expert_domains=["numbers", "pictures"], router_reads="picture")
    assert start_from_domains(model, samples, range(16)).right == 1.0
    forward(model, routing, batch(0, 1, 2, 3))  # pictures, numbers, pictures, numbers
    context = routing.context
    for decided in context.routings.values():
        assert torch.equal(decided.expert_ids_TK[:, 0], 1 - context.sample_T % 2)
    plain, _ = make(router_reads="token")
    assert start_from_domains(plain, samples, range(16)) is None


def test_a_trained_projector_in_fp32_on_a_bf16_base_embeds_pictures_for_the_start(samples):
    base, _ = tiny_llava()
    model = get_peft_model(base.to(torch.bfloat16), MoleConfig(r=2, expert_domains=["numbers", "pictures"]))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    assert start_from_domains(model, samples, range(16)).right == 1.0


def test_a_projector_to_start_from_is_no_adapter_whose_routers_are_trained_already(tmp_path):
    section = SimpleNamespace(start_from=tmp_path)
    assert not starts_from_adapter(section)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert starts_from_adapter(section)
