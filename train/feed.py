"""What a rank reads, and when: the run's whole order of micro-batches as a pure function of mixture, seed and shape."""

from collections.abc import Iterator
from itertools import chain, count, islice

from torch.utils.data import Sampler

from mllm.data.mixture import Mixture


class RunOrder(Sampler[list[int]]):
    """Row indices of every micro-batch that one rank takes in a run, epoch after epoch.

    A step's global batch depends on the seed and the step alone: two arms, or one arm on another number of ranks, see
    the same samples in the same step. Resuming skips by arithmetic, without reading a sample.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        steps: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        start: int = 0,
    ) -> None:
        """mixture: anything with a length and `order(seed, epoch)`. start: rows an earlier stage has seen."""
        self.mixture = mixture
        self.seed = seed
        self.steps = steps
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world = world
        self.start = start

    def __len__(self) -> int:
        return self.steps * (self.batch_size // (self.micro_batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        rows = chain.from_iterable(self.mixture.order(self.seed, epoch).tolist() for epoch in count())
        rows = islice(rows, self.start, None)
        for _ in range(self.steps):
            batch = list(islice(rows, self.batch_size))
            first, stride = self.rank * self.micro_batch_size, self.world * self.micro_batch_size
            for start in range(first, self.batch_size, stride):
                yield batch[start : start + self.micro_batch_size]
