"""What can be wrong with a run before it starts: said in a second, before any folder or process group is made."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from mllm.build import PROJECTOR_FILE, load_processor, load_window, read_adapter_config
from mllm.common.errors import UserError
from mllm.common.folders import check_writable
from mllm.common.precision import lacks_bf16
from mllm.common.ranks import is_first
from mllm.data.check import check_mixture
from mllm.data.mixture import Mixture, load_mixture
from mllm.data.sources import tell_first
from mllm.data.template import ConversationEncoder
from mllm.mole import MoleConfig
from train.bad_rows import check_limit
from train.config import RunSection, TrainConfig, read_yaml, renamed
from train.parts import adapter_config, starts_from_adapter
from train.seal import damage

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
SETTINGS = "config.yaml"
ROWS = "rows.txt"  # digest of what a run reads, and a line about each file
FROM_NEWEST = ("auto", "data")  # values of run.resume
ANEW = "run.resume=never (for a finished run, run.overwrite=true)"
WHERE_DATA_LIES = ("data.mixture:", "data.captions:", "data.image_root:", "data.cache:")
# What may change between a run and its continuation.
FREE_ON_RESUME = {
    "run": {
        "resume",
        "overwrite",
        "max_hours",
        "log_every",
        "save_every",
        "keep",
        "report_to",
        "output_dir",
        "micro_batch_size",
    },
    "data": {"workers"},
    "deepspeed": {"offload"},
    "model": {"gradient_checkpointing"},
}


def check_run(config: TrainConfig, *, ranks: int) -> Mixture:
    """The run's mixture, opened, once everything a run needs was found in order.

    Raises:
        UserError: batch sizes that do not divide, adapter fields, a base or an adapter to start from that is not there,
            data that cannot be read, or a folder that holds another run. Each message names the key.
    """
    check_batch(config.run, ranks)
    config.run.micro_batch_size = micro_batch(config.run, ranks)
    adapter = adapter_config(config.model)
    processor = load_processor(config.model.path)
    start = config.model.start_from
    if start is not None and not any((start / name).is_file() for name in ("adapter_config.json", PROJECTOR_FILE)):
        raise UserError(
            f"model.start_from: {start} holds neither adapter_config.json nor {PROJECTOR_FILE}. Give the"
            " adapter folder of an earlier run."
        )
    data = config.data
    mixture = load_mixture(data.mixture, bad_rows=data.bad_rows, max_bad=data.max_bad, too_long=data.too_long)
    name_domains(config, adapter, mixture)
    find_checkpoint(config, ranks=ranks, data=mixture.contents)
    if config.stage == "instruct" and starts_from_adapter(config.model):
        check_domains(read_adapter_config(start), mixture)
    check_domains(adapter, mixture)
    if is_first():
        window = load_window(config.model.path) or data.max_length
        check_rows(mixture, ConversationEncoder(processor, min(data.max_length, window)))
    return mixture


def name_domains(config: TrainConfig, adapter: PeftConfig | None, mixture: Mixture) -> None:
    """Fills in the domains that experts are meant for, where the router is to be taught them and they are several."""
    if not isinstance(adapter, MoleConfig) or adapter.expert_domains or not adapter.learns:
        return
    is_labelled = adapter.domain_loss_weight > 0 and adapter.router_start != "clusters"
    if is_labelled and len(mixture.domains) > 1:
        config.model.adapter["expert_domains"] = list(mixture.domains)


def check_domains(adapter: PeftConfig | None, mixture: Mixture) -> None:
    """Raises UserError if no expert is meant for one of the mixture's domains."""
    if isinstance(adapter, MoleConfig) and adapter.expert_domains:
        unknown = [domain for domain in mixture.domains if domain not in adapter.expert_domains]
        if unknown:
            raise UserError(
                f"The adapter's expert_domains are {', '.join(adapter.expert_domains)}, but the mixture also holds"
                f" {', '.join(unknown)}. Name every domain in model.adapter.expert_domains, in the order of experts; an"
                " adapter started from keeps its own, so start a new one, or tag the rows with a domain it has."
            )


def check_rows(mixture: Mixture, encoder: ConversationEncoder) -> None:
    """Raises UserError for rows that would stop the run when their turn comes: better now than hours into it.

    Those are missing pictures, too long rows and whatever else can be told without decoding a picture; with
    `bad_rows: skip`, more of them than `max_bad` allows.
    """
    bad = check_mixture(mixture, encoder, decode=False, progress=len(mixture) > 20_000).bad
    refused = [row.error for row in bad if row.action == "refused"]
    if refused:
        raise UserError(tell_first(refused))
    check_limit(mixture, [row.error for row in bad], "found before the start")


def check_dtype(dtype: str) -> None:
    """Raises UserError for bf16 on a GPU that does not compute in it: it would be emulated, many times slower."""
    if dtype == "bf16" and lacks_bf16():
        raise UserError(
            f"model.dtype=bf16: {torch.cuda.get_device_name()} does not compute in bfloat16. Set model.dtype=fp32."
        )


