"""Pictures to codes and back, of Janus's and of Emu3's kind."""

import json

import pytest
import torch
from transformers import Emu3VQVAE
from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig

from mllm.common.errors import UserError
from mllm.moma.image_tokens import ImageTokenizer, distinct_codes, normalise_codes, psnr, reconstruct, revive_codes
from tests.tiny import tiny_image

COLOURS = ("red", "green", "blue", "black")
PICTURES = [tiny_image(colour, 16) for colour in COLOURS]


def small(**sizes) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer.small(**{"image_size": 16, "side": 2, "codebook_size": 16, "width": 32, "patch": 4, **sizes})


def tiny_emu3() -> ImageTokenizer:
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}
    config = Emu3VQVAEConfig(codebook_size=16, hidden_size=32, temporal_downsample_factor=2, **sizes)
    return ImageTokenizer(Emu3VQVAE(config), image_size=8)


@pytest.mark.parametrize("make", [small, tiny_emu3])
def test_codes_have_the_pictures_number_and_range_and_decode_to_its_size(make, tmp_path):
    tokenizer = make()
    codes_NP = tokenizer.encode(PICTURES)
    assert codes_NP.shape == (4, tokenizer.num_tokens)
    assert 0 <= codes_NP.min() <= codes_NP.max() < tokenizer.codebook_size
    decoded = tokenizer.decode(codes_NP)
    assert {picture.size for picture in decoded} == {(tokenizer.image_size,) * 2}
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.image_size == tokenizer.image_size
    assert torch.equal(again.encode(PICTURES), codes_NP)
    assert [picture.tobytes() for picture in again.decode(codes_NP)] == [picture.tobytes() for picture in decoded]


def test_what_training_sees_is_what_the_library_encodes_and_decodes():
    tokenizer = small()
    normalise_codes(tokenizer)
    pixels = tokenizer.pixels(PICTURES)
    with torch.no_grad():
        made = reconstruct(tokenizer, pixels)
    codes_NP = tokenizer.encode(PICTURES)
    assert torch.equal(made.codes.view(4, -1), codes_NP)
    assert [p.tobytes() for p in tokenizer.pictures(made.pixels)] == [p.tobytes() for p in tokenizer.decode(codes_NP)]


def test_gradients_pass_the_codes_to_the_encoder_and_reach_the_codes():
    tokenizer = small()
    normalise_codes(tokenizer)
    made = reconstruct(tokenizer, tokenizer.pixels(PICTURES))
    made.pixels.square().mean().backward(retain_graph=True)
    assert tokenizer.model.encoder.conv_in.weight.grad.abs().sum() > 0
    made.quantisation_loss.backward()
    assert tokenizer.model.quantize.embedding.weight.grad.abs().sum() > 0


def test_a_few_steps_bring_pictures_closer():
    tokenizer = small(side=4)
    normalise_codes(tokenizer)
    pixels = tokenizer.pixels(PICTURES)
    optimizer = torch.optim.AdamW(tokenizer.model.parameters(), lr=3e-3)
    before = psnr(pixels, tokenizer.pixels(tokenizer.decode(tokenizer.encode(PICTURES)))).mean()
    for _ in range(60):
        made = reconstruct(tokenizer, pixels)
        ((made.pixels - pixels).square().mean() + 0.25 * made.quantisation_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        normalise_codes(tokenizer)
    after = psnr(pixels, tokenizer.pixels(tokenizer.decode(tokenizer.encode(PICTURES)))).mean()
    assert after > before + 5


def test_codes_that_nobody_used_move_to_latents_and_others_stay():
    tokenizer = small()
    codes_CZ = tokenizer.model.quantize.embedding.weight
    before, latents = codes_CZ.detach().clone(), torch.ones(3, codes_CZ.shape[1])
    counts = torch.ones(16)
    counts[5] = 0
    assert revive_codes(tokenizer, counts, latents, torch.Generator()) == 1
    assert torch.equal(codes_CZ[5], latents[0])
    assert torch.equal(codes_CZ[:5], before[:5])


def test_of_codes_that_are_alike_the_one_in_use_is_kept_and_pictures_come_out_the_same():
    tokenizer = small()
    codes_CZ = tokenizer.model.quantize.embedding.weight
    with torch.no_grad():
        codes_CZ.copy_(torch.nn.functional.normalize(torch.randn(codes_CZ.shape), dim=1))
        codes_CZ[8:] = codes_CZ[:8] + 1e-4 * torch.randn(8, codes_CZ.shape[1])
    used = set(tokenizer.encode(PICTURES).flatten().tolist())
    fewer = distinct_codes(tokenizer, PICTURES, keep=8)
    kept_CZ = fewer.model.quantize.embedding.weight
    assert fewer.codebook_size == len(kept_CZ) == 8
    nearest = torch.cdist(codes_CZ, kept_CZ).argmin(1)
    assert nearest[:8].tolist() == nearest[8:].tolist()
    assert sorted(nearest[:8].tolist()) == list(range(8))
    alone = [code for code in used if (code + 8) % 16 not in used]  # its twin is nobody's
    assert all((kept_CZ == codes_CZ[code]).all(1).any() for code in alone)
    before, after = (each.pixels(each.decode(each.encode(PICTURES))) for each in (tokenizer, fewer))
    torch.testing.assert_close(before, after, atol=0.02, rtol=0)
    with pytest.raises(UserError, match="17 distinct codes"):
        distinct_codes(tokenizer, PICTURES, keep=17)


def test_psnr_of_equal_pictures_is_high_and_of_opposite_ones_zero():
    white, black = torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)
    assert psnr(white, white).item() > 90
    assert psnr(white, black).item() == pytest.approx(0)


@pytest.mark.parametrize("kind", ["chameleon_vqgan", "llama"])
def test_a_checkpoint_that_cannot_decode_is_refused_by_its_kind(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=kind):
        ImageTokenizer.from_pretrained(tmp_path)


def test_an_empty_folder_sizes_that_do_not_divide_and_a_wrong_number_of_codes_are_refused(tmp_path):
    with pytest.raises(UserError, match="image_tokenizer"):
        ImageTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="power of two"):
        small(side=3)
    with pytest.raises(UserError, match="4 codes, got 3"):
        small().decode(torch.zeros(1, 3, dtype=torch.long))
