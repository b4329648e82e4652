"""Published benchmarks, one file each; the file's name is the benchmark's: `pope` is `benchmarks/pope.py`.

A benchmark's file holds `BENCHMARK`, a `Benchmark` that says where it lies, its licence, split, prompt, metric and
reference, and a reader of its rows as the publisher ships them. Nothing else has to be told of a new one; a contract
test tries every file here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.evaluation.benchmarks.base import Benchmark, Row

BENCHMARKS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))
SUITES = ("general", "document", "biomedical", "all")


def find(name: str) -> Benchmark:
    """The benchmark in the file of that name, or the one that a YAML file (`NAME.yaml`) describes.

    Raises UserError for a name that is none of `BENCHMARKS`, with the nearest one.
    """
    if name.endswith((".yaml", ".yml")):
        from mllm.evaluation.own_benchmark import read_own

        return read_own(Path(name))
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, n=1)
        question = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no benchmark {name!r}. {question}There are {', '.join(BENCHMARKS)}, or a YAML of your own.")
    return replace(importlib.import_module(f"{__name__}.{name}").BENCHMARK, name=name)


def suite(name: str) -> list[str]:
    """The benchmarks of a domain, or all."""
    if name not in SUITES:
        raise UserError(f"no suite {name!r}; there are {', '.join(SUITES)}.")
    return [each for each in BENCHMARKS if name in ("all", find(each).domain)]


@dataclass(frozen=True)
class Selection:
    """Benchmarks below one folder, in the place of a file of questions.

    Attributes:
        asked: names or YAML files, each of which must be there.
        suite: a suite whose benchmarks are asked as far as they are there.
    """

    root: Path
    asked: tuple[str, ...] = ()
    suite: str | None = None
    split: str | None = None

    @property
    def name(self) -> str:
        return ", ".join([*self.asked, *([f"suite {self.suite}"] if self.suite else [])])

    @property
    def stem(self) -> str:
        """What a recipe calls the split."""
        return f"{self.name} ({self.split})" if self.split else self.name

    def places(self) -> tuple[dict[str, Path], list[str]]:
        """Benchmark -> its folder, and those of the suite that are not on disk.

        Raises UserError for one asked by name that is not there, or where nothing is.
        """
        if not self.root.is_dir():
            raise UserError(f"--root {self.root} is not a folder.")
        found: dict[str, Path] = {}
        for name in self.asked:
            benchmark = find(name)
            split = self.split or benchmark.splits[0]
            place = benchmark.folder(self.root, split)
            if place is None:
                lacking = ", ".join(benchmark.missing(self.root / benchmark.name, split))
                raise UserError(
                    f"{benchmark.name}: no {lacking} in {self.root / benchmark.name} or {self.root}. "
                    f"Get it from {benchmark.home} ({benchmark.licence})."
                )
            found[name] = place
        skipped = []
        for name in suite(self.suite) if self.suite else []:
            benchmark = find(name)
            has_split = self.split is None or self.split in benchmark.splits
            place = benchmark.folder(self.root, self.split or benchmark.splits[0], alone=False) if has_split else None
            if place is None:
                skipped.append(name)
            else:
                found[name] = place
        if not found:
            raise UserError(
                f"--root {self.root}: nothing of the suite {self.suite} is there. Each benchmark lies in a folder of "
                f"its name: {', '.join(skipped)}. `mllm benchmarks` tells what belongs in it."
            )
        return found, skipped

    def told(self) -> str:
        """What is asked and what was skipped, in a line."""
        found, skipped = self.places()
        not_there = f"; not on disk, skipped: {', '.join(skipped)}" if skipped else ""
        return f"benchmarks: {', '.join(found)}{not_there}"

    def read(self, *, limit: int | None = None, check_files: bool = True) -> list[Conversation]:
        """The rows of all that is there, at most `limit` of each."""
        found, _ = self.places()
        twice = [name for name, times in Counter(find(name).name for name in found).items() if times > 1]
        if twice:
            raise UserError(f"benchmark {twice[0]} is asked for twice; give a YAML another `name`.")
        return [
            row
            for name, folder in found.items()
            for row in find(name).conversations(folder, split=self.split, limit=limit, check_files=check_files)
        ]


def listing(root: Path | None = None) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of all benchmarks; with a root, whether each is there."""
    heads = ["name", "domain", "split", "metric", "licence"] + (["on disk"] if root else [])
    rows = []
    for benchmark in map(find, BENCHMARKS):
        row = [benchmark.name, benchmark.domain, benchmark.splits[0], benchmark.metric, benchmark.licence]
        if root:
            place = benchmark.folder(root, benchmark.splits[0], alone=False)
            row.append("yes" if place else f"no {benchmark.missing(root / benchmark.name, benchmark.splits[0])[0]}")
        rows.append(row)
    return heads, rows


__all__: Sequence[str] = ["BENCHMARKS", "SUITES", "Benchmark", "Row", "Selection", "find", "listing", "suite"]
