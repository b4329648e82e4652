"""Parts become a LLaVA, checkpoints come back whole, and what does not fit is refused by name."""

import json

import numpy as np
import open_clip
import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mllm.build import build, fingerprint, load, write_base_card
from mllm.common.errors import UserError
from mllm.common.precision import suitable
from mllm.mole import MoleConfig
from tests.tiny import (
    TOWER_CFG,
    tiny_image,
    tiny_language_model,
    tiny_llava,
    tiny_tokenizer,
    tiny_tower,
    write_tiny_llava,
)

ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}]
ANSWERED = [*ASK, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("llava"))


def inputs(processor, text="USER: <image>\nWhat colour? ASSISTANT:", image=None):
    return processor(images=[image or tiny_image()], text=[text], return_tensors="pt")


@torch.no_grad()
def logits(model, processor):
    return model(**inputs(processor)).logits


# ---- build ---------------------------------------------------------------------------------------------------------


def test_text_logits_equal_the_language_models_own():
    language_model = tiny_language_model()
    input_ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = language_model(input_ids).logits
        model, _ = build(tiny_tower(), language_model, tokenizer=tiny_tokenizer())
        got = model(input_ids).logits[..., : expected.shape[-1]]
    assert torch.equal(got, expected)


def test_image_token_is_new_and_has_a_row_and_ids_agree(llava):
    model, processor = llava
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    rows = model.get_input_embeddings().weight.shape[0]
    assert model.config.image_token_id == model.config.image_token_index == processor.image_token_id == image_id
    assert rows == model.config.text_config.vocab_size == len(processor.tokenizer) > image_id
    assert model.config.text_config.pad_token_id == processor.tokenizer.pad_token_id


def test_tokenizer_without_padding_token_gets_one_that_is_not_the_end():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model, processor = build(tiny_tower(), tiny_language_model(), tokenizer=tokenizer)
    assert processor.tokenizer.pad_token_id == model.generation_config.pad_token_id != processor.tokenizer.eos_token_id


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_processor_writes_as_many_image_tokens_as_the_model_has_features(strategy):
    model, processor = build(
        tiny_tower(), tiny_language_model(), tokenizer=tiny_tokenizer(), vision_feature_select_strategy=strategy
    )
    batch = inputs(processor)
    num_tokens = (batch["input_ids"] == processor.image_token_id).sum().item()
    assert num_tokens == model.config.image_seq_length == (9 if strategy == "default" else 10)
    assert model(**batch).image_hidden_states.shape[0] == num_tokens


@pytest.mark.parametrize("name", ["test_vit2", "test_convnext"])
def test_tower_without_class_token_keeps_every_patch(name, tmp_path):
    options = {"timm_model_name": name, "timm_pool": "", "timm_proj": "none", "image_size": 160}
    visual = open_clip.model._build_vision_tower(32, dict(options))
    model, processor = build(
        (visual, {"embed_dim": 32, "vision_cfg": options}), tiny_language_model(), tokenizer=tiny_tokenizer()
    )
    assert (inputs(processor)["input_ids"] == processor.image_token_id).sum() == 100
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.equal(logits(*load(tmp_path)), logits(model, processor))


def test_two_vision_layers_are_read_side_by_side():
    model, processor = build(
        tiny_tower(), tiny_language_model(), tokenizer=tiny_tokenizer(), vision_feature_layer=[-2, -1]
    )
    assert model.model.multi_modal_projector.linear_1.in_features == 64
    assert logits(model, processor).isfinite().all()


def test_image_statistics_are_those_of_the_tower():
    clip, cfg = tiny_tower()
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    _, processor = build(
        (clip, {"model_cfg": cfg, "preprocess_cfg": statistics}), tiny_language_model(), tokenizer=tiny_tokenizer()
    )
    pixels = inputs(processor, image=Image.new("RGB", (50, 30), (255, 0, 255)))["pixel_values"][0]
    expected = torch.tensor([(1 - 0.1) / 0.4, (0 - 0.2) / 0.5, (1 - 0.3) / 0.6])
    assert torch.allclose(pixels.mean((1, 2)), expected, atol=1e-5)


def test_pixels_are_near_open_clips_own_transform(llava):
    noise = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 60))
    theirs = open_clip.image_transform(24, is_train=False)(image)
    ours = inputs(llava[1], image=image)["pixel_values"][0]
    assert (ours - theirs).abs().max() < 0.05  # 0.03 measured: two grey levels, Pillow's rounding against torchvision's


