"""What README and docs claim and a test can check: links, paths, commands, code, tables, and how they are written."""

import ast
import dataclasses
import importlib
import json
import re
import tomllib
from pathlib import Path

import peft
import pytest
import torch
import yaml
from peft.config import PeftConfig

from mllm.cli import app
from mllm.mole import MoleConfig
from tests.tiny import tiny_language_model

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}
README = PAGES["README.md"]
TOP = "mllm|train|demo|data_recipes|studies|benchmarks|tests|docs"
pages = pytest.mark.parametrize("page", PAGES)


def fences(page: str, language: str) -> list[str]:
    """The code blocks of a page in that language; "" for blocks that name none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.M | re.S)


def prose(page: str) -> str:
    """A page without code blocks, tables, markers, link targets and headings; `code` becomes one word."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    text = re.sub(r"^(\|.*|#.*|<!--.*)$", "", text, flags=re.M)
    text = re.sub(r"(!?)\[([^\]]*)\]\([^)]*\)", lambda link: "" if link[1] else link[2], text)
    return re.sub(r"`[^`]*`", "code", text)


def anchors(text: str) -> set[str]:
    """What `#…` may name: headings in small letters, blanks as dashes, other marks left out."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


@pages
def test_every_path_named_exists(page):
    for name in re.findall(rf"(?<![\w./])((?:{TOP})/[\w./*-]*\w)", re.sub(r"\]\(.*?\)", "]", PAGES[page])):
        assert list(ROOT.glob(name)), name


@pages
def test_no_sentence_is_longer_than_25_words(page):
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*] |\d\. )", prose(page)):
        for sentence in re.split(r"(?<=[.!?])[)*\"]*\s", paragraph):
            words = re.findall(r"\w[\w'’.,/-]*", sentence)
            assert len(words) <= 25, " ".join(sentence.split())


@pages
def test_every_command_exists(page):
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^(?:\$ )?mllm (\w+)", "\n".join(fences(page, "")), re.M)) <= known


@pages
def test_every_make_target_exists(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", PAGES[page], re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pages
def test_every_python_example_parses_and_imports_what_there_is(page):
    for code in fences(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("balance", ["global_batch", "bias"])
def test_the_loop_of_ones_own_trains_and_balances_the_routers_as_written(balance):
    (loop,) = [code for code in fences("docs/routing.md", "python") if "optimizer.step()" in code]
    config = MoleConfig(r=2, num_experts=3, expert_domains=["a", "b", "c"], balance=balance)
    model = peft.get_peft_model(tiny_language_model(), config)
    weight = next(weight for name, weight in model.named_parameters() if "mole_router" in name)
    before, ids = weight.detach().clone(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    batches = [({"input_ids": ids, "labels": ids}, ["a", "b"])]
    exec(loop, {"model": model, "optimizer": optimizer, "batches": batches})
    assert not torch.equal(weight, before)
    if balance == "bias":
        assert any(bias.any() for name, bias in model.named_buffers() if "selection_bias" in name)


def test_readme_is_short_and_keeps_its_numbers_in_one_table():
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"(?:^\|.*\n)+", README, re.M)) == 1
    numbers = re.findall(r"(?<![\w.-])[+-]?\d[\d.,]*", re.sub(r"\bcode\b", "", prose("README.md")))
    assert len(numbers) <= 10, numbers


def test_every_folder_of_the_tree_exists():
    block = README.split("## The tree")[1].split("```")[1].strip("\n")
    parent = ROOT
    for line in block.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else ROOT / name
        assert (parent / name if line.startswith(" ") else parent).is_dir(), line


@pytest.mark.parametrize("target", ["quickstart", "test", "demo"])
def test_readme_names_the_first_commands(target):
    assert f"make {target}" in README


def test_package_citation_and_changelog_name_the_same_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## ([\d.]+)", PAGES["CHANGELOG.md"], re.M)[1] == version


def test_every_switch_of_routing_stands_in_the_table_with_its_default():
    table = PAGES["docs/routing.md"].split("<!-- switches -->")[1].split("<!-- /switches -->")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.M))
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    fields = {field.name: field.default for field in dataclasses.fields(MoleConfig) if field.name not in inherited}
    assert {name: ast.literal_eval(value) for name, value in told.items()} == fields


def test_the_quickstart_table_is_the_committed_result():
    """Each score in the table between the marks is that of studies/results/quickstart/report.json, rounded."""
    report = json.loads((ROOT / "studies" / "results" / "quickstart" / "report.json").read_text())
    page = PAGES["docs/results/quickstart.md"]
    table = page.split("<!-- quickstart -->")[1].split("<!-- /quickstart -->")[0]
    for arm in report["arms"].values():
        for figures in arm["domains"].values():
            assert f"{100 * figures['score']:.1f}" in table


def test_the_conflict_table_is_the_committed_result():
    folder = ROOT / "studies" / "results" / "conflict" / "look_alikes"
    summary = json.loads((folder / "summary.json").read_text())
    page = PAGES["docs/results/conflict.md"]

    def told(figures: dict, name: str, scale: float, digits: int) -> str:
        score, low, high = (f"{scale * figures[key]:.{digits}f}" for key in (name, "ci_low", "ci_high"))
        return f"{score} [{low}, {high}]"

    rows = page.split("<!-- conflict -->")[1].split("<!-- /conflict -->")[0].strip().splitlines()[2:]
    scores = {told(arm["mean"], "score", 100, 1): name for name, arm in summary["arms"].items()}
    for row in rows:
        _, score, recovery = (cell.strip() for cell in row.strip("|").split("|"))
        arm = scores[score]
        if recovery.startswith(("0.", "1.", "-")):
            assert recovery == told(summary["recovery"][arm]["mean"], "recovery", 1, 2), arm
    difference = summary["differences"]["wide"]["experts"]["mean"]
    assert f"{100 * difference['difference']:+.1f} [{100 * difference['ci_low']:+.1f}" in page
