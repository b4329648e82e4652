"""Several sources as one data set, with an order that depends on nothing but seed and epoch."""

import difflib
import hashlib
import json
import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.utils.data import Dataset

from mllm.common import plain_yaml
from mllm.common.errors import TooLongError, UserError
from mllm.data.conversation import Conversation
from mllm.data.formats import COLUMNS
from mllm.data.sources import Source

MOST_STAND_INS = 100  # rows tried in the place of a bad one, after which its source is taken for broken
BadRowsPolicy = Literal["error", "skip"]
TooLongPolicy = Literal["error", "skip", "truncate"]


def most_rows(limit: int | float | str, rows: int) -> int:
    """How many of so many rows a limit allows: a number of rows (20), or a share of them ("1%", 0.01).

    Raises ValueError for anything else.
    """
    percent = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*%\s*", limit) if isinstance(limit, str) else None
    share = float(percent[1]) / 100 if percent else limit
    if isinstance(share, float) and 0 <= share <= 1:
        return int(share * rows)
    if isinstance(limit, int) and limit >= 0:
        return limit
    raise ValueError(f'expected a number of rows (20) or a share of them ("1%", 0.01), got {limit!r}')


def check_limit(limit: int | float | str) -> int | float | str:
    """Raises ValueError unless `most_rows` can read it."""
    most_rows(limit, 1)
    return limit


Limit = Annotated[int | float | str, AfterValidator(check_limit)]


class SourceConfig(BaseModel):
    """One file of a mixture. Relative paths are relative to the YAML file."""

    model_config = ConfigDict(extra="forbid")

    path: Path  # JSON or JSONL, see mllm/data/formats.py
    image_root: Path | None = None  # default: the file's own folder
    name: str | None = None  # default: each record's `source`, or else the file's name
    domain: str | None = None  # default: each record's `domain`, or else its source
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # how often each row is drawn in an epoch, on average
    allow_outside_root: bool = False  # whether pictures may lie outside `image_root`
    columns: dict[Literal[COLUMNS], str] | None = None  # e.g. {question: prompt}: how the file calls what we call so


class MixtureConfig(BaseModel):
    """What a mixture file says."""

    model_config = ConfigDict(extra="forbid")

    sources: list[SourceConfig] = Field(min_length=1)
    # a record, picture or length that cannot be used: stop, or let another row of the same source take the place
    bad_rows: BadRowsPolicy = "error"
    max_bad: Limit = "10%"  # with skip: more bad rows than this number or share of all rows are an error
    # more tokens than `data.max_length`; truncate: without its last turns; null: as `bad_rows` says
    too_long: TooLongPolicy | None = None

    @model_validator(mode="before")
    @classmethod
    def former_names(cls, values: Any) -> Any:
        """`bad_rows` was `bad_images`, when it was for pictures alone."""
        if isinstance(values, dict) and "bad_images" in values and "bad_rows" not in values:
            return {"bad_rows" if key == "bad_images" else key: value for key, value in values.items()}
        return values

    def skips(self, error: UserError) -> bool:
        """Whether another row takes the place of the one that raised this."""
        own = self.too_long if isinstance(error, TooLongError) and self.too_long != "truncate" else None
        return (own or self.bad_rows) == "skip"


