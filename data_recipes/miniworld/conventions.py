"""How each domain words the same fact: the conflict that mixed training has to live with.

The base model is pre-trained with ``NEUTRAL`` answers; instruction tuning asks the same forms of question and wants
each domain's own convention. All conventions stay apart under the metrics (``exact_match`` holds "three" and "3" to be
equal, so number words would be no conflict).
"""

from collections.abc import Callable
from dataclasses import dataclass

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
GRADES = ("none", "few", "few", "several", "several")  # 0, 1, 2, 3, 4; above that: many


def viewer_place(row: int, column: int) -> str:
    """A cell of the 3 x 3 grid as the viewer sees it: "top left", "center", "right"."""
    if row == column == 1:
        return "center"
    return " ".join(w for w in (ROWS[row] if row != 1 else "", COLUMNS[column] if column != 1 else "") if w)


def patient_place(row: int, column: int) -> str:
    """The same cell as radiology has it: sides are the patient's, so they are mirrored; "upper left", "lower"."""
    words = viewer_place(row, 2 - column).split()
    return " ".join({"top": "upper", "bottom": "lower"}.get(w, w) for w in words)


def ordinal(line: int) -> str:
    """Line 0 is "first"."""
    return ("first", "second", "third", "fourth", "fifth")[line]


@dataclass(frozen=True)
class Convention:
    """The answer to each shared form of question. ``line`` names the n-th line of a page, counted from 0."""

    presence: tuple[str, str]  # (there is one, there is none)
    count: Callable[[int], str]
    place: Callable[[int, int], str]
    line: Callable[[int], str]
    presence_metric: str = "yes_no_accuracy"


NEUTRAL = Convention(("yes", "no"), str, viewer_place, lambda line: f"line {line + 1}")

CONVENTIONS = {
    "general": NEUTRAL,
    "document": Convention(("true", "false"), lambda n: f"{n} in all", viewer_place, ordinal),
    "biomedical": Convention(
        ("present", "absent"),
        lambda n: GRADES[n] if n < len(GRADES) else "many",
        patient_place,
        lambda line: f"line {line + 1}",
        presence_metric="exact_match",
    ),
}
