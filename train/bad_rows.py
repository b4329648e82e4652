"""Which rows a run could not use: gathered from all ranks, counted in the log, listed in a file, bounded."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mllm.common import ranks
from mllm.common.errors import UserError
from mllm.data.encoded import BadRow
from mllm.data.mixture import Mixture, most_rows
from mllm.data.sources import tell_first

BAD_ROWS = "bad_rows.jsonl"


class BadRows(TrainerCallback):
    """The bad rows that the steps so far have met, each once, as `bad_rows.jsonl` lists them.

    What a step meets is a function of data and seed, so the list after a step is the same on any number of ranks and
    loading processes, and after a resume, which drops what came after its checkpoint.
    """

    def __init__(self, path: Path, mixture: Mixture) -> None:
        self.path = path
        self.mixture = mixture
        self.waiting: list[BadRow] = []  # met by this rank since the last `gather`
        self.known: dict[int, dict] = {}  # index of a row -> its entry; the same on all ranks

    def add(self, bad_rows: Iterable[BadRow]) -> None:
        """What a micro-batch brought."""
        self.waiting += bad_rows

    def gather(self, step: int) -> int:
        """Puts together what all ranks have met and writes down what is new; returns how many rows that are.

        All ranks call it together. Raises UserError on all of them if the mixture allows no more bad rows.
        """
        met, self.waiting = list(chain.from_iterable(ranks.all_gathered(self.waiting))), []
        new = {bad.index: {"step": step, **vars(bad)} for bad in met if bad.index not in self.known}
        new = dict(sorted(new.items()))
        self.known |= new
        if new and ranks.is_first():
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new.values())
        skipped = [entry["error"] for entry in self.known.values() if entry["action"] == "skipped"]
        check_limit(self.mixture, skipped, f"up to step {step}; {self.path} lists them")
        return len(new)

    def counts(self) -> dict[str, int]:
        """Rows met so far by what was done, source and reason, for the log; nothing if there were none."""
        kinds = Counter(f"{bad['action']}/{bad['source']}/{bad['reason']}" for bad in self.known.values())
        return {f"bad_rows/{kind}": number for kind, number in sorted(kinds.items())}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Takes over the list of the run that is resumed."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [entry for line in lines if (entry := _entry(line)) and entry["step"] <= state.global_step]
        self.known = {entry["index"]: entry for entry in entries}
        ranks.barrier()  # every rank has read
        if ranks.is_first() and lines:
            text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            self.path.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_limit(mixture: Mixture, errors: list[str], when: str) -> None:
    """Raises UserError if there are more bad rows than the mixture's `max_bad` allows."""
    allowed = most_rows(mixture.config.max_bad, len(mixture))
    if len(errors) > allowed:
        raise UserError(
            f"{len(errors)} of {len(mixture)} rows cannot be used ({when}), more than max_bad"
            f" {mixture.config.max_bad} allows ({allowed}). Mend the data, or raise max_bad. The first of them:\n"
            + tell_first(errors)
        )


def _entry(line: str) -> dict | None:
    """None for a line that a killed run has not written to its end."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
