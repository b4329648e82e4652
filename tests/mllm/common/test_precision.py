"""16-bit types are for machines that compute in them; elsewhere a model is loaded in float32."""

import pytest
import torch

from mllm import load
from mllm.common import precision
from mllm.common.errors import UserError
from train.config import ModelSection, load_config
from train.stages import check


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


@pytest.fixture
def old_gpu(monkeypatch):
    """A T4: torch answers yes for bfloat16 unless told not to count emulation."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(old_gpu):
    assert precision.suitable(torch.bfloat16) == torch.float32
    assert precision.suitable(torch.float16) == torch.float16
    assert ModelSection(path="miniworld").dtype == "fp32"


def test_bf16_asked_for_on_such_a_gpu_is_refused_before_a_run(old_gpu, tmp_path):
    (tmp_path / "config.yaml").write_text(
        "stage: align\nmodel: {path: x, dtype: bf16}\ndata: {mixture: x}\nrun: {output_dir: x, steps: 1}\n"
    )
    with pytest.raises(UserError, match=r"model\.dtype=bf16: Tesla T4 .* Set model\.dtype=fp32"):
        check(load_config(tmp_path / "config.yaml"), ranks=1)


@pytest.mark.parametrize("name", ["potato", "cuda:99", "cuda:-1", "7g"])
def test_a_device_that_is_not_there_is_told_by_key(name):
    with pytest.raises(UserError, match="--device"):
        precision.find_device(name, key="--device")


def test_a_device_is_taken_as_named_or_the_best_there_is(monkeypatch):
    assert precision.find_device("cpu", key="--device") == "cpu"
    for is_there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert precision.find_device(None, key="--device") == ("cuda" if is_there else "cpu")
