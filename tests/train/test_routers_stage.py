"""Stage routers: two ranks of the real engine on a tiny adapter, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mllm
from mllm.alignment import load_router_adapter
from mllm.common.errors import UserError
from mllm.mole import MoleConfig
from tests.mllm.mole.helpers import wake
from tests.train.data import write_config
from tests.train.ranks import run_stage
from train.config import load_config
from train.parts import build_model, gather_adapter, write_adapter
from train.run import base_card

SECTIONS = {
    "stage": "routers",
    "routers": "{layers: 1, neighbours: 2, weight: [1.0, 3.0], samples: 24, validation_share: 0.25, least_grade: 1.0}",
}


def write_stage(folder, **sections):
    """A MoLE adapter whose experts do something, and the config of a stage that goes on with it."""
    config = load_config(write_config(folder))
    torch.manual_seed(0)
    model, processor = build_model(config)
    card = base_card(model, config.model.path, processor)
    write_adapter(folder / "mole", wake(model), gather_adapter(model), base_card=card)
    model = f"{{path: '{folder}/base', start_from: '{folder}/mole', dtype: fp32}}"
    return write_config(folder, **(SECTIONS | {"model": model} | sections))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two ranks. Nobody of so small a model succeeds, so all are neighbours."""
    folder = tmp_path_factory.mktemp("align")
    path = write_stage(folder)
    run_stage(path, "routers.only_successful=false", "run.steps=4")
    return folder


@pytest.mark.engine
def test_only_routers_of_the_chosen_layers_differ_from_the_adapter_that_was_started_from(finished):
    before, after = (load_file(finished / name / "adapter_model.safetensors") for name in ("mole", "run/adapter"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("mole_router" in name and "layers.1." in name for name in changed)


@pytest.mark.engine
def test_the_routers_alone_on_the_first_adapter_are_the_whole_new_one(finished):
    base, ids = finished / "base", torch.arange(3, 15)[None]
    loaded, _ = mllm.load(base, adapter=finished / "mole")
    load_router_adapter(loaded, finished / "run" / "routers")
    whole, _ = mllm.load(base, adapter=finished / "run" / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert whole.peft_config["default"].peft_type == MoleConfig().peft_type


@pytest.mark.engine
def test_the_report_tells_neighbours_layers_choice_and_scores(finished):
    report = json.loads((finished / "run" / "report.json").read_text())
    assert [tried["weight"] for tried in report["choice"]] == [1.0, 3.0]
    losses = {tried["weight"]: tried["loss"] for tried in report["choice"]}
    (chosen,) = [tried for tried in report["choice"] if tried["chosen"]]
    assert chosen["loss"] == min(losses.values())
    assert report["settings"]["weight"] == chosen["weight"]
    assert report["layers"].keys() == {"layers.1.mlp"}
    assert report["layers"]["layers.1.mlp"]["weights_moved"] > 0
    assert report["consistency"]["before"] != report["consistency"]["after"]
    assert report["evaluation"]["arms"].keys() == {"before", "after"}
    assert "Neighbour consistency" in (finished / "run" / "report.md").read_text()
    assert (finished / "run" / "report.png").stat().st_size > 10_000


@pytest.mark.engine
def test_the_log_has_every_weight_and_step(finished):
    log = [json.loads(line) for line in (finished / "run" / "train_log.jsonl").read_text().splitlines()]
    assert [(entry["weight"], entry["step"]) for entry in log] == [(w, s) for w in (1.0, 3.0) for s in (1, 2, 3, 4)]
    first, second = (entry["answer_loss"] for entry in (log[0], log[4]))
    assert first == second  # the second weight began where the first one did


@pytest.mark.engine
def test_without_a_cache_the_routers_are_the_same(finished, tmp_path):
    overrides = [
        "routers.only_successful=false",
        "run.steps=4",
        "routers.cache=false",
        f"run.output_dir={tmp_path}/run",
    ]
    run_stage(finished / "config.yaml", *overrides)
    two, other = (load_file(f / "routers" / "router_adapter.safetensors") for f in (finished / "run", tmp_path / "run"))
    for name, weight in two.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.start_from=null", "go(es)? on with a MoLE adapter"),
        ("deepspeed.zero=3", r"set deepspeed\.zero to 0, 1 or 2"),
        ("routers.weight=[]", r"routers\.weight.*at least 1 item"),
        ("routers.neighbors=4", r"routers\.neighbors .did you mean neighbours"),
        ("routers.token=best", r"routers\.token"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_key(tmp_path, override, message):
    path = write_config(tmp_path, **SECTIONS, model=f"{{path: base, start_from: '{tmp_path}'}}")
    with pytest.raises(UserError, match=message):
        load_config(path, [override])
