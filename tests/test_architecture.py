"""Who may import whom. The tree is meant to be read from its imports, so the arrows are tested."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mllm", "data_recipes", "train", "demo")
MAY_IMPORT = {
    "mllm": set(),
    "data_recipes": {"mllm"},
    "train": {"mllm", "data_recipes"},
    "demo": {"mllm"},
}
ONLY_IN = {"deepspeed": ("train/",), "gradio": ("demo/app.py",), "open_clip": ("mllm/", "train/miniworld_base.py")}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_corner(library):
    users = {relative(path) for path in FILES if any(name.split(".")[0] == library for name in imported(path))}
    assert users
    assert not [user for user in users if not user.startswith(ONLY_IN[library])]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("mllm/routing", ("mllm.mole", "mllm.build", "mllm.data", "mllm.evaluation", "peft")),
        ("mllm/evaluation", ("mllm.build", "mllm.generate", "mllm.mole", "torch", "transformers")),
        ("mllm/data", ("mllm.mole", "mllm.routing", "mllm.evaluation", "mllm.build", "mllm.generate")),
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
