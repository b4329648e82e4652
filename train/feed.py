"""What a rank reads, and when: the run's whole order of micro-batches as a pure function of mixture, seed and shape."""

from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any

from torch.utils.data import Dataset, Sampler

from mllm.data.images import ImageError
from mllm.data.mixture import Mixture
from mllm.data.template import ConversationEncoder


class EncodedMixture(Dataset[dict[str, Any]]):
    """A mixture's rows as encoded samples; a row whose picture cannot be read is replaced if the mixture says `skip`."""

    def __init__(self, mixture: Mixture, encoder: ConversationEncoder) -> None:
        self.mixture = mixture
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.encoder.encode(self.mixture[index])
        except ImageError:
            if self.mixture.config.bad_images == "error":
                raise
            return self._replacement(index)

    def _replacement(self, index: int) -> dict[str, Any]:
        """The first readable stand-in, the same one whenever and wherever the row is asked for."""
        for other in self.mixture.stand_ins(index):
            try:
                return self.encoder.encode(self.mixture[other])
            except ImageError:
                continue
        raise ImageError(f"{self.mixture.source_of_row[index]}: not one picture of this source can be read.")


class RunOrder(Sampler[list[int]]):
    """Row indices of every micro-batch that one rank takes in a run, epoch after epoch.

    A step's global batch depends on the seed and the step alone: two arms, or one arm on another number of ranks, see
    the same samples in the same step. Resuming skips by arithmetic, without reading a sample.
    """

    def __init__(
        self, mixture: Mixture, *, seed: int, steps: int, batch_size: int, micro_batch_size: int, rank: int, world: int
    ) -> None:
        self.mixture = mixture
        self.seed = seed
        self.steps = steps
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return self.steps * (self.batch_size // (self.micro_batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        rows = chain.from_iterable(self.mixture.order(self.seed, epoch).tolist() for epoch in count())
        for _ in range(self.steps):
            batch = list(islice(rows, self.batch_size))
            first, stride = self.rank * self.micro_batch_size, self.world * self.micro_batch_size
            for start in range(first, self.batch_size, stride):
                yield batch[start : start + self.micro_batch_size]
