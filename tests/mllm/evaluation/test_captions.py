"""CIDEr-D, BLEU and ROUGE-L: the values that pycocoevalcap 1.2 gives to the same words, and our way to tell words."""

import pytest

from mllm.evaluation.captions import bleu, cider_d, rouge_l, words_of

SAID = ["a red square on a table", "two dogs play in the grass", "a man rides", "a cat"]
KNOWN = [
    ["a red square on the table", "there is a red box on a table"],
    ["two dogs are playing in the grass", "dogs in the grass", "two brown dogs play"],
    ["a man rides a horse along the beach"],
    ["a dog sits on a mat", "the dog"],
]
CIDER_D = [4.503816228651835, 3.2628371111289463, 2.7992317567870333, 0.04562817181168744]
BLEU = [0.6612880212520795, 0.6270176869865667, 0.5353883181404078, 0.3661371141962267]
ROUGE_L = [0.8333333333333334, 0.9242424242424241, 0.5041322314049587, 0.22932330827067668]


def test_cider_d_is_coco_captions():
    assert cider_d(SAID, KNOWN) == pytest.approx(CIDER_D, abs=1e-12)


def test_bleu_is_coco_captions():
    assert bleu(SAID, KNOWN) == pytest.approx(BLEU, abs=1e-12)


@pytest.mark.parametrize(("said", "known", "value"), zip(SAID, KNOWN, ROUGE_L, strict=True))
def test_rouge_l_is_coco_captions(said, known, value):
    assert rouge_l(said, known) == pytest.approx(value, abs=1e-12)


def test_a_set_of_one_picture_has_no_rare_words_and_empty_captions_score_nothing():
    assert cider_d(["a cat"], [["a cat"]]) == [0.0]
    assert rouge_l("", ["a cat"]) == rouge_l("...", ["a cat"]) == rouge_l("a cat", ["!"]) == 0.0
    assert bleu([""], [["a cat"]])[0] < 1e-6


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog.", "a man 's dog"),
        ("They don't run, do they?", "they do n't run do they"),
        ("a black-and-white T-shirt", "a black-and-white t-shirt"),
        ("3.5 (three) cats; 1,000 dogs!", "3.5 three cats 1,000 dogs"),
        ("it’s", "it 's"),
        ('"quoted" - text', "quoted text"),
    ],
)
def test_words_are_told_apart_as_in_the_penn_treebank(caption, words):
    assert words_of(caption) == words.split()