class Mixture(Dataset[Conversation]):
    """The rows of all sources, one after another; `order` tells which of them an epoch takes.

    Attributes:
        parts: the `Source`s, in the order of the file.
        sources, domains: names that occur in the rows, sorted.
        source_of_row, domain_of_row: name of each row, without reading it.
        bad: row -> why its record cannot be used.
    """

    def __init__(self, config: MixtureConfig, *, folder: str | Path = ".", keep_bad: bool | None = None) -> None:
        """Opens every source.

        Args:
            folder: what relative paths are relative to.
            keep_bad: whether bad records stay as rows that raise when they are taken; None: as `bad_rows` says.

        Raises:
            UserError: as `Source` does, for all files in one message.
        """
        self.config = config
        self.parts: list[Source] = []
        errors: list[str] = []
        for entry in config.sources:
            try:
                self.parts.append(
                    Source(
                        Path(folder, entry.path),
                        image_root=None if entry.image_root is None else Path(folder, entry.image_root),
                        name=entry.name,
                        domain=entry.domain,
                        allow_outside_root=entry.allow_outside_root,
                        columns=entry.columns,
                        keep_bad=config.bad_rows == "skip" if keep_bad is None else keep_bad,
                    )
                )
            except UserError as error:
                errors.append(str(error))
        if errors:
            raise UserError("\n".join(errors))
        self.source_of_row = [name for part in self.parts for name in part.source_of_row]
        self.domain_of_row = [name for part in self.parts for name in part.domain_of_row]
        self._starts = list(accumulate((len(part) for part in self.parts), initial=0))
        self._alike: dict[tuple[int, str], np.ndarray] = {}
        self.bad = {
            start + row: error
            for start, part in zip(self._starts, self.parts, strict=False)
            for row, error in part.bad.items()
        }
        self.sources = sorted(set(self.source_of_row))
        self.domains = sorted(set(self.domain_of_row))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Conversation:
        """Raises `RowError` for a bad record, `ImageError` for a picture that does not exist."""
        return self.read(index, check_files=True)

    def read(self, index: int, *, check_files: bool) -> Conversation:
        """The conversation of one row; whether its pictures exist is looked at if `check_files`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a mixture of {len(self)} rows")
        part = self._part_of(index)
        return self.parts[part].read(index - self._starts[part], check_files=check_files)

    @property
    def draws_of_row(self) -> np.ndarray:
        """How often an epoch draws each row, on average: float64 `[rows]`."""
        shares = [np.full(len(rows), self._draws(part) / len(rows)) for part, rows in enumerate(self.parts)]
        return np.concatenate(shares)

    @property
    def epoch_length(self) -> int:
        """Rows drawn in an epoch: the sum over sources of weight x rows, each rounded and at least 1."""
        return sum(self._draws(part) for part in range(len(self.parts)))

    def digest(self) -> str:
        """Sixteen hexadecimal digits of what rows say, and how often each source's come; not of pictures' content."""
        name = hashlib.sha256()
        for part, entry in zip(self.parts, self.config.sources, strict=True):
            about = [entry.weight, part.name, part.domain, entry.columns, self.config.bad_rows, self.config.too_long]
            name.update(json.dumps(about).encode("utf-8", "surrogatepass") + part.content)
        return name.hexdigest()[:16]

    def contents(self) -> str:
        """The digest, and a line about each source, by which a change can be named."""
        lines = [self.digest()]
        for part, entry in zip(self.parts, self.config.sources, strict=True):
            content = hashlib.sha256(part.content).hexdigest()[:12]
            lines.append(f"{part.path.name}: {len(part):,} rows of content {content}, weight {entry.weight:g}")
        return "\n".join(lines)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Row indices of one epoch, int64 `[epoch_length]`; a pure function of its arguments.

        Each source is an endless stream of shuffled passes over its rows, of which an epoch takes the next
        weight x rows (LLaVA-MoLE's sampling weight): at weight 1 every row comes once an epoch, at weight 0.5 every
        row comes once in two. The epoch is then shuffled as a whole.
        """
        taken = [self._take(part, seed, epoch) for part in range(len(self.parts))]
        return np.random.default_rng([seed, epoch]).permutation(np.concatenate(taken))

    def stand_ins(self, index: int) -> list[int]:
        """Rows that may take the place of row `index`, in the order in which they are tried.

        They are drawn at random from the rows of its file and source name, a hundred at most, so that bad rows that lie
        together do not all fall on one neighbour. The draw depends on `index` and the files alone.
        """
        rows = self._rows_like(self._part_of(index), self.source_of_row[index])
        rng = np.random.default_rng(index)
        drawn = rng.choice(rows, size=min(len(rows), MOST_STAND_INS + 1), replace=False) if len(rows) else rows
        return [row for row in drawn.tolist() if row != index][:MOST_STAND_INS]

    def _rows_like(self, part: int, source: str) -> np.ndarray:
        """Rows of a file with usable records that have a source name."""
        if (part, source) not in self._alike:
            rows = range(*self._starts[part : part + 2])
            alike = [row for row in rows if self.source_of_row[row] == source and row not in self.bad]
            self._alike[part, source] = np.array(alike, np.int64)
        return self._alike[part, source]

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


def load_mixture(path: str | Path, *, keep_bad: bool | None = None, **policies: Any) -> Mixture:
    """Reads a mixture YAML; a data file (`.json`, `.jsonl`, also `.gz`) is taken as a mixture of that one source.

    Args:
        keep_bad: see `Mixture`.
        policies: `bad_rows`, `max_bad` or `too_long` in place of what the file says; None leaves that.

    Raises:
        UserError: no such file, malformed YAML, an unknown key (the nearest is named), or what `Source` refuses.
    """
    path = Path(path)
    given = {key: value for key, value in policies.items() if value is not None}
    if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        config = _checked({"sources": [{"path": path}], **given}, path)
        return Mixture(config, keep_bad=keep_bad)
    return Mixture(read_mixture_config(path, **given), folder=path.parent, keep_bad=keep_bad)


def read_mixture_config(path: str | Path, **policies: Any) -> MixtureConfig:
    """The checked content of a mixture YAML, with no source opened. Arguments and errors as those of `load_mixture`."""
    path = Path(path)
    try:
        content = plain_yaml.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no such mixture file: {path}" if not path.exists() else f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: malformed YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping with the key `sources`, got {type(content).__name__}.")
    return _checked(content | policies, path)


def _checked(content: dict[str, Any], path: Path) -> MixtureConfig:
    """Raises UserError naming every key that is wrong."""
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
