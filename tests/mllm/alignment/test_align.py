"""What alignment trains, and that its regulariser reaches it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mllm.alignment import Aligner, AlignmentBatches, AlignSettings, align_routers, nearest, sample_vectors, score
from mllm.alignment.loss import REGULARISERS, TARGETS
from mllm.alignment.tail import run
from mllm.common.errors import UserError
from mllm.mole import MoleConfig
from tests.mllm.alignment.helpers import MOLES, NATIVES, tiny, tiny_mole, token_rows
from tests.tiny import tiny_image, tiny_llava

EMBEDDINGS = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
NEIGHBOURS = nearest(EMBEDDINGS, k=2)
every_kind = pytest.mark.parametrize("kind", [*MOLES, *NATIVES])


def aligned(model, *, steps: int = 3, lr: float = 1e-3, **settings):
    made = AlignSettings(**{"layers": 2} | settings)
    return align_routers(model, token_rows(12), made, neighbours=NEIGHBOURS, steps=steps, batch_size=4, lr=lr)


def regulariser_gradients(model, **settings) -> dict[str, torch.Tensor]:
    aligner = Aligner(model, AlignSettings(**{"layers": 2} | settings))
    source = AlignmentBatches(token_rows(12), NEIGHBOURS)
    batch = source.batch([0, 1, 2, 3])
    losses = aligner(batch)
    losses.loss.backward()
    with_it = {name: parameter.grad.clone() for name, parameter in aligner.trained().items()}
    aligner.zero_grad()
    plain = Aligner(model, AlignSettings(layers=2, regulariser="none"))
    plain(batch).loss.backward()
    return {name: with_it[name] - parameter.grad for name, parameter in plain.trained().items()}


# -- the defect of the released code -----------------------------------------------------------------------------------


@every_kind
def test_with_r_detached_the_weights_are_those_of_the_answers_loss_alone_bit_for_bit(kind):
    """The regulariser of RoMA's released code does this: it is read from constants."""
    alone = aligned(tiny(kind), regulariser="none").weights()
    detached = aligned(tiny(kind), targets="detached_both", weight=100.0).weights()
    live = aligned(tiny(kind), targets="live", weight=100.0).weights()
    assert all(torch.equal(detached[name], weight) for name, weight in alone.items())
    assert all(not torch.equal(live[name], weight) for name, weight in alone.items())


@every_kind
@pytest.mark.parametrize("targets", [name for name in TARGETS if name not in ("detached_both", "table")])
def test_the_regulariser_reaches_every_trained_weight(kind, targets):
    for name, gradient in regulariser_gradients(tiny(kind), targets=targets).items():
        assert gradient.abs().max() > 1e-7, name


def test_the_released_defect_reaches_none():
    assert not any(gradient.any() for gradient in regulariser_gradients(tiny_mole(), targets="detached_both").values())


def test_the_regularisers_gradient_is_that_of_finite_differences():
    """Through softmax, layers and both vectors: no constant is in between. The picks do not flip in so small a step."""
    model = tiny_mole(num_experts=3, gate="softmax", top_k=3).double()
    aligner = Aligner(model, AlignSettings(layers=2))
    for parameter in aligner.trained().values():
        parameter.data = parameter.data.double()
    batch = AlignmentBatches(token_rows(12), NEIGHBOURS).batch([0, 1, 2, 3])

    def regulariser() -> torch.Tensor:
        run(model, batch.inputs, None)
        return aligner._regulariser(batch)

    weight = aligner.trained()["layers.1.mlp.weight"]
    (analytic,) = torch.autograd.grad(regulariser(), weight)
    step, place = 1e-2, divmod(int(analytic.abs().argmax()), analytic.shape[1])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            values.append(regulariser().item())
            weight[place] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(analytic[place].item(), rel=1e-2)


# -- what is trained ---------------------------------------------------------------------------------------------------


@every_kind
def test_only_the_routers_of_the_chosen_layers_change(kind):
    model = tiny(kind)
    before = copy.deepcopy(dict(model.named_parameters()) | dict(model.named_buffers()))
    aligner = aligned(model, layers=1)
    trained = {id(parameter) for parameter in aligner.trained().values()}
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (id(tensor) in trained), name


@pytest.mark.parametrize("regulariser", REGULARISERS)
@pytest.mark.parametrize("kind", ["nulls", "olmoe"])
def test_every_regulariser_starts_at_the_answers_loss_and_learns(kind, regulariser):
    model = tiny(kind)
    aligner = Aligner(model, AlignSettings(regulariser=regulariser))
    source = AlignmentBatches(token_rows(12), NEIGHBOURS)
    batches = [source.batch([0, 1, 2, 3]), source.batch([4, 5, 6, 7])]
    aligner.calibrate(batches)
    losses = [aligner(batch) for batch in batches]
    answers, whole = (sum(getattr(each, name).item() for each in losses) for name in ("answer_loss", "loss"))
    assert whole == pytest.approx(answers if regulariser in ("none", "initial") else 2 * answers, rel=1e-4)
    before = aligner.weights()
    after = aligned(model, regulariser=regulariser).weights()
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())