def test_resize_mode_squash_keeps_the_edges_that_cropping_loses():
    image = Image.new("RGB", (80, 20), "white")
    image.paste("black", (0, 0, 10, 20))
    shapes = {}
    for mode in ("shortest", "squash", "longest"):
        _, processor = build(tiny_tower(), tiny_language_model(), tokenizer=tiny_tokenizer(), resize_mode=mode)
        pixels = inputs(processor, image=image)["pixel_values"][0, 0]
        assert pixels.shape == (24, 24)
        shapes[mode] = (pixels[12] < 0).any().item()
    assert shapes == {"shortest": False, "squash": True, "longest": True}


def test_default_template_is_llavas_for_items_and_for_strings(llava):
    _, processor = llava
    as_items = processor.apply_chat_template(ANSWERED)
    as_strings = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat colour?"}, {"role": "assistant", "content": "red"}]
    )
    assert as_items == as_strings == "USER: <image>\nWhat colour? ASSISTANT: red</s>"
    assert as_items.startswith(processor.apply_chat_template(ASK, add_generation_prompt=True))


def test_text_models_own_template_is_made_to_take_images():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] + '|' + m['content'] }}]{% endfor %}"
    _, processor = build(tiny_tower(), tiny_language_model(), tokenizer=tokenizer)
    assert processor.apply_chat_template(ANSWERED) == "[user|<image>\nWhat colour?][assistant|red]"


def test_a_template_whose_prompt_is_not_how_its_training_text_begins_is_refused_when_built():
    bad = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}"
    with pytest.raises(UserError, match="generation prompt is not how a turn of the assistant begins"):
        build(tiny_tower(), tiny_language_model(), tokenizer=tiny_tokenizer(), chat_template=bad)


def test_template_that_loses_the_answer_is_refused():
    with pytest.raises(UserError, match="chat template"):
        build(
            tiny_tower(), tiny_language_model(), tokenizer=tiny_tokenizer(), chat_template="{{ messages[0].content }}"
        )


@pytest.mark.parametrize(
    "language_model",
    [
        lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=2, tie_word_embeddings=True, **SMALL)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2)),
    ],
    ids=["qwen2 tied", "gpt2 tied under another name"],
)
def test_tied_language_models_come_back_the_same(language_model, tmp_path):
    model, processor = build(tiny_tower(), language_model(), tokenizer=tiny_tokenizer())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.equal(logits(*load(tmp_path)), logits(model, processor))


def test_language_model_with_scaled_logits_is_refused_by_type():
    config = CohereConfig(vocab_size=300, num_key_value_heads=2, logit_scale=0.25, pad_token_id=0, **SMALL)
    with pytest.raises(UserError, match="cohere"):
        build(tiny_tower(), CohereForCausalLM(config), tokenizer=tiny_tokenizer())


def test_tower_and_language_model_are_read_from_folders(tmp_path):
    clip, _ = tiny_tower()
    (tmp_path / "clip").mkdir()
    save_file(dict(clip.state_dict()), tmp_path / "clip" / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"model_cfg": TOWER_CFG, "preprocess_cfg": preprocess}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    tiny_language_model().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")

    model, processor = build(tmp_path / "clip", tmp_path / "lm")
    pixels = torch.randn(1, 3, 24, 24)
    theirs = clip.visual.eval().forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")
    ours = model.model.vision_tower(pixels, output_hidden_states=-2).hidden_states[-2]
    assert torch.equal(ours[:, 1:], theirs["image_intermediates"][-2])
    assert list(processor.image_processor.image_std) == [0.25] * 3


def test_unknown_tower_is_refused_with_near_names():
    with pytest.raises(UserError, match="ViT-B-32"):
        build("ViT-B32", tiny_language_model(), tokenizer=tiny_tokenizer())


def test_model_made_in_memory_needs_a_tokenizer():
    with pytest.raises(UserError, match="tokenizer="):
        build(tiny_tower(), tiny_language_model())


def test_pickled_tower_weights_are_refused(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="safetensors"):
        build("ViT-B-32", tiny_language_model(), tokenizer=tiny_tokenizer(), pretrained=str(tmp_path / "weights.pt"))


# ---- saving and loading --------------------------------------------------------------------------------------------


def test_round_trip_needs_only_transformers_own_calls(folder, llava):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert torch.equal(logits(model, processor), logits(*llava))
    assert processor.chat_template == llava[1].chat_template
    assert processor.image_processor.image_mean == llava[1].image_processor.image_mean
    assert processor.tokenizer.padding_side == "left"


def test_llava_with_transformers_own_tower_gives_bit_equal_logits(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision = CLIPVisionConfig(image_size=24, patch_size=8, projection_dim=32, **SMALL)
    text = LlamaConfig(vocab_size=len(tokenizer), **SMALL)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, image_seq_length=9)
    model = LlavaForConditionalGeneration(config).eval()
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    processor = LlavaProcessor(CLIPImageProcessor(**sizes), tokenizer)  # as early llava-hf folders: no patch size in it
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    loaded, loaded_processor = load(tmp_path)
    batch = inputs(loaded_processor)
    assert (batch["input_ids"] == image_id).sum() == 9
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert fingerprint(loaded) == fingerprint(model)


