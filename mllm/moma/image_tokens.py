"""Pictures as discrete tokens: a VQ autoencoder of transformers, from a checkpoint folder or new and small.

N pictures, G tokens a side, P = G·G tokens of a picture in reading order, C codes, Z width of a code, R pixels a side.
Pixels are in [-1, 1]. Of transformers' VQ autoencoders Janus's and Emu3's can do both ways; Chameleon's has no decoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from transformers import Emu3VQVAE, PreTrainedModel
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from mllm.common.errors import UserError

KINDS = {"janus_vqgan": JanusVQVAE, "emu3_vqgan": Emu3VQVAE}
PICTURES_AT_ONCE = 64


class ImageTokenizer:
    """Pictures to codes 0 .. codebook_size - 1 and back. Where codes stand in a vocabulary is MomaProcessor's part.

    A Janus model may work on patches instead of pixels: with 3·k² input channels it sees k x k pixels at once, which
    makes it k² times cheaper. Attributes: `image_size` R, `num_tokens` P, `codebook_size` C.
    """

    def __init__(self, model: PreTrainedModel, image_size: int | None = None) -> None:
        """image_size: pixels a side, for Emu3, which takes any multiple of its stride; Janus's model has its own."""
        self.model = model.eval()
        config = model.config
        stride = 2 ** (len(config.channel_multiplier) - 1)
        self.patch = math.isqrt(config.in_channels // 3)
        if isinstance(model, JanusVQVAE):
            self.codebook_size, self.side = config.num_embeddings, config.num_patches
            self.image_size = config.num_patches * stride * self.patch
        else:
            self.image_size = image_size or getattr(config, "image_size", None) or 512
            if self.image_size % stride:
                raise UserError(f"image_size={self.image_size} is not a multiple of the tokenizer's stride {stride}.")
            config.image_size = self.image_size
            self.codebook_size, self.side = config.codebook_size, self.image_size // stride
        self.num_tokens = self.side**2

    @classmethod
    def small(
        cls, *, image_size: int = 96, side: int = 12, codebook_size: int = 512, width: int = 64, patch: int = 4
    ) -> ImageTokenizer:
        """A new one of Janus's kind, untrained; 1.03M weights as it stands, 0.90M with patch 8.

        Raises UserError for sizes that do not divide, or widths that Janus's group norm of 32 groups cannot take.
        """
        halvings = image_size / (side * patch)
        if halvings < 1 or not math.log2(halvings).is_integer() or width % 32:
            raise UserError(
                f"image_size={image_size} must be side={side} x patch={patch} x a power of two, and width={width} a "
                "multiple of 32."
            )
        levels = int(math.log2(halvings)) + 1
        config = JanusVQVAEConfig(
            embed_dim=8,  # few dimensions on a sphere keep all codes in use (2110.04627)
            num_embeddings=codebook_size,
            latent_channels=width,
            base_channels=width,
            channel_multiplier=[1] * levels,
            num_res_blocks=1,
            num_patches=side,
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
        )
        return cls(JanusVQVAE(config))

    @classmethod
    def from_pretrained(cls, folder: str | Path, image_size: int | None = None) -> ImageTokenizer:
        """Reads what `save_pretrained` of this class, of JanusVQVAE or of Emu3VQVAE wrote.

        Raises UserError for a folder without a model, and for one of a kind that cannot decode.
        """
        path = Path(folder, "config.json")
        if not path.is_file():
            raise UserError(f"{folder} holds no image tokenizer (no config.json). Train one: stage image_tokenizer.")
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if kind not in KINDS:
            raise UserError(
                f"{path}: model_type is {kind!r}; an image tokenizer is one of {', '.join(KINDS)} (of a whole Janus or "
                "Emu3 model, save `model.model.vqmodel` by itself). Chameleon's cannot decode in transformers."
            )
        return cls(KINDS[kind].from_pretrained(folder, use_safetensors=True), image_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """config.json and model.safetensors."""
        self.model.save_pretrained(folder)

    # -- pictures and pixels -------------------------------------------------------------------------------------------

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float32 [N, 3, R, R]; pictures of another size are resized."""
        size = (self.image_size, self.image_size)
        arrays = [np.array(picture.convert("RGB").resize(size)) for picture in pictures]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1

    @staticmethod
    def pictures(pixels_N3RR: Tensor) -> list[Image.Image]:
        """Of pixels, clipped to what a picture can show."""
        bytes_NRR3 = ((pixels_N3RR.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(each) for each in bytes_NRR3]

    # -- codes ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """int64 [N, P]."""
        codes = [self._encode(pictures[k : k + PICTURES_AT_ONCE]) for k in range(0, len(pictures), PICTURES_AT_ONCE)]
        return torch.cat(codes) if codes else torch.empty(0, self.num_tokens, dtype=torch.long)

    def _encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels = self.pixels(pictures).to(self.model.device, self.model.dtype)
        if isinstance(self.model, JanusVQVAE):
            codes = self.model.encode(F.pixel_unshuffle(pixels, self.patch), return_dict=True).image_tokens
        else:
            sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
            codes = torch.stack(list(self.model.encode(pixels, sizes, return_dict=True).image_tokens))
        return codes.reshape(len(pictures), self.num_tokens)

    @torch.no_grad()
    def decode(self, codes_NP: Tensor) -> list[Image.Image]:
        """Pictures of R x R pixels. Raises UserError for another number of codes than a picture has."""
        if codes_NP.shape[1] != self.num_tokens:
            raise UserError(f"A picture has {self.num_tokens} codes, got {codes_NP.shape[1]}.")
        codes_NP = codes_NP.to(self.model.device)
        if isinstance(self.model, JanusVQVAE):
            pixels = F.pixel_shuffle(self.model.decode(codes_NP), self.patch)
        else:
            pixels = self.model.decode(codes_NP.view(-1, self.side, self.side))
        return self.pictures(pixels.float())


# -- learning ----------------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """A training forward: pixels [N, 3, R, R], the quantisation loss, codes [N·P], latents they stand for [N·P, Z]."""

    pixels: Tensor
    quantisation_loss: Tensor
    codes: Tensor
    latents: Tensor


def reconstruct(tokenizer: ImageTokenizer, pixels_N3RR: Tensor) -> Reconstruction:
    """A forward with gradient from the picture through the codes (straight through) to the encoder.

    Janus decodes from codes of length one, so latents are brought to length one too, as where its weights come from
    (2406.06525): then the nearest code is the most alike in direction, and `encode` picks the same. Codes must be kept
    at length one, see `normalise_codes`. Losses are the library's: commitment, and a quarter of the codes' own.
    Raises UserError for a model of another kind, which the library cannot train.
    """
    model = tokenizer.model
    if not isinstance(model, JanusVQVAE):
        raise UserError(f"Only image tokenizers of Janus's kind can be trained here, got {type(model).__name__}.")
    latents_NZGG = F.normalize(model.quant_conv(model.encoder(F.pixel_unshuffle(pixels_N3RR, tokenizer.patch))), dim=1)
    quantised_NZGG, loss, codes = model.quantize(latents_NZGG)
    decoded = F.pixel_shuffle(model.decoder(model.post_quant_conv(quantised_NZGG)), tokenizer.patch)
    return Reconstruction(decoded, loss, codes, latents_NZGG.permute(0, 2, 3, 1).flatten(0, 2))


@torch.no_grad()
def normalise_codes(tokenizer: ImageTokenizer) -> None:
    """Bring every code to length one, after it was initialised or moved."""
    weight_CZ = tokenizer.model.quantize.embedding.weight
    weight_CZ.copy_(F.normalize(weight_CZ, dim=1))


@torch.no_grad()
def revive_codes(tokenizer: ImageTokenizer, counts_C: Tensor, latents: Tensor, generator: torch.Generator) -> int:
    """Put codes that nobody used where latents are, picked at random. Returns how many; counts_C says who was used."""
    dead = (counts_C == 0).nonzero()[:, 0]
    if len(dead):
        chosen = torch.randint(len(latents), (len(dead),), generator=generator)
        tokenizer.model.quantize.embedding.weight[dead] = latents[chosen].to(tokenizer.model.dtype)
    return len(dead)


@torch.no_grad()
def distinct_codes(tokenizer: ImageTokenizer, pictures: Sequence[Image.Image], keep: int) -> ImageTokenizer:
    """The tokenizer with at most `keep` codes: of each group that points the same way the one that pictures use most.

    Codes crowd where pictures are alike, and which of several alike is nearest hangs on next to nothing: a language
    model can only guess it, token for token. Groups are those of average linkage over codes of length one.
    Raises UserError for a model of another kind, and where there are fewer codes.
    """
    model = tokenizer.model
    if not isinstance(model, JanusVQVAE) or not 0 < keep <= tokenizer.codebook_size:
        raise UserError(
            f"{keep} distinct codes cannot be kept of a {type(model).__name__} with {tokenizer.codebook_size}."
        )
    weight_CZ = F.normalize(model.quantize.embedding.weight.float(), dim=1).cpu()
    uses_C = tokenizer.encode(pictures).flatten().cpu().bincount(minlength=len(weight_CZ))
    group_C = torch.from_numpy(fcluster(linkage(weight_CZ.numpy(), "average"), keep, "maxclust")) - 1
    kept = torch.stack([uses_C.where(group_C == group, -1).argmax() for group in range(int(group_C.max()) + 1)])
    config = copy(model.config)
    config.num_embeddings = len(kept)
    smaller = JanusVQVAE(config).to(model.device, model.dtype)
    codes = "quantize.embedding.weight"
    state = model.state_dict()
    smaller.load_state_dict({**state, codes: state[codes][kept.to(model.device)]})
    return ImageTokenizer(smaller)


@torch.no_grad()
def psnr(pixels: Tensor, decoded: Tensor) -> Tensor:
    """[N] decibels; a difference of a level of 256 everywhere is 48 dB."""
    error_N = (pixels - decoded.clamp(-1, 1)).square().flatten(1).mean(1).clamp(min=1e-10)
    return 10 * torch.log10(4 / error_N)  # the range is 2 wide