def test_alignment_draws_neighbours_together():
    model, data = tiny_mole(), token_rows(12)
    layers = Aligner(model, AlignSettings()).layers

    def apart() -> float:
        r = sample_vectors(model, data, layers)
        return (r[:, None] - r[NEIGHBOURS.ids_NK]).square().sum(-1).mean().item()

    before = apart()
    aligned(model, layers=5, steps=30, lr=5e-2, weight=10.0)
    assert apart() < 0.5 * before


def test_the_answers_loss_alone_learns_the_answers():
    model, data = tiny_mole(lora_alpha=40), token_rows(12)
    model.get_base_model().lm_head.weight.data.mul_(20)  # wide enough for what lies below it to matter
    before = score(model, data).loss_N.mean()
    align_routers(model, data, AlignSettings(regulariser="none"), steps=30, batch_size=12, lr=3e-2)
    assert score(model, data).loss_N.mean() < before - 0.1


@pytest.mark.parametrize("targets", TARGETS)
def test_the_same_seed_gives_the_same_weights(targets):
    one, other = (aligned(tiny_mole(), targets=targets).weights() for _ in range(2))
    assert all(torch.equal(one[name], weight) for name, weight in other.items())


def test_groups_by_modality_are_aligned_on_a_llava_with_pictures(tmp_path):
    import json

    from peft import get_peft_model

    from mllm.alignment import EncodedRows, base_embeddings
    from mllm.data.sources import Source
    from tests.mllm.mole.helpers import wake

    records = []
    for number, colour in enumerate(("red", "green", "blue") * 2):
        tiny_image(colour).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is the square?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    model, processor = tiny_llava()
    groups = {"image": 2, "text": 2, "shared": 1}
    torch.manual_seed(0)
    config = MoleConfig(r=2, expert_groups=groups, num_null_experts=1, top_k=2, modality_prior=True)
    model = wake(get_peft_model(model, config)).eval()
    data = EncodedRows(list(Source(tmp_path / "rows.json")), processor)
    embeddings = base_embeddings(model, data)
    assert embeddings.shape == (6, 32)
    settings = AlignSettings(token="mean")  # pictures' tokens too
    before = Aligner(model, settings).weights()
    aligner = align_routers(model, data, settings, neighbours=nearest(embeddings, k=2), steps=2, batch_size=3)
    assert all(not torch.equal(before[name], weight) for name, weight in aligner.weights().items())
    r = sample_vectors(model, data, aligner.layers)
    assert r.isfinite().all()


# -- the parts of a run ------------------------------------------------------------------------------------------------


def test_lambda_rises_over_its_warm_up():
    aligner = Aligner(tiny_mole(), AlignSettings(weight_warmup=0.5))
    batch = AlignmentBatches(token_rows(12), NEIGHBOURS).batch([0, 1])
    added = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        aligner.progress = progress
        losses = aligner(batch)
        added.append((losses.loss - losses.answer_loss).item() / losses.regulariser.item())
    assert added == pytest.approx([0.0, 0.5, 1.0, 1.0], rel=1e-3)


def test_an_engine_cannot_put_it_into_training_mode():
    aligner = Aligner(tiny_mole(router_jitter=0.5, lora_dropout=0.5), AlignSettings())
    aligner.train()
    assert not any(module.training for module in aligner.modules())
    batch = AlignmentBatches(token_rows(12), NEIGHBOURS).batch([0, 1])
    assert aligner(batch).loss == aligner(batch).loss


def test_micro_batches_add_up_to_the_step():
    aligner = Aligner(tiny_mole(), AlignSettings(regulariser="none"))
    source = AlignmentBatches(token_rows(12))
    whole = source.batch([0, 1, 2, 3])
    halves = [source.batch(rows, answer_tokens=whole.answer_tokens) for rows in ([0, 1], [2, 3])]
    assert sum(aligner(half).loss.item() for half in halves) == pytest.approx(aligner(whole).loss.item(), rel=1e-5)


def test_neighbours_are_looked_for_anew_each_epoch():
    asked = []

    def refresh(aligner, epoch):
        asked.append(epoch)
        return nearest(EMBEDDINGS, candidates_N=score(aligner.model, token_rows(12)).loss_N < 100, k=1)

    align_routers(
        tiny_mole(), token_rows(12), AlignSettings(), neighbours=NEIGHBOURS, steps=9, batch_size=4, refresh=refresh
    )
    assert asked == [1, 2]


def test_what_cannot_learn_or_has_no_neighbours_is_refused():
    with pytest.raises(UserError, match="gate is 'none'"):
        Aligner(tiny_mole(gate="none"), AlignSettings(regulariser="none"))
    with pytest.raises(UserError, match="needs neighbours"):
        align_routers(tiny_mole(), token_rows(4), AlignSettings(), steps=1)
    same = nearest(EMBEDDINGS, k=1)
    same.weights_NK.zero_()
    with pytest.raises(UserError, match="exactly alike"):
        align_routers(tiny_mole(), token_rows(12), AlignSettings(), neighbours=same, steps=1)
    for wrong in ({"token": "best"}, {"targets": "frozen"}, {"regulariser": "l1"}, {"space": "x"}, {"weight": -1}):
        with pytest.raises(UserError):
            AlignSettings(**wrong)
