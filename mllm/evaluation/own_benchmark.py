"""A benchmark of one's own, described by a YAML instead of a file here: any `datasets` folder, parquet, JSON or CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mllm.common import plain_yaml
from mllm.common.errors import UserError
from mllm.evaluation.benchmarks.base import SHORT, Benchmark, Domain, Row
from mllm.evaluation.choices import LETTERS
from mllm.evaluation.layouts import embedded, read_datasets_folder, read_json, read_lines, read_parquet, read_table
from mllm.evaluation.metrics import ALL_METRICS, OF_OPTIONS

Column = Literal["question", "answer", "answers", "image", "options", "id", "qtype"]


class OwnBenchmark(BaseModel):
    """What the YAML says. Paths are relative to --root."""

    model_config = ConfigDict(extra="forbid")

    name: str
    data: str  # a folder that `datasets` saved, or a pattern of .parquet, .json, .jsonl, .csv or .tsv; {split} in it
    columns: dict[Column, str]  # our name of a column -> the file's
    metric: str = "exact_match"
    domain: Domain = "general"
    licence: str = "not told"
    split: str = "test"
    prompt: str = SHORT
    images: str = ""  # folder of pictures that are named and not embedded


def read_own(path: Path) -> Benchmark:
    """Raises UserError for a file that cannot be read, an unknown key or metric, or a column that is lacking."""
    try:
        own = OwnBenchmark.model_validate(plain_yaml.read(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a benchmark ({error}).") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UserError(f"{path}: {faults}. Keys: {', '.join(OwnBenchmark.model_fields)}.") from error
    if own.metric not in ALL_METRICS:
        raise UserError(f"{path}: no metric {own.metric!r}; there are {', '.join(ALL_METRICS)}.")
    needed = {"question", "options"} if own.metric in OF_OPTIONS else {"question"}
    lacking = needed - set(own.columns)
    if lacking or not {"answer", "answers"} & set(own.columns):
        raise UserError(f"{path}: columns lack {', '.join(sorted(lacking)) or 'answer (or answers)'}.")
    if own.metric in OF_OPTIONS and "{options}" not in own.prompt:
        raise UserError(f"{path}: {own.metric} needs the options in the prompt: put {{options}} into `prompt`.")

    def read(folder: Path, split: str) -> Iterator[Row]:
        for number, record in enumerate(_records(folder, own.data.replace("{split}", split), split), 1):
            yield _row(record, own, number)

    return Benchmark(
        name=own.name,
        title=own.name,
        domain=own.domain,
        home=str(path),
        licence=own.licence,
        splits=(own.split,),
        files=(own.data,),
        pictures=own.images or "in the data",
        metric=own.metric,
        reference="the file's",
        read=read,
        prompt=own.prompt,
    )


def _records(folder: Path, data: str, split: str) -> Iterator[dict[str, Any]]:
    found = sorted(folder.glob(data))
    for path in found:
        if path.is_dir():
            yield from read_datasets_folder(path, split)
        elif path.suffix == ".json":
            yield from read_json(path)
        elif path.suffix in (".csv", ".tsv"):
            yield from read_table(path)
        elif path.suffix == ".parquet":
            yield from read_parquet([path])
        else:
            yield from read_lines(path)


def _row(record: Mapping[str, Any], own: OwnBenchmark, number: int) -> Row:
    told = {ours: record[theirs] for ours, theirs in own.columns.items()}
    answers = told.get("answers", told.get("answer"))
    answers = [str(answer) for answer in (answers if isinstance(answers, list | tuple) else [answers])]
    options = [str(option) for option in told.get("options") or ()]
    if own.metric in OF_OPTIONS:
        answers = [_letter(answer, options) for answer in answers]
    images = told.get("image")
    images = images if isinstance(images, list | tuple) else [images] if images else []
    return Row(
        id=str(told.get("id", number)),
        question=str(told["question"]),
        answers=tuple(answers),
        options=tuple(options),
        images=tuple(_image(image, own.images) for image in images),
        qtype=None if told.get("qtype") is None else str(told["qtype"]),
    )


def _letter(answer: str, options: list[str]) -> str:
    """A letter as it is; an option's index from 0, or its text, as its letter."""
    if answer in options:
        return LETTERS[options.index(answer)]
    return LETTERS[int(answer)] if answer.isdigit() else answer


def _image(image: Any, folder: str) -> str | bytes:
    if isinstance(image, dict) and not image.get("bytes"):
        image = image["path"]
    if isinstance(image, str):
        return f"{folder}/{image}" if folder else image
    return embedded(image)
