"""Captions against several people's: CIDEr-D, BLEU and ROUGE-L as coco-caption computes them, without its Java.

CIDEr-D: Vedantam et al. 2015. BLEU: Papineni et al. 2002. ROUGE-L: Lin 2004. The arithmetic is that of
pycocoevalcap 1.2 (`tests/mllm/evaluation/test_captions.py` holds its values); only words are told apart by our own
rules, which follow the Penn Treebank's, in place of the Java program. METEOR and SPICE need more than arithmetic.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

MOST = 4  # words of the longest n-gram
BETA = 1.2  # weight of recall in ROUGE-L, as coco-caption sets it
SIGMA = 6.0  # words: width of CIDEr-D's length penalty
_CLITICS = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))\b")
_WORDS = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)*|[^\W_]+(?:[-.&/][^\W_]+)*|[^\w\s]")
_DROPPED = frozenset("'`.?!,:-;\"()[]{}…–—")

Grams = Counter[tuple[str, ...]]


def words_of(caption: str) -> list[str]:
    """Small letters, clitics apart ("do n't"), hyphenated words whole, punctuation gone."""
    text = _CLITICS.sub(r" \1", caption.lower().replace("’", "'"))
    return [word for word in _WORDS.findall(text) if word not in _DROPPED]


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L of one caption: longest common subsequence, its best precision and best recall over the answers.

    Its quirk, kept since all published numbers have it: the two may be of different answers.
    """
    reply = words_of(prediction)
    common = [(_longest_common(reply, truth), len(truth)) for truth in map(words_of, answers)]
    precision = max(length / len(reply) for length, _ in common) if reply else 0.0
    recall = max(length / many if many else 0.0 for length, many in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(one: list[str], two: list[str]) -> int:
    lengths = [0] * (len(two) + 1)
    for word in one:
        before = 0  # of the row above, one to the left
        for place, other in enumerate(two, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == other else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]


def bleu(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 … BLEU-4 of a whole set, with the nearest reference length and coco-caption's tiny smoothing."""
    matched, guessed = [0] * MOST, [0] * MOST
    reply_length = reference_length = 0
    for prediction, own in zip(predictions, answers, strict=True):
        reply, references = words_of(prediction), [words_of(answer) for answer in own]
        grams, most = _grams(reply), Counter()
        for reference in references:
            most |= _grams(reference)
        reply_length += len(reply)
        reference_length += min((abs(len(each) - len(reply)), len(each)) for each in references)[1]
        for gram, count in grams.items():
            matched[len(gram) - 1] += min(count, most[gram])
        for n in range(MOST):
            guessed[n] += max(0, len(reply) - n)
    ratio = (reply_length + 1e-15) / (reference_length + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(MOST):
        product *= (matched[n] + 1e-15) / (guessed[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def cider_d(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; their mean is the set's. Rare n-grams of the set's answers weigh more.

    So a caption's score depends on the set it is in, and a set of one picture scores 0.
    """
    references = [[_grams(words_of(answer)) for answer in own] for own in answers]
    seen_in: Counter[tuple[str, ...]] = Counter()
    for own in references:
        seen_in.update({gram for grams in own for gram in grams})
    log_pictures = math.log(len(references))

    def weigh(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(MOST)]
        for gram, count in grams.items():
            vectors[len(gram) - 1][gram] = count * (log_pictures - math.log(max(1, seen_in[gram])))
        return vectors

    return [
        10 * sum(_alike(weigh(grams), weigh(truth), grams, truth) for truth in own) / len(own)
        for grams, own in zip((_grams(words_of(text)) for text in predictions), references, strict=True)
    ]


def _alike(one: list[dict], two: list[dict], grams: Grams, truth: Grams) -> float:
    """Clipped cosine, mean over n, times the penalty for a difference in length."""
    total = 0.0
    for mine, theirs in zip(one, two, strict=True):
        norm = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(sum(v * v for v in theirs.values()))
        if norm:
            total += sum(min(v, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, v in mine.items()) / norm
    shorter_by = _pairs(grams) - _pairs(truth)  # the reference counts pairs of words for the length
    return total / MOST * math.exp(-(shorter_by**2) / (2 * SIGMA**2))


def _pairs(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _grams(words: list[str]) -> Grams:
    return Counter(tuple(words[start : start + n]) for n in range(1, MOST + 1) for start in range(len(words) - n + 1))
