"""The examples in the docstrings of what is public about routing, run as they stand."""

import doctest
import importlib

import pytest

import mllm

MODULES = ["mllm.routing.context", "mllm.mole.model", "mllm.mole.objective", "mllm.mole.start", "mllm.mole.native_moe"]
NAMES = [
    "BiasBalance", "RoutingLossMixin", "RoutingObjective", "native_moe", "routing_context", "routing_loss",
    "start_routers",
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_give_what_they_say(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_of_routing_has_an_example(name):
    assert name in mllm.__all__
    assert ">>> " in getattr(mllm, name).__doc__
