"""How a short reply is graded: one function a metric, each `(prediction, answers) -> float in [0, 1]`.

`answers` are all the accepted ones. Text alone is compared; nothing here knows a model.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from mllm.common.errors import UserError

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

    The accuracy of GQA (Hudson & Manning 2019), loosened for articles and numbers as in VQA (Antol et al. 2015).
    """
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def yes_no_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the reply's first word is an answer's first word: yes or no, true or false.

    POPE (Li et al. 2023) as lmms-eval scores it, except that "Yes, there is." counts as "yes" and a reply without
    either word is wrong; POPE's own script takes such a reply for a yes. "true" is not an answer to a yes/no question.
    """
    word = _first_word(prediction)
    return float(word is not None and word in {_first_word(answer) for answer in answers})


def _first_word(text: str) -> str | None:
    found = re.search(r"[^\W_]+", text.lower())
    return found.group() if found else None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity of one question: the best 1 - NL over the answers, 0 where NL >= 0.5.

    The mean over questions is ANLS: Biten et al. 2019 (ST-VQA), equation 1. NL = edit distance / length of the longer,
    both stripped and lower-cased. Many evaluators also fold blanks for the distance but divide by the unfolded
    length; the paper does not.
    """
    reply = prediction.strip().lower()
    distances = (Levenshtein.normalized_distance(reply, answer.strip().lower()) for answer in answers)
    nearest = min(distances)
    return 1.0 - nearest if nearest < 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the reply is a number within 5 % of an answer, or else equals it but for case: Masry et al. 2022 (ChartQA).

    "5%" is 0.05, in reply and answer alike, so "5" is not "5%". An answer of 0 has no 5 %: it is compared as text.
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


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's soft accuracy over ten people's answers: mean over people of min(1, agreeing others / 3).

    Antol et al. 2015 (VQA), section 3, with the normaliser of the TextVQA evaluator (`_vqa_normalise`). Used by VQAv2,
    TextVQA, VizWiz and OK-VQA.

    Raises:
        UserError: not exactly ten answers.
    """
    if len(answers) != 10:
        raise UserError(
            f"vqa_accuracy compares a reply with the answers of ten people, but this row has {len(answers)} answers. "
            f"Use exact_match for a row whose answers are alternatives."
        )
    reply = _vqa_normalise(prediction)
    agreeing = sum(_vqa_normalise(answer) == reply for answer in answers)
    # Leaving one person out leaves agreeing - 1 matches where that person agreed and all of them where not.
    return (agreeing * min(1.0, (agreeing - 1) / 3) + (10 - agreeing) * min(1.0, agreeing / 3)) / 10


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBER_WORDS = {"none": "0"} | {word: _NUMBER_WORDS[word] for word in _ZERO_TO_NINETEEN.split()[:11]}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't needn't
not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll you'd you'd've you'll you're you've"""


def _restored_contractions() -> dict[str, str]:
    """{"dont": "don't", "couldnt've": "couldn't've", "couldn'tve": …}: each spelling with one apostrophe lost."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTIONS.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }


_RESTORED_CONTRACTIONS = _restored_contractions()


def _vqa_normalise(text: str) -> str:
    """The published evaluators' normaliser, with what their code does rather than what it means to do.

    A mark that touches a blank anywhere is dropped everywhere, else it becomes a blank; a period goes unless a digit
    follows (their look-behind is misspelt and never fires), and only the first 32 do (a flag passed as a count).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    without_marks = text
    for mark in _VQA_PUNCTUATION:
        touches_blank = f"{mark} " in text or f" {mark}" in text
        without_marks = without_marks.replace(mark, "" if touches_blank else " ")
    without_periods = re.sub(r"\.(?!\d)", "", without_marks, count=32)
    words = (_VQA_NUMBER_WORDS.get(word, word) for word in without_periods.split())
    return " ".join(_RESTORED_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "yes_no_accuracy": yes_no_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa_accuracy,
}


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """The grade in [0, 1] of one reply by the metric of that name.

    Raises:
        UserError: a metric that does not exist, a row that is not to be graded, or no answers to compare with.
    """
    if metric == NOT_GRADED:
        raise UserError(f"a row with metric '{NOT_GRADED}' is for training only and has no score; leave it out")
    if metric not in METRICS:
        nearest = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.4)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise UserError(f"no metric '{metric}'; there are {', '.join(METRICS)}.{hint}")
    if not answers:
        raise UserError(f"metric '{metric}' needs at least one accepted answer, the row has none")
    return METRICS[metric](prediction, answers)