def check_batch(run: RunSection, ranks: int) -> None:
    """Raises UserError unless the global batch is shared out evenly among the ranks."""
    if run.batch_size % ranks:
        raise UserError(
            f"run.batch_size={run.batch_size} is not a multiple of the {ranks} ranks. Set run.batch_size, or --ranks,"
            " so that it is."
        )


def check_whole_batches(run: RunSection, ranks: int) -> None:
    """Raises UserError unless a step is a whole number of micro-batches of just that size on every rank."""
    if run.batch_size % (run.micro_batch_size * ranks):
        raise UserError(
            f"run.batch_size={run.batch_size} is not a multiple of run.micro_batch_size={run.micro_batch_size} x"
            f" {ranks} ranks. Experts choose among a micro-batch, so its size is kept: set run.batch_size or --ranks."
        )


def micro_batch(run: RunSection, ranks: int) -> int:
    """Samples that a rank holds at once: the most up to `run.micro_batch_size` that divide its share of the batch."""
    share = run.batch_size // ranks
    return next(size for size in range(min(run.micro_batch_size, share), 0, -1) if share % size == 0)


def find_checkpoint(
    config: TrainConfig,
    result: str = ADAPTER,
    *,
    ranks: int | None = None,
    data: Callable[[], str] | None = None,
) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    Args:
        config: of a stage that writes checkpoints.
        result: the folder that a finished run has.
        ranks: how many are to go on; None: not compared.
        data: makes the digest of the rows to go on with, where there is something to compare it with.

    Raises:
        UserError: the checkpoint asked for is not there or not whole, `output_dir` holds a run with other settings,
            other rows or (under ZeRO) another number of ranks, or cannot be written to.
    """
    run = config.run
    check_writable(run.output_dir, "run.output_dir")
    is_over = (run.output_dir / result).exists()
    if run.resume == "never" or (run.resume in FROM_NEWEST and run.overwrite and is_over):
        refuse_finished(config, result)
        return None
    found = newest(run.output_dir) if run.resume in FROM_NEWEST else Path(run.resume)
    if found is None:
        refuse_finished(config, result)
        return None
    if run.resume not in FROM_NEWEST and (lack := fault(found)):
        raise UserError(
            f"run.resume: {found} is no checkpoint of a run: {lack}. Give a folder checkpoint-N with all that it had,"
            " or auto, or never."
        )
    check_settings(config, found.parent.parent)
    if found.parent.parent.resolve() != run.output_dir.resolve() or not is_longer(config):
        refuse_finished(config, result)
    check_ranks(found, ranks, config.deepspeed.zero)
    check_same_rows(found.parent.parent, data, goes_on=run.resume == "data")
    return found


def refuse_finished(config: TrainConfig, result: str) -> None:
    """Raises UserError if the folder holds what a run leaves at its end, unless it is to be overwritten."""
    run = config.run
    if not (run.output_dir / result).exists():
        return
    if run.overwrite:
        start = getattr(getattr(config, "model", None), "start_from", None)
        if start is not None and start.resolve().is_relative_to(run.output_dir.resolve()):
            raise UserError(
                f"run.overwrite=true would remove model.start_from {start}, which lies in run.output_dir"
                f" {run.output_dir}: set another run.output_dir."
            )
        return
    length = "run.steps" if run.steps else "run.epochs"
    longer = f" a larger {length} to train on," if checkpoints(run.output_dir) else ""
    raise UserError(
        f"run.output_dir {run.output_dir} holds a finished run. Set another run.output_dir,{longer} or"
        " run.overwrite=true to train anew in its place."
    )


def is_longer(config: TrainConfig) -> bool:
    """Whether a run is to take more steps than the one whose settings lie in its folder."""
    file = config.run.output_dir / SETTINGS
    return file.is_file() and longer(read_yaml(file).get("run") or {}, config.run.model_dump(mode="json"))


def longer(old: Mapping, new: Mapping) -> bool:
    """Whether a section `run` asks for more of what another asked for, steps or epochs."""
    return any(old.get(key) and new.get(key) and new[key] > old[key] for key in ("steps", "epochs"))


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of most steps in a run's folder."""
    return next(filter(is_whole, sorted(checkpoints(folder), key=step_of, reverse=True)), None)


