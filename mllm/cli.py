"""The ``mllm`` command. Thin: each command parses its options and calls, or starts, what does the work.

``train`` and ``demo`` and the recipes are started as modules, since the library never imports them.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mllm.errors import UserError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)
console = Console()

Arms = Annotated[
    list[str] | None, typer.Option("--arm", help="NAME=ADAPTER_FOLDER; repeat. `base` alone is the model without one.")
]


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A mistake of the user's is told in words and ends with status 2; anything else keeps its traceback."""

    @wraps(command)
    def run(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def start_module(module: str, *arguments: str) -> None:
    """Becomes ``python -m module``: signals and the exit status are then its own."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@plain_errors
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML of one training stage, e.g. train/configs/mole.yaml.")],
    ranks: Annotated[int | None, typer.Option(help="Processes; default: one a GPU, or two on a CPU.")] = None,
) -> None:
    """Train one stage with DeepSpeed: mllm train CONFIG.yaml section.key=value …"""
    options = [] if ranks is None else ["--ranks", str(ranks)]
    start_module("train.launch", str(config), *context.args, *options)


@app.command("eval")
@plain_errors
def evaluate(
    questions: Annotated[Path, typer.Option(help="Questions in LLaVA JSON or JSONL, with answers, metric and domain.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, report.png and answers/.")],
    model: Annotated[str, typer.Option(help="Folder, hub id, or `miniworld`.")] = "miniworld",
    arm: Arms = None,
    train_rows: Annotated[
        Path | None, typer.Option("--train", help="Training rows (a mixture YAML or JSON), for the blind baseline.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Where pictures lie; default: the questions' folder.")] = None,
    blanked: Annotated[bool, typer.Option(help="Also score each arm with the picture blanked.")] = True,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of each source.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
) -> None:
    """Answer a question set with several adapters of one model; print and store scores per domain and source."""
    from mllm.evaluate import evaluate_arms

    adapters = parse_arms(arm or ["base"])
    evaluate_arms(
        model, adapters, questions, out, train_rows=train_rows, image_root=image_root, blanked=blanked, limit=limit,
        batch_size=batch_size, max_new_tokens=max_new_tokens,
    )  # fmt: skip


def parse_arms(texts: list[str]) -> dict[str, str | None]:
    """Arm name -> adapter folder, in the order given. Raises UserError for a name that comes twice."""
    arms: dict[str, str | None] = {}
    for text in texts:
        name, folder = parse_arm(text)
        if name in arms:
            raise UserError(f"--arm {text}: there is an arm {name!r} already; give each a name of its own.")
        arms[name] = folder
    return arms


def parse_arm(text: str) -> tuple[str, str | None]:
    """``lora=runs/lora/adapter`` -> ("lora", folder); ``base`` -> ("base", None)."""
    name, _, folder = text.partition("=")
    if not name or "/" in name or (not folder and name != "base"):
        raise UserError(f"--arm {text}: expected NAME=ADAPTER_FOLDER, or `base` for the model without an adapter.")
    return name, folder or None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@plain_errors
def chat(context: typer.Context) -> None:
    """Chat with pictures in a browser, on this machine unless told otherwise; options: python -m demo --help."""
    start_module("demo", *context.args)


@app.command()
@plain_errors
def check(
    mixture: Annotated[Path, typer.Argument(help="Mixture YAML, as in data_recipes/mixtures.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and image size the lengths are for.")] = "miniworld",
    max_length: Annotated[int, typer.Option(help="Longest sample in tokens, pictures included.")] = 2048,
) -> None:
    """Read every row and picture of a mixture, name the bad ones and exit with 1 if there are any."""
    from mllm.build import load_processor
    from mllm.data.check import check_mixture
    from mllm.data.mixture import load_mixture
    from mllm.data.template import ConversationEncoder

    report = check_mixture(load_mixture(mixture), ConversationEncoder(load_processor(model), max_length))
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if report.bad:
        raise typer.Exit(1)


@app.command()
@plain_errors
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report.")] = Path("runs/quickstart"),
    quick: Annotated[bool, typer.Option(help="A tenth of the work, to see that all parts run.")] = bool(
        os.environ.get("QUICK")
    ),
) -> None:
    """Draw miniworld, train LoRA and MoLE on its three domains, score both beside the base, and report."""
    from mllm.quickstart import quickstart as run

    run(out, quick=quick)


if __name__ == "__main__":
    app()
