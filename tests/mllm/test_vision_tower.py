"""The wrapped tower gives open_clip's own features, survives saving, and counts layers as transformers' CLIP does."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModel

from mllm.common.errors import UserError
from mllm.vision_tower import OpenClipVisionConfig, OpenClipVisionModel, build_visual, wrap_visual
from tests.tiny import TOWER_CFG, tiny_tower


def timm_cfg(name, image_size):
    options = {"timm_model_name": name, "timm_pool": "", "timm_proj": "none", "image_size": image_size}
    return {"embed_dim": 32, "vision_cfg": options}


TOWERS = {
    "vit": TOWER_CFG,
    "timm vit with class token": timm_cfg("test_vit", 160),
    "timm vit with register only": timm_cfg("test_vit2", 160),
    "timm vit with rotary tables": timm_cfg("vit_pe_core_tiny_patch16_384", 384),
    "timm convnext": timm_cfg("test_convnext", 160),
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "image_size": 64},
    },
}


@pytest.fixture(scope="module", params=TOWERS)
def pair(request):
    """open_clip's own tower and our copy of it."""
    torch.manual_seed(0)
    cfg = TOWERS[request.param]
    visual = build_visual(OpenClipVisionConfig(embed_dim=cfg["embed_dim"], vision_cfg=cfg["vision_cfg"])).eval()
    return visual, wrap_visual(visual, cfg)


@pytest.fixture
def vit():
    clip, cfg = tiny_tower()
    return wrap_visual(clip.visual, cfg)


def pictures(tower, n=2):
    return torch.randn(n, 3, tower.config.image_size, tower.config.image_size)


def patches(tower, state):
    return state[:, 1:] if tower.config.has_class_token else state


@torch.no_grad()
def test_patch_features_equal_open_clips_own(pair):
    visual, tower = pair
    pixels = pictures(tower)
    theirs = visual.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
    ours = tower(pixels, output_hidden_states=True).hidden_states[-len(theirs) :]
    for our_state, their_map in zip(ours, theirs, strict=True):
        assert torch.equal(patches(tower, our_state), their_map.flatten(2).transpose(1, 2))


@torch.no_grad()
def test_saved_tower_gives_the_same_features(pair, tmp_path):
    _, tower = pair
    pixels = pictures(tower)
    tower.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, OpenClipVisionModel)
    assert torch.equal(loaded(pixels).last_hidden_state, tower(pixels).last_hidden_state)


