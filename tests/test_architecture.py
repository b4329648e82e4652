"""Who may import whom. The tree is meant to be read from its imports, so the arrows are tested."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mllm", "data_recipes", "train", "demo", "studies", "benchmarks")
MAY_IMPORT = {
    "mllm": set(),
    "data_recipes": {"mllm"},
    "train": {"mllm", "data_recipes"},
    "demo": {"mllm"},
    "studies": {"mllm", "data_recipes", "train"},
    "benchmarks": {"mllm", "data_recipes", "train"},
}
ONLY_IN = {"deepspeed": ("train/",), "gradio": ("demo/app.py",), "open_clip": ("mllm/", "studies/miniworld_base.py")}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part for part in parts if part in MODULES}
            names |= {node.module} if parts - MODULES.keys() else set()
    return frozenset(names)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in FILES}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package):
    ours = set(PACKAGES) - {package} - MAY_IMPORT[package]
    wrong = [
        f"{relative(path)} imports {name}"
        for path in FILES
        if relative(path).startswith(f"{package}/")
        for name in imported(path)
        if name.split(".")[0] in ours
    ]
    assert not wrong


def circles(imports: dict[str, frozenset[str]]) -> set[tuple[str, ...]]:
    """Groups of modules each of which imports, by whatever way, all others of its group."""
    reached = {}
    for name in imports:
        found, ahead = set(), [name]
        while ahead:
            new = {each for each in imports[ahead.pop()] if each in imports} - found
            found |= new
            ahead += new
        reached[name] = found
    return {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in imports} - {()}


def test_no_modules_import_each_other_in_a_circle():
    assert circles({name: imported(path) for name, path in MODULES.items()}) == set()


def test_a_circle_over_three_modules_is_found():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "elsewhere"}, "d": {"a"}, "e": set()}
    assert circles(imports) == {("a", "b", "c")}


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_corner(library):
    users = {relative(path) for path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert users
    assert not [user for user in users if not user.startswith(ONLY_IN[library])]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("mllm/routing", ("mllm.mole", "mllm.build", "mllm.data", "mllm.evaluation", "peft")),
        ("mllm/evaluation", ("mllm.build", "mllm.inference.generate", "mllm.mole", "torch", "transformers")),
        ("mllm/data", ("mllm.mole", "mllm.routing", "mllm.evaluation", "mllm.build", "mllm.inference.generate")),
    ],
)
def test_inside_the_library_too(package, forbidden):
    wrong = [
        f"{relative(path)} imports {name}"
        for path in FILES
        if relative(path).startswith(f"{package}/")
        for name in imported(path)
        if name.startswith(forbidden)
    ]
    assert not wrong
