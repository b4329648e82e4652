"""What two ranks compute together equals what one computes on the joined batch."""

import pickle

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mllm.routing import BALANCE_LOSSES, RoutingContext, RoutingStats, route

ROWS_OF_RANK = [slice(0, 1), slice(1, 3)]
IDS = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])  # ranks hold 2 and 7 counted tokens
DOMAINS = ["general", "document", "document"]
LOGITS = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))


def work(rows):
    """Balance loss, gradient of the logits and statistics for some rows of the batch."""
    logits = LOGITS[rows].flatten(0, 1).clone().requires_grad_()
    context = RoutingContext(image_token_id=0)
    context.begin(input_ids=IDS[rows], attention_mask=MASK[rows])
    context.record("a", route(logits, top_k=1, gate="none"), trainable=False)
    loss = BALANCE_LOSSES["global_batch"](
        router_probs_LTX=context.stack("router_probs_TX"),
        expert_ids_LTK=context.stack("expert_ids_TK"),
        is_counted_T=~context.is_pad_T,
        sample_T=context.sample_T,
    )
    loss.backward()
    stats = RoutingStats()
    stats.update(context, DOMAINS[rows])
    return loss.detach(), logits.grad, stats.all_reduce().to_json()


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(work(ROWS_OF_RANK[rank])))
    dist.destroy_process_group()


def test_balance_loss_its_gradient_and_statistics_over_two_ranks_equal_the_joined_batch(tmp_path):
    mp.spawn(on_rank, args=(tmp_path,), nprocs=2)
    ranks = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)]
    loss, gradient, stats = work(slice(0, 3))
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), loss)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / 2, gradient)  # data parallelism averages over ranks
    assert ranks[0][2] == ranks[1][2]
    assert ranks[0][2]["shares"] == stats["shares"]
    for domain, cells in stats["domains"].items():
        for modality, values in cells.items():
            assert ranks[0][2]["domains"][domain][modality]["picks"] == values["picks"]
            torch.testing.assert_close(
                torch.tensor(ranks[0][2]["domains"][domain][modality]["entropy"]), torch.tensor(values["entropy"])
            )
