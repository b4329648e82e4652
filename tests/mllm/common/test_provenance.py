import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from mllm.common.provenance import PRODUCT, commit, provenance


def test_a_figure_names_date_commit_device_and_versions():
    stamp = provenance()
    assert set(stamp) >= {"date", "commit", "device", "torch", "deepspeed"}
    assert all(stamp.values())


def checkout(root: Path, project: str) -> tuple[Path, str]:
    """A repository with a project of that name and a package in it; the package and its commit."""
    package = root / "mllm"
    package.mkdir(parents=True)
    (package / "provenance.py").touch()
    (root / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    git = ["git", "-C", root, "-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    said = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return package, said.stdout.strip()


def test_a_checkout_of_the_project_tells_its_commit_and_whether_it_was_changed(tmp_path):
    package, head = checkout(tmp_path / "project", PRODUCT)
    assert head.startswith(commit(package))
    (package / "provenance.py").write_text("changed")
    assert commit(package).endswith("-dirty")


def test_the_repository_of_the_current_folder_or_of_a_hook_tells_nothing(tmp_path, monkeypatch):
    package, head = checkout(tmp_path / "project", PRODUCT)
    checkout(tmp_path / "other", "other")
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert head.startswith(commit(package))


@pytest.mark.parametrize("place", [".venv/lib/site-packages", "third_party", "."])
def test_a_package_inside_another_repository_tells_its_own_version(place, tmp_path):
    other, _ = checkout(tmp_path / "other", "other")
    package = other.parent / place / "mllm"
    package.mkdir(parents=True, exist_ok=True)
    assert commit(package.resolve()) == f"v{version(PRODUCT)}"


def test_a_package_outside_any_repository_tells_its_version(tmp_path):
    assert commit(tmp_path) == f"v{version(PRODUCT)}"
