"""What two ranks compute together equals what one computes on the joined batch."""

import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mllm.routing import BALANCE_LOSSES, BalanceWindow, ExpertLayout, RoutingContext, RoutingStats, Target, route

ROWS_OF_RANK = [slice(0, 1), slice(1, 3)]
IDS = torch.randint(0, 3, (2, 3, 4), generator=torch.Generator().manual_seed(0))  # two micro-batches
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])  # ranks hold 2 and 7 counted tokens
DOMAINS = ["general", "document", "document"]
LOGITS = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(1))
LAYOUTS = {
    "plain": ExpertLayout.of(3),
    "nulls": ExpertLayout.of(3, None, 2),
    "groups and nulls": ExpertLayout.of(5, {"text": 2, "image": 2, "shared": 1}, 1),
}


def work(rows, layout):
    """Loss and gradient of the logits of each micro-batch, its window over both, and statistics, for some rows."""
    window, stats, results = BalanceWindow(), RoutingStats(), []
    for ids, logits in zip(IDS, LOGITS, strict=True):
        context = RoutingContext(image_token_id=0)
        context.begin(input_ids=ids[rows], attention_mask=MASK[rows])
        num_columns = layout.allowed_PX.shape[1]
        logits_TX = logits[rows].flatten(0, 1)[:, :num_columns].clone().requires_grad_()
        population_T = context.modality_T if layout.is_grouped else torch.zeros_like(context.sample_T)
        routing = route(
            logits_TX,
            top_k=2,
            gate="none",
            num_experts=layout.num_experts,
            allowed_TX=layout.allowed_PX[population_T],
        )
        context.record("a", routing, trainable=False)
        loss = BALANCE_LOSSES["global_batch"](
            router_probs_LTX=context.stack("router_probs_TX"),
            picks_LTX=context.stack("picks_TX"),
            is_counted_T=~context.is_pad_T,
            sample_T=context.sample_T,
            population_T=population_T,
            target=Target.of(layout),
            window=window,
        )
        loss.backward()
        results.append((loss.detach(), logits_TX.grad, window.counts_LPX))
        stats.update(context, DOMAINS[rows])
    return results, stats.all_reduce().to_json()


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    done = {name: work(ROWS_OF_RANK[rank], layout) for name, layout in LAYOUTS.items()}
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(done))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_rank, args=(folder,), nprocs=2)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_balance_its_gradient_and_its_window_over_two_ranks_equal_the_joined_batch(ranks, name):
    joined, _ = work(slice(0, 3), LAYOUTS[name])
    for step, (loss, gradient, counts_LPX) in enumerate(joined):
        of_ranks = [rank[name][0][step] for rank in ranks]
        torch.testing.assert_close(torch.stack([r[0] for r in of_ranks]).mean(), loss)
        # data parallelism averages gradients over ranks
        torch.testing.assert_close(torch.cat([r[1] for r in of_ranks]) / 2, gradient)
        assert gradient.any()
        for r in of_ranks:
            assert torch.equal(r[2], counts_LPX)


def test_statistics_over_two_ranks_equal_the_joined_batch(ranks):
    _, stats = work(slice(0, 3), LAYOUTS["plain"])
    one, other = (rank["plain"][1] for rank in ranks)
    assert one == other
    assert one["shares"] == stats["shares"]
    for domain, cells in stats["domains"].items():
        for modality, values in cells.items():
            assert one["domains"][domain][modality]["picks"] == values["picks"]
            torch.testing.assert_close(
                torch.tensor(one["domains"][domain][modality]["entropy"]), torch.tensor(values["entropy"])
            )
