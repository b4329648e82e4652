"""MMBench: single choice over twenty abilities, each question asked once."""

from collections.abc import Iterator
from pathlib import Path

from mllm.evaluation.benchmarks.base import CHOICE, Benchmark, Row
from mllm.evaluation.choices import LETTERS
from mllm.evaluation.layouts import embedded, first_there, read_table

PATTERNS = ("mmbench_{split}_en*.tsv", "MMBench_{split}_EN*.tsv", "mmbench_{split}_2*.tsv")
FILES = " or ".join((*PATTERNS, "MMBench_DEV_EN*.tsv"))


def read(folder: Path, split: str) -> Iterator[Row]:
    """A TSV with the picture in base64, or the `index` of the row that holds it."""
    pictures: dict[str, str] = {}
    upper = [pattern.replace("{split}", split.upper()) for pattern in PATTERNS]
    path = first_there(folder, *(pattern.replace("{split}", split) for pattern in PATTERNS), *upper)
    for row in read_table(path):
        held = row["image"]
        pictures[row["index"]] = pictures.get(held, held)
        hint = f"{row['hint'].strip()}\n" if row.get("hint", "").strip() not in ("", "nan") else ""
        options = [row[letter] for letter in LETTERS[:5] if (row.get(letter) or "").strip() not in ("", "nan")]
        yield Row(
            id=row["index"],
            question=hint + row["question"],
            answers=(row["answer"],),
            options=tuple(options),
            images=(embedded(pictures[row["index"]]),),
            qtype=row.get("l2-category") or row.get("category"),
        )


BENCHMARK = Benchmark(
    title="MMBench",
    domain="general",
    home="https://github.com/open-compass/MMBench",
    licence="Apache-2.0",
    splits=("dev",),
    files=(FILES,),
    pictures="in the TSV",
    metric="option_letter",
    reference="Liu et al. 2023; exact form: option_letter_mmbench",
    read=read,
    prompt=CHOICE,
)
