"""What a training loop has to do about routing, by one object, by transformers' Trainer, and by nobody."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mllm.common.errors import UserError
from mllm.mole import BiasBalance, RoutingLossMixin, RoutingObjective, routing_context, routing_loss
from mllm.routing import BalanceWindow
from tests.mllm.mole.helpers import INPUT_IDS, gradients, mole_routers, tiny_llama, tiny_mole


class OurTrainer(RoutingLossMixin, Trainer):
    pass


def train(trainer_class, model, tmp_path, **arguments):
    options = {"max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 0.1} | arguments
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", save_strategy="no", **options)
    rows = [{"input_ids": row, "labels": row} for row in INPUT_IDS]
    trainer_class(model, arguments, train_dataset=rows).train()


def test_the_loss_is_zero_and_without_parts_where_a_bias_balances():
    model = tiny_mole(balance="bias")
    model(INPUT_IDS)
    loss, parts = routing_loss(model)
    assert (loss.item(), parts) == (0, {})


def test_the_loss_of_a_model_that_has_not_run_is_refused():
    with pytest.raises(UserError, match="has run none"):
        routing_loss(tiny_mole())


def test_any_two_bias_balances_of_a_model_are_the_same():
    model = tiny_mole(balance="bias")
    model(INPUT_IDS)
    BiasBalance(model).count()
    BiasBalance(model).move()
    assert all(router.selection_bias.any() for router in mole_routers(model))


def test_the_objective_is_the_loss_of_a_window_that_each_step_begins_anew():
    model = tiny_mole(balance_loss_weight=0.4, balance_final_weight=0.1, balance_schedule="linear")
    objective = RoutingObjective(model, steps=2)
    for progress in (0.0, 0.5):
        window = BalanceWindow()
        for ids in (INPUT_IDS[:1], INPUT_IDS[1:]):
            model(ids)
            torch.testing.assert_close(objective.loss(), routing_loss(model, window=window, progress=progress)[0])
        objective.step()


def test_the_objective_of_a_model_without_mole_is_nothing():
    model = tiny_llama()
    objective = RoutingObjective(model)
    objective.set_domains(["general"])
    loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    assert torch.equal(loss + objective.loss(), loss)
    objective.step()


def test_training_that_asks_for_no_routing_loss_warns_once():
    model = tiny_mole()
    with pytest.warns(UserWarning, match="nobody has asked for the routing losses"):
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()


@pytest.mark.parametrize("config", [{}, {"balance": "bias"}, {"balance": "none", "z_loss_weight": 0.1}])
def test_training_that_asks_does_not_warn(config):
    model = tiny_mole(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = model(INPUT_IDS, labels=INPUT_IDS).loss
        (loss + RoutingObjective(model).loss()).backward()


def test_training_without_routing_losses_to_ask_for_does_not_warn():
    model = tiny_mole(balance="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()


def test_the_warning_does_not_keep_a_forward_alive():
    model = tiny_mole(balance="none", z_loss_weight=0.1)
    output = model(INPUT_IDS, labels=INPUT_IDS)
    forward = routing_context(model).forward
    assert not [hook for hook in (output.loss._backward_hooks or {}).values() if hook.__self__ is not forward.reading]


def test_transformers_trainer_as_it_is_warns(tmp_path):
    with pytest.warns(UserWarning, match="RoutingLossMixin"):
        train(Trainer, tiny_mole(), tmp_path)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_mixin_gives_trainer_the_gradients_of_a_loop_of_ones_own(micro_batches, tmp_path):
    config = {"gate": "none", "balance": "layer" if micro_batches == 3 else "global_batch", "balance_loss_weight": 0.5}
    trained, seen = tiny_mole(**config), {}

    class Watched(OurTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(trained)))
            return optimizer

    options = {"gradient_accumulation_steps": micro_batches, "max_grad_norm": 1e9}
    train(Watched, trained, tmp_path, per_device_train_batch_size=3 // micro_batches, **options)
    model = tiny_mole(**config)
    objective = RoutingObjective(model)
    for ids in INPUT_IDS.split(3 // micro_batches):
        ((model(ids, labels=ids).loss + objective.loss()) / micro_batches).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(seen[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_mixin_moves_biases_once_a_step(tmp_path):
    model = tiny_mole(balance="bias")
    train(OurTrainer, model, tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    rate = model.peft_config["default"].bias_update_rate
    for router in mole_routers(model):
        assert router.selection_bias.any()
        assert router.selection_bias.abs().max().item() == pytest.approx(rate)
