"""One stage of the early-fusion model, on one rank: vocabulary, model, rows, trainer, report."""

import subprocess
from pathlib import Path

import torch
from transformers import ProgressCallback, set_seed

from mllm.common import ranks
from mllm.common.console import quieten
from mllm.common.errors import UserError
from mllm.common.folders import check_writable
from mllm.common.processes import module_command, module_environment
from mllm.moma.processor import MomaProcessor
from mllm.moma.stream import PackedRows
from train.check import check_whole_batches, find_checkpoint, tell_of_checkpoint
from train.moma.config import MomaTrainConfig, StreamSection
from train.moma.data import as_experts, check_data, check_length, contents, data_digest, training_rows
from train.moma.model import MODEL, build_moma, build_processor, check_fields, config_of, num_parameters, rows_seen
from train.moma.trainer import MomaTrainer
from train.run import callbacks, prepare_folder, set_up_cpu, training_arguments
from train.trainer import ProgressLine

RESULTS = (MODEL, "report.json", "report.md", "samples.png")


def check_moma(config: MomaTrainConfig, *, ranks: int) -> None:
    """What a run needs, found in order in a second. Raises UserError naming the key."""
    quieten()
    check_writable(config.run.output_dir, "run.output_dir")
    check_whole_batches(config.run, ranks)
    check_fields(config.model)
    check_data(config.data)
    processor = build_processor(config.model)
    model = config_of(config, processor)
    check_length(config.data, model, processor)
    data = as_experts(config.data, model.layout)
    find_checkpoint(config, MODEL, ranks=ranks, data=lambda: contents(data, processor))


def run_moma(config: MomaTrainConfig, checked: None = None) -> None:
    """Trains and saves. Every rank calls it.

    Writes into `run.output_dir`: config.yaml, train_log.jsonl, tensorboard/, checkpoints/ and, at the end, model/,
    report.json, report.md and samples.png.
    """
    quieten()
    if not torch.cuda.is_available():
        set_up_cpu()
    set_seed(config.run.seed)  # new weights are the same on every rank
    checkpoint = find_checkpoint(config, MODEL)
    if ranks.is_first():
        tell_of_checkpoint(config, checkpoint, config.run.steps)
    model, processor = build_moma(config)
    arguments = training_arguments(config, config.run.steps)
    data = as_experts(config.data, model.config.layout)
    rows, name = first_rank_first(data, processor), data_digest(data, processor)
    start = rows_seen(config, name)
    if ranks.is_first():
        show_run(config, model, rows, start)
        prepare_folder(config, fresh=checkpoint is None, rows=contents(data, processor), results=RESULTS)
    trainer = MomaTrainer(
        config=config,
        processor=processor,
        start=start,
        data_digest=name,
        model=model,
        args=arguments,
        train_dataset=rows,
        callbacks=callbacks(config),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLine())
    trainer.train_and_save(checkpoint)
    if ranks.is_first():
        print(f"model saved in {config.run.output_dir / MODEL}", flush=True)
        if config.report.enabled:
            report(config.run.output_dir)


def first_rank_first(data: StreamSection, processor: MomaProcessor) -> PackedRows:
    """The rows, made by one rank while the others wait."""
    if ranks.is_first():
        training_rows(data, processor)
    ranks.barrier()
    return training_rows(data, processor)


def show_run(config: MomaTrainConfig, model: torch.nn.Module, rows: PackedRows, start: int) -> None:
    """Prints what learns, from what."""
    total, learning = num_parameters(model)
    image = rows.ids_RS >= model.config.image_token_start
    print(
        f"stage {config.stage}: {learning:,} of {total:,} parameters learn; {model.config.num_hidden_layers} layers, "
        f"experts {model.config.expert_groups}\n"
        f"{len(rows):,} rows of {rows.ids_RS.shape[1]} tokens, {image.mean():.0%} of them image codes; "
        f"begins at row {start:,} of the run's order",
        flush=True,
    )


def report(folder: Path) -> None:
    """In a process of its own: under ZeRO-3 this one can load no model."""
    command = module_command("train.moma.report", str(folder))
    made = subprocess.run(command, env=module_environment(), check=False)
    if made.returncode:
        raise UserError(f"the model is saved, its report failed; make it again: python -m train.moma.report {folder}")
