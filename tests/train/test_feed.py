"""What each rank reads, and when."""

import pytest

from mllm.data.mixture import load_mixture
from tests.train.data import write_rows
from train.feed import RunOrder

SHAPE = {"seed": 3, "steps": 20, "batch_size": 8}


@pytest.fixture
def mixture(tmp_path):
    return load_mixture(write_rows(tmp_path))


def global_batches(mixture, world: int, micro: int) -> list[set[int]]:
    """The rows of each step, put together from all ranks."""
    ranks = [RunOrder(mixture, micro_batch_size=micro, rank=rank, world=world, **SHAPE) for rank in range(world)]
    per_step = len(ranks[0]) // SHAPE["steps"]
    batches = [list(order) for order in ranks]
    return [
        {row for rank in batches for batch in rank[step * per_step : (step + 1) * per_step] for row in batch}
        for step in range(SHAPE["steps"])
    ]


def test_a_step_reads_the_same_rows_on_any_number_of_ranks_and_micro_batches(mixture):
    assert global_batches(mixture, 1, 8) == global_batches(mixture, 2, 2) == global_batches(mixture, 4, 1)


def test_ranks_share_no_row_and_leave_none_out(mixture):
    first_epoch = global_batches(mixture, 2, 2)[: len(mixture) // SHAPE["batch_size"]]
    assert sum(len(batch) for batch in first_epoch) == len(set().union(*first_epoch)) == len(mixture)


def test_the_next_epoch_comes_in_another_order(mixture):
    rows = [row for batch in RunOrder(mixture, micro_batch_size=8, rank=0, world=1, **SHAPE) for row in batch]
    assert rows[: len(mixture)] == mixture.order(3, 0).tolist()
    assert rows[len(mixture) : 2 * len(mixture)] == mixture.order(3, 1).tolist()


def test_a_later_stage_reads_on_where_the_earlier_stopped(mixture):
    def rows(**changes: int) -> list[int]:
        order = RunOrder(mixture, micro_batch_size=8, rank=0, world=1, **SHAPE | changes)
        return [row for batch in order for row in batch]

    assert rows(steps=12, start=64) == rows()[64:]


def test_length_is_the_number_of_micro_batches(mixture):
    order = RunOrder(mixture, micro_batch_size=2, rank=1, world=2, **SHAPE)
    assert len(order) == len(list(order)) == 40
