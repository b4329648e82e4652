"""Our exact forms against lmms-eval's own code, case by case on generated answers. Runs where it is installed
(`pip install --no-deps lmms-eval`); only its functions are taken from its files, so that nothing else of it is needed.

Listed reasons to differ: lmms-eval 0.7 reads MMMU's letters by more rules than MMMU's own code ("C." counts), so
`option_letter_mmmu` agrees only where MMMU's code finds a letter or lmms-eval finds none either.
"""

import ast
import importlib.util
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from mllm.evaluation.metrics import score

CASES = 5000
PIECES = """yes|no|Yes|No.|NO|not|A|B|(B)|C.|the|a|an|dog|dogs|two|2|dont|don't|12.5|5%|5 %|1,000|x-ray|left|right|is
answer|The answer is B|so|=|3.14|1e3|none|?|!|,|.|  |cat|category|know|black cat|red|blue|nan|inf|-3|it's|isnt|Z|50%
""".replace("\n", "|").split("|")
FOUND = importlib.util.find_spec("lmms_eval")
pytestmark = pytest.mark.skipif(FOUND is None, reason="lmms-eval is not installed")


def code(name: str, **given: object) -> dict:
    """The functions, classes and constants of one of its files, without what the file imports."""
    path = Path(FOUND.submodule_search_locations[0]) / name
    space = {"re": re, "np": np, "random": random, "statistics": statistics, "defaultdict": defaultdict, **given}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign):
            try:
                exec(compile(ast.Module([node], []), str(path), "exec"), space)
            except (NameError, AttributeError, TypeError):
                continue  # something of another file, not asked for
    return space


def some_text(dice: random.Random, most: int = 4) -> str:
    return dice.choice([" ", "", " "]).join(dice.choice(PIECES) for _ in range(dice.randint(0, most)))


def agree(metric: str, theirs: Callable[[str, list[str]], float], make: Callable[[random.Random], tuple]) -> None:
    dice = random.Random(0)
    for _ in range(CASES):
        reply, answers = make(dice)
        assert score(metric, reply, answers) == pytest.approx(float(theirs(reply, answers))), (reply, answers)


def one(dice):
    return some_text(dice, 3), [some_text(dice, 3)]


def yes_or_no(dice):
    return some_text(dice, 3), [dice.choice(["yes", "no"])]


def ten(dice):
    known = [some_text(dice, 3) for _ in range(3)]
    return dice.choice([*known, some_text(dice, 3)]), [dice.choice(known) for _ in range(10)]


def test_relaxed_accuracy():
    check = code("tasks/chartqa/utils.py")["relaxed_correctness"]
    agree("relaxed_accuracy_official", lambda reply, answers: check(reply, answers[0]), one)


def test_anls():
    check = code("api/metrics.py", levenshtein_distance=Levenshtein.distance)["anls"]
    several = lambda dice: (some_text(dice, 3), [some_text(dice, 3) for _ in range(dice.randint(1, 3))])  # noqa: E731
    agree("anls_official", lambda reply, answers: check(answers, [reply])["anls"], several)


def test_mme():
    read = code("tasks/mme/utils.py")["parse_pred_ans"]
    agree("mme", lambda reply, answers: read(reply) == answers[0], yes_or_no)


def test_pope():
    check = code("tasks/pope/utils.py")["pope_process_results"]
    agree(
        "pope_lmms_eval",
        lambda reply, answers: check({"answer": answers[0], "question_id": 0}, [reply])["pope_accuracy"]["score"],
        yes_or_no,
    )


def test_vqav2():
    normaliser = code("tasks/_task_utils/vqa_eval_metric.py")["EvalAIAnswerProcessor"]
    check = code("tasks/vqav2/utils.py", EvalAIAnswerProcessor=normaliser)["vqav2_process_results"]

    def theirs(reply, answers):
        people = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
        return check({"answers": people, "question_id": 0}, [reply])["exact_match"]

    agree("vqa_accuracy_lmms_eval", theirs, ten)


def test_textvqa():
    normalise = code("tasks/_task_utils/vqa_eval_metric.py")["EvalAIAnswerProcessor"]()

    def theirs(reply, answers):
        said, known = normalise(reply), [normalise(answer) for answer in answers]
        others = [known[:place] + known[place + 1 :] for place in range(10)]
        return statistics.mean(min(1, each.count(said) / 3) for each in others)

    agree("vqa_accuracy", theirs, ten)


def test_mmmus_open_questions():
    mmmu = code("tasks/mmmu/utils.py")
    answers = ["cat", "3.14", "2", "no", "a", "1,000", "red", "blue cat"]
    agree(
        "mmmu_open_official",
        lambda reply, known: mmmu["eval_open"](known, mmmu["parse_open_response"](reply)),
        lambda dice: (some_text(dice, 8), [dice.choice(answers)]),
    )