def test_model_loads_in_the_dtype_it_was_saved_in_where_the_machine_computes_it(tmp_path, llava):
    model, processor = tiny_llava()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load(tmp_path)[0].dtype == suitable(torch.bfloat16)
    assert load(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


def test_batched_left_padded_generation_equals_one_by_one(folder):
    model, processor = load(folder)
    prompts = ["USER: <image>\nWhat? ASSISTANT:", "USER: <image>\nHow many squares are left of it? ASSISTANT:"]
    images = [tiny_image("red"), tiny_image("blue")]
    options = {"max_new_tokens": 12, "do_sample": False}
    batch = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for prompt, image, row in zip(prompts, images, together, strict=True):
        one = inputs(processor, prompt, image)
        assert torch.equal(model.generate(**one, **options)[0, one["input_ids"].shape[1] :], row)


def test_missing_checkpoint_is_named():
    with pytest.raises(UserError, match="no/such/folder"):
        load("no/such/folder")


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load(tmp_path)


def test_plain_language_model_is_refused_by_type(tmp_path):
    tiny_language_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'llama'.*mllm\.build"):
        load(tmp_path)


def test_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model, processor = tiny_llava()
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if "linear_1" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="linear_1"):
        load(tmp_path)


def test_a_weight_that_llava_has_no_place_for_is_refused_by_name(tmp_path):
    model, processor = tiny_llava()
    weights = {k: v.contiguous() for k, v in model.state_dict().items()} | {"lm_head.bias": torch.ones(4)}
    model.save_pretrained(tmp_path, state_dict=weights)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"1 weight \(lm_head.bias\)"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    model, processor = tiny_llava()
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights | {"lm_head.weight": torch.ones(4, 4)})
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lm_head"):
        load(tmp_path)


def test_a_language_model_that_lacks_weights_is_refused_by_name(tmp_path):
    model = tiny_language_model()
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 3 weights .model\.layers\.1\.mlp"):
        build(tiny_tower(), tmp_path)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_language_model_takes_the_attention_asked_for(folder, name):
    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation=name)
    assert model.config.text_config._attn_implementation == name
    again, processor = load(folder)
    again.set_attn_implementation(name)
    torch.testing.assert_close(logits(again, processor), logits(load(folder)[0], processor))


# ---- adapters ------------------------------------------------------------------------------------------------------


def write_lora(folder, base, base_path):
    model, _ = load(base)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    write_base_card(folder, adapted, base_path)
    return adapted


