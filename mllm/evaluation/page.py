"""The report as one HTML file: bars with intervals, tables, routing by domain, and samples with their pictures.

Nothing is fetched and nothing runs: styles are inline, pictures are in it, and whatever comes from data is escaped.
"""

import base64
import io
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from mllm.data.images import ImageError, open_image
from mllm.evaluation.answers import Answer
from mllm.evaluation.graded import Graded, grade
from mllm.evaluation.picture import COLOURS
from mllm.evaluation.samples import pick_samples
from mllm.evaluation.tables import percent, remarks, report_tables, with_interval

_PIXELS = 224  # longest side of a sample's picture
_MOST_NUMBERED_EXPERTS = 16


def write_page(report: dict, arms: Mapping[str, Any], path: Path) -> None:
    """Writes the page of a report and of the arms it was built from."""
    template = (resources.files("mllm") / "assets" / "report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        about=_about(report.get("about", {})),
        colours=_colours(report),
        bars=_bars(report["arms"]),
        tables=[table for table in report_tables(report) if not table[0].startswith("Routing")],
        routed=[_routed(name, routing) for name, routing in report["routing"].items()],
        samples=_samples(arms),
        notes=remarks(report),
    )
    path.write_text(page, encoding="utf-8", errors="replace")


def _about(about: dict) -> list[tuple[str, str]]:
    measured = about.get("measured", {})
    lines = {key: about[key] for key in ("model", "questions") if key in about}
    lines |= {key: measured[key] for key in ("date", "commit", "device") if key in measured}
    return [(key, str(value)) for key, value in lines.items()]


def _colours(report: dict) -> dict[str, str]:
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(report["arms"])}


def _bars(arms: Mapping[str, dict]) -> list[dict]:
    """A group of bars a domain, and one for the mean over domains; lengths in per cent."""
    domains = next(iter(arms.values()))["domains"]
    columns = {domain: {name: arm["domains"][domain] for name, arm in arms.items()} for domain in domains}
    columns["mean over domains"] = {name: arm["mean"] for name, arm in arms.items()}
    return [
        {
            "name": group,
            "n": next(iter(column.values()))["n"],
            "arms": {name: _bar(each) for name, each in column.items()},
        }
        for group, column in columns.items()
    ]


def _bar(figures: dict) -> dict:
    low, high = 100 * figures["ci_low"], 100 * figures["ci_high"]
    lengths = {"score": 100 * figures["score"], "low": low, "width": high - low}
    marks = {key: None if figures[key] is None else 100 * figures[key] for key in ("blind", "blanked")}
    return lengths | marks | {"text": with_interval(figures["score"], figures)}


def _routed(name: str, routing: dict) -> dict:
    """Per domain, layers by experts: what is written in a cell, and how dark it is in its own scale."""
    is_null = np.array([expert == "null" for expert in routing["experts"]])
    tables = {domain: np.array(list(by_layer.values())) for domain, by_layer in routing["shares"].items()}
    most = max(table[:, ~is_null].max() for table in tables.values()) or 1.0
    numbered = len(is_null) <= _MOST_NUMBERED_EXPERTS

    def cell(share: float, null: bool) -> dict:
        depth = share if null else share / most
        text = f"{100 * share:.0f}" if numbered else ""
        return {
            "text": text,
            "depth": f"{depth:.3f}",
            "null": bool(null),
            "dark": depth > 0.55,
            "title": percent(share),
        }

    return {
        "name": name,
        "experts": routing["experts"] if numbered else [],
        "domains": {
            domain: [
                (str(row), [cell(*each) for each in zip(shares, is_null, strict=True)])
                for row, shares in enumerate(table)
            ]
            for domain, table in tables.items()
        },
    }


# -- samples ---------------------------------------------------------------------------------------------------------


def _samples(arms: Mapping[str, Any]) -> dict:
    """Titles, and for each domain the rows picked, with what every arm said."""
    graded = {name: grade(arm["answers"]) for name, arm in arms.items()}
    *_, (last, last_arm) = arms.items()
    blanked = grade(last_arm["blanked"]) if last_arm.get("blanked") else None
    first = next(iter(graded))
    several = len(graded) > 1
    shown = graded if blanked is None else graded | {f"{last} blanked": blanked}
    return {
        "best": f"{last} gains most on {first}" if several else f"{last} at its best",
        "worst": f"{last} loses most against {first}" if several else f"{last} at its worst",
        "domains": {
            domain: {kind: [_card(shown, index) for index in rows] for kind, rows in picked._asdict().items()}
            for domain, picked in pick_samples(graded, blanked).items()
        },
    }


def _card(shown: Mapping[str, Graded], index: int) -> dict:
    row = next(iter(shown.values())).rows[index]
    return {
        "picture": _picture(row),
        "question": row.question,
        "answers": list(dict.fromkeys(row.answers)),
        "source": row.source,
        "id": row.id,
        "replies": [
            {"arm": name, "text": graded.rows[index].prediction, "score": float(graded.scores[index])}
            for name, graded in shown.items()
            if index < len(graded.rows) and graded.rows[index].id == row.id
        ],
    }


def _picture(row: Answer) -> str | None:
    """A small JPEG as a data URI; None for a question without a picture, or where its file is not at hand."""
    if not row.image:
        return None
    try:
        image = open_image(row.image, where=row.where)
    except ImageError:
        return None
    image.thumbnail((_PIXELS, _PIXELS))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
