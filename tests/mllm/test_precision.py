"""16-bit types are for machines that compute in them; elsewhere a model is loaded in float32."""

import pytest
import torch

from mllm import load, precision
from train.config import ModelSection


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def has_instructions(request, monkeypatch):
    """A machine without accelerator, whose CPU knows bfloat16 or does not."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in precision.INSTRUCTIONS.values():
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: request.param)
    return request.param


def test_a_half_precision_type_gives_way_where_the_cpu_does_not_know_it(has_instructions):
    for dtype in (torch.bfloat16, torch.float16):
        assert precision.suitable(dtype) == (dtype if has_instructions else torch.float32)
    assert precision.suitable(torch.float64) == torch.float64


def test_an_accelerator_decides_alone(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert precision.suitable(torch.bfloat16) == torch.bfloat16


def test_a_base_saved_in_bfloat16_is_loaded_in_what_the_machine_computes(has_instructions):
    assert load("miniworld")[0].dtype == (torch.bfloat16 if has_instructions else torch.float32)
    assert load("miniworld", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_training_defaults_to_what_the_machine_computes_and_takes_what_it_is_told(has_instructions):
    assert ModelSection(path="miniworld").dtype == ("bf16" if has_instructions else "fp32")
    assert ModelSection(path="miniworld", dtype="bf16").dtype == "bf16"
