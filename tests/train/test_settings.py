"""Every setting of every section refuses what it cannot mean, by its key, before anything is loaded. Generated."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from mllm.common.errors import UserError
from studies.conflict.config import ConflictConfig, load_conflict_config
from train import stages
from train.config import load_config
from train.fields import kinds_of
from train.moma.model import moma_config
from train.parts import adapter_config, make_adapter

RUN = "run: {output_dir: out, steps: 3}\n"
TRAIN = f"stage: instruct\nmodel: {{path: base, adapter: {{type: mole}}}}\ndata: {{mixture: m.yaml}}\n{RUN}"
MOMA = f"stage: pretrain_moma\nmodel: {{image_tokenizer: tokens}}\n{RUN}"
STAGES = {
    "instruct": TRAIN,
    "routers": f"stage: routers\nmodel: {{path: base, start_from: adapter}}\ndata: {{mixture: m.yaml}}\n{RUN}",
    "pretrain_moma": MOMA,
    "image_tokenizer": f"stage: image_tokenizer\n{RUN}",
}
CONFLICT = "data: {train: a.yaml, test: b.yaml}\nrun: {out: out}\n"
ROOTS = {
    **{name: (stages.find(name).Config, text, load_config) for name, text in STAGES.items()},
    "conflict": (ConflictConfig, CONFLICT, load_conflict_config),
}
# What no setting of a kind can mean, as typed. Free dictionaries are checked where their fields are known.
NUMBERS = (".nan", ".inf", "-.inf", "-1", "true", "a word", "{a: b}")
WRONG = {int: (*NUMBERS, "2.5"), float: NUMBERS, str: ("''", "7", "true", "{a: b}"), Path: ("''", "7", "true", "[x]"),
         bool: ("a word", "7", "[true]"), dict: ("7", "a word")}  # fmt: skip


def section_of(annotation: Any) -> type[BaseModel] | None:
    return next((kind for kind in (*get_args(annotation), annotation) if hasattr(kind, "model_fields")), None)


def settings(section: type[BaseModel], *above: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of each setting, those of sections inside too."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        yield ".".join((*above, name)), field.annotation
        if inner is not None:
            yield from settings(inner, *above, name)


def wrong_values(annotation: Any) -> list[str]:
    if section_of(annotation) is not None:
        return ["7", "a word", "{nonsense: 1}"]
    kinds = kinds_of(annotation)
    if any(get_origin(part) is dict for part in kinds):
        return list(WRONG[dict])
    if any(get_origin(part) is list for part in kinds) and Path in kinds:
        return ["7", "['']", "[7]", "[true]"]
    if kinds & {int, float} and str in kinds:  # a number, or a word of a few
        return [*NUMBERS[:5], "a word"]
    known = [kind for kind in (float, int, Path, str, bool) if kind in kinds]
    return list(WRONG[known[0] if known else dict])


def refusal(load: Callable[[Path, list[str]], Any], path: Path, override: str) -> str:
    """What is said against it, or nothing."""
    try:
        load(path, [override])
    except UserError as error:
        return str(error)
    return ""


CASES = [(root, key, annotation) for root, (kind, _, _) in ROOTS.items() for key, annotation in settings(kind)]


@pytest.mark.parametrize(("root", "key", "annotation"), CASES, ids=[f"{root}-{key}" for root, key, _ in CASES])
def test_a_setting_refuses_by_its_key_what_it_cannot_mean(root, key, annotation, tmp_path):
    _, minimal, load = ROOTS[root]
    (tmp_path / "config.yaml").write_text(minimal)
    for value in wrong_values(annotation):
        said = refusal(load, tmp_path / "config.yaml", f"{key}={value}")
        assert key in said, (value, said or "was taken")
        assert "\n" not in said


OUT_OF_RANGE = {
    "instruct": ("optim.betas=[2, 3]", "optim.betas=[0.9]", "optim.betas=[.nan, 0.9]", "optim.lr=0", "run.steps=0",
                 "run.seed=4294967296", "run.micro_batch_size=0", "run.keep=0", "deepspeed.zero=4", "data.max_length=7",
                 "optim.part_lr.router=0", "optim.warmup_ratio=1", "optim.max_grad_norm=0"),
    "routers": ("routers.layers=[]", "routers.layers=0", "routers.layers=[-1]", "routers.weight=[-1]",
                "routers.weight=[]"),
    "pretrain_moma": ("data.forms={text: -1}", "data.forms={text: .nan}", "data.forms={text: true}", "data.length=15",
                      "data.domains=[nowhere]", "data.image_share=1", "report.guidance=0.5"),
    "image_tokenizer": ("tokenizer.codebook_size=1", "data.domains=[]", "data.miniworld=0"),
    "conflict": ("run.lrs=[0]", "run.lrs=[.inf]", "run.lrs=[]", "run.lrs=[1e-3, 0.001]", "data.val_share=1",
                 "adapter.num_experts=1", "adapter.lora_dropout=1", "run.limit_minutes=0"),
}  # fmt: skip


@pytest.mark.parametrize(("root", "override"), [(root, each) for root in OUT_OF_RANGE for each in OUT_OF_RANGE[root]])
def test_a_value_out_of_range_is_refused_by_its_key(root, override, tmp_path):
    _, minimal, load = ROOTS[root]
    (tmp_path / "config.yaml").write_text(minimal)
    with pytest.raises(UserError, match=override.partition("=")[0].rpartition(".")[2]):
        load(tmp_path / "config.yaml", [override])


# Of fields that a dictionary passes on: what is typed, and the class that takes it.
FIELDS = {
    "mole": ("r=0", "r=2.5", "r=[8]", "r=true", "r=.nan", "lora_alpha=[1]", "lora_alpha=0", "lora_alpha=.inf",
             "lora_dropout=2", "num_experts=2.5", "num_experts=0", "top_k=9", "top_k=none", "target_modules=3",
             "modules_to_save=3", "expert_groups={image: -1, text: 4}", "expert_groups={picture: 2}",
             "balance_loss_weight=-1",
             "gate=nonsense", "router=nonsense", "balance=3", "router_temperature=0", "real_share=3",
             "use_rslora=maybe", "expert_domains=word", "num_null_experts=-1", "nonsense=1"),
    "lora": ("r=0", "r=a word", "lora_alpha=[1]", "lora_alpha=0", "lora_dropout=1", "lora_dropout=.nan", "bias=sum",
             "target_modules=3", "target_modules=[3]", "use_dora=maybe", "rank_pattern=3", "layers_to_transform=a",
             "init_lora_weights=3", "nonsense=1"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "field"), [(kind, each) for kind in FIELDS for each in FIELDS[kind]])
def test_a_field_of_the_adapter_is_refused_by_its_key(kind, field, tmp_path):
    (tmp_path / "config.yaml").write_text(TRAIN)
    section = load_config(tmp_path / "config.yaml", [f"model.adapter={{type: {kind}}}", f"model.adapter.{field}"]).model
    with pytest.raises(UserError, match=f"model.adapter.{field.partition('=')[0]}") as refused:
        adapter_config(section)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "field",
    ["hidden_size=0", "hidden_size=a word", "num_hidden_layers=2.5", "image_side=-1", "routing=nonsense", "nonsense=1",
     "mixture_of_depths=2", "threshold_momentum=.nan", "z_loss_weight=[1]", "num_attention_heads=-2"],
)  # fmt: skip
def test_a_field_of_the_early_fusion_model_is_refused_by_its_key(field, tmp_path):
    (tmp_path / "config.yaml").write_text(MOMA)
    config = load_config(tmp_path / "config.yaml", [f"model.fields.{field}"])
    processor = SimpleNamespace(config_fields={}, check=lambda _: None)
    with pytest.raises(UserError, match=r"model\.fields.*" + field.partition("=")[0]):
        moma_config(config.model, processor)


@pytest.mark.parametrize("field", ["r=0", "top_k=2.5", "nonsense=1", "gate=3", "router_rate=0", "router_rate=fast"])
def test_a_field_of_an_own_arm_is_refused_by_its_key(field, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFLICT)
    with pytest.raises(UserError, match=f"own_arms.warm.{field.partition('=')[0]}"):
        load_conflict_config(tmp_path / "config.yaml", [f"own_arms.warm.{field}"])


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "1.0e-3", "0.001"])
def test_a_number_with_an_exponent_is_a_number_wherever_it_stands(text, tmp_path):
    (tmp_path / "config.yaml").write_text(TRAIN.replace("{type: mole}", f"{{type: mole, z_loss_weight: {text}}}"))
    config = load_config(tmp_path / "config.yaml", [f"model.adapter.balance_loss_weight={text}", f"optim.lr={text}"])
    adapter = adapter_config(config.model)
    assert (adapter.z_loss_weight, adapter.balance_loss_weight, config.optim.lr) == (1e-3, 1e-3, 1e-3)
    assert config.model.adapter["balance_loss_weight"] == 1e-3
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_text_that_looks_like_a_number_is_saved_as_text(tmp_path):
    (tmp_path / "config.yaml").write_text(TRAIN)
    config = load_config(tmp_path / "config.yaml", ["model.path='1e3'", "model.adapter.router='1e3'"])
    config.save(tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_whole_number_may_be_written_with_an_exponent_or_in_quotes():
    for alpha in (16.0, "16", "1.6e1"):
        assert make_adapter({"type": "lora", "lora_alpha": alpha}, "model.adapter").lora_alpha == 16
        assert make_adapter({"type": "mole", "lora_alpha": alpha}, "model.adapter").lora_alpha == 16


@pytest.mark.parametrize("number", [10.0, "10"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_number_of_a_pattern_is_a_number_too(field, number):
    config = make_adapter({"type": "lora", field: {"q_proj": number}}, "model.adapter")
    assert getattr(config, field) == {"q_proj": 10}


@pytest.mark.parametrize("number", [0, -1, True, math.nan, "wide"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_number_that_a_pattern_cannot_mean_is_refused_with_its_field(field, number):
    with pytest.raises(UserError, match=rf"model\.adapter\.{field}"):
        make_adapter({"type": "lora", field: {"q_proj": number}}, "model.adapter")