def step_of(checkpoint: Path) -> int:
    """The steps that were done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(folder: Path) -> list[Path]:
    """What bears the name of a checkpoint in a run's folder, whole or not."""
    return [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has all its files, as they were written."""
    return fault(checkpoint) is None


def fault(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, in a few words; None: nothing. Runs write them aside, so theirs are whole at first."""
    latest = checkpoint / "latest"  # DeepSpeed's, with the name of the folder of its states
    try:
        has_states = latest.is_file() and (checkpoint / latest.read_text(encoding="utf-8").strip()).is_dir()
    except (UnicodeDecodeError, ValueError):
        return "latest is not what was written"
    if not has_states or not (checkpoint / "trainer_state.json").is_file():
        return "files are missing"
    return damage(checkpoint)


def tell_of_checkpoint(config: TrainConfig, found: Path | None, steps: int | None = None) -> None:
    """Prints what a start does, and what in the run's folder looks like a checkpoint and is none."""
    if config.run.resume in FROM_NEWEST:
        for path in sorted((config.run.output_dir / CHECKPOINTS).glob("checkpoint-*")):
            is_named = path.name.rpartition("-")[2].isdecimal()
            if is_named and found is not None and step_of(path) <= step_of(found):
                continue  # not looked at
            if lack := fault(path):
                print(f"warning: {path} is not a whole checkpoint ({lack}), so it is passed over.", flush=True)
    length = f" of {steps:,} steps" if steps else ""
    print(f"starts anew{length.replace(' of', ':')}" if found is None else f"goes on from {found}{length}", flush=True)


def check_ranks(checkpoint: Path, ranks: int | None, zero: int) -> None:
    """Raises UserError for another number of ranks than the checkpoint's, where the optimizer is split among them."""
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if ranks is not None and zero and before and ranks != before:
        raise UserError(
            f"{checkpoint} was saved by {before} rank(s), and now there are {ranks}: with deepspeed.zero={zero} each"
            f" holds a part of the optimizer. Go on with --ranks {before}, or set {ANEW} to start anew."
        )


def check_same_rows(folder: Path, data: Callable[[], str] | None, *, goes_on: bool = False) -> None:
    """Raises UserError, naming what changed, if a run's rows are others than those it began with.

    Runs of old did not note them. With `goes_on` what changed is only told.
    """
    noted = folder / ROWS
    if data is None or not noted.is_file():
        return
    before, now = noted.read_text(encoding="utf-8").split("\n"), data().split("\n")
    if before[0].strip() == now[0]:
        return
    old, new = ([line for line in lines[1:] if line.strip()] for lines in (before, now))
    gone, come = ("; ".join(line for line in a if line not in b) for a, b in ((old, new), (new, old)))
    is_told = bool(old) and bool(gone or come)
    changed = f"it read {gone or 'no more'}, and now there is {come or 'nothing in its place'}" if is_told else ""
    changed = changed or "what data names has changed since"
    if not goes_on:
        raise UserError(
            f"{folder} holds a run on other rows: {changed}. Put the files back as they were, set run.resume=data to go"
            f" on with the changed ones, set another run.output_dir, or {ANEW} to start anew in its place."
        )
    if os.environ.get("RANK") == "0":  # said by the rank, and not by the launcher, which checks before it, too
        print(f"warning: the rows are not those that {folder} began with: {changed}.", flush=True)


def check_settings(config: TrainConfig, folder: Path) -> None:
    """Raises UserError, naming the differences, if the run in a folder had settings that change its course."""
    if not (folder / SETTINGS).is_file():
        return
    changed = differences(renamed(read_yaml(folder / SETTINGS), quiet=True), config.model_dump(mode="json"))
    if (folder / ROWS).is_file():  # what was read is compared, wherever it lies now
        changed = [change for change in changed if not change.startswith(WHERE_DATA_LIES)]
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}). Set another run.output_dir, or"
            f" {ANEW} to start anew in its place."
        )


def chooses_over_batch(settings: Mapping) -> bool:
    """Whether experts or layers choose among a micro-batch (`mllm.moma`): then its size changes what is learned."""
    if settings.get("stage") not in ("pretrain_moma", "train_causal_routers", "upcycle"):
        return False
    model = settings.get("model") or {}
    fields = model.get("fields") or {}
    experts_choose = fields.get("routing", "expert_choice") == "expert_choice"
    return fields.get("mixture_of_depths") is not None or (
        experts_choose and (settings["stage"] == "train_causal_routers" or model.get("preset") not in ("dense", "1t1i"))
    )


def without_unset(value: Any) -> Any:
    """A setting without what is null inside it: releases add settings that are null unless somebody gives them."""
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, Mapping) else value


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Settings that differ between a run and the one that would go on with it, as `section.key: old, now new`."""
    changed = []
    fixed = {"micro_batch_size"} if chooses_over_batch(new) else set()
    for section, values in new.items():
        before = old.get(section)
        if not isinstance(values, dict):
            changed += [f"{section}: {before}, now {values}"] * (before != values)
            continue
        free = FREE_ON_RESUME.get(section, set()) - fixed
        if section == "run" and longer(before or {}, values):
            free |= {"steps", "epochs"}
        for key in values.keys() - free:
            if without_unset((before or {}).get(key)) != without_unset(values[key]):
                changed.append(f"{section}.{key}: {(before or {}).get(key)}, now {values[key]}")
    return sorted(changed)
