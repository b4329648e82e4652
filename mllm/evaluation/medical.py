"""Open and closed questions about medical pictures: ours, and as LLaVA-Med (Li et al. 2023) scores them."""

import re
from collections import Counter
from collections.abc import Sequence

from mllm.evaluation.vqa import published_normalise, textvqa_normalise

YES_NO = ("yes", "no")


def open_recall(prediction: str, answers: Sequence[str]) -> float:
    """The share of an answer's words that the reply has, each as often as it has it; the best answer counts.

    The corrected form of `open_recall_llava_med`. Long replies are not punished: report `token_f1` beside it.
    """
    reply = _tokens(prediction)
    recalls = [_share(reply & truth, truth) for truth in map(_tokens, answers)]
    return max(*recalls, _is_one_of(prediction, answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of the shares of words that reply and answer have in common, as in SQuAD (Rajpurkar et al. 2016).

    The corrected form of `token_f1_llava_med`; the best answer counts.
    """
    reply = _tokens(prediction)
    scores = [_f1(_share(reply & truth, reply), _share(reply & truth, truth)) for truth in map(_tokens, answers)]
    return max(*scores, _is_one_of(prediction, answers))


def closed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the reply says yes or no first, as the answer does; of any other answer, if it stands in the reply.

    The corrected form of `closed_accuracy_llava_med`: "left" and "right" can be right, "unknown" is no "no". Where the
    answer is not yes or no, its words must stand together in the reply.
    """
    reply = textvqa_normalise(prediction)
    return max(_is_one_of(prediction, answers), float(any(_closed(prediction, reply, answer) for answer in answers)))


def _closed(prediction: str, reply: str, answer: str) -> bool:
    truth = textvqa_normalise(answer)
    if truth in YES_NO:
        return next((word for word in re.findall(r"[a-z]+", prediction.lower()) if word in YES_NO), None) == truth
    return bool(truth) and f" {truth} " in f" {reply} "


def closed_accuracy_llava_med(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA-Med's closed accuracy: the exact form for one row.

    Its quirks: "yes" or "no" must be in the reply, if only inside a word ("know"), so that other answers score 0 unless
    that happens; and a row whose reply has either but not the answer is left out of its mean altogether, which the
    report's figures do and this row's 0 does not.
    """
    reply = published_normalise(prediction.lower())
    return float(any(word in reply for word in YES_NO) and published_normalise(answers[0].lower()) in reply)


def counts_for_llava_med(prediction: str, answers: Sequence[str]) -> bool:
    """Whether LLaVA-Med's script takes a closed row into its mean."""
    reply = published_normalise(prediction.lower())
    return not any(word in reply for word in YES_NO) or closed_accuracy_llava_med(prediction, answers) == 1


def open_recall_llava_med(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA-Med's recall of an open answer: the exact form.

    Its quirk: a shared word counts as often as the *reply* repeats it, which raises the recall.
    """
    return _llava_med(prediction, answers[0])[2]


def token_f1_llava_med(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA-Med's token F1: the exact form, with the quirk of `open_recall_llava_med`."""
    return _llava_med(prediction, answers[0])[0]


def exact_match_llava_med(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA-Med's "exact match score": the exact form. Its quirk: it is the share of the reply's words that are right
    (different words of the answer found, over all words of the reply), so that half an answer scores 1.
    """
    reply, truth = _exact_tokens(prediction), _exact_tokens(answers[0])
    return sum(word in reply for word in truth) / reply.total() if reply else 0.0


def _llava_med(prediction: str, answer: str) -> tuple[float, float, float]:
    """F1, precision, recall."""
    reply, truth = _exact_tokens(prediction), _exact_tokens(answer)
    shared = sum(count for word, count in reply.items() if word in truth)
    if not shared:
        return 0.0, 0.0, 0.0
    precision = shared / reply.total()
    recall = shared / (shared + sum(count for word, count in truth.items() if word not in reply))
    return _f1(precision, recall), precision, recall


def _exact_tokens(text: str) -> Counter[str]:
    once = published_normalise(text.lower()).replace(",", "")
    return Counter(published_normalise(once).replace(",", "").split())  # the reference normalises twice


def _is_one_of(prediction: str, answers: Sequence[str]) -> float:
    """1 for an answer itself, one whose words are all articles or marks too."""
    return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})


def _tokens(text: str) -> Counter[str]:
    return Counter(textvqa_normalise(text).split())


def _share(part: Counter[str], whole: Counter[str]) -> float:
    return part.total() / whole.total() if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
