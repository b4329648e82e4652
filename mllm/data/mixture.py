"""Several sources as one data set, with an order that depends on nothing but seed and epoch."""

import difflib
import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.utils.data import Dataset

from mllm import plain_yaml
from mllm.data.conversation import Conversation
from mllm.data.sources import Source
from mllm.errors import UserError


class SourceConfig(BaseModel):
    """One file of a mixture. Relative paths are relative to the YAML file."""

    model_config = ConfigDict(extra="forbid")

    path: Path  # LLaVA JSON or JSONL
    image_root: Path | None = None  # default: the file's own folder
    name: str | None = None  # default: each record's `source`, or else the file's name
    domain: str | None = None  # default: each record's `domain`, or else its source
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # how often each row is drawn in an epoch, on average
    allow_outside_root: bool = False  # whether pictures may lie outside `image_root`


class MixtureConfig(BaseModel):
    """What a mixture file says."""

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceConfig] = Field(min_length=1)
    bad_images: Literal["error", "skip"] = "error"  # skip: another row of the same source takes the place


class Mixture(Dataset[Conversation]):
    """The rows of all sources, one after another; `order` tells which of them an epoch takes.

    Attributes:
        parts: the `Source`s, in the order of the file.
        sources, domains: names that occur in the rows, sorted.
        source_of_row, domain_of_row: name of each row, without reading it.
    """

    def __init__(self, config: MixtureConfig, *, folder: str | Path = ".") -> None:
        """Opens every source; `folder` is what relative paths are relative to. Raises `UserError` as `Source` does."""
        self.config = config
        folder = Path(folder)
        self.parts = [
            Source(
                folder / entry.path,
                image_root=None if entry.image_root is None else folder / entry.image_root,
                name=entry.name,
                domain=entry.domain,
                allow_outside_root=entry.allow_outside_root,
            )
            for entry in config.sources
        ]
        self.source_of_row = [name for part in self.parts for name in part.source_of_row]
        self.domain_of_row = [name for part in self.parts for name in part.domain_of_row]
        self.sources = sorted(set(self.source_of_row))
        self.domains = sorted(set(self.domain_of_row))
        self._starts = list(accumulate((len(part) for part in self.parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a mixture of {len(self)} rows")
        part = self._part_of(index)
        return self.parts[part][index - self._starts[part]]

    @property
    def epoch_length(self) -> int:
        """Rows drawn in an epoch: the sum over sources of weight x rows, each rounded and at least 1."""
        return sum(self._draws(part) for part in range(len(self.parts)))

    def digest(self) -> str:
        """Sixteen hexadecimal digits of what rows say, and how often each source's come; not of pictures' content."""
        name = hashlib.sha256()
        for part, entry in zip(self.parts, self.config.sources, strict=True):
            about = [entry.weight, part.name, part.domain, self.config.bad_images]
            name.update(json.dumps(about).encode("utf-8", "surrogatepass") + part.content)
        return name.hexdigest()[:16]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row indices of one epoch, int64 `[epoch_length]`; a pure function of its arguments.

        Each source is an endless stream of shuffled passes over its rows, of which an epoch takes the next
        weight x rows (LLaVA-MoLE's sampling weight): at weight 1 every row comes once an epoch, at weight 0.5 every
        row comes once in two. The epoch is then shuffled as a whole.
        """
        taken = [self._take(part, seed, epoch) for part in range(len(self.parts))]
        return np.random.default_rng([seed, epoch]).permutation(np.concatenate(taken))

    def stand_ins(self, index: int) -> list[int]:
        """Rows that may take the place of row `index`, in order: those after it with the same file and source name."""
        part = self._part_of(index)
        first, end = self._starts[part], self._starts[part + 1]
        others = [*range(index + 1, end), *range(first, index)]
        return [other for other in others if self.source_of_row[other] == self.source_of_row[index]]

    def _part_of(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1

    def _draws(self, part: int) -> int:
        return max(1, round(self.config.sources[part].weight * len(self.parts[part])))

    def _take(self, part: int, seed: int, epoch: int) -> np.ndarray:
        num_rows, draws = len(self.parts[part]), self._draws(part)
        begin, end = epoch * draws, (epoch + 1) * draws
        first_pass, last_pass = begin // num_rows, (end - 1) // num_rows
        passes = [
            np.random.default_rng([seed, part, number]).permutation(num_rows)
            for number in range(first_pass, last_pass + 1)
        ]
        offset = begin - first_pass * num_rows
        return np.concatenate(passes)[offset : offset + draws] + self._starts[part]


def load_mixture(path: str | Path) -> Mixture:
    """Reads a mixture YAML; a `.json` or `.jsonl` data file is taken as a mixture of that one source.

    Raises:
        UserError: no such file, malformed YAML, an unknown key (the nearest is named), or what `Source` refuses.
    """
    path = Path(path)
    if path.suffix in (".json", ".jsonl"):
        return Mixture(MixtureConfig(sources=[SourceConfig(path=path)]))
    return Mixture(read_mixture_config(path), folder=path.parent)


def read_mixture_config(path: str | Path) -> MixtureConfig:
    """The checked content of a mixture YAML, with no source opened. Raises `UserError` as `load_mixture` does."""
    path = Path(path)
    try:
        content = plain_yaml.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no such mixture file: {path}" if not path.exists() else f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: malformed YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with the key `sources`, got {type(content).__name__}.")
    try:
        return MixtureConfig.model_validate(content)
    except ValidationError as error:
        problems = "\n".join(f"  {_problem(detail)}" for detail in error.errors())
        raise UserError(f"{path}: not a valid mixture:\n{problems}") from error


def _problem(detail: dict) -> str:
    """One finding of pydantic in a line, with the nearest known key for an unknown one."""
    place = ".".join(str(step) for step in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"{place}: {detail['msg']} (got {detail['input']!r:.60})"
    known = (SourceConfig if len(detail["loc"]) > 1 else MixtureConfig).model_fields
    near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}."
    return f"{place}: unknown key; {hint}"
