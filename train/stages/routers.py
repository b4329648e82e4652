"""Stage routers: the routers of an adapter that is there learn to route like neighbours (RoMA, 2511.07419).

What is dear is kept in the folder `work` of the output_dir: the answers that tell who succeeded, and the states
entering the first trained layer. A run that was interrupted takes both from there; the training itself is short and
starts again, so there are no checkpoints. Settings of other stages (`data.workers`, `model.gradient_checkpointing`, …)
have no meaning here.

N rows, R length of a routing vector.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import deepspeed
import torch
from peft import PeftModel
from pydantic import model_validator
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaProcessor, get_scheduler, set_seed

from mllm.alignment import (
    Aligner,
    AlignmentBatches,
    AlignmentData,
    AlignSettings,
    CachedStates,
    EncodedRows,
    Neighbours,
    answered,
    cache_states,
    embed,
    nearest,
    routed_layers,
    sample_vectors,
    save_router_adapter,
    score,
    successful,
)
from mllm.alignment.align import CALIBRATION_BATCHES, begin_epoch, row_order
from mllm.alignment.embeddings import centred
from mllm.alignment.report import alignment_tables, consistency, draw_routing, moved_layers
from mllm.alignment.vectors import vector_sizes
from mllm.build import BASE_CARD, load, resolve
from mllm.common import ranks
from mllm.common.console import quieten
from mllm.common.digests import digest
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation
from mllm.data.encoded import EncodedMixture
from mllm.data.mixture import Mixture, load_mixture
from mllm.data.template import IGNORED, ConversationEncoder
from mllm.evaluation.answers import Answer
from mllm.evaluation.report import Arm, build_report
from mllm.evaluation.tables import markdown, print_tables, remarks, report_tables
from mllm.inference.evaluate import stamp
from mllm.mole import MoleConfig
from train.bad_rows import BAD_ROWS, BadRows
from train.check import ADAPTER, check_run
from train.config import RoutersSection, TrainConfig
from train.parts import DTYPES, parameter_groups, write_adapter
from train.run import prepare_folder, set_up_cpu
from train.trainer import LOG
from train.zero import deepspeed_config

ROUTERS, WORK = "routers", "work"
check = check_run  # nothing of its own to find wrong before the start


class Config(TrainConfig):
    """Its settings."""

    stage: Literal["routers"]
    routers: RoutersSection = RoutersSection()

    @model_validator(mode="after")
    def routers_to_align(self) -> "Config":
        if self.model.adapter is not None or self.model.start_from is None:
            raise ValueError(
                "stage routers goes on with a MoLE adapter: give its folder as model.start_from, and no model.adapter"
            )
        if self.run.max_hours is not None:
            raise ValueError("stage routers saves no checkpoints to go on from: leave run.max_hours out")
        if self.deepspeed.zero == 3:
            raise ValueError("stage routers trains a few thousand weights: set deepspeed.zero to 0, 1 or 2")
        return self


@dataclass
class AlignmentRun:
    """What the steps of a run share. Rows are numbered through: those to learn from first, then the held-out ones."""

    config: Config
    model: PeftModel
    processor: LlavaProcessor
    conversations: list[Conversation]
    num_trained: int
    data: AlignmentData
    stamp: str

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.config.run.output_dir

    @property
    def trained_rows(self) -> range:
        """To learn from."""
        return range(self.num_trained)

    @property
    def held_out(self) -> range:
        """To validate on."""
        return range(self.num_trained, len(self.conversations))

    def answers(self, rows: range, name: str, *, stamp: str = "") -> list[Answer]:
        """What the model answers, kept under that name. All ranks call it together."""
        return answered(
            self.model,
            self.processor,
            [self.conversations[row] for row in rows],
            self.folder / WORK / f"{name}.jsonl",
            stamp=stamp or self.stamp,
            batch_size=self.config.run.micro_batch_size,
        )


def run(config: Config, mixture: Mixture) -> None:
    """Aligns, validates, reports and saves. Every rank calls it, with RANK, LOCAL_RANK and WORLD_SIZE set.

    Writes into `run.output_dir`: routers/, adapter/, report.json, .md and .png, train_log.jsonl, config.yaml, work/.
    """
    quieten()
    if not torch.cuda.is_available():
        set_up_cpu()
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    set_seed(config.run.seed)
    if ranks.is_first():
        prepare_folder(config, fresh=True, results=(ADAPTER, ROUTERS, "report.json", "report.md", "report.png"))
    ranks.barrier()
    run = open_run(config, mixture)
    answers = run.answers(run.trained_rows, "before-train")
    before = run.answers(run.held_out, "before-held-out")
    embeddings_NM = over_ranks(len(run.conversations), lambda rows: embed_rows(run, rows))
    embeddings_NM = centred(embeddings_NM, embeddings_NM[: run.num_trained].mean(0))
    if config.routers.cache:
        run = replace(run, data=cached(run))
    true = neighbours_among(run, embeddings_NM, answers)
    aligner, choice = choose_weight(run, embeddings_NM, answers)
    after = run.answers(run.held_out, "after-held-out", stamp=digest([run.stamp, weights_digest(aligner)]))
    if ranks.is_first():
        report = make_report(run, aligner, true, before, after, choice)
        save(run, aligner)
        show(run, report)
    ranks.barrier()


def open_run(config: Config, mixture: Mixture) -> AlignmentRun:
    """Model, rows and what everything kept depends on."""
    model, processor = load(
        config.model.path, adapter=config.model.start_from, dtype=DTYPES[config.model.dtype], device=ranks.own_device()
    )
    if not isinstance(model, PeftModel) or not isinstance(model.peft_config["default"], MoleConfig):
        raise UserError(
            f"model.start_from {config.model.start_from} is no MoLE adapter, so it has no routers to align."
        )
    rows = dict.fromkeys(mixture.order(config.run.seed, 0).tolist())
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", config.data.max_length)
    max_length = min(config.data.max_length, positions)
    taken = usable_rows(config, mixture, ConversationEncoder(processor, max_length), rows)
    if config.routers.validation is not None:
        held_out = list(load_mixture(config.routers.validation))
    else:
        number = max(1, round(config.routers.validation_share * len(taken)))
        taken, held_out = taken[:-number], taken[-number:]
    if len(taken) <= config.routers.neighbours:
        raise UserError(f"{len(taken)} rows to learn from are too few for {config.routers.neighbours} neighbours each.")
    conversations = [*taken, *held_out]
    data = EncodedRows(conversations, processor, max_length)
    in_text = getattr(processor, "special_tokens_in_text", "text")
    made_of = [stamp(resolve(config.model.path), config.model.start_from), config.model.dtype, in_text]
    return AlignmentRun(config, model, processor, conversations, len(taken), data, digest(made_of))


def usable_rows(
    config: Config, mixture: Mixture, encoder: ConversationEncoder, rows: Iterable[int]
) -> list[Conversation]:
    """The first `align.samples` of the rows; with `bad_rows: skip`, of those that can be used.

    A bad row has no stand-in here, which might be a row that is taken too, or held out. All ranks call it together.
    Raises UserError as `EncodedMixture` does, and for more bad rows than `max_bad` allows.
    """
    if {mixture.config.bad_rows, mixture.config.too_long} <= {"error", None}:
        return [mixture[row] for row in islice(rows, config.routers.samples)]  # a bad one stops the run when encoded
    samples = EncodedMixture(mixture, encoder)
    bad_rows = BadRows(config.run.output_dir / BAD_ROWS, mixture)
    taken: list[Conversation] = []
    for row in rows:
        if len(taken) == config.routers.samples:
            break
        conversation, sample = samples.take(row)
        told = sample.get("bad_rows", [])
        bad_rows.add(told)
        if not any(bad.index == row and bad.action == "skipped" for bad in told):
            taken.append(conversation)
    bad_rows.gather(step=0)
    return taken


def cached(run: AlignmentRun) -> CachedStates:
    """The rows as states entering the first trained layer; each rank makes its share, all read all."""
    first = routed_layers(run.model, layers_of(run.config))[0].depth
    rows = [[row.where, row.turns, [str(path) for path in row.images]] for row in run.conversations]
    cache_states(
        run.model,
        run.data,
        run.folder / WORK / "states",
        first_layer=first,
        rows=range(len(run.conversations))[ranks.rank() :: ranks.size()],
        batch_size=run.config.run.micro_batch_size,
        part=f"{ranks.rank()}-of-{ranks.size()}",
        stamp=digest([run.stamp, str(rows)]),
    )
    ranks.barrier()
    return CachedStates(run.folder / WORK / "states", pad_token_id=run.processor.tokenizer.pad_token_id)


def layers_of(config: Config) -> int | tuple[int, ...]:
    """As the library takes them."""
    return config.routers.layers if isinstance(config.routers.layers, int) else tuple(config.routers.layers)


def over_ranks(number: int, compute: Callable[[range], Tensor]) -> Tensor:
    """`compute(rows)` of all rows [N, …], each rank its share. All ranks call it together."""
    parts = ranks.all_gathered(compute(range(number)[ranks.rank() :: ranks.size()]))
    whole = parts[0].new_empty(number, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: ranks.size()] = part
    return whole


def embed_rows(run: AlignmentRun, rows: range) -> Tensor:
    """Embeddings of questions and pictures."""
    return embed(
        run.config.routers.embedding, run.model, run.data, run.conversations, rows=rows,
        batch_size=run.config.run.micro_batch_size,
    )  # fmt: skip


def neighbours_among(
    run: AlignmentRun, embeddings_NM: Tensor, answers: list[Answer], *, random: bool = False
) -> Neighbours:
    """Of every row, held-out ones too; neighbours are rows to learn from, by default those answered correctly.

    `random` draws others in their place, with their weights.
    """
    align = run.config.routers
    candidates_N = torch.zeros(len(embeddings_NM), dtype=torch.bool)
    is_right = successful(answers, least_grade=align.least_grade) if align.only_successful else True
    candidates_N[: run.num_trained] = is_right
    found = nearest(
        embeddings_NM, candidates_N=candidates_N, k=align.neighbours, radius=align.radius, sigma=align.sigma
    )
    return found.shuffled(candidates_N, torch.Generator().manual_seed(run.config.run.seed)) if random else found


# -- training ----------------------------------------------------------------------------------------------------------


def choose_weight(run: AlignmentRun, embeddings_NM: Tensor, answers: list[Answer]) -> tuple[Aligner, list[dict]]:
    """Trains with every λ and keeps the one with the least loss on held-out answers; the model has its routers."""
    fits = {field.name for field in fields(AlignSettings)} - {"weight", "layers"}
    settings = AlignSettings(layers=layers_of(run.config), **run.config.routers.model_dump(include=fits))
    neighbours = neighbours_among(run, embeddings_NM, answers, random=run.config.routers.random_neighbours)
    choice, best = [], None
    weights = run.config.routers.weights if settings.regulariser != "none" else [0.0]
    for weight in weights:
        if best is not None:
            replace_routers(aligner, aligner.initial)  # noqa: F821 that of the λ before
        aligner = Aligner(run.model, replace(settings, weight=weight))
        train(run, aligner, neighbours, embeddings_NM)
        scores = over_ranks(len(run.held_out), lambda rows: held_out_scores(run, rows))
        loss, exact = scores.mean(0).tolist()
        choice.append({"weight": weight, "loss": loss, "exact": exact, "chosen": False, "scale": aligner.scale})
        if best is None or loss < best[0]:
            best = (loss, len(choice) - 1, aligner.weights())
    loss, number, trained = best
    choice[number]["chosen"] = True
    aligner.settings = replace(settings, weight=weights[number])
    aligner.set_weights(trained)
    return aligner, choice


def held_out_scores(run: AlignmentRun, rows: range) -> Tensor:
    """Loss and whether right to the letter of held-out rows, [N, 2]."""
    scores = score(run.model, run.data, [run.held_out[row] for row in rows])
    return torch.stack([scores.loss_N, scores.exact_N.float()], dim=1)


def replace_routers(aligner: Aligner, weights: dict[str, Tensor]) -> None:
    """Routers anew, as parameters that no earlier engine has a hook on."""
    for layer in aligner.layers:
        owner = getattr(layer.router, "router", layer.router)
        for name, parameter in layer.parameters().items():
            fresh = weights[f"{layer.name}.{name}"].to(parameter.device, copy=True)
            setattr(owner, name, nn.Parameter(fresh))


def train(run: AlignmentRun, aligner: Aligner, neighbours: Neighbours, embeddings_NM: Tensor) -> None:
    """One λ, on DeepSpeed's engine."""
    config = run.config
    steps = config.run.steps or math.ceil(config.run.epochs * run.num_trained / config.run.batch_size)
    source = AlignmentBatches(run.data, neighbours if aligner.settings.needs_neighbours else None)
    # the same rows on all ranks, so that all have the same scale; targets kept as a table are alive for it
    first = row_order(run.trained_rows, CALIBRATION_BATCHES, config.run.micro_batch_size, config.run.seed)
    aligner.calibrate(source.batch(rows) for rows in first)
    order = row_order(run.trained_rows, steps, config.run.batch_size, config.run.seed)
    engine = make_engine(config, aligner, steps)
    per_epoch, losses = -(-run.num_trained // config.run.batch_size), []
    refresh = refresher(run, embeddings_NM) if config.routers.refresh_success else None
    bar = tqdm(order, total=steps, desc=f"λ = {aligner.settings.weight:g}", disable=ranks.rank() > 0)
    for step, rows in enumerate(bar):
        if step % per_epoch == 0:
            begin_epoch(aligner, source, step // per_epoch, refresh)
        aligner.progress = step / steps
        losses.append(take_step(config, engine, source, rows))
        if (step + 1) % config.run.log_every == 0 or step + 1 == steps:
            log(run, aligner, step + 1, torch.stack(losses).mean(0))
            losses = []
    engine.destroy()


def make_engine(config: Config, aligner: Aligner, steps: int) -> deepspeed.DeepSpeedEngine:
    """Without autocast: routers are aligned in the arithmetic in which answers are given, adapters in fp32."""
    optim = config.optim
    optimizer = torch.optim.AdamW(parameter_groups(aligner, optim), lr=optim.lr, betas=optim.betas)
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    rate = get_scheduler(schedules[optim.schedule], optimizer, round(optim.warmup_ratio * steps), steps)
    accumulation = config.run.batch_size // (config.run.micro_batch_size * ranks.size())
    settings = deepspeed_config(config, accumulation=accumulation)
    settings["torch_autocast"]["enabled"] = False
    return deepspeed.initialize(model=aligner, optimizer=optimizer, lr_scheduler=rate, config=settings)[0]


def take_step(config: Config, engine: deepspeed.DeepSpeedEngine, source: AlignmentBatches, rows: list[int]) -> Tensor:
    """One optimizer step of this rank's micro-batches; returns its answer loss and regulariser.

    Answers count by their tokens in the whole step, and the engine averages over ranks and micro-batches.
    """
    micro, stride = config.run.micro_batch_size, config.run.micro_batch_size * ranks.size()
    own = [rows[start : start + micro] for start in range(ranks.rank() * micro, len(rows), stride)]
    batches = [source.batch(each) for each in own]
    tokens = sum((batch.labels_BS[:, 1:] != IGNORED).sum() for batch in batches)
    tokens = ranks.summed(tokens.to(engine.device, torch.float64)).item() / (len(batches) * ranks.size())
    taken = []
    for batch in batches:
        loss, answer_loss, regulariser = engine(batch._replace(answer_tokens=tokens))
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()}. Lower optim.lr or routers.weight.")
        engine.backward(loss)
        engine.step()
        taken.append(torch.stack([answer_loss, regulariser]).float())
    return torch.stack(taken).mean(0)


def refresher(run: AlignmentRun, embeddings_NM: Tensor) -> Callable[[Aligner, int], Neighbours]:
    """Who succeeds now."""

    def refresh(aligner: Aligner, epoch: int) -> Neighbours:
        name = f"epoch-{epoch}-weight-{aligner.settings.weight:g}"
        answers = run.answers(run.trained_rows, name, stamp=digest([run.stamp, weights_digest(aligner)]))
        return neighbours_among(run, embeddings_NM, answers, random=run.config.routers.random_neighbours)

    return refresh


def weights_digest(aligner: Aligner) -> str:
    """Changes with every bit of the routers."""
    return digest([[name, weight.numpy().tobytes().hex()] for name, weight in aligner.weights().items()])


def log(run: AlignmentRun, aligner: Aligner, step: int, losses: Tensor) -> None:
    """Means over ranks of the steps since the last entry. All ranks call it together."""
    answer_loss, regulariser = (ranks.summed(losses.clone()) / ranks.size()).tolist()
    if ranks.is_first():
        entry = {"weight": aligner.settings.weight, "step": step, "answer_loss": answer_loss,
                 "regulariser": aligner.scale * regulariser}  # fmt: skip
        with (run.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


# -- results -----------------------------------------------------------------------------------------------------------


def make_report(
    run: AlignmentRun,
    aligner: Aligner,
    true: Neighbours,
    before: list[Answer],
    after: list[Answer],
    choice: list[dict],
) -> dict:
    """What alignment did to held-out rows: their routing, and their answers as the evaluation grades them."""
    final, token = aligner.weights(), aligner.settings.token
    vectors = {}
    for when, weights in (("before", aligner.initial), ("after", final)):
        aligner.set_weights(weights)
        vectors[when] = sample_vectors(run.model, run.data, aligner.layers, token=token)
    sizes, held_out = vector_sizes(run.model, aligner.layers), list(run.held_out)
    tasks = [f"{row.domain}: {row.qtype or row.source}" for row in run.conversations]
    draw_routing(*(each[held_out] for each in vectors.values()), [tasks[row] for row in held_out],
                 run.folder / "report.png")  # fmt: skip
    arms = {name: Arm(answers=answers) for name, answers in (("before", before), ("after", after))}
    return {
        "settings": asdict(aligner.settings),
        "trained_parameters": sum(weight.numel() for weight in final.values()),
        "consistency": {when: consistency(table, true, held_out) for when, table in vectors.items()},
        "layers": moved_layers(
            *(each[held_out] for each in vectors.values()), sizes, aligner.names, aligner.initial, final
        ),
        "choice": choice,
        "evaluation": build_report(arms, []),
    }


def save(run: AlignmentRun, aligner: Aligner) -> None:
    """The routers alone, and the adapter with them in it."""
    start = run.config.model.start_from
    save_router_adapter(run.folder / ROUTERS, aligner, base=run.config.model.path, adapter=str(start))
    card = (start / BASE_CARD).read_text(encoding="utf-8") if (start / BASE_CARD).is_file() else "{}"
    weights = {name: tensor.detach().cpu() for name, tensor in run.model.state_dict().items()}
    write_adapter(run.folder / ADAPTER, run.model, weights, base_card=card, start_from=start)
    if card == "{}":
        (run.folder / ADAPTER / BASE_CARD).unlink()


def show(run: AlignmentRun, report: dict) -> None:
    """Prints the report and writes it."""
    tables = [*alignment_tables(report), *report_tables(report["evaluation"])]
    notes = [
        f"{report['trained_parameters']:,} router weights trained; {run.num_trained} rows to learn from,"
        f" {len(run.held_out)} held out. λ was chosen on these held-out rows, so their scores flatter it:"
        " test on others.",
        *remarks(report["evaluation"]),
    ]
    print_tables(tables, notes)
    text = markdown("Router alignment\n\n![routing vectors before and after](report.png)", tables, notes)
    (run.folder / "report.md").write_text(text, encoding="utf-8")
    unfinished = run.folder / "report.json.part"
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, run.folder / "report.json")
    Console(highlight=False).print(
        f"routers saved in {run.folder / ROUTERS}, the adapter with them in {run.folder / ADAPTER}"
    )
