"""What a benchmark reports beside the mean of its rows: figures that only a set has, and one for each kind of question.

A figure is `{"value": …, "unit": "%" or "points"}`, a share where the unit is "%".
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from mllm.evaluation import captions
from mllm.evaluation.answers import Answer
from mllm.evaluation.medical import closed_accuracy_llava_med, counts_for_llava_med
from mllm.evaluation.metrics import is_no_field, yes_no_accuracy
from mllm.evaluation.references import read_pope

Figures = dict[str, dict]
MOST_KINDS = 16  # kinds of questions that a table lists
CIRCLE = 1_000_000  # MMBench numbers the rotations of a question index + k · 1,000,000
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def figures_of(answers: Iterable[Answer]) -> dict[str, Figures]:
    """Source -> its figures; sources that have none are left out."""
    by_source: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.graded:
            by_source[answer.source].append(answer)
    found = {source: _of_source(rows) for source, rows in sorted(by_source.items())}
    return {source: figures for source, figures in found.items() if figures}


def _of_source(rows: list[Answer]) -> Figures:
    figures: Figures = {}
    for metric in sorted({row.metric for row in rows} & OF_SET.keys()):
        figures |= OF_SET[metric]([row for row in rows if row.metric == metric])
    kinds = sorted({row.qtype for row in rows})
    if 1 < len(kinds) <= MOST_KINDS and "mme" not in {row.metric for row in rows}:
        for kind in kinds:
            figures[kind or "no kind"] = _share(fmean(row.grade() for row in rows if row.qtype == kind))
    return figures


def _share(value: float) -> dict:
    return {"value": float(value), "unit": "%"}


def _points(value: float) -> dict:
    return {"value": float(value), "unit": "points"}


def _pope(rows: Sequence[Answer]) -> Figures:
    """Accuracy, precision, recall, F1 and the share of yes, by POPE's own reading; of each kind of negatives and of
    all. `(strict)`: with a reply that says neither counted as wrong and no yes.
    """
    figures: Figures = {}
    for kind in [*sorted({row.qtype for row in rows} - {""}), "all"]:
        part = [row for row in rows if kind in (row.qtype, "all")]
        truths = [row.answers[0].strip().lower() == "yes" for row in part]
        for name, said in (
            ("", [read_pope(row.prediction) == "yes" for row in part]),
            (" (strict)", [yes_no_accuracy(row.prediction, ["yes"]) == 1 for row in part]),
        ):
            hits = sum(yes and true for yes, true in zip(said, truths, strict=True))
            figures |= {
                f"{kind}: {key}{name}": _share(value) for key, value in _f1(hits, sum(said), sum(truths)).items()
            }
            figures[f"{kind}: yes ratio{name}"] = _share(fmean(said))
    return figures


def _f1(hits: int, said: int, true: int) -> dict[str, float]:
    precision = hits / said if said else 0.0
    recall = hits / true if true else 0.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / both if both else 0.0}


def _mme(rows: Sequence[Answer]) -> Figures:
    """Each subtask's acc and acc+ (both questions of a picture right), their sum as points of 200, and the sums of
    perception (of 2000) and cognition (of 800). Pictures with one question asked, as with --limit, have no acc+.
    """
    pictures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        pictures[row.qtype][row.image].append(row.grade())
    points, figures = {}, {}
    for task, grades in sorted(pictures.items()):
        whole = [pair for pair in grades.values() if len(pair) > 1]
        right = fmean(grade for pair in grades.values() for grade in pair)
        both = fmean(all(pair) for pair in whole) if whole else 0.0
        figures |= {f"{task}: acc": _share(right), f"{task}: acc+": _share(both)}
        points[task] = 100 * (right + both)
        figures[f"{task}: acc and acc+"] = _points(points[task])
    for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        own = [points[task] for task in tasks if task in points]
        if own:
            figures[f"{name} ({len(own)} of {len(tasks)} subtasks)"] = _points(sum(own))
    return figures


def _circular(rows: Sequence[Answer]) -> Figures:
    """The share of questions right in all their rotations, as MMBench reports it."""
    rotations: dict[str | int, list[float]] = defaultdict(list)
    for row in rows:
        rotations[int(row.id) % CIRCLE if row.id.isdecimal() else row.id].append(row.grade())
    return {"right in all rotations": _share(fmean(all(grades) for grades in rotations.values()))}


def _captions(rows: Sequence[Answer]) -> Figures:
    """CIDEr-D as a share of 1 (100 % is as near as people's own captions are, roughly), BLEU-1 … 4, ROUGE-L."""
    said, known = [row.prediction for row in rows], [row.answers for row in rows]
    blocks = {"CIDEr-D": fmean(captions.cider_d(said, known))}
    blocks |= {f"BLEU-{n}": value for n, value in enumerate(captions.bleu(said, known), 1)}
    blocks["ROUGE-L"] = fmean(row.grade() for row in rows)
    return {name: _share(value) for name, value in blocks.items()}


def _fields(rows: Sequence[Answer]) -> Figures:
    """F1 over fields: of those that the replies give, and of those that the forms give."""
    said = [row for row in rows if not is_no_field(row.prediction)]
    true = sum(not all(map(is_no_field, row.answers)) for row in rows)
    return {
        f"fields: {key}": _share(value)
        for key, value in _f1(sum(r.grade() == 1 for r in said), len(said), true).items()
    }


def _closed(rows: Sequence[Answer]) -> Figures:
    """LLaVA-Med's mean over closed rows, with those left out that its script leaves out."""
    counted = [row for row in rows if counts_for_llava_med(row.prediction, row.answers)]
    mean = fmean(closed_accuracy_llava_med(row.prediction, row.answers) for row in counted) if counted else 0.0
    return {f"closed by LLaVA-Med's script ({len(counted)} of {len(rows)} rows)": _share(mean)}


OF_SET: dict[str, Callable[[Sequence[Answer]], Figures]] = {
    "pope": _pope,
    "mme": _mme,
    "option_letter_circular": _circular,
    "rouge_l": _captions,
    "field_f1": _fields,
    "closed_accuracy": _closed,
    "closed_accuracy_llava_med": _closed,
}
