"""A question set answered by one model: batch by batch, by all ranks, and on from where a killed run was.

With the same batch size a batch is the same rows whatever was answered before and whoever answers it, so a resumed run
and one of several ranks give the replies of one that ran alone, to the last bit.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from mllm.common import ranks
from mllm.data.conversation import Conversation
from mllm.evaluation.answers import Answer, answer_line, collect_answers, recipe_path
from mllm.evaluation.recipe import Recipe
from mllm.inference.generate import answer_batches, plan_batches
from mllm.mole import routing_context
from mllm.routing.stats import RoutingStats, Sums


class ResumableAnswers:
    """Answers as they come: <arm>.jsonl, in the order of the batches, and <arm>.resume.pt, which says what they are
    answers of, which rows are done, and how their prompts were routed.

    Each batch's lines are appended at once and counted after that, so that a kill between the two costs one batch.
    """

    def __init__(self, path: Path, origin: Mapping[str, str], *, model_id: str, recipe: Recipe, fresh: bool) -> None:
        """Opens what is there, if it has the same `origin`; else, or if `fresh`, moves it aside and says so.

        Args:
            origin: name -> value of everything the replies depend on.
        """
        self.path, self._model_id, self._recipe, self._origin = path, model_id, recipe, dict(origin)
        self.replies: dict[int, str] = {}
        self.stats = RoutingStats()
        if path.exists() and (reason := "a fresh start was asked for" if fresh else self._read()):
            self.replies, self.stats = {}, RoutingStats()
            self._move_aside(reason)

    @property
    def _progress(self) -> Path:
        return self.path.with_suffix(".resume.pt")

    def _read(self) -> str | None:
        """Takes over replies and routing; returns why they are of no use here, if they are not."""
        if not self._progress.exists():
            return "nothing says what they are answers of"
        with torch.serialization.safe_globals([RoutingStats, Sums]):
            saved = torch.load(self._progress, weights_only=True)
        if others := [name for name, value in self._origin.items() if saved["origin"].get(name) != value]:
            return f"they were given with another {' and another '.join(others)}"
        self._drop_torn_line()
        done = set(saved["rows"])
        replies = {row: text for row, text in _replies_in(self.path).items() if row in done}
        if len(replies) < len(done):
            return "lines are missing from them"
        self.replies, self.stats = replies, saved["stats"]
        return None

    def _drop_torn_line(self) -> None:
        """What a kill in the middle of a write left behind the last whole line."""
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def _move_aside(self, reason: str) -> None:
        number = 1
        while (earlier := self.path.with_suffix(f".earlier-{number}.jsonl")).exists():
            number += 1
        for now, then in ((recipe_path(self.path), recipe_path(earlier)), (self.path, earlier)):
            if now.exists():
                now.rename(then)
        self._progress.unlink(missing_ok=True)
        say(f"{self.path}: there were answers, but {reason}; moved to {earlier.name}")

    def add(self, rows: Sequence[int], answers: Sequence[Answer], stats: RoutingStats) -> None:
        """Keeps the replies to one batch and the routing of its prompts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            answer_line(answer, row, model_id=self._model_id, recipe=self._recipe)
            for row, answer in zip(rows, answers, strict=True)
        ]
        with self.path.open("ab") as file:
            file.write("".join(lines).encode("utf-8"))
        self.replies |= {row: answer.prediction for row, answer in zip(rows, answers, strict=True)}
        self.stats = self.stats.merge(stats)
        unfinished = self._progress.with_suffix(".part")
        torch.save({"origin": self._origin, "rows": list(self.replies), "stats": self.stats}, unfinished)
        os.replace(unfinished, self._progress)


def _replies_in(path: Path) -> dict[int, str]:
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return {record["metadata"]["row"]: record["text"] for record in records}


def answer_all(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    rows: Sequence[Conversation],
    answers_file: ResumableAnswers | None,
    *,
    batch_size: int,
    max_new_tokens: int,
    blank: bool = False,
) -> tuple[list[Answer], RoutingStats]:
    """Every row's answer, in order, and the routing of the prompts, on every rank; all ranks call it together.

    Args:
        answers_file: of the first rank, where everything is kept as it comes; None on the others.

    Raises:
        UserError: as `mllm.inference.generate.answer`.
    """
    done = ranks.shared(set(answers_file.replies) if answers_file else None)
    batches = [
        left for batch in plan_batches(rows, processor, batch_size) if (left := [r for r in batch if r not in done])
    ]
    prompted: list[RoutingStats] = []
    answered = answer_batches(
        model, processor, rows, batches[ranks.rank() :: ranks.size()], max_new_tokens=max_new_tokens, blank=blank,
        on_batch=lambda domains: prompted.append(_routing_of(model, domains)),
    )  # fmt: skip
    with tqdm(
        total=len(rows), initial=len(done), unit=" questions", desc="answering", disable=answers_file is None
    ) as bar:
        for start in range(0, len(batches), ranks.size()):
            round_of = batches[start : start + ranks.size()]
            mine = (next(answered), prompted.pop()) if ranks.rank() < len(round_of) else None
            for batch, (texts, stats) in zip(round_of, ranks.gathered(mine) or [], strict=False):
                answers_file.add(batch, collect_answers([rows[row] for row in batch], texts), stats)
                bar.update(len(batch))
    answered.close()
    replies, stats = ranks.shared((answers_file.replies, answers_file.stats) if answers_file else None)
    return collect_answers(rows, [replies[row] for row in range(len(rows))]), stats


def _routing_of(model: PreTrainedModel | PeftModel, domains: Sequence[str]) -> RoutingStats:
    """Of the forward that has just been; empty for a model without routers."""
    stats, context = RoutingStats(), routing_context(model)
    if context is not None:
        stats.update(context, domains)
    return stats


def say(text: str) -> None:
    """To whoever watches, once for all ranks."""
    if ranks.is_first():
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
