"""What a benchmark's file describes, and what its reader gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.formats import IMAGE_PLACE, EmbeddedImage
from mllm.evaluation.choices import LETTERS

Domain = Literal["general", "document", "biomedical"]
SHORT = "{question}\nAnswer the question using a single word or phrase."  # LLaVA-1.5's prompts
CHOICE = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
YES_NO = "{question}\nPlease answer yes or no."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question as its publisher gives it; the benchmark's prompt is put around it by `Benchmark`."""

    id: str
    question: str  # `<image>` where a picture stands; without any mark they stand in front
    answers: tuple[str, ...]  # all accepted ones; of options, the right one's letter
    images: tuple[str | bytes, ...] = ()  # paths below the benchmark's folder, or the file's content
    options: tuple[str, ...] = ()
    qtype: str | None = None
    metric: str | None = None  # where it differs from the benchmark's
    prompt: str | None = None  # likewise
    target: str | None = None  # what training would learn; by default the first answer


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published set of questions: where it lies, what may be done with it, how it is asked and graded.

    Nothing here is of evaluation alone: a training recipe reads the same rows of another split.
    """

    title: str
    domain: Domain
    home: str  # address of its publisher
    licence: str
    splits: tuple[str, ...]  # those that have answers and that the reader knows; the first is asked by default
    files: tuple[str, ...]  # patterns of what must be in its folder; {split} is the split's name
    pictures: str  # where pictures lie, in words
    metric: str
    reference: str  # whose rule the metric is
    read: Callable[[Path, str], Iterator[Row]]  # its folder, a split
    prompt: str = SHORT
    name: str = ""  # the file's, set by `find`
    lies_in: str = ""  # the benchmark whose folder it shares, if any

    def folder(self, root: Path, split: str, *, alone: bool = True) -> Path | None:
        """`root/NAME` (or that of the benchmark it lies with), or `root` itself if it is asked for alone; None where
        its files are in none of them.
        """
        places = [root / self.name, *([root / self.lies_in] if self.lies_in else []), *([root] if alone else [])]
        return next((place for place in places if not self.missing(place, split)), None)

    def missing(self, folder: Path, split: str) -> list[str]:
        """Patterns of its files that nothing in a folder fits."""
        patterns = [pattern.replace("{split}", split) for pattern in self.files]
        return [pattern for pattern in patterns if not any(any(folder.glob(each)) for each in pattern.split(" or "))]

    def conversations(
        self, folder: Path, *, split: str | None = None, limit: int | None = None, check_files: bool = True
    ) -> list[Conversation]:
        """Its rows, asked as it is usual; at most `limit`.

        Raises:
            UserError: an unknown split, files in another layout than the published one, a missing picture.
        """
        split = split or self.splits[0]
        if split not in self.splits:
            raise UserError(f"{self.name}: no split {split!r} with answers; there is {', '.join(self.splits)}.")
        if missing := self.missing(folder, split):
            raise UserError(f"{self.name}: no {missing[0]} in {folder}. Get it from {self.home}.")
        rows: list[Conversation] = []
        try:
            for row in islice(self.read(folder, split), limit):
                where = f"{folder}: {self.name} {split} row {len(rows) + 1}"
                record = self.record(row)
                rows.append(Conversation.from_record(record, image_root=folder, where=where, check_files=check_files))
        except UserError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{folder}: {self.name} {split} row {len(rows) + 1} is not in the published layout "
                f"({type(error).__name__}: {error}). Expected files: {', '.join(self.files)}; see {self.home}."
            ) from error
        if not rows:
            raise UserError(f"{folder}: {self.name} has no row of split {split}.")
        return rows

    def record(self, row: Row) -> dict[str, Any]:
        """A row as LLaVA's record with its labels: what `mllm.data` reads and trains on."""
        options = "\n".join(f"{LETTERS[place]}. {text}" for place, text in enumerate(row.options))
        prompt = row.prompt or self.prompt
        asked = prompt.replace("{options}", options).replace("{question}", row.question.strip())
        if row.images and IMAGE_PLACE not in row.question:
            asked = f"{IMAGE_PLACE}\n" * len(row.images) + asked
        target = row.target if row.target is not None else row.answers[0]
        return {
            "id": row.id,
            "image": [EmbeddedImage(image) if isinstance(image, bytes) else image for image in row.images],
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": target}],
            "source": self.name,
            "domain": self.domain,
            "metric": row.metric or self.metric,
            "qtype": row.qtype,
            "answers": list(row.answers),
            "options": list(row.options),
        }
