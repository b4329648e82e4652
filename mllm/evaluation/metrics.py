"""How a short reply is graded: one function a metric, each `(prediction, answers) -> float in [0, 1]`.

`answers` are all the accepted ones. A metric of option letters is also given the options' texts. Text alone is
compared; nothing here knows a model. Where published numbers depend on a quirk of a reference's code, its exact form
has a name of its own beside the corrected one, and its docstring says so.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from mllm.common.errors import UserError
from mllm.evaluation import captions, choices, medical, references, vqa

NOT_GRADED = "not_graded"
DEFAULT_METRIC = "exact_match"  # of a row that names none
SCORER_VERSION = "1"  # raise it with every change that can move a grade: recipes carry it

_ARTICLES = frozenset({"a", "an", "the"})


_ZERO_TO_NINETEEN = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def _number_words() -> dict[str, str]:
    """{"zero": "0", …, "twenty": "20", "twenty-one": "21", …, "ninety-nine": "99"}."""
    small = _ZERO_TO_NINETEEN.split()
    words = {word: str(number) for number, word in enumerate(small)}
    for ten, word in enumerate(_TENS.split(), start=2):
        words[word] = str(10 * ten)
        words |= {f"{word}-{small[one]}": str(10 * ten + one) for one in range(1, 10)}
    return words


_NUMBER_WORDS = _number_words()


def collapse(text: str) -> str:
    """Lower case, outer blanks gone, inner runs of blanks made one."""
    return " ".join(text.lower().split())


def normalise(text: str) -> str:
    """What `exact_match` compares: case, blanks, one final period, articles and number words no longer matter.

    An article stands before a word, so a last word is never one: the option letter "A" and "hepatitis A" stay.
    """
    words = collapse(text).removesuffix(".").split()
    kept = [word for word in words[:-1] if word not in _ARTICLES] + words[-1:]
    return " ".join(_NUMBER_WORDS.get(word, word) for word in kept)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the reply equals an answer after `normalise`.

    The accuracy of GQA (Hudson & Manning 2019), loosened for articles and numbers as in VQA (Antol et al. 2015): the
    corrected form of `gqa_llava` and `gqa_lmms_eval`.
    """
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def yes_no_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the reply's first word is an answer's first word: yes or no, true or false.

    The corrected form of `pope`, `pope_lmms_eval` and `mme`: "Yes, there is." counts as "yes", and a reply without
    either word is wrong. "true" is not an answer to a yes/no question.
    """
    word = _first_word(prediction)
    return float(word is not None and word in {_first_word(answer) for answer in answers})


def _first_word(text: str) -> str | None:
    found = re.search(r"[^\W_]+", text.lower())
    return found.group() if found else None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity of one question: the best 1 - NL over the answers, 0 where NL >= 0.5.

    The mean over questions is ANLS: Biten et al. 2019 (ST-VQA), equation 1. NL = edit distance / length of the longer,
    both stripped and lower-cased. The corrected form of `anls_official`: a similarity of exactly 0.5 is 0 by the paper.
    """
    reply = prediction.strip().lower()
    distances = (Levenshtein.normalized_distance(reply, answer.strip().lower()) for answer in answers)
    nearest = min(distances)
    return 1.0 - nearest if nearest < 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the reply is a number within 5 % of an answer, or else equals it but for case: Masry et al. 2022 (ChartQA).

    "5%" is 0.05, in reply and answer alike, so "5" is not "5%". An answer of 0 has no 5 %: it is compared as text.
    The corrected form of `relaxed_accuracy_official`: outer blanks do not matter.
    """
    return float(any(_relaxed_equal(prediction, answer) for answer in answers))


def _relaxed_equal(prediction: str, answer: str) -> bool:
    reply, truth = _number(prediction), _number(answer)
    if reply is not None and truth:
        return abs(reply - truth) / abs(truth) <= 0.05 + 1e-9  # 1.05 against 1 is 5 %, whatever binary fractions say
    return prediction.strip().lower() == answer.strip().lower()


def _number(text: str) -> float | None:
    """The number a text is, a percentage as its fraction; None for words (and for "nan" and "infinity", words here)."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


NO_FIELD = ("", "none", "n/a", "not available")  # an answer that says that a form does not give the field


def field_f1(prediction: str, answers: Sequence[str]) -> float:
    """1 if a form's field is read right: equal but for case, blanks and a final period; `NO_FIELD` are one answer.

    DUE's F1 over fields (Borchmann et al. 2021) is among the report's figures: a set has it, not a row.
    """
    return float(_field(prediction) in {_field(answer) for answer in answers})


def _field(text: str) -> str:
    text = collapse(text).removesuffix(".")
    return "" if text in NO_FIELD else text


def is_no_field(text: str) -> bool:
    """Whether a reply or an answer says that the form does not give the field."""
    return not _field(text)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "yes_no_accuracy": yes_no_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa.vqa_accuracy,
    "open_recall": medical.open_recall,
    "closed_accuracy": medical.closed_accuracy,
    "token_f1": medical.token_f1,
    "rouge_l": captions.rouge_l,
    "mmmu_open": choices.mmmu_open,
    "field_f1": field_f1,
}
EXACT_FORMS: dict[str, Callable[[str, Sequence[str]], float]] = {  # what published evaluators compute, quirks included
    "pope": references.pope,
    "pope_lmms_eval": references.pope_lmms_eval,
    "mme": references.mme,
    "anls_official": references.anls_official,
    "relaxed_accuracy_official": references.relaxed_accuracy_official,
    "gqa_llava": references.gqa_llava,
    "gqa_lmms_eval": references.gqa_lmms_eval,
    "vqa_accuracy_official": vqa.vqa_accuracy_official,
    "vqa_accuracy_lmms_eval": vqa.vqa_accuracy_lmms_eval,
    "open_recall_llava_med": medical.open_recall_llava_med,
    "closed_accuracy_llava_med": medical.closed_accuracy_llava_med,
    "token_f1_llava_med": medical.token_f1_llava_med,
    "exact_match_llava_med": medical.exact_match_llava_med,
    "mmmu_open_official": choices.mmmu_open_official,
}
OF_OPTIONS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "option_letter": choices.option_letter,
    "option_letter_circular": choices.option_letter_circular,
    "option_letter_llava": choices.option_letter_llava,
    "option_letter_mmbench": choices.option_letter_mmbench,
    "option_letter_mmmu": choices.option_letter_mmmu,
}
ALL_METRICS = METRICS | EXACT_FORMS | OF_OPTIONS


def score(metric: str, prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """The grade in [0, 1] of one reply by the metric of that name.

    Raises:
        UserError: a metric that does not exist, a row that is not to be graded, or no answers to compare with.
    """
    if metric == NOT_GRADED:
        raise UserError(f"a row with metric '{NOT_GRADED}' is for training only and has no score; leave it out")
    if metric not in ALL_METRICS:
        nearest = difflib.get_close_matches(metric, ALL_METRICS, n=1, cutoff=0.4)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise UserError(f"no metric '{metric}'; there are {', '.join(ALL_METRICS)}.{hint}")
    if not answers:
        raise UserError(f"metric '{metric}' needs at least one accepted answer, the row has none")
    if metric in OF_OPTIONS:
        return OF_OPTIONS[metric](prediction, answers, options)
    return (METRICS | EXACT_FORMS)[metric](prediction, answers)
