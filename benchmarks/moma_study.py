"""Experts by modality (MoMa, 2407.21770) against their rivals at equal active FLOPs, every arm scored causally.

    python -m benchmarks.moma_study --scale cpu --image-tokenizer runs/image_tokenizer/image_tokenizer
    python -m benchmarks.moma_study --scale cpu --report-only

Named before anything was run:
  primary    η of 4t4i on the loss over all held-out tokens, causal: how much more compute dense needs for the same
             loss. Of two curves the one that ends lower gives the compute at which it first was where the other ended;
             curves are running minima, interpolated in log compute; the rate is constant after warm-up, so that every
             point of a curve is a run of that length. Geometric mean over paired seeds, 95 % bootstrap interval.
  secondary  the same by direction (text, image, image→text, text→image) and in seconds of the processor; the gap
             between leaky and causal loss, as a row of its own; tokens a second beside dense.
The rate is chosen for each arm among the same three, on the val split with a seed of its own; figures are of the test
split. Claims to test: η 3.7 overall, 2.6 text, 5.2 image for 4t4i, 3.0 for 8x; and that agnostic routing is better
(2504.07951). All arms norm each expert's output by itself ("expert"), since the post-norm would cancel the gate of a
lone pick; for dense and 1t1i the two are one. An arm of its own has MoMa's. Runs made by the same recipe are kept.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.store import RESULTS
from mllm.console import quieten
from mllm.moma import MomaConfig, MomaForCausalLM, layers_at_equal_flops
from mllm.moma.cost import head_flops, moma_cost
from mllm.moma.processor import MomaProcessor
from mllm.moma.scoring import LEAKY, evaluation_modes, held_out_losses
from mllm.moma.stream import DIRECTIONS, PackedRows, pack
from mllm.provenance import provenance
from train.moma.config import MomaModelSection, StreamSection
from train.moma.data import held_out_documents, training_rows
from train.moma.model import build_processor

FOLDER = RESULTS / "moma_study"
MEASURES = ("all", *DIRECTIONS)
DENSE, MAIN = "dense", "4t4i"
SWEEP_SEED = 1000
RESAMPLES = 10_000

TOKEN_CHOICE = {"routing": "token_choice", "num_experts_per_tok": 1, "balance": "global_batch"}
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {"preset": "dense"},
    "8x": {"preset": "8x"},
    "1t1i": {"preset": "1t1i"},
    "2t2i": {"preset": "2t2i"},
    MAIN: {"preset": "4t4i"},
    "4t4i_post": {"preset": "4t4i", "norm_position": "post"},
    "mod_4t4i": {"preset": "4t4i", "mixture_of_depths": 0.25},
    "dense_total": {"preset": "dense"},  # as many parameters as 4t4i has, all of them active
    "token_agnostic": {"preset": "8x", **TOKEN_CHOICE},
    "token_split": {"preset": "4t4i", **TOKEN_CHOICE},
    "shared": {"preset": "3t3i2s"},  # of the eight experts two are open to both modalities (MoIIE, 2508.09779)
}


@dataclass(frozen=True)
class Scale:
    """A size of the study. `fields` are of MomaConfig."""

    fields: dict[str, Any]
    steps: int
    batch_rows: int
    length: int
    points: int  # of a curve
    scenes: int
    held_out: int
    auxiliary_steps: int
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    warmup: float = 0.05
    captions: list[str] = field(default_factory=list)
    image_root: str | None = None


def shape(width: int, inner: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    """The fields of MomaConfig that all arms share."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "norm_position": "expert",
        "threshold_momentum": 0.9,  # runs are short: the mean of the last tens of batches
    }


