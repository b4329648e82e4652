"""What a finished early-fusion run can do: `python -m train.moma.report RUN_FOLDER`.

Held-out loss by direction, causal and leaky apart; pictures drawn from held-out captions, and captions of held-out
pictures. Writes report.json, report.md and samples.png into the run's folder.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_recipes.miniworld_reader import Score, read_caption, score_picture
from mllm.common.console import quieten
from mllm.common.errors import UserError
from mllm.common.provenance import provenance
from mllm.moma import MomaForCausalLM
from mllm.moma.generation import describe, draw, leaves_room, load_moma
from mllm.moma.processor import MomaProcessor
from mllm.moma.scoring import LEAKY, evaluation_modes, held_out_losses, mode_label
from mllm.moma.stream import DIRECTIONS, PackedRows, pack
from train.check import SETTINGS
from train.config import load_config
from train.moma.config import MomaTrainConfig, ReportSection
from train.moma.data import captioned, held_out_documents
from train.moma.model import MODEL
from train.stages.image_tokenizer import grid

Losses = dict[str, dict[str, float]]


def write_report(folder: Path) -> dict:
    """Measures the model of a run's folder, writes the three files, and returns what report.json holds."""
    config: MomaTrainConfig = load_config(folder / SETTINGS)
    model, processor = load_moma(folder / MODEL)
    rows = held_out_rows(config, processor)
    losses = {
        mode: held_out_losses(model, rows, processor, mode=mode, batch_size=config.report.batch_size, progress=True)
        for mode in evaluation_modes(model)
    }
    wanted = max(config.report.pictures, config.report.scored)
    held_out = captioned(config.data, "test")
    shown = list(islice((each for each in held_out if leaves_room(model, processor, each[1])), wanted))
    report = {"stage": config.stage, "losses": losses, "made": provenance()}
    if shown:
        report["samples"] = sample(model, processor, shown, config.report, folder / "samples.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    print_losses(losses)
    return report


def held_out_rows(config: MomaTrainConfig, processor: MomaProcessor) -> PackedRows:
    """Held-out documents in both orders, packed; what fills no row is left out."""
    packed = list(pack(held_out_documents(config.data, processor), config.data.length))
    if not packed:
        raise UserError(f"data.held_out: {config.data.held_out} samples fill no row of {config.data.length} tokens.")
    return PackedRows(*(np.stack(column) for column in zip(*packed, strict=True)))


def sample(
    model: MomaForCausalLM,
    processor: MomaProcessor,
    shown: list[tuple[Image.Image, str]],
    section: ReportSection,
    path: Path,
) -> dict:
    """Draws and describes; writes the grid, if any: true pictures, those through their codes, drawn from captions.

    Where captions are miniworld's, the reader scores all that was drawn, and what the codes left of the true pictures;
    the grid and the descriptions are of the first ones.
    """
    pictures, captions = [list(column) for column in zip(*shown, strict=True)]
    tokenizer = processor.image_tokenizer
    through_codes = tokenizer.decode(tokenizer.encode(pictures))
    sampling = {"guidance": section.guidance, "temperature": section.temperature}
    drawn = draw(model, processor, captions, **sampling, progress=True)
    first = slice(section.pictures)
    described = describe(model, processor, pictures[first], progress=True)
    figures: dict = {"captions": captions[first], "described": described}
    if section.pictures:
        grid([tokenizer.pictures(tokenizer.pixels(pictures[first])), through_codes[first], drawn[first]]).save(path)
    if all(read_caption(caption) for caption in captions):
        figures |= {"drawn_right": read(drawn, captions), "reconstructed_right": read(through_codes, captions)}
    return figures


def read(pictures: list[Image.Image], captions: list[str]) -> dict[str, float]:
    """What the reader finds right in pictures."""
    none = Score(0, 0, 0, 0, 0)
    total = sum(map(score_picture, pictures, captions), none)
    return vars(total) | {"share": total.share}


def as_markdown(report: dict) -> str:
    """The report as a page."""
    lines = [f"# {report['stage']}", "", "Held-out loss in nats a token, by what it is predicted from.", ""]
    lines += [f"| experts choose by | {' | '.join(DIRECTIONS)} | all |", "|---" * (len(DIRECTIONS) + 2) + "|"]
    for mode, figures in report["losses"].items():
        cells = [f"{figures[name]:.3f}" if name in figures else "–" for name in (*DIRECTIONS, "all")]
        lines.append(f"| {mode_label(mode)} | {' | '.join(cells)} |")
    if LEAKY in report["losses"]:
        lines += ["", "A leaky row is not a language model's loss: later tokens and other rows take part in routing."]
    if samples := report.get("samples"):
        if samples["captions"]:
            lines += ["", "![true, through codes, drawn from captions](samples.png)"]
        lines.append("")
        if "drawn_right" in samples:
            drawn, kept = samples["drawn_right"], samples["reconstructed_right"]["share"]
            lines += [
                f"Objects drawn as named: {drawn['share']:.0%} of {drawn['objects']} "
                f"(true pictures through their codes: {kept:.0%}).",
                "",
            ]
        pairs = zip(samples["captions"], samples["described"], strict=True)
        lines += [f"- {caption}\n  described as: {described}" for caption, described in pairs]
    return "\n".join(lines) + "\n"


def print_losses(losses: Losses) -> None:
    """The table of losses, on stdout."""
    table = Table("experts choose by", *DIRECTIONS, "all", title="held-out loss, nats a token")
    for mode, figures in losses.items():
        table.add_row(mode_label(mode), *(f"{figures.get(name, float('nan')):.3f}" for name in (*DIRECTIONS, "all")))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    quieten()
    write_report(Path(sys.argv[1]))
