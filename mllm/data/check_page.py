"""What a check found, as figures (JSON) and as one HTML page that fetches nothing."""

import io
import json
from collections import Counter
from importlib import resources
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from mllm.common.errors import UserError, printable
from mllm.data.check import CheckReport
from mllm.data.mixture import Mixture, most_rows
from mllm.data.template import ConversationEncoder

BINS = 24
SAMPLES = 3  # of each source
MOST_LISTED = 200  # of bad rows and pairs on the page; check.json has all


def figures(report: CheckReport, mixture: Mixture) -> dict[str, Any]:
    """Everything the page shows but the samples, as plain values."""
    tokens, images, supervised = np.array(report.sizes, np.int64).reshape(-1, 3).T
    draws = mixture.draws_of_row
    names = np.array(mixture.source_of_row)
    limit = report.max_length or max(int(tokens.max(initial=1)), 1)
    kept = np.minimum(tokens, limit)  # of a cut row about so many

    def part(is_in: np.ndarray) -> dict[str, Any]:
        known = is_in & (tokens > 0)
        epoch_tokens = float((kept * draws)[known].sum())
        return {
            "rows": int(is_in.sum()),
            "share_of_epoch": float(draws[is_in].sum() / draws.sum()),
            "mean_tokens": float(tokens[known].mean()) if known.any() else 0.0,
            "image_share": float(images[known].sum() / max(tokens[known].sum(), 1)),
            "supervised_share": float(supervised[known].sum() / max(tokens[known].sum(), 1)),
            "too_long": int((tokens[is_in] > limit).sum()),
            "epoch_tokens": round(epoch_tokens),
            "epoch_supervised": round(float((supervised * draws)[known].sum())),
        }

    sources = {name: part(names == name) | {"bad": dict(bad)} for name, bad in report.bad_of_source.items()}
    everything = part(np.ones(len(names), bool))
    edges = np.unique(np.linspace(0, max(int(tokens.max(initial=1)), 1), BINS + 1).astype(int))
    histogram = []
    for low, high in pairwise(edges.tolist()):
        is_in = (tokens > low) & (tokens <= high)
        share = float(images[is_in].sum() / max(tokens[is_in].sum(), 1))
        histogram.append({"from": low + 1, "to": high, "rows": int(is_in.sum()), "image_share": share})
    return {
        "rows": report.rows,
        "bad_rows": len(report.bad),
        "max_bad": most_rows(mixture.config.max_bad, report.rows),
        "max_length": report.max_length,
        "longest": report.longest,
        "longest_where": report.longest_where,
        "epoch_samples": mixture.epoch_length,
        "total": everything,
        "sources": sources,
        "lengths": histogram,
        "cut": [vars(row) for row in report.cut],
        "bad": [vars(row) for row in report.bad],
        "twins": report.twins,
        "pictures": len(report.pictures),
        "same_pictures": same_pictures(report.pictures),
        "overlap": {name: _by_theirs(pairs) for name, pairs in report.overlap.items()},
    }


def _by_theirs(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Picture of the evaluation -> those of ours that look like it."""
    groups: dict[str, list[str]] = {}
    for ours, theirs in pairs:
        groups.setdefault(theirs, []).append(ours)
    return groups


def same_pictures(pictures: dict[str, bytes]) -> list[list[str]]:
    """Groups of files with one and the same perceptual hash."""
    groups: dict[bytes, list[str]] = {}
    for name, value in pictures.items():
        groups.setdefault(value, []).append(name)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def write_check(folder: Path, report: CheckReport, mixture: Mixture, encoder: ConversationEncoder, title: str) -> None:
    """Writes check.json, check.html and, as they are found in a run too, bad_rows.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    found = figures(report, mixture)
    report.write(folder / "bad_rows.jsonl")
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (folder / "check.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    template = (resources.files("mllm") / "assets" / "check.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=title,
        found=found,
        reasons=Counter(row.reason for row in report.bad),
        most_rows=max((each["rows"] for each in found["lengths"]), default=0) or 1,
        samples=_samples(report, mixture, encoder),
        listed=MOST_LISTED,
    )
    (folder / "check.html").write_text(printable(page), encoding="utf-8")


def _samples(report: CheckReport, mixture: Mixture, encoder: ConversationEncoder) -> dict[str, list[dict]]:
    """The first good rows of each source in the order of training, with what is supervised in colour."""
    bad = {row.index for row in report.bad} | {row.index for row in report.cut}
    order = [row for row in mixture.order(seed=0, epoch=0).tolist() if row not in bad]
    samples: dict[str, list[dict]] = {}
    for name in sorted(report.rows_of_source):
        rows = (row for row in order if mixture.source_of_row[row] == name)
        samples[name] = []
        for row in islice(rows, SAMPLES):
            try:
                sample = encoder.encode(mixture[row])
            except UserError:  # a file that has changed since it was checked
                continue
            console = Console(record=True, file=io.StringIO(), width=110)
            console.print(encoder.show(sample))
            html = console.export_html(inline_styles=True, code_format="{code}")
            samples[name].append({"where": sample["where"], "html": Markup(html)})
    return samples
