"""The point of the project in one command: what mixing domains costs, and which adapter gets it back.

Draws three domains whose answers contradict each other, trains plain LoRA on each and on the mix, a wider LoRA and the
default experts with DeepSpeed, scores them all on held-out questions, and says the result in words.
"""

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from mllm.common.folders import check_writable
from mllm.common.processes import module_command, module_environment
from mllm.inference.evaluate import Adapter, evaluate_arms

DOMAINS = ("general", "document", "biomedical")
SCENES = {"train": 320, "val": 0, "test": 100}  # a domain; two questions each
QUICK_SCENES = {"train": 40, "val": 0, "test": 20}
DATA_SEED = 1  # scenes of seed 0 were looked at while the embedded base was made, so they are not held out
RANK = 2  # small: a study of the same domains found the conflict where room is scarce (docs/conflicts.md)
# Rate, batch and what is trained are those of the study of these domains (studies/results/conflict/look_alikes), which
# chose the rate for each arm on validation scenes of another seed: the same for all four.
RATE = 5e-3
FRAME = {"run.batch_size": 4, "run.micro_batch_size": 2, "run.save_every": 0, "model.train_projector": "false"}
MLPS = "[gate_proj,up_proj,down_proj]"
console = Console()


@dataclass(frozen=True)
class Training:
    """One `mllm train`: its name in the table, its config, and what it sets there."""

    name: str
    config: str
    settings: dict[str, object]
    data: str = "train.json"


def lora(rank: int) -> dict[str, object]:
    """LoRA of this rank on the MLPs, where the experts are, so that two arms differ in the experts alone."""
    return {"model.adapter.r": rank, "model.adapter.lora_alpha": 2 * rank, "model.adapter.target_modules": MLPS}


EXPERTS = lora(RANK) | {
    "model.adapter.target_modules": "[]",  # for experts: no plain LoRA beside them, on the attention
    "model.adapter.num_experts": len(DOMAINS),
    "optim.part_lr.router": RATE / 10,  # as in experts.yaml: routers start right and only have to stay so
}
TRAININGS = (
    Training("lora", "lora", lora(RANK)),
    Training("wide_lora", "lora", lora(RANK * len(DOMAINS))),  # as many weights as the experts
    Training("experts", "experts", EXPERTS),
    *(Training(f"lora_{domain}", "lora", lora(RANK), f"train-{domain}.json") for domain in DOMAINS),
)


def quickstart(out: Path, *, quick: bool, clash: int = 2) -> dict:
    """Runs every step into ``out`` and returns the report; a step that fails ends the whole with its status.

    Args:
        quick: an eighth of the data, to see that all parts run.
        clash: how much the domains contradict each other, see data_recipes/clashes.py; 0 not at all.
    """
    check_writable(out, "--out")
    started = time.time()
    data = out / "data"
    drawn = (QUICK_SCENES if quick else SCENES) | {"clash": clash, "seed": DATA_SEED}
    step("data_recipes.clashes", "--out", str(data), *(word for k, v in drawn.items() for word in (f"--{k}", str(v))))
    for training in TRAININGS:
        settings = training.settings | FRAME | {
            "optim.lr": RATE,
            "data.mixture": data / training.data,
            "run.output_dir": out / training.name,
            "run.resume": "never",
            "run.overwrite": "true",
        }  # fmt: skip
        step("train.launch", training.config, *(f"{key}={value}" for key, value in settings.items()))
    report = evaluate_arms(
        "miniworld",
        arms(out),
        data / "test.json",
        out,
        train_rows=data / "train.json",
        blanked=False,
        batch_size=64,
        max_new_tokens=8,
    )
    console.print(Panel("\n".join(in_words(report)), title="what it says", expand=False), highlight=False)
    say_where_things_are(out, minutes=(time.time() - started) / 60)
    return report


def arms(out: Path) -> dict[str, Adapter]:
    """The table's columns; `lora_apart` answers each domain with the LoRA that saw nothing else."""
    apart = {domain: out / f"lora_{domain}" / "adapter" for domain in DOMAINS}
    mixed = {name: out / name / "adapter" for name in ("lora", "wide_lora", "experts")}
    return {"base": None, "lora_apart": apart} | mixed


def in_words(report: dict) -> list[str]:
    """What mixing costs and how much of it each arm gets back, in points with 95 % intervals over pictures."""
    score = {name: f"{100 * arm['mean']['score']:.1f} %" for name, arm in report["arms"].items()}
    # A difference is stored as later arm minus earlier, so what mixing costs is minus that of lora and lora_apart.
    mixing = report["differences"]["lora"]["lora_apart"]["mean"]
    cost = {"difference": -mixing["difference"], "ci_low": -mixing["ci_high"], "ci_high": -mixing["ci_low"]}
    gains = {name: report["differences"][name]["lora"]["mean"] for name in ("wide_lora", "experts")}
    over_wide = report["differences"]["experts"]["wide_lora"]["mean"]
    lines = [
        f"Three LoRAs, one a domain, answer {score['lora_apart']} right. One LoRA on the mix answers {score['lora']}.",
        f"So mixing costs {points(cost)}." if cost["ci_low"] > 0 else f"Mixing costs nothing shown: {points(cost)}.",
        f"LoRA of as many weights as the experts gets back {points(gains['wide_lora'])}: {score['wide_lora']}.",
        f"The default experts get back {points(gains['experts'])}: {score['experts']}.",
    ]
    verdict = "more than" if over_wide["ci_low"] > 0 else "no more than is told from"
    lines.append(f"Experts get back {verdict} LoRA of as many weights: {points(over_wide)}.")
    lines.append("One seed, drawn scenes; `mllm conflict` measures it on your own data with several.")
    return lines


def points(figures: dict) -> str:
    """`+12.3 points [+10.1, +14.4]`."""
    low, high = (f"{100 * figures[key]:+.1f}" for key in ("ci_low", "ci_high"))
    return f"{100 * figures['difference']:+.1f} points [{low}, {high}]"


def step(module: str, *arguments: str) -> None:
    """Prints a command as one would type it, runs it, and stops the quickstart if it fails."""
    console.rule(f"[bold]python -m {module} {' '.join(arguments)}", align="left")
    environment = module_environment() | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(module_command(module, *arguments), env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # a killed quickstart leaves nothing running
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise SystemExit(status)


def say_where_things_are(out: Path, *, minutes: float) -> None:
    """The last words: what was made, where it lies, and how to chat with it."""
    lines = [
        f"report   {out / 'report.html'}, report.json, report.md",
        f"picture  {out / 'report.png'}",
        f"answers  {out / 'answers'}",
        f"adapters {out}/*/adapter",
        "",
        "chat with it:  make demo",
        f"               mllm chat --model miniworld --adapter {out / 'experts' / 'adapter'}",
    ]
    console.print(Panel("\n".join(lines), title=f"quickstart done in {minutes:.1f} minutes", expand=False))
