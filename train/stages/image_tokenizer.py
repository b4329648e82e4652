"""Stage image_tokenizer: a small VQ autoencoder of Janus's kind, on pictures; one process, a plain loop.

N pictures of a step, C codes. Loss: mean absolute and squared error of pixels, and quantisation (see `reconstruct`).
"""

import json
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import get_scheduler

from mllm.common.errors import UserError
from mllm.common.folders import check_writable
from mllm.common.provenance import provenance
from mllm.moma.image_tokens import ImageTokenizer, distinct_codes, normalise_codes, psnr, reconstruct, revive_codes
from train.check import refuse_finished
from train.moma.config import ImageTokenizerSection, MomaStage, PictureSection
from train.moma.data import captioned
from train.run import prepare_folder
from train.trainer import LOG

IS_ALONE = True
FOLDER = "image_tokenizer"
GRID = 12  # held-out pictures shown
COUNTED = 1500  # training pictures that say which codes are used most


class Config(MomaStage):
    """Its settings."""

    stage: Literal["image_tokenizer"]
    data: PictureSection = PictureSection()
    tokenizer: ImageTokenizerSection = ImageTokenizerSection()


def check(config: Config, *, ranks: int) -> None:
    """Raises UserError for sizes that do not fit, and a folder that cannot be written or holds a finished tokenizer."""
    folder = Path(config.run.output_dir)
    check_writable(folder, "run.output_dir")
    refuse_finished(config, FOLDER)
    if config.run.max_hours is not None:
        raise UserError("stage image_tokenizer saves nothing on its way: leave run.max_hours out.")
    ImageTokenizer.small(**config.tokenizer.shape)


def run(config: Config, checked: None = None) -> ImageTokenizer:
    """Trains and writes image_tokenizer/, train_log.jsonl, report.json and reconstructions.png into run.output_dir.

    A run of minutes: it is not resumed, an interrupted one starts again.
    """
    run, settings = config.run, config.tokenizer
    torch.manual_seed(run.seed)
    tokenizer = ImageTokenizer.small(**settings.shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer.model.to(device)
    pixels = training_pixels(config, tokenizer)
    prepare_folder(config, fresh=True, results=(FOLDER, "report.json", "reconstructions.png"))
    print(f"starts anew: {run.steps:,} steps", flush=True)
    learn(config, tokenizer, pixels)
    if settings.kept_codes:
        counted = [picture for picture, _ in islice(captioned(config.data, "train"), COUNTED)]
        tokenizer = distinct_codes(tokenizer, counted, settings.kept_codes)
    tokenizer.save_pretrained(run.output_dir / FOLDER)
    held_out = held_out_pictures(config.data)
    figures = measure(tokenizer, held_out)
    report = provenance() | {"settings": config.model_dump(mode="json"), "figures": figures}
    (run.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    reconstructions(tokenizer, held_out[:GRID]).save(run.output_dir / "reconstructions.png")
    print(f"{figures['psnr']:.1f} dB, {figures['codes_used']} of {tokenizer.codebook_size} codes in use", flush=True)
    print(f"image tokenizer saved in {run.output_dir / FOLDER}", flush=True)
    return tokenizer


def training_pixels(config: Config, tokenizer: ImageTokenizer) -> Tensor:
    """uint8 [N, 3, R, R] on the CPU: a quarter of what floats would take."""
    size = (tokenizer.image_size, tokenizer.image_size)
    pictures = [np.array(picture.convert("RGB").resize(size)) for picture, _ in captioned(config.data, "train")]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def learn(config: Config, tokenizer: ImageTokenizer, pixels: Tensor) -> None:
    """Training proper; a line of the log every `run.log_every` steps."""
    run, optim, model = config.run, config.optim, tokenizer.model
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    schedule = {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule)
    rate = get_scheduler(schedule, optimizer, round(optim.warmup_ratio * run.steps), run.steps)
    counts_C = torch.zeros(tokenizer.codebook_size, dtype=torch.long)
    normalise_codes(tokenizer)
    model.train()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar, (run.output_dir / LOG).open("w", encoding="utf-8") as log:
        task = bar.add_task("image tokenizer", total=run.steps)
        for step in range(1, run.steps + 1):
            chosen = torch.randint(len(pixels), (run.batch_size,), generator=generator)
            shown = (pixels[chosen].float() / 127.5 - 1).to(model.device)
            made = reconstruct(tokenizer, shown)
            difference = made.pixels - shown
            reconstruction_loss = difference.abs().mean() + difference.square().mean()
            loss = reconstruction_loss + config.tokenizer.quantisation_weight * made.quantisation_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
            normalise_codes(tokenizer)
            counts_C += made.codes.cpu().bincount(minlength=len(counts_C))
            if step % run.log_every == 0:
                entry = {
                    "step": step,
                    "loss": loss.item(),
                    "reconstruction_loss": reconstruction_loss.item(),
                    "quantisation_loss": made.quantisation_loss.item(),
                    "psnr": psnr(shown, made.pixels.detach()).mean().item(),
                    "codes_used": int((counts_C > 0).sum()),
                }
                log.write(json.dumps(entry) + "\n")
                log.flush()
                bar.update(task, description=f"image tokenizer, {entry['psnr']:.1f} dB")
            every = config.tokenizer.revive_every
            if every and step % every == 0:
                if step < run.steps * 2 / 3:
                    revive_codes(tokenizer, counts_C, made.latents.detach(), generator)
                counts_C.zero_()
            bar.advance(task)
    model.eval()


def held_out_pictures(section: PictureSection) -> list[Image.Image]:
    """Those of the test split, each once, however many captions it has."""
    return list({picture.tobytes(): picture for picture, _ in captioned(section, "test")}.values())


def measure(tokenizer: ImageTokenizer, pictures: list[Image.Image]) -> dict[str, float]:
    """Of pictures it did not learn from: PSNR through the codes, codes in use, and perplexity of codes (C is even)."""
    codes_NP = tokenizer.encode(pictures)
    decoded = [tokenizer.decode(codes_NP[k : k + 64]) for k in range(0, len(codes_NP), 64)]
    shown = tokenizer.pixels(pictures)
    seen = tokenizer.pixels([picture for group in decoded for picture in group])
    share_C = codes_NP.flatten().cpu().bincount(minlength=tokenizer.codebook_size) / codes_NP.numel()
    entropy = -(share_C * share_C.clamp(min=1e-12).log()).sum()
    return {
        "pictures": len(pictures),
        "psnr": psnr(shown, seen).mean().item(),
        "codes_used": int((share_C > 0).sum()),
        "code_perplexity": entropy.exp().item(),
    }


def reconstructions(tokenizer: ImageTokenizer, pictures: list[Image.Image]) -> Image.Image:
    """Pictures above, what is left of them through the codes below."""
    return grid([tokenizer.pictures(tokenizer.pixels(pictures)), tokenizer.decode(tokenizer.encode(pictures))])


def grid(rows: list[list[Image.Image]], gap: int = 2) -> Image.Image:
    """Rows of pictures of one size, on white."""
    side = rows[0][0].width + gap
    sheet = Image.new("RGB", (side * max(map(len, rows)) - gap, side * len(rows) - gap), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (side * column, side * row))
    return sheet