def test_adapter_comes_back_and_can_go_on_training(folder, tmp_path):
    adapted = write_lora(tmp_path, folder, folder)
    frozen, processor = load(folder, adapter=tmp_path)
    trainable, _ = load(folder, adapter=tmp_path, is_trainable=True)
    assert torch.equal(logits(frozen, processor), logits(adapted, processor))
    assert not torch.equal(logits(frozen, processor), logits(load(folder)[0], processor))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {n.split(".")[-3] for n, p in trainable.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_adapter_of_another_base_is_refused_with_both_names(folder, tmp_path):
    other = write_tiny_llava(tmp_path / "other", seed=1)
    write_lora(tmp_path / "adapter", other, other)
    with pytest.raises(UserError) as caught:
        load(folder, adapter=tmp_path / "adapter")
    assert str(other) in str(caught.value)
    assert str(folder) in str(caught.value)


def test_adapter_trained_with_another_template_is_refused(folder, tmp_path):
    write_lora(tmp_path, folder, folder)
    card = json.loads((tmp_path / "base.json").read_text())
    (tmp_path / "base.json").write_text(json.dumps(card | {"chat_template_sha": "another"}))
    with pytest.raises(UserError, match="chat template"):
        load(folder, adapter=tmp_path)


def test_an_adapter_brings_back_how_special_tokens_in_text_were_read(folder, tmp_path):
    model, processor = load(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    adapted.save_pretrained(tmp_path)
    processor.special_tokens_in_text = "tokens"
    write_base_card(tmp_path, adapted, folder, processor)
    assert load(folder, adapter=tmp_path)[1].special_tokens_in_text == "tokens"


def test_adapter_without_a_card_that_does_not_fit_names_both_bases(folder, tmp_path):
    write_lora(tmp_path, folder, folder)
    (tmp_path / "base.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"r": 3, "base_model_name_or_path": "its/own-base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load(folder, adapter=tmp_path)
    assert "its/own-base" in str(caught.value)
    assert str(folder) in str(caught.value)


def test_adapter_with_keys_missing_is_refused(folder, tmp_path):
    adapted = write_lora(tmp_path, folder, folder)
    weights = {k: v for k, v in peft.get_peft_model_state_dict(adapted).items() if "layers.1" not in k}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="missing adapter keys"):
        load(folder, adapter=tmp_path)


@pytest.mark.parametrize("kind", ["lora", "mole"])
def test_adapter_with_keys_left_over_is_refused_by_name(folder, tmp_path, kind):
    config = MoleConfig(r=2) if kind == "mole" else peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(load(folder)[0], config)
    adapted.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    extra = {k.replace("layers.1.", "layers.9."): v.clone() for k, v in weights.items() if "layers.1." in k}
    save_file(weights | extra, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"without a place: {len(extra)} weights \(.*layers\.9"):
        load(folder, adapter=tmp_path)


def test_adapter_that_lacks_a_module_trained_in_full_is_refused_by_name(folder, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    peft.get_peft_model(load(folder)[0], config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "linear_2" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"multi_modal_projector\.linear_2"):
        load(folder, adapter=tmp_path)


@pytest.mark.parametrize("kind", ["lora", "mole"])
@pytest.mark.parametrize(("change", "told"), [({"top_kk": 1}, "top_kk"), ({"peft_type": "MOEL"}, "MOEL")])
def test_a_field_or_method_that_is_not_known_is_refused_by_name(folder, tmp_path, kind, change, told):
    config = MoleConfig(r=2) if kind == "mole" else peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(load(folder)[0], config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=rf"adapter_config\.json.*{told}"):
        load(folder, adapter=tmp_path)


def test_adapter_whose_start_changes_the_base_is_refused_by_name(folder, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    peft.get_peft_model(load(folder)[0], config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pissa_niter_4.*changes 2 frozen weights"):
        load(folder, adapter=tmp_path)


def test_missing_adapter_is_named(folder):
    with pytest.raises(UserError, match="no/such/adapter"):
        load(folder, adapter="no/such/adapter")


def test_projector_alone_is_loaded_from_its_folder(folder, tmp_path):
    trained, _ = tiny_llava(seed=3)
    projector = trained.model.multi_modal_projector
    save_file(projector.state_dict(), tmp_path / "projector.safetensors")
    model, _ = load(folder, adapter=tmp_path)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, projector.linear_1.weight)


def test_projector_of_another_width_names_both(folder, tmp_path):
    save_file(torch.nn.Linear(4, 4).state_dict(), tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load(folder, adapter=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_does_not_depend_on_dtype_or_adapter(folder, llava, dtype):
    model, _ = load(folder, dtype=dtype)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    assert fingerprint(model) == fingerprint(llava[0]) == fingerprint(peft.get_peft_model(model, config))


@pytest.mark.parametrize("part", ["embedding", "tower"])
def test_fingerprint_tells_apart_models_of_the_same_shape(llava, part):
    model, _ = tiny_llava()
    weight = model.get_input_embeddings().weight if part == "embedding" else next(model.model.vision_tower.parameters())
    with torch.no_grad():
        weight.mul_(1.1)
    assert fingerprint(model) != fingerprint(llava[0])


def test_weights_trained_with_quick_gelu_are_refused_on_a_tower_without_it():
    with pytest.raises(UserError, match="ViT-B-32-quickgelu"):
        build("ViT-B-32", tiny_language_model(), tokenizer=tiny_tokenizer(), pretrained="openai")


def test_a_fingerprint_knows_another_projector_only_when_asked(llava):
    model, _ = llava
    known, whole = fingerprint(model), fingerprint(model, with_projector=True)
    weight = next(model.model.multi_modal_projector.parameters())
    before = weight.data.clone()
    try:
        weight.data += 1
        assert fingerprint(model) == known  # an adapter may bring a projector of its own
        assert fingerprint(model, with_projector=True) != whole
    finally:
        weight.data = before


MISFITS = {
    "a head with a bias": (PhiForCausalLM, PhiConfig, {}, "lm_head.bias"),
    "a cap on its logits": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 8}, "not a plain linear map"),
    "narrower embeddings": (OPTForCausalLM, OPTConfig, {"word_embed_proj_dim": 16}, "lm_head.weight"),
    "no attention": (MambaForCausalLM, MambaConfig, {}, "cannot read a picture"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_language_model_that_llava_cannot_hold_is_refused(name):
    kind, config, fields, told = MISFITS[name]
    language_model = kind(config(vocab_size=320, **{**SMALL, **fields})).eval()
    if name == "a head with a bias":
        torch.nn.init.ones_(language_model.lm_head.bias)
    with pytest.raises(UserError, match=told):
        build(tiny_tower(), language_model, tokenizer=tiny_tokenizer())
