"""The dense gradient changes no output, and is that of the outputs of all experts."""

import pytest
import torch

from mllm.alignment import Aligner, AlignmentBatches, AlignSettings
from mllm.alignment.dense import dense_gradient
from mllm.common.errors import UserError
from tests.mllm.alignment.helpers import MOLES, NATIVES, tiny, tiny_mole, token_rows

BATCH = range(4)


def logits_and_gradients(kind: str, *, dense: bool):
    aligner = Aligner(tiny(kind), AlignSettings(layers=1, regulariser="none", dense_gradient=dense))
    losses = aligner(AlignmentBatches(token_rows(4)).batch(BATCH))
    losses.loss.backward()
    return losses.loss, {name: parameter.grad for name, parameter in aligner.trained().items()}


@pytest.mark.parametrize("kind", [*MOLES, *NATIVES])
def test_the_output_stays_bit_for_bit_and_the_gradient_does_not(kind):
    (loss, sparse), (same, dense) = (logits_and_gradients(kind, dense=dense) for dense in (False, True))
    assert torch.equal(loss, same)
    assert all(gradient.isfinite().all() for gradient in dense.values())
    assert any(not torch.allclose(sparse[name], gradient) for name, gradient in dense.items())


def test_the_gradient_is_that_of_the_softmax_over_all_experts_outputs():
    """Where every expert is picked and weighed by its probability, dense and ordinary gradients are one."""
    for kind, config in (("mole", {"num_experts": 3, "top_k": 3, "gate": "softmax", "renormalize": False}),):
        made = []
        for dense in (False, True):
            settings = AlignSettings(layers=1, regulariser="none", dense_gradient=dense)
            aligner = Aligner(tiny_mole(**config), settings)
            aligner(AlignmentBatches(token_rows(4)).batch(BATCH)).loss.backward()
            made.append({name: parameter.grad for name, parameter in aligner.trained().items()})
        for name, gradient in made[0].items():
            torch.testing.assert_close(made[1][name], gradient, msg=f"{kind} {name}")


def test_a_native_model_that_picks_all_experts_has_the_same_gradient_densely():
    made = []
    for dense in (False, True):
        from mllm.alignment import prepare
        from tests.mllm.mole.test_native_moe import tiny_moe

        model = prepare(tiny_moe("olmoe", num_experts_per_tok=4))
        aligner = Aligner(model, AlignSettings(layers=1, regulariser="none", dense_gradient=dense))
        aligner(AlignmentBatches(token_rows(4)).batch(BATCH)).loss.backward()
        made.append({name: parameter.grad for name, parameter in aligner.trained().items()})
    for name, gradient in made[0].items():
        torch.testing.assert_close(made[1][name], gradient)


def test_a_gate_without_gradient_learns_by_the_dense_one():
    _, gradients = logits_and_gradients("plain", dense=True)
    aligner = Aligner(tiny_mole(gate="none"), AlignSettings(layers=1, regulariser="none", dense_gradient=True))
    aligner(AlignmentBatches(token_rows(4)).batch(BATCH)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in aligner.trained().values())
    assert gradients


def test_sorted_experts_are_refused():
    model = tiny_mole(expert_path="sorted")
    aligner = Aligner(model, AlignSettings())
    with pytest.raises(UserError, match="expert_path: masked"), dense_gradient(model, aligner.layers):
        pass