@torch.no_grad()
def test_config_tells_width_and_number_of_features(pair):
    _, tower = pair
    state = patches(tower, tower(pictures(tower), output_hidden_states=-2).hidden_states[-2])
    assert state.shape == (2, (tower.config.image_size // tower.config.patch_size) ** 2, tower.config.hidden_size)


@torch.no_grad()
def test_hidden_states_are_what_enters_and_leaves_each_block(vit):
    seen = []
    for block in vit.visual.transformer.resblocks:
        block.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    states = vit(pictures(vit), output_hidden_states=True).hidden_states
    entered, left = seen[0::2], seen[1::2]
    assert len(states) == vit.config.num_hidden_layers + 1
    assert all(torch.equal(a, b) for a, b in zip(states, [entered[0], *left], strict=True))


@torch.no_grad()
def test_blocks_after_the_one_asked_for_do_not_run(vit):
    ran = []
    for number, block in enumerate(vit.visual.transformer.resblocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    output = vit(pictures(vit), output_hidden_states=-2)
    assert ran == [0]
    assert [state is not None for state in output.hidden_states] == [False, True, False]


@torch.no_grad()
def test_layers_asked_for_by_a_list_equal_those_of_all(vit):
    pixels = pictures(vit)
    every = vit(pixels, output_hidden_states=True).hidden_states
    some = vit(pixels, output_hidden_states=[0, -1]).hidden_states
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[-1], every[-1])


def test_layer_out_of_range_is_refused(vit):
    with pytest.raises(IndexError):
        vit(pictures(vit), output_hidden_states=-9)


@torch.no_grad()
def test_bfloat16_tower_takes_float32_pixels_and_stays_near(vit):
    pixels = pictures(vit)
    exact = vit(pixels).last_hidden_state
    rough = copy.deepcopy(vit).to(torch.bfloat16)(pixels).last_hidden_state
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.1  # 0.03 measured, of values up to 3


@torch.no_grad()
def test_weights_offloaded_by_accelerate_are_brought_in(pair):
    _, tower = pair
    pixels = pictures(tower)
    expected = tower(pixels).last_hidden_state
    whole = ["MultiheadAttention"]  # torch's own reads its out_proj's weight without calling it
    offloaded = cpu_offload(copy.deepcopy(tower), execution_device="cpu", preload_module_classes=whole)
    assert torch.equal(offloaded(pixels).last_hidden_state, expected)


def test_frozen_tower_keeps_its_batch_statistics_while_training():
    cfg = TOWERS["resnet"]
    visual = build_visual(OpenClipVisionConfig(embed_dim=cfg["embed_dim"], vision_cfg=cfg["vision_cfg"]))
    tower = wrap_visual(visual, cfg).requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    tower.train()
    tower(pictures(tower))
    assert all(torch.equal(before[name], buffer) for name, buffer in tower.named_buffers())


def test_wrapping_leaves_the_given_tower_alone(vit):
    clip, cfg = tiny_tower()
    tower = wrap_visual(clip.visual, cfg)
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    assert not torch.equal(next(tower.parameters()), next(clip.visual.parameters()))
    assert clip.encode_image(pictures(tower)).shape == (2, cfg["embed_dim"])


def test_patch_dropout_of_pretraining_is_switched_off():
    cfg = {**TOWER_CFG, "vision_cfg": {**TOWER_CFG["vision_cfg"], "patch_dropout": 0.5}}
    tower = OpenClipVisionModel(OpenClipVisionConfig(embed_dim=32, vision_cfg=cfg["vision_cfg"])).train()
    assert isinstance(tower.visual.patch_dropout, torch.nn.Identity)


def test_tower_for_oblong_pictures_is_refused():
    cfg = {**TOWER_CFG, "vision_cfg": {**TOWER_CFG["vision_cfg"], "image_size": [24, 32]}}
    visual = build_visual(OpenClipVisionConfig(embed_dim=32, vision_cfg=cfg["vision_cfg"]))
    with pytest.raises(UserError, match="24, 32"):
        wrap_visual(visual, cfg)


@pytest.fixture
def joined():
    cfg = timm_cfg("test_efficientnet", 128)
    visual = build_visual(OpenClipVisionConfig(embed_dim=cfg["embed_dim"], vision_cfg=cfg["vision_cfg"])).eval()
    return wrap_visual(visual, cfg, joined=[(3, 2), ("final", 1)], patch_size=32)


@torch.no_grad()
def test_joined_stages_lie_on_one_grid_behind_the_single_ones(joined):
    pixels = pictures(joined)
    final, stages = joined.visual.trunk.forward_intermediates(pixels)
    states = joined(pixels, output_hidden_states=True).hidden_states
    assert len(states) == len(stages) + 1
    fine, coarse = stages[3], final
    assert states[-1].shape == (2, 16, joined.config.hidden_size) == (2, 16, 4 * fine.shape[1] + coarse.shape[1])
    assert fine.shape[-1] == 8
    assert coarse.shape[-1] == 4
    second_patch = states[-1][:, 1]
    torch.testing.assert_close(second_patch[:, : 4 * fine.shape[1]], fine[:, :, :2, 2:4].flatten(1))
    torch.testing.assert_close(second_patch[:, 4 * fine.shape[1] :], coarse[:, :, 0, 1])


@torch.no_grad()
def test_joined_stages_survive_saving(joined, tmp_path):
    joined.save_pretrained(tmp_path)
    again, pixels = AutoModel.from_pretrained(tmp_path).eval(), pictures(joined)
    torch.testing.assert_close(again(pixels).last_hidden_state, joined(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("test_efficientnet", {"patch_size": 48}, "divide the picture's side, 128"),
        ("test_efficientnet", {"joined": [(9, 1)]}, "no stage 9"),
        ("test_vit", {}, "convolutional"),
    ],
)
def test_stages_that_cannot_be_joined_are_told(name, changes, message):
    cfg = timm_cfg(name, 160 if name == "test_vit" else 128)
    visual = build_visual(OpenClipVisionConfig(embed_dim=cfg["embed_dim"], vision_cfg=cfg["vision_cfg"])).eval()
    with pytest.raises(UserError, match=message):
        wrap_visual(visual, cfg, **{"joined": [(3, 2)], "patch_size": 32, **changes})
