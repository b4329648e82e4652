"""What was learned, as the package data that `mllm fetch smol` merges: a projector, a PEFT adapter and their card."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mllm.bases.fetched import SMOL_PARTS
from mllm.build import PROJECTOR_FILE
from studies.smol.features import Features
from studies.smol.plan import ALPHA, RANK

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def fold(projector: dict[str, Tensor], features: Features) -> dict[str, Tensor]:
    """The projector for features as the tower gives them: what standardises them goes into its first layer."""
    weight = projector["linear_1.weight"] / features.std
    bias = projector["linear_1.bias"] - weight @ features.mean
    return {**projector, "linear_1.weight": weight, "linear_1.bias": bias}


def write_trained(
    model: LlavaForConditionalGeneration, learned: dict[str, Tensor], features: Features, out: Path, card: dict
) -> None:
    """Writes projector, adapter and card, in bfloat16. `model` is the base without any of them; it gets the adapter."""
    out.mkdir(parents=True, exist_ok=True)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    own = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, tensor in learned.items():
            part, _, rest = name.partition(".")
            if part == "adapter":
                module, _, factor = rest.rpartition(".")
                own[f"base_model.model.model.language_model.{module}.lora_{factor}.default.weight"].copy_(tensor)
    adapted.peft_config["default"].base_model_name_or_path = SMOL_PARTS
    adapted.to(torch.bfloat16).save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    projector = {name.removeprefix("projector."): t for name, t in learned.items() if name.startswith("projector.")}
    folded = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in fold(projector, features).items()}
    save_file(folded, out / PROJECTOR_FILE)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def read_trained(folder: Path, features: Features) -> dict[str, Tensor]:
    """What `write_trained` wrote, by the names training has for it, in float32."""
    projector = {name: tensor.float() for name, tensor in load_file(folder / PROJECTOR_FILE).items()}
    projector["linear_1.bias"] = projector["linear_1.bias"] + projector["linear_1.weight"] @ features.mean
    projector["linear_1.weight"] = projector["linear_1.weight"] * features.std
    learned = {f"projector.{name}": tensor for name, tensor in projector.items()}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module = name.partition("language_model.")[2].removesuffix(".weight")  # layers.0.mlp.up_proj.lora_A
        learned[f"adapter.{module.replace('.lora_', '.')}"] = tensor.float()
    return learned
