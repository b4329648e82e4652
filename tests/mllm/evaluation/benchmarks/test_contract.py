"""What every benchmark here keeps to, tried on five rows in its publisher's layout."""

import re
import shutil
from pathlib import Path

import pytest

from mllm.common.errors import UserError
from mllm.evaluation.answers import check_gradable, collect_answers
from mllm.evaluation.benchmarks import BENCHMARKS, Benchmark, Selection, find, listing, suite
from mllm.evaluation.figures import figures_of
from mllm.evaluation.metrics import ALL_METRICS
from tests.mllm.evaluation.benchmarks.layouts import LAYOUTS

DOCS = (Path(__file__).parents[4] / "docs" / "evaluate.md").read_text(encoding="utf-8")
every = pytest.mark.parametrize("name", BENCHMARKS)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """All layouts, each in a folder of its name."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name in BENCHMARKS:
        assert name in LAYOUTS, f"write five rows of {name} in its published layout into layouts.py"
        (root / name).mkdir()
        LAYOUTS[name](root / name)
    return root


@every
def test_it_says_where_it_lies_and_what_may_be_done_with_it(name):
    benchmark = find(name)
    assert isinstance(benchmark, Benchmark)
    assert benchmark.name == name
    assert benchmark.home.startswith("https://")
    assert all((benchmark.title, benchmark.licence, benchmark.pictures, benchmark.reference, benchmark.splits))
    assert "{question}" in benchmark.prompt
    assert ("{options}" in benchmark.prompt) == benchmark.metric.startswith("option_letter")


@every
def test_exact_forms_that_it_names_exist(name):
    named = re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", find(name).reference)
    assert {each for each in named if not each.endswith("evaluator") and each != "eval_pope"} <= ALL_METRICS.keys() | {
        "eval_tool"
    }


@every
def test_it_is_read_as_published_with_rows_that_can_be_told_apart_and_graded(name, root):
    rows = find(name).conversations(root / name)
    assert len(rows) >= 5
    assert len({row.id for row in rows}) == len(rows)
    assert {row.source for row in rows} == {name}
    assert {row.domain for row in rows} == {find(name).domain}
    check_gradable(rows)


@every
def test_what_it_would_teach_is_right_and_nonsense_is_not(name, root):
    rows = find(name).conversations(root / name)
    right = collect_answers(rows, [row.turns[-1].text for row in rows])
    assert sum(answer.grade() for answer in right) / len(right) > 0.95
    wrong = collect_answers(rows, ["qqqq"] * len(rows))
    assert sum(answer.grade() for answer in wrong) / len(wrong) <= 0.75  # POPE's own script takes it for a yes
    figures_of(right), figures_of(wrong), figures_of(collect_answers(rows, [""] * len(rows)))


@every
def test_pictures_are_asked_for_where_they_stand_and_one_that_is_missing_is_named(name, root, tmp_path):
    rows = find(name).conversations(root / name)
    assert any(row.images for row in rows)
    files = [image for row in rows for image in row.images if isinstance(image, Path)]
    if files:
        shutil.copytree(root / name, tmp_path / name)
        moved = tmp_path / name / files[0].relative_to(root / name)
        moved.unlink()
        with pytest.raises(UserError, match=re.escape(moved.name)):
            find(name).conversations(tmp_path / name)


@every
def test_a_limit_takes_the_first_rows(name, root):
    rows = find(name).conversations(root / name, limit=2)
    assert [row.id for row in rows] == [row.id for row in find(name).conversations(root / name)[:2]]


@every
def test_another_layout_is_refused_with_the_file_that_lacks(name, root, tmp_path):
    with pytest.raises(UserError, match=rf"{name}: no .* in .* Get it from https://"):
        find(name).conversations(tmp_path)
    with pytest.raises(UserError, match="no split 'nosuch'"):
        find(name).conversations(root / name, split="nosuch")


@every
def test_the_table_in_the_docs_has_it(name):
    benchmark = find(name)
    line = next((line for line in DOCS.splitlines() if line.startswith(f"| `{name}` ")), "")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        f"`{name}`", f"[{benchmark.title}]({benchmark.home})", benchmark.domain, benchmark.splits[0],
        f"`{benchmark.metric}`", benchmark.licence,
    ]  # fmt: skip


# -- several -----------------------------------------------------------------------------------------------------------


def test_a_suite_takes_what_is_there_and_names_what_is_not(root, tmp_path):
    shutil.copytree(root / "pope", tmp_path / "pope")
    shutil.copytree(root / "slake", tmp_path / "slake")
    selection = Selection(root=tmp_path, suite="all")
    assert {row.source for row in selection.read(limit=1)} == {"pope", "slake", "slake_zh"}
    assert "skipped: ai2d" in selection.told()
    assert {row.source for row in Selection(root=tmp_path, suite="biomedical").read()} == {"slake", "slake_zh"}


def test_suites_are_the_domains_and_all():
    assert sorted(suite("general") + suite("document") + suite("biomedical")) == suite("all") == list(BENCHMARKS)
    with pytest.raises(UserError, match="no suite 'medical'"):
        suite("medical")


def test_one_asked_by_name_may_lie_in_the_root_itself_but_must_be_there(root, tmp_path):
    assert Selection(root=root / "gqa", asked=("gqa",)).read(limit=1)[0].source == "gqa"
    with pytest.raises(UserError, match=r"gqa: no testdev_balanced_questions\.json .*CC BY 4\.0"):
        Selection(root=tmp_path, asked=("gqa",)).read()


def test_nothing_of_a_suite_on_disk_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing of the suite document"):
        Selection(root=tmp_path, suite="document").read()
    with pytest.raises(UserError, match="not a folder"):
        Selection(root=tmp_path / "none", suite="document").read()


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'textvqa'"):
        find("text_vqa")


def test_a_row_in_another_layout_is_named(root, tmp_path):
    shutil.copytree(root / "textvqa", tmp_path / "textvqa")
    path = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    path.write_text(path.read_text().replace('"question_id": 34604', '"questionId": 34604'))
    with pytest.raises(UserError, match=r"textvqa val row 3 is not in the published layout .*question_id"):
        find("textvqa").conversations(tmp_path / "textvqa")


def test_the_listing_tells_what_is_on_disk(root, tmp_path):
    heads, rows = listing(root)
    assert heads[-1] == "on disk"
    assert {row[-1] for row in rows} == {"yes"}
    assert {row[-1][:3] for row in listing(tmp_path)[1]} == {"no "}