SCALES = {
    "smoke": Scale(shape(16, 24, 2, 2, 128), 6, 2, 128, 2, 40, 16, 2, rates=(1e-2,)),
    "cpu": Scale(shape(128, 256, 6, 4, 512), 1500, 8, 512, 15, 20_000, 512, 150),  # 1.6M active
    "gpu": Scale(shape(512, 1376, 8, 8, 1024), 8000, 64, 1024, 20, 200_000, 2048, 800),  # 28M active
}


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training: an arm, a rate and a seed; `split` is what its curve is scored on."""

    arm: str
    rate: float
    seed: int
    split: Literal["val", "test"]

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.rate:g}-s{self.seed}-{self.split}"


class Study:
    """A scale, its data, and the folder that keeps runs."""

    def __init__(self, scale_name: str, tokenizer: Path, out: Path) -> None:
        self.scale, self.folder = SCALES[scale_name], out / scale_name
        self.processor = build_processor(MomaModelSection(image_tokenizer=tokenizer))
        scale = self.scale
        self.data = StreamSection(
            miniworld=scale.scenes,
            held_out=scale.held_out,
            length=scale.length,
            rows=scale.steps * scale.batch_rows,
            captions=scale.captions,
            image_root=scale.image_root,
            cache=Path("runs/moma_study/rows"),
        )

    def prepare(self) -> None:
        """Rows of all splits, once, so that a run's time is its own."""
        self.rows = training_rows(self.data, self.processor)
        self.scored = {split: self._held_out(split) for split in ("val", "test")}

    def _held_out(self, split: Literal["val", "test"]) -> PackedRows:
        documents = held_out_documents(self.data, self.processor, split)
        return PackedRows(*(np.stack(column) for column in zip(*pack(documents, self.data.length), strict=True)))

    def path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"

    def kept(self, run: Run) -> dict | None:
        """What was measured, if it was by this recipe."""
        path = self.path(run)
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return record if record and record["recipe"] == self.recipe(run) else None

    def recipe(self, run: Run) -> str:
        """A short name of all that a run's figures follow from."""
        values = [asdict(self.scale), ARMS[run.arm], asdict(run), self.data.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def carry_out(self, run: Run) -> dict:
        """Train, measure, keep; the file appears whole."""
        record = {"recipe": self.recipe(run), "run": asdict(run), **train_arm(self, run), "made": provenance()}
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
        return record

    def rate_of(self, arm: str) -> float | None:
        """The rate with the lowest final causal loss on the val split; None until all were tried."""
        tried = {rate: self.kept(Run(arm, rate, SWEEP_SEED, "val")) for rate in self.scale.rates}
        if not all(tried.values()):
            return None
        return min(tried, key=lambda rate: tried[rate]["curve"][-1]["losses"]["all"])

    def due(self, arms: list[str], seeds: int, main_seeds: int) -> Iterator[Run]:
        """Runs that are not there: first every arm's rates, then seed by seed, so that what is there is paired."""
        sweep = [Run(arm, rate, SWEEP_SEED, "val") for arm in arms for rate in self.scale.rates]
        yield from (run for run in sweep if not self.kept(run))
        for seed in range(max(seeds, main_seeds)):
            for arm in arms:
                if seed < (main_seeds if arm in (DENSE, MAIN) else seeds):
                    run = Run(arm, self.rate_of(arm), seed, "test")
                    if not self.kept(run):
                        yield run


def arm_config(arm: str, scale: Scale, processor: MomaProcessor) -> MomaConfig:
    """The arm's model. Mixture of depths gets more layers, the dense model of equal total size a wider FFN."""
    settings = {**processor.config_fields, **scale.fields, **ARMS[arm]}
    preset = settings.pop("preset")
    if arm == "mod_4t4i":
        settings["num_hidden_layers"] = layers_at_equal_flops(settings["num_hidden_layers"], 0.25)
    if arm == "dense_total":
        settings["intermediate_size"] *= MomaConfig.preset(ARMS[MAIN]["preset"]).layout.num_experts
    return MomaConfig.preset(preset, **settings)


def train_arm(study: Study, run: Run) -> dict:
    """A plain loop on one device: {"curve", "final", "flops_a_step", "parameters", "tokens_per_second"}.

    The same seed gives every arm the same rows in the same order. Compute is forward, times three, head included.
    """
    scale, device = study.scale, "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(run.seed)
    model = MomaForCausalLM(arm_config(run.arm, scale, study.processor)).to(device)
    order = study.rows.order(run.seed, 0)[: scale.steps * scale.batch_rows].reshape(scale.steps, scale.batch_rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, round(scale.warmup * scale.steps))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    marks = set(np.unique(np.geomspace(warm, scale.steps, scale.points).round().astype(int)).tolist())
    curve, seconds, flops = [], 0.0, 0
    for step, rows in enumerate(order, 1):
        began = clock()
        learn(model, study.rows.batch(rows.tolist()), optimizer)
        rate.step()
        seconds += clock() - began
        flops += 3 * (moma_cost(model).flops + head_flops(model))
        if step in marks:
            losses = held_out_losses(model, study.scored[run.split], study.processor)
            curve.append({"step": step, "flops": flops, "seconds": seconds, "losses": losses})
    cost = moma_cost(model)
    final = {mode: losses_by(study, run, model, mode) for mode in evaluation_modes(model)}
    if run.split == "test" and model.config.chooses_over_batch:
        train_auxiliary(study, model, order)
        final["aux"] = losses_by(study, run, model, "aux")
    return {
        "curve": curve,
        "final": final,
        "flops_a_step": flops / scale.steps,
        "parameters": {"total": cost.total_parameters, "active": cost.active_parameters},
        "tokens_per_second": scale.steps * scale.batch_rows * scale.length / seconds,
    }


def learn(model: MomaForCausalLM, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    model.train()
    loss = model(**{key: values.to(model.device) for key, values in batch.items()}).loss
    loss.backward()
    nn.utils.clip_grad_norm_([weight for weight in model.parameters() if weight.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_auxiliary(study: Study, model: MomaForCausalLM, order: np.ndarray) -> None:
    """MoMa's second stage, on rows seen before."""
    model.begin_auxiliary_stage()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for rows in order[: study.scale.auxiliary_steps]:
        learn(model, study.rows.batch(rows.tolist()), optimizer)


def losses_by(study: Study, run: Run, model: MomaForCausalLM, mode: str) -> dict[str, float]:
    """Leaky figures depend on the batch: it is that of training."""
    rows = study.scored[run.split]
    return held_out_losses(model, rows, study.processor, mode=mode, batch_size=study.scale.batch_rows)


def clock() -> float:
    """Seconds: the processor's on a CPU, which others' work stretches less, the wall's on a GPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# -- analysis ----------------------------------------------------------------------------------------------------------


def eta(arm: list[dict], dense: list[dict], *, measure: str = "all", axis: str = "flops") -> float:
    """How much more of `axis` dense needs than the arm for the same loss; below 1 where it needs less.

    Where a curve never comes near the other's end within its first point, the figure is a bound, from that point.
    """
    arm_C, arm_loss_C = _curve(arm, measure, axis)
    dense_C, dense_loss_C = _curve(dense, measure, axis)
    if arm_loss_C[-1] <= dense_loss_C[-1]:
        return dense_C[_reached(dense_loss_C, dense_loss_C[-1])] / _compute_at(arm_C, arm_loss_C, dense_loss_C[-1])
    return _compute_at(dense_C, dense_loss_C, arm_loss_C[-1]) / arm_C[_reached(arm_loss_C, arm_loss_C[-1])]


def _curve(points: list[dict], measure: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
    losses = np.minimum.accumulate([point["losses"][measure] for point in points])
    return np.array([point[axis] for point in points], dtype=float), losses


def _reached(loss_C: np.ndarray, loss: float) -> int:
    """The first point at which a falling curve is as low as a loss."""
    return int(np.argmax(loss_C <= loss))


def _compute_at(compute_C: np.ndarray, loss_C: np.ndarray, loss: float) -> float:
    """Where a falling curve first reaches a loss, interpolated in log compute."""
    k = _reached(loss_C, loss)
    if k == 0:
        return float(compute_C[0])
    part = (loss_C[k - 1] - loss) / (loss_C[k - 1] - loss_C[k])
    low, high = np.log(compute_C[k - 1 : k + 1])
    return float(np.exp(low + part * (high - low)))


def bootstrap(values_S: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % percentile interval over seeds."""
    values = np.array(values_S)
    means = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def analyse(study: Study, arms: list[str], seeds: int) -> dict[str, dict]:
    """Arm -> its rate, losses, η by measure in FLOPs and seconds, gap, and speed beside dense; paired over seeds."""
    results = {}
    for arm in arms:
        pairs = [pair for seed in range(seeds) if (pair := _pair(study, arm, seed))]
        if not pairs:
            continue
        finals = [mine["final"] for mine, _ in pairs]
        results[arm] = {
            "rate": study.rate_of(arm),
            "seeds": len(pairs),
            "parameters": pairs[0][0]["parameters"],
            "flops_a_step": pairs[0][0]["flops_a_step"],
            "losses": {
                mode: {
                    measure: float(np.mean([final[mode][measure] for final in finals])) for measure in finals[0][mode]
                }
                for mode in finals[0]
            },
            "leaky_gap": _gap(finals),
            "speed": bootstrap([mine["tokens_per_second"] / base["tokens_per_second"] for mine, base in pairs]),
            "eta": {axis: _etas(pairs, axis) for axis in ("flops", "seconds")},
        }
    return results


def _pair(study: Study, arm: str, seed: int) -> tuple[dict, dict] | None:
    if study.rate_of(arm) is None or study.rate_of(DENSE) is None:
        return None
    mine, base = (study.kept(Run(name, study.rate_of(name), seed, "test")) for name in (arm, DENSE))
    return (mine, base) if mine and base else None


def _etas(pairs: list[tuple[dict, dict]], axis: str) -> dict[str, list[float]]:
    measures = [measure for measure in MEASURES if measure in pairs[0][0]["curve"][-1]["losses"]]
    logs = {
        measure: [np.log(eta(mine["curve"], base["curve"], measure=measure, axis=axis)) for mine, base in pairs]
        for measure in measures
    }
    return {measure: np.exp(bootstrap(values)).tolist() for measure, values in logs.items()}


def _gap(finals: list[dict]) -> dict[str, list[float]]:
    """Causal (thresholds) minus leaky loss: what a leaky figure would have promised. Empty where nothing leaks."""
    if LEAKY not in finals[0]:
        return {}
    return {
        measure: list(bootstrap([final["threshold"][measure] - final[LEAKY][measure] for final in finals]))
        for measure in finals[0][LEAKY]
    }


def as_markdown(results: dict[str, dict]) -> str:
    """Tables: η, causal losses, gaps."""
    measures = [measure for measure in MEASURES if measure in next(iter(results.values()))["eta"]["flops"]]

    def table(title: str, cell: Any, rows: list[str]) -> list[str]:
        lines = [f"**{title}**", "", f"| arm | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
        return [*lines, *(f"| {arm} | {' | '.join(cell(arm, m) for m in measures)} |" for arm in rows), ""]

    def spread(values: list[float]) -> str:
        return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"

    lines = ["# MoMa study", ""]
    for axis in ("flops", "seconds"):
        lines += table(
            f"η in {axis}: how much more dense needs for the same causal held-out loss",
            lambda arm, m, axis=axis: spread(results[arm]["eta"][axis][m]),
            list(results),
        )
    for mode in ("threshold", "aux", "token"):
        rows = [arm for arm in results if mode in results[arm]["losses"]]
        lines += table(
            f"causal loss, nats a token: {mode}",
            lambda arm, m, mode=mode: f"{results[arm]['losses'][mode][m]:.3f}",
            rows,
        )
    leaking = [arm for arm in results if results[arm]["leaky_gap"]]
    lines += table("causal minus leaky loss", lambda arm, m: spread(results[arm]["leaky_gap"][m]), leaking)
    lines += [
        "| arm | rate | seeds | parameters, M | active, M | GFLOP a step | speed beside dense |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {arm} | {r['rate']:g} | {r['seeds']} | {r['parameters']['total'] / 1e6:.2f} | "
        f"{r['parameters']['active'] / 1e6:.2f} | {r['flops_a_step'] / 1e9:.1f} | {spread(r['speed'])} |"
        for arm, r in results.items()
    ]
    return "\n".join(lines) + "\n"


# -- command -----------------------------------------------------------------------------------------------------------


def main(
    image_tokenizer: Annotated[Path, typer.Option(help="Folder of a stage image_tokenizer.")],
    scale: Annotated[Literal["smoke", "cpu", "gpu"], typer.Option(help="Size.")] = "cpu",
    seeds: Annotated[int, typer.Option(help="Of every arm.")] = 3,
    main_seeds: Annotated[int, typer.Option(help="Of dense and 4t4i.")] = 5,
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms (and dense).")] = None,
    limit_minutes: Annotated[float, typer.Option(help="Start no run that would end later.")] = 60.0,
    out: Annotated[Path, typer.Option(help="Where results go.")] = FOLDER,
    report_only: Annotated[bool, typer.Option("--report-only", help="Tables of what is there.")] = False,
) -> None:
    """Train and score what is not there yet, then report."""
    quieten()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    study = Study(scale, image_tokenizer, out)
    arms = list(ARMS) if not arm else list(dict.fromkeys([DENSE, *arm]))
    if not report_only:
        study.prepare()
        began, longest = time.monotonic(), 0.0
        for run in study.due(arms, seeds, main_seeds):
            started = time.monotonic()
            if started - began + longest > 60 * limit_minutes:
                print("time is over; the same command goes on")
                break
            record = study.carry_out(run)
            longest = max(longest, time.monotonic() - started)
            print(f"{run.name}: causal loss {record['curve'][-1]['losses']['all']:.4f}, {longest:.0f} s", flush=True)
    results = analyse(study, arms, max(seeds, main_seeds))
    if not results:
        print("no seed of dense is complete yet")
        return
    (study.folder / "results.json").write_text(json.dumps(provenance() | {"arms": results}, indent=1) + "\n")
    (study.folder / "README.md").write_text(as_markdown(results), encoding="utf-8")
    print(as_markdown(results))


if __name__ == "__main__":
    typer.run(main)
