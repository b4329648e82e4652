"""One stage, on one rank: data, model, trainer, adapter."""

import math
import os
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlavaProcessor, ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from mllm.build import BASE_CARD, write_base_card
from mllm.common import ranks
from mllm.common.console import quieten
from mllm.data.collate import Collator
from mllm.data.encoded import EncodedMixture
from mllm.data.mixture import Mixture
from mllm.data.template import ConversationEncoder
from train.bad_rows import BAD_ROWS
from train.check import ADAPTER, CHECKPOINTS, ROWS, SETTINGS, checkpoints, find_checkpoint, tell_of_checkpoint
from train.config import TrainConfig
from train.parts import build_model, part_of, part_rate, router_rate_after, starts_from_adapter, trained
from train.routing import routing_table, start_from_domains
from train.trainer import LOG, LogFile, MllmTrainer, ProgressLine
from train.zero import deepspeed_config

TENSORBOARD = "tensorboard"


def run_stage(config: TrainConfig, mixture: Mixture) -> None:
    """Trains and saves. Every rank calls it, with RANK, LOCAL_RANK and WORLD_SIZE in the environment.

    Writes into `run.output_dir`: config.yaml, train_log.jsonl, tensorboard/, checkpoints/, bad_rows.jsonl if
    there are any, and, at the end, adapter/.
    """
    quieten()
    if not torch.cuda.is_available():
        set_up_cpu()
    set_seed(config.run.seed)  # adapters start from the same values on every rank
    checkpoint = find_checkpoint(config)
    steps = config.run.steps or math.ceil(config.run.epochs * mixture.epoch_length / config.run.batch_size)
    if ranks.is_first():
        tell_of_checkpoint(config, checkpoint, steps)
    model, processor = build_model(config)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", config.data.max_length)
    encoder = ConversationEncoder(processor, min(config.data.max_length, positions))
    card = base_card(model, config.model.path, processor)
    learned = config
    if not starts_from_adapter(config.model):  # when resumed too: weights come from the checkpoint, the rate from here
        start = start_from_domains(model, EncodedMixture(mixture, encoder), mixture.order(config.run.seed, 0))
        learned = config.model_copy(update={"optim": router_rate_after(config.optim, start)})
    if ranks.is_first():
        show_run(learned, model, mixture, encoder, steps)
        prepare_folder(config, fresh=checkpoint is None, rows=mixture.contents())
    trainer = MllmTrainer(
        config=learned,
        domains=mixture.domains,
        base_card=card,
        model=model,
        args=training_arguments(config, steps),
        train_dataset=EncodedMixture(mixture, encoder),
        data_collator=Collator(processor),
        callbacks=callbacks(config),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLine())
    trainer.train_and_save(checkpoint)
    if ranks.is_first():
        if trainer.routing.last.layers:
            Console(highlight=False).print(routing_table(trainer.routing.last))
        print(f"adapter saved in {config.run.output_dir / ADAPTER}", flush=True)


def set_up_cpu() -> None:
    """Two choices of the libraries that do not serve a CPU.

    DeepSpeed's shared-memory reduction needs a compiler, takes a minute to build on the first start, and a start that
    is killed meanwhile leaves a lock on which every later one waits for ever: gloo reduces instead. And torch's flash
    attention is slow backwards in bf16: without it a step of a 6M-weight LLaVA takes 540 ms of a core instead of 700.
    """
    deepspeed.ops.__compatible_ops__ = {}
    torch.backends.cuda.enable_flash_sdp(False)  # the switch counts for the CPU's flash attention too


