"""VQA's soft accuracy over ten people's answers: ours, and as the published evaluators compute it."""

import re
from collections.abc import Callable, Sequence

from mllm.common.errors import UserError

PEOPLE = 10
_ARTICLES = frozenset({"a", "an", "the"})
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ZERO_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(_ZERO_TO_TEN.split())}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't needn't
not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""


def _restored_contractions() -> dict[str, str]:
    """{"dont": "don't", "couldnt've": "couldn't've", "couldn'tve": …}: each spelling with one apostrophe lost."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTIONS.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }


_RESTORED_CONTRACTIONS = _restored_contractions()


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA's soft accuracy: mean over ten people of min(1, agreeing others / 3). The corrected form.

    Antol et al. 2015 (VQA), section 3, with the normaliser of the TextVQA evaluator (`textvqa_normalise`), which every
    answer and the reply go through. Used by VQAv2, TextVQA, VizWiz and OK-VQA.

    Raises:
        UserError: not exactly ten answers.
    """
    return _soft_accuracy(prediction, answers, textvqa_normalise, textvqa_normalise)


def vqa_accuracy_official(prediction: str, answers: Sequence[str]) -> float:
    """The same as VQA's own evaluator (GT-Vision-Lab) computes it: the exact form.

    Its quirk: where all ten people wrote the same text, that text is compared as it stands with a normalised reply.
    So "a dog" is wrong where all wrote "a dog", and so is "two" where all wrote "two". Elsewhere their answers lose
    punctuation only. Raises UserError as `vqa_accuracy` does.
    """
    unanimous = len(set(answers)) == 1
    return _soft_accuracy(
        prediction, answers, (lambda answer: answer) if unanimous else strip_punctuation, published_normalise
    )


def vqa_accuracy_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """The same as lmms-eval 0.7 computes it for VQAv2: the exact form.

    Its quirk: the TextVQA normaliser's first pass is left out, so that "dog's" loses nothing and "a,b" is one word.
    Raises UserError as `vqa_accuracy` does.
    """
    return _soft_accuracy(prediction, answers, published_normalise, published_normalise)


def _soft_accuracy(
    prediction: str,
    answers: Sequence[str],
    of_answer: Callable[[str], str],
    of_reply: Callable[[str], str],
) -> float:
    if len(answers) != PEOPLE:
        raise UserError(
            f"vqa_accuracy compares a reply with the answers of ten people, but this row has {len(answers)} answers. "
            f"Use exact_match for a row whose answers are alternatives."
        )
    reply = of_reply(prediction)
    agreeing = sum(of_answer(answer) == reply for answer in answers)
    # Leaving one person out leaves agreeing - 1 matches where that person agreed and all of them where not.
    return (agreeing * min(1.0, (agreeing - 1) / 3) + (PEOPLE - agreeing) * min(1.0, agreeing / 3)) / PEOPLE


def textvqa_normalise(text: str) -> str:
    """The TextVQA evaluator's normaliser: a first pass over commas, question marks and "'s", then the published one."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return published_normalise(text)


def published_normalise(text: str) -> str:
    """The published evaluators' normaliser, with what their code does rather than what it means to do."""
    words = (_NUMBER_WORDS.get(word, word) for word in strip_punctuation(_blanks_mended(text)).lower().split())
    return " ".join(_RESTORED_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def strip_punctuation(text: str) -> str:
    """A mark that touches a blank anywhere is dropped everywhere, and any mark in a text with 1,000; else it becomes a
    blank. A period goes unless a digit follows (their look-behind is misspelt and never fires), and only the first 32
    do (a flag passed as a count).
    """
    has_thousands = re.search(r"\d,\d", text) is not None
    without_marks = text
    for mark in _MARKS:
        touches_blank = f"{mark} " in text or f" {mark}" in text
        without_marks = without_marks.replace(mark, "" if touches_blank or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", without_marks, count=32)


def _blanks_mended(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
