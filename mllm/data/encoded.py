"""A mixture as a data set of encoded samples, with stand-ins for rows that cannot be used."""

from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import Dataset

from mllm.common.errors import RowError, TooLongError, UserError
from mllm.data.conversation import Conversation
from mllm.data.mixture import Mixture
from mllm.data.template import ConversationEncoder


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used as it is, and why."""

    index: int  # of the row in the mixture
    source: str
    reason: str  # "record", "missing picture", "picture", "too long"
    error: str  # names file and row
    action: Literal["refused", "skipped", "cut"] = "refused"
    instead: str | None = None  # file and row of the one that took its place


def bad_row(mixture: Mixture, index: int, error: UserError, *, cut: bool = False, instead: str | None = None) -> BadRow:
    """What is to be told of a row that raised an error, and of what the mixture's policies make of it."""
    reason = error.reason if isinstance(error, RowError) else RowError.reason
    action = "cut" if cut else "skipped" if mixture.config.skips(error) else "refused"
    return BadRow(index, mixture.source_of_row[index], reason, str(error), action, instead)


class EncodedMixture(Dataset[dict[str, Any]]):
    """Row i of the mixture, encoded. The mixture's `bad_rows` and `too_long` say what happens to one that cannot be:

    `error` raises. `skip` gives another row of the same source, the same one in every run, process and epoch.
    `truncate` takes a too long conversation without its last turns. Either tells so in the sample's `bad_rows`, a list
    of `BadRow`, which travels with the sample: what a step has met does not depend on how far data is read ahead.
    """

    def __init__(self, mixture: Mixture, encoder: ConversationEncoder) -> None:
        self.mixture = mixture
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `ConversationEncoder.encode` returns and raises, and `bad_rows` where there is something to tell."""
        return self.take(index)[1]

    def take(self, index: int) -> tuple[Conversation, dict[str, Any]]:
        """The conversation that stands at row `index` once the policies had their say, and its sample."""
        try:
            return self._take(index)
        except UserError as error:
            if not self.mixture.config.skips(error):
                raise
            return self._stand_in(index, error)

    def _take(self, index: int) -> tuple[Conversation, dict[str, Any]]:
        conversation = self.mixture[index]
        try:
            return conversation, self.encoder.encode(conversation)
        except TooLongError as error:
            if self.mixture.config.too_long != "truncate":
                raise
            short = self.encoder.shortened(conversation)
            told = bad_row(self.mixture, index, error, cut=True)
            return short, self.encoder.encode(short) | {"bad_rows": [told]}

    def _stand_in(self, index: int, error: UserError) -> tuple[Conversation, dict[str, Any]]:
        others = self.mixture.stand_ins(index)
        for other in others:
            try:
                conversation, sample = self._take(other)
            except UserError:
                continue
            told = bad_row(self.mixture, index, error, instead=sample["where"])
            return conversation, sample | {"bad_rows": [told, *sample.get("bad_rows", [])]}
        raise RowError(f"{error}\nNor can any of {len(others)} other rows drawn from that source be used.") from error