def training_arguments(config: TrainConfig, steps: int) -> TrainingArguments:
    """Trainer's arguments. Making them starts the process group."""
    run, optim = config.run, config.optim
    accumulation = run.batch_size // (run.micro_batch_size * int(os.environ["WORLD_SIZE"]))
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    return TrainingArguments(
        output_dir=str(run.output_dir / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=run.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=optim.lr,
        lr_scheduler_type=schedules[optim.schedule],
        warmup_steps=round(optim.warmup_ratio * steps),
        max_grad_norm=optim.max_grad_norm,
        average_tokens_across_devices=True,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,  # the trainer stops on them
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 1,
        seed=run.seed,
        report_to="none",
        remove_unused_columns=False,
        deepspeed=deepspeed_config(config, accumulation=accumulation),
        use_cpu=not torch.cuda.is_available(),
        log_level="error",
    )


def callbacks(config: TrainConfig) -> list[Any]:
    """What follows the run: the log file and, on rank 0, TensorBoard."""
    followers: list[Any] = [LogFile(config.run.output_dir / LOG)]
    if config.run.report_to == "tensorboard" and ranks.is_first():
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import

        followers.append(TensorBoardCallback(SummaryWriter(str(config.run.output_dir / TENSORBOARD))))
    return followers


def base_card(model: nn.Module, path: str, processor: LlavaProcessor) -> str:
    """The text of `base.json`, made before the engine starts: under ZeRO-3 no rank holds whole weights afterwards."""
    with TemporaryDirectory() as folder:
        write_base_card(folder, model, path, processor)
        return Path(folder, BASE_CARD).read_text(encoding="utf-8")


def prepare_folder(
    config: TrainConfig, *, fresh: bool, rows: str | None = None, results: tuple[str, ...] = (ADAPTER,)
) -> None:
    """Make `output_dir` with the settings as resolved, and the digest of the rows that are read.

    What a finished run left goes first: results always belong to the settings beside them, whenever a run is killed. A
    new run takes the place of an older one's records, too; what else lies beside its checkpoints is left.
    """
    folder = config.run.output_dir
    for result in results:
        remove(folder / result)
    if fresh:
        for old in [*checkpoints(folder), folder / TENSORBOARD, folder / LOG, folder / BAD_ROWS]:
            remove(old)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / SETTINGS)
    if rows is not None:
        (folder / ROWS).write_text(f"{rows}\n", encoding="utf-8")


def remove(path: Path) -> None:
    """Takes away a file or a folder, if there is one; a folder is out of the way at once, not file by file."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def show_run(config: TrainConfig, model: nn.Module, mixture: Mixture, encoder: ConversationEncoder, steps: int) -> None:
    """Prints what is trained, part by part, on what, and the first sample with its supervised span."""
    console = Console(highlight=False)
    console.print(trained_table(config, model))
    parameters = list(model.parameters())
    total, active = (
        sum(p.numel() for p in parameters if p.requires_grad or everything) for everything in (True, False)
    )
    rows = Counter(mixture.domain_of_row)
    console.print(
        f"{active:,} of {total:,} parameters trained ({active / total:.2%}), in fp32; base {config.model.path} in"
        f" {config.model.dtype}, frozen\n"
        f"{len(mixture):,} rows ({', '.join(f'{name} {count:,}' for name, count in sorted(rows.items()))});"
        f" {steps:,} steps of {config.run.batch_size} samples; {os.environ['WORLD_SIZE']} rank(s) with"
        f" {config.run.micro_batch_size} at once, ZeRO {config.deepspeed.zero}\nfirst sample:"
    )
    samples = EncodedMixture(mixture, encoder)
    console.print(encoder.show(samples[int(mixture.order(config.run.seed, 0)[0])]))


def trained_table(config: TrainConfig, model: nn.Module) -> Table:
    """Tensors, parameters and learning rate of each part that is trained."""
    table = Table("part", "tensors", "parameters", "lr", title=f"stage {config.stage}: trained parts")
    tensors, sizes = Counter(), Counter()
    for name, parameter in trained(model):
        tensors[part_of(name)] += 1
        sizes[part_of(name)] += parameter.numel()
    for part in sizes:
        table.add_row(part, str(tensors[part]), f"{sizes[part]:,}", f"{part_rate(config.optim, part):g}")
    return table
