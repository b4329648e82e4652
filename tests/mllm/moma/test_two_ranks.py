"""Under data parallelism the batch of expert choice is the rank's own, or, where it is asked for, that of all ranks."""

import multiprocessing
import pickle

import pytest
import torch
import torch.distributed as dist

from tests.mllm.moma.helpers import IDS, MASK, tiny_moma

MODELS_FROM = "tests.mllm.moma.helpers"
ROWS_OF_RANK = [slice(0, 1), slice(1, 3)]
PADS = 4  # the first row begins with
MODELS = {
    "global": {"choice_batch": "global"},
    "global, depths": {"choice_batch": "global", "mixture_of_depths": 0.5},
    "rank": {},
}


def work(rows, fields, first=0):
    """What a training forward on some rows, from a column on, chooses in the first layer, and thresholds it leaves."""
    model = tiny_moma("2t2i", **fields)
    for router in model._choice_routers():
        router.batches_seen.zero_()
    model.train()(IDS[rows, first:], attention_mask=MASK[rows, first:])
    picks = {name: choice.is_chosen_TE for name, choice in model.routing_context.choices.items() if "layers.0" in name}
    return picks, [router.threshold for router in model._choice_routers()]


def gradients(rows, *, checkpointed):
    """Of all weights, where experts choose among all ranks' tokens."""
    model = tiny_moma("2t2i", **MODELS["global"]).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(IDS[rows], attention_mask=MASK[rows], labels=IDS[rows]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def on_rank(rank, folder):
    made = {name: tiny_moma("2t2i", **fields).state_dict() for name, fields in MODELS.items()}  # before ranks meet
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    done = {name: work(ROWS_OF_RANK[rank], MODELS[name]) for name in made}
    done["lengths"] = work(ROWS_OF_RANK[rank], MODELS["global"], first=PADS if rank == 0 else 0)
    done["gradients"] = [gradients(ROWS_OF_RANK[rank], checkpointed=checkpointed) for checkpointed in (False, True)]
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(done))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = multiprocessing.get_context("forkserver")  # imports the model once, and not for each rank
    processes.set_forkserver_preload([MODELS_FROM])
    running = [processes.Process(target=on_rank, args=(rank, folder)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


def joined(ranks, name):
    parts = [rank[name][0] for rank in ranks]
    return {router: torch.cat([part[router] for part in parts]) for router in parts[0]}


@pytest.mark.parametrize("name", ["global", "global, depths"])
def test_experts_that_choose_globally_choose_as_from_the_joined_batch(ranks, name):
    picks, thresholds = work(slice(0, 3), MODELS[name])
    for router, is_chosen_TE in joined(ranks, name).items():
        assert torch.equal(is_chosen_TE, picks[router]), router
    torch.testing.assert_close(ranks[0][name][1][0], thresholds[0])


def test_ranks_whose_rows_differ_in_length_choose_as_from_the_joined_batch(ranks):
    picks = work(slice(0, 3), MODELS["global"])[0]["layers.0.ffn.router"]
    assert torch.equal(joined(ranks, "lengths")["layers.0.ffn.router"], picks[PADS:])


def test_recomputation_in_the_backward_pass_chooses_globally_too(ranks):
    for rank in ranks:
        plain, checkpointed = rank["gradients"]
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_by_default_each_rank_chooses_from_its_own_rows(ranks):
    for rank, rows in zip(ranks, ROWS_OF_RANK, strict=True):
        picks, _ = work(rows, MODELS["rank"])
        assert torch.equal(rank["rank"][0]["layers.0.ffn.router"], picks["layers.0.ffn.router"])
    alone, _ = work(slice(0, 3), MODELS["rank"])
    assert not torch.equal(joined(ranks, "rank")["layers.0.ffn.router"], alone["layers.0.ffn.router"])


@pytest.mark.parametrize("name", MODELS)
def test_ranks_agree_on_thresholds(ranks, name):
    for first, second in zip(ranks[0][name][1], ranks[1][name][1], strict=True):
        assert torch.equal(first, second)
