"""A mixture as a data set of encoded samples, with stand-ins for rows whose picture cannot be read."""

import logging
import multiprocessing
from itertools import islice
from typing import Any

from torch.utils.data import Dataset

from mllm.data.images import ImageError
from mllm.data.mixture import Mixture
from mllm.data.template import ConversationEncoder

logger = logging.getLogger(__name__)


class EncodedMixture(Dataset[dict[str, Any]]):
    """Row i of the mixture, encoded. What happens to a bad picture is the mixture's `bad_images`:

    `error` raises; `skip` gives the next row of the same source that can be read, the same one in every run, and
    counts it in `skipped`, over all data-loading processes. No other error is skipped.
    """

    MAX_TRIES = 20  # bad rows on end, after which the source is taken for broken

    def __init__(self, mixture: Mixture, encoder: ConversationEncoder) -> None:
        self.mixture = mixture
        self.encoder = encoder
        self._skipped = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `ConversationEncoder.encode` returns and raises."""
        try:
            return self.encoder.encode(self.mixture[index])
        except ImageError as error:
            if self.mixture.config.bad_images == "error":
                raise
            return self._stand_in(index, error)

    @property
    def skipped(self) -> int:
        """How often a row was replaced so far."""
        return self._skipped.value

    def _stand_in(self, index: int, error: ImageError) -> dict[str, Any]:
        for other in islice(self.mixture.stand_ins(index), self.MAX_TRIES):
            try:
                sample = self.encoder.encode(self.mixture[other])
            except ImageError:
                continue
            with self._skipped.get_lock():
                self._skipped.value += 1
            logger.warning("row skipped, %s takes its place. %s", sample["where"], error)
            return sample
        raise ImageError(f"{error}\nNor can the pictures of the rows after it in that source be read.") from error
