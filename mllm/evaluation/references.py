"""Published evaluators' rules exactly as their code has them, quirks included. Beside each stands our corrected one.

ours                exact forms here
yes_no_accuracy     pope, pope_lmms_eval, mme
anls                anls_official
relaxed_accuracy    relaxed_accuracy_official
exact_match         gqa_llava, gqa_lmms_eval
"""

import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def pope(prediction: str, answers: Sequence[str]) -> float:
    """POPE (Li et al. 2023) as its own script and LLaVA's read a reply: the exact form.

    Its quirks: only the first sentence counts; "No", "no" or "not" as a word makes it a no; everything else is a yes,
    an empty reply, "NO" and "maybe" among it.
    """
    return float(read_pope(prediction) == answers[0].strip().lower())


def read_pope(prediction: str) -> str:
    """yes or no, by POPE's own script."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """POPE as lmms-eval scores it: the exact form. Its quirk: "Yes." is wrong, the reply must be the bare word."""
    return float(prediction.lower().strip() == answers[0].lower().strip())


def mme(prediction: str, answers: Sequence[str]) -> float:
    """MME (Fu et al. 2023) as its evaluation tool and lmms-eval read a reply: the exact form.

    Its quirk: "yes" or "no" anywhere in the first four characters counts, so that "Not", "None" and "Know" are a no.
    A lone "y" or "n" is taken too.
    """
    return float(read_mme(prediction) == answers[0].lower().strip().replace(".", ""))


def read_mme(prediction: str) -> str:
    """yes, no or other, by MME's tool."""
    text = prediction.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def anls_official(prediction: str, answers: Sequence[str]) -> float:
    """ANLS as the script of the DocVQA challenge, Qwen-VL and lmms-eval compute it: the exact form.

    Its quirks: blanks are folded for the distance, but the length is that of the unfolded texts; a similarity of
    exactly 0.5 counts as 0.5, where the paper's equation gives 0.
    """
    distances = []
    for answer in answers:
        truth, reply = (" ".join(text.strip().lower().split()) for text in (answer, prediction))
        longer = max(len(answer), len(prediction))
        distances.append(Levenshtein.distance(truth, reply) / longer if longer else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= 0.5 else 0.0


def relaxed_accuracy_official(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy as pix2struct, Qwen-VL and lmms-eval compute it: the exact form.

    Its quirks: words are compared with their outer blanks; "nan" and "inf" are numbers; 1.05 may miss 1 by rounding.
    """
    return float(any(_relaxed(prediction, answer) for answer in answers))


def _relaxed(prediction: str, answer: str) -> bool:
    reply, truth = _as_float(prediction), _as_float(answer)
    if reply is not None and truth:
        return abs(reply - truth) / abs(truth) <= 0.05
    return prediction.lower() == answer.lower()


def _as_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def gqa_llava(prediction: str, answers: Sequence[str]) -> float:
    """GQA's own equality after what LLaVA does to a reply: final periods and case go. The exact form.

    Its quirk: a blank or any other mark at an end makes a right word wrong.
    """
    return float(prediction.rstrip(".").lower() in set(answers))


def gqa_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """GQA as lmms-eval scores it: equal but for case and all punctuation. The exact form.

    Its quirk: marks inside words go too, so that "t shirt" is not "t-shirt", but "tshirt" is.
    """
    return float(_without_marks(prediction) in {_without_marks(answer) for answer in answers})


_NO_MARKS = str.maketrans("", "", string.punctuation)


def _without_marks(text: str) -> str:
    return text.lower().translate(_NO_MARKS)
