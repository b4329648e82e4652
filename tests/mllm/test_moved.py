"""Former names of modules are the modules themselves."""

import importlib
import sys

import pytest

from mllm.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_former_name_is_the_module_itself_and_tells_the_new_one(old, monkeypatch):
    new = importlib.import_module(MOVED[old])
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is {MOVED[old]} now"):
        assert importlib.import_module(old) is new
    assert new.__spec__.name == new.__name__ == MOVED[old]


def test_an_unknown_module_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"mllm\.nowhere"):
        importlib.import_module("mllm.nowhere")
