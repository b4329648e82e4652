"""What routers know of a row's earlier calls: a layer of its own in transformers' KV cache.

There it follows the cache through all that is done with it: beams are reordered, rows chosen or repeated, the cache
copied, cropped or reset. The model itself remembers nothing, so each conversation keeps its own.

B rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mllm.common.errors import UserError


class Entry(NamedTuple):
    """What is known of the rows from cached position `end` on; it changed at positions `start` to `end`."""

    start: int
    end: int
    rows: dict[str, Tensor]


class PastRows(CacheLayerMixin):
    """Tensors with a row for each row of the cache, by name, each as it was after some call: `values [B, ...]`.

    It stands behind the decoder's own layers and holds neither keys nor values. An entry is made only by a call that
    changed something, so a long generation adds none.
    """

    is_compileable = is_croppable = True
    is_sliding = supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.entries: list[Entry] = []

    def before(self, length: int) -> dict[str, Tensor]:
        """What the first `length` cached positions say of the rows; {} where they say nothing.

        Forgets what was known of later positions, which have been cropped. Raises UserError where the cache was cut
        in the middle of what an entry was made from.
        """
        self.entries = [entry for entry in self.entries if entry.start < length or entry.end <= length]
        if self.entries and self.entries[-1].end > length:
            last = self.entries[-1]
            raise UserError(
                f"The cache was cropped to {length} tokens, in the middle of a picture that routers read (tokens "
                f"{last.start} to {last.end}). Crop it before or behind the picture, or begin with a new cache."
            )
        return self.entries[-1].rows if self.entries else {}

    def add(self, entry: Entry) -> None:
        """Take in what a call has told."""
        self.entries.append(entry)

    def _each_row(self, change: Any) -> None:
        self.entries = [
            entry._replace(rows={name: change(values) for name, values in entry.rows.items()}) for entry in self.entries
        ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_row(lambda values: values.index_select(0, beam_idx.to(values.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda values: values[indices.to(values.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda values: values.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self.entries = []

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing: the next call tells how long the cache still is, see `before`."""

    def offload(self) -> None:
        """Nothing: a few numbers a row stay where they are."""

    prefetch = offload

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make room for."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[None, None]:
        """Keeps no keys and values; transformers calls it with None when it rebuilds a cache."""
        return None, None

    def get_seq_length(self) -> int:
        return 0  # a cache tells its length by its first layers; this one has no keys

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.2x


def past_length(cache: Any) -> int:
    """Tokens that a model's `past_key_values` hold. Raises UserError for what is not a Cache of transformers."""
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UserError(
            f"past_key_values must be a Cache of transformers, which remembers what routers read of a row, got "
            f"{type(cache).__name__}; use DynamicCache."
        )
    return int(cache.get_seq_length())


def find_past(cache: Any) -> PastRows | None:
    """What a cache remembers for routers; None where it has been filled without them."""
    layers = getattr(_decoder_cache(cache), "layers", [])
    return next((layer for layer in layers if isinstance(layer, PastRows)), None)


def keep_past(cache: Any, entry: Entry | None) -> None:
    """Lets a cache that a forward has filled remember what the forward told, if it told something."""
    past = find_past(cache)
    if past is None:
        past = PastRows()
        _decoder_cache(cache).layers.append(past)
    if entry is not None:
        past.add(entry)


def find_cache(output: Any) -> Cache | None:
    """The cache in what a model returned: a ModelOutput, or a tuple."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return getattr(output, "past_key_values", None)


def _decoder_cache(cache: Any) -> Any:
    return getattr(cache, "self_attention_cache", cache)
