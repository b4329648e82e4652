"""Settings for every test: no network, few threads, the same random numbers each time."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture
def kept_environment(monkeypatch):
    """What a command sets for the process that would replace it does not outlast the test."""
    monkeypatch.setattr("os.environ", os.environ.copy())
