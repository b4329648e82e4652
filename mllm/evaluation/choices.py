"""Which option a reply picks: ours, and as LLaVA, MMBench and MMMU read one.

Each metric is `(prediction, answers, options) -> float`: `answers` holds the right option's letter, `options` their
texts in the order asked, the first being A.
"""

import re
import string
from collections.abc import Callable, Sequence

from mllm.common.errors import UserError
from mllm.evaluation.vqa import published_normalise

LETTERS = string.ascii_uppercase
Reader = Callable[[str, Sequence[str]], str | None]


def option_letter(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """1 if the reply picks the right option: by its letter, or by its text where exactly one option's is in it.

    The corrected form. "B", "(b)", "B. dog", "**B**: dog", "The answer is B", "Option (B)" and "dog" all pick B. A
    reply that names several letters picks by "answer is …", else none: nothing is guessed.
    """
    return _right(read_option, prediction, answers, options)


def option_letter_circular(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """`option_letter` of one rotation of a question; the report's figures tell the share right in all rotations."""
    return option_letter(prediction, answers, options)


def option_letter_llava(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """ScienceQA as LLaVA scores it: the exact form.

    A bare letter A to E, or one followed by ". ", or a single "The answer is X" with any character behind it. Its
    quirks: "B." and "B\\n" are wrong, and so is "The answer is B" at the very end.
    """
    return _right(_read_llava, prediction, answers, options)


def option_letter_mmbench(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """MMBench as VLMEvalKit reads a reply without a judge: the exact form.

    A single letter among the last four words, else the only option whose text is in the reply. Its quirks: "A" counts
    as a letter where it is an article, and an option's text inside another word counts ("cat" in "category"). Where
    it would ask a language model, the row is wrong here.
    """
    return _right(_read_mmbench, prediction, answers, options)


def option_letter_mmmu(prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    """MMMU's own rule for multiple choice (Yue et al. 2024): the exact form, but for its dice.

    Letters in brackets, else letters between blanks, else options' texts in replies of more than five words; the last
    of several counts. Where it picks an option at random, the row gets what that is worth on average: 1 / options.
    """
    letter = _read_mmmu(prediction, options)
    return _right(_read_mmmu, prediction, answers, options) if letter else 1 / _checked(answers, options)


def _right(read: Reader, prediction: str, answers: Sequence[str], options: Sequence[str]) -> float:
    _checked(answers, options)
    return float(read(prediction, options) in answers)


def _checked(answers: Sequence[str], options: Sequence[str]) -> int:
    """The number of options. Raises UserError where there are none, or an answer is no letter of one."""
    if not options:
        raise UserError("a metric of option letters needs the row's `options`: their texts, the first being A")
    letters = LETTERS[: len(options)]
    for answer in answers:
        if len(answer) != 1 or answer not in letters:
            raise UserError(
                f"expected an option's letter ({letters[0]} to {letters[-1]}) as answer, got {answer!r:.60}"
            )
    return len(options)


# -- ours --------------------------------------------------------------------------------------------------------------

_LEADING = re.compile(r"[\W_]*([A-Z])[\W_]*(?:[.):,\]*\n]|$)")
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b)\W*(?:(?i:is|would be|option)\W*){0,2}([A-Z])\b(?!['’]|\s+[a-z])"
)


def read_option(prediction: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply picks; None where it picks none or several."""
    reply, letters = prediction.strip(), LETTERS[: len(options)]
    bare = re.sub(r"[\W_]", "", reply)
    if len(bare) == 1:
        return bare.upper() if bare.upper() in letters else _by_text(reply, options)
    stated = [letter for letter in _STATED.findall(reply) if letter in letters]
    leading = _LEADING.match(reply)
    if leading and leading[1] in letters and not stated:
        return leading[1]
    if stated:
        return stated[-1]
    return _by_text(reply, options)


def _by_text(reply: str, options: Sequence[str]) -> str | None:
    """The only option whose words stand in the reply, those inside a longer one that does too left out."""
    said = f" {_words(reply)} "
    texts = [f" {_words(option)} " for option in options]
    equal = [place for place, text in enumerate(texts) if text == said]
    if equal:
        return LETTERS[equal[0]] if len(equal) == 1 else None
    found = [place for place, text in enumerate(texts) if text.strip() and text in said]
    found = [place for place in found if not any(texts[place] in texts[o] for o in found if texts[o] != texts[place])]
    return LETTERS[found[0]] if len(found) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:[.'-][^\W_]+)*", text.lower()))


# -- LLaVA, MMBench, MMMU ----------------------------------------------------------------------------------------------


def _read_llava(prediction: str, options: Sequence[str]) -> str | None:
    five = LETTERS[:5]
    if len(prediction) == 1 and prediction in five:
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in five and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        stated = re.findall(r"The answer is ([A-Z]).", prediction)
        letter = stated[0] if len(stated) == 1 else ""
    return letter if letter and letter in five[: len(options)] else None


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def _read_mmbench(prediction: str, options: Sequence[str]) -> str | None:
    letters = LETTERS[: len(options)]
    if any(refusal in prediction for refusal in _REFUSALS):
        return None
    words = prediction.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return None
    reply = prediction.lower()
    if len(reply) > 2 * sum(map(len, options)):
        return None
    found = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in reply]
    return found[0] if len(found) == 1 else None


def _read_mmmu(prediction: str, options: Sequence[str]) -> str | None:
    """None where the reference would pick at random."""
    reply = prediction
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    letters = LETTERS[: len(options)]
    forms = [{letter: form.format(letter) for letter in letters} for form in ("({})", " {} ")]
    texts = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}
    for sought in [*forms, texts if len(reply.split()) > 5 else {}]:
        said = reply.lower() if sought is texts else reply
        found = {letter: said.rfind(text) for letter, text in sought.items() if text in said}
        if found:
            return max(found, key=found.__getitem__)
    return None


# -- MMMU's open questions ---------------------------------------------------------------------------------------------


def mmmu_open(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer stands in what a reply concludes with: as whole words, or as the same number to two places.

    The corrected form of `mmmu_open_official`: sentences are told apart before case goes, "no" is not in "know".
    """
    return _open(prediction, answers, exact=False)


def mmmu_open_official(prediction: str, answers: Sequence[str]) -> float:
    """MMMU's own rule for open questions: the exact form.

    What follows the last "is ", "so ", "answer " … of a line is searched for the answer's text and numbers. Its
    quirks: sentences are split at capitals after all were made small, so only lines are; text is found inside words.
    """
    return _open(prediction, answers, exact=True)


_CONCLUDING = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _open(prediction: str, answers: Sequence[str], *, exact: bool) -> float:
    concluded = _conclusions(prediction, exact=exact)
    said = [*concluded, *(found for text in concluded for form in _NUMBERS for found in re.findall(form, text))]
    replies = {form for text in said for form in _forms(text)}
    truths = [form for answer in answers for form in _forms(answer)]
    numbers = {truth for truth in truths if isinstance(truth, float)}
    texts = [truth for truth in truths if isinstance(truth, str)]

    def holds(reply: str, truth: str) -> bool:
        return truth in reply if exact else f" {published_normalise(truth)} " in f" {published_normalise(reply)} "

    return float(
        any(
            reply in numbers if isinstance(reply, float) else any(holds(reply, truth) for truth in texts)
            for reply in replies
        )
    )


def _conclusions(prediction: str, *, exact: bool) -> list[str]:
    whole = prediction.strip().strip(".")
    parts = re.split(r"\.\s(?=[A-Z])|\n", whole.lower() if exact else whole)
    found = []
    for place, part in enumerate(parts):
        part = part.lower()
        signs = (*_CONCLUDING, "=") if place == len(parts) - 1 else _CONCLUDING
        tails = [part.split(sign)[-1].strip() for sign in signs if sign in part]
        shortest = ""
        for tail in tails:
            # The reference lets an empty tail win, and the next one win over that.
            if (tail or exact) and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in list(":,.!?;'"):
            found.append(shortest)
    return found or [whole.lower()]


def _forms(text: str) -> list[str | float]:
    """A number rounded to two places, or else the text in small letters; one letter only where a blank is beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
