"""What can be wrong with a run before it starts: said in a second, before any folder or process group is made."""

import os
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig

from mllm.build import PROJECTOR_FILE, load_processor, load_window
from mllm.data.check import check_mixture
from mllm.data.mixture import Mixture, load_mixture
from mllm.data.sources import tell_first
from mllm.data.template import ConversationEncoder
from mllm.errors import UserError
from mllm.mole import MoleConfig
from train.bad_rows import check_limit
from train.config import RunSection, TrainConfig, read_yaml
from train.parts import adapter_config, starts_from_adapter

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
SETTINGS = "config.yaml"
# What may change between a run and its continuation.
FREE_ON_RESUME = {
    "run": {"resume", "log_every", "save_every", "keep", "report_to", "output_dir", "micro_batch_size"},
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
    find_checkpoint(config)
    if config.stage == "instruct" and starts_from_adapter(config.model):
        check_domains(PeftConfig.from_pretrained(str(start)), mixture)
    check_domains(adapter, mixture)
    if os.environ.get("RANK", "0") == "0":
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


def check_batch(run: RunSection, ranks: int) -> None:
    """Raises UserError unless the global batch is a whole number of micro-batches on every rank."""
    if run.batch_size % (run.micro_batch_size * ranks):
        raise UserError(
            f"run.batch_size={run.batch_size} is not a multiple of run.micro_batch_size={run.micro_batch_size} x"
            f" {ranks} ranks. Set run.micro_batch_size so that it is."
        )


def find_checkpoint(config: TrainConfig, result: str = ADAPTER) -> Path | None:
    """The checkpoint to resume from, or None for a new run. `result`: the folder that a finished run has.

    Raises:
        UserError: the checkpoint asked for is not there, or output_dir holds a run with other settings.
    """
    run = config.run
    if run.resume == "never":
        return None
    if run.resume != "auto":
        if not Path(run.resume, "trainer_state.json").is_file():
            raise UserError(f"run.resume: {run.resume} is no checkpoint of a run (it has no trainer_state.json).")
        check_settings(config, Path(run.resume).parent.parent)
        return Path(run.resume)
    found = {int(path.name.rsplit("-", 1)[1]): path for path in (run.output_dir / CHECKPOINTS).glob("checkpoint-*")}
    if not found and (run.output_dir / result).exists():
        raise UserError(
            f"run.output_dir {run.output_dir} holds a finished run. Set another run.output_dir, or run.resume=never to"
            " train anew in its place."
        )
    if not found:
        return None
    check_settings(config, run.output_dir)
    return found[max(found)]


def check_settings(config: TrainConfig, folder: Path) -> None:
    """Raises UserError, naming the differences, if the run in a folder had settings that change its course."""
    if not (folder / SETTINGS).is_file():
        return
    changed = differences(read_yaml(folder / SETTINGS), config.model_dump(mode="json"))
    if changed:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}). Set another run.output_dir, or"
            " run.resume=never to start anew in its place."
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


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Settings that differ between a run and the one that would go on with it, as `section.key: old, now new`."""
    changed = []
    fixed = {"micro_batch_size"} if chooses_over_batch(new) else set()
    for section, values in new.items():
        before = old.get(section)
        if not isinstance(values, dict):
            changed += [f"{section}: {before}, now {values}"] * (before != values)
            continue
        for key in values.keys() - (FREE_ON_RESUME.get(section, set()) - fixed):
            if (before or {}).get(key) != values[key]:
                changed.append(f"{section}.{key}: {(before or {}).get(key)}, now {values[key]}")
    return sorted(changed)
