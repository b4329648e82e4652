"""transformers' Trainer for one stage: routing losses, token-weighted loss, a rate for each part, whole checkpoints.

B batch, S sequence, P supervised positions of a batch, V vocabulary.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.runtime.utils import clip_grad_norm_
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import rotate_checkpoints

from mllm.common import ranks
from mllm.common.errors import UserError
from mllm.common.processes import end_with_parent
from mllm.data.template import IGNORED
from train.bad_rows import BAD_ROWS, BadRows
from train.check import ADAPTER
from train.config import TrainConfig
from train.feed import RunOrder
from train.parts import gather_adapter, parameter_groups, part_of, trained, write_adapter
from train.routing import RunRouting
from train.seal import seal
from train.status import SIGNALS, Stopped
from train.stop import Stopping

LOG = "train_log.jsonl"


class DiskFull(UserError, OSError):
    """There is no room for what is to be written."""


class StageTrainer(Trainer):
    """What every stage shares: a step counts tokens of the whole global batch, and checkpoints are whole or not there.

    Needs `self.config` with a section `run`, as all stages have.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole step
    config: Any

    def __init__(self, **kwargs: Any) -> None:
        """Trainer's own arguments."""
        super().__init__(**kwargs)
        self.failures: list[str] = []  # what this rank could not write of a checkpoint
        self.saved: Path | None = None  # the last checkpoint

    def train_and_save(self, checkpoint: Path | None) -> None:
        """The whole of a run from a checkpoint, or anew, on.

        Raises:
            Stopped: it was asked to stop, and stopped after a whole step, from which it goes on.
        """
        run = self.config.run
        self.saved = checkpoint
        check_space(run.output_dir, self._bytes_to_come())
        stopping = Stopping(run.max_hours, self.args.device)
        self.add_callback(stopping)
        with stopping.listening():
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if not stopping.reason:
                self._save_result()
                return
        at = f"stopped after step {self.state.global_step:,} of {self.state.max_steps:,} ({stopping.reason})"
        if self.saved is None:
            raise Stopped(f"{at}; no checkpoint could be saved, so the same command starts anew.")
        raise Stopped(f"{at}, saved in {self.saved}. The same command goes on from there.")

    def _save_result(self) -> None:
        """What a finished run leaves. Raises UserError, on rank 0, where it cannot be written."""
        self.failures.clear()
        with self._noting_failures():
            self.save_model(str(self.config.run.output_dir))
        if self.failures:
            again = f"go on from {self.saved}" if self.saved else "train anew"
            raise UserError(
                f"what was trained cannot be written into {self.config.run.output_dir}: {self.failures[0]}. Make room"
                f" and start the same command again, to {again}."
            )

    def _bytes_to_come(self) -> int:
        """What checkpoints and the result take at the least, besides the checkpoints that are there."""
        run, one = self.config.run, self._checkpoint_bytes()
        if not run.save_every:
            return one // 4
        number = (
            min(run.keep, -(-self.args.max_steps // run.save_every)) + 1
        )  # a new one is whole before an old one goes
        there = len(list(Path(self.args.output_dir).glob("checkpoint-*")))
        return max(number - there, 1) * one + one // 4

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's estimate walks all weights in every micro-batch, and knows nothing of experts."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Written aside by all ranks and renamed when all are done: a folder that bears the name checkpoint-N is whole.
        # What one rank cannot write must not keep it from what all do together, or the others would wait for it.
        folder, partial = Path(self.args.output_dir), Path(self.args.output_dir, ".partial")
        name = f"checkpoint-{self.state.global_step}"
        self.failures.clear()
        with self._noting_failures():
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / name).mkdir(parents=True)
                check_space(folder, self._checkpoint_bytes())
        if self._all_well():
            self.args.output_dir = str(partial)
            try:
                with self._noting_failures(), patched(self, "save_model", self._noting_failures):
                    super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            if self._all_well():
                with self._noting_failures():
                    if self.args.should_save:
                        seal(partial / name)
                        shutil.rmtree(folder / name, ignore_errors=True)
                        os.rename(partial / name, folder / name)
        if self._all_well():
            self.saved = folder / name
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                rotate_checkpoints(str(folder), self.config.run.keep)
        elif self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            why = self.failures[0] if self.failures else "another rank could not write its part"
            last = f"; the last one saved is {self.saved}" if self.saved else ""
            print(f"\nwarning: {name} is not saved: {why}{last}. Training goes on.", file=sys.stderr, flush=True)
        ranks.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine = self.model_wrapped
        writer = engine.checkpoint_engine
        with (
            patched(writer, "save", self._noting_failures),
            patched(engine, "_copy_recovery_script", self._noting_failures),
        ):
            # Trainer leaves frozen weights out for a PeftModel only; in stage projector the model is none.
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True, save_latest=False)
        if self.args.should_save:
            with self._noting_failures():
                Path(output_dir, "latest").write_text(f"global_step{engine.global_steps}", encoding="utf-8")
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    @contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Keeps what cannot be written as a sentence, and goes on."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.failures.append(getattr(error, "strerror", None) or str(error))
        except RuntimeError as error:  # torch's zip writer tells no more than where it stood
            if "writ" not in str(error):
                raise
            self.failures.append(str(error).splitlines()[0])

    def _all_well(self) -> bool:
        """Whether no rank failed to write. All ranks call it together."""
        return not ranks.summed(torch.tensor(float(len(self.failures)), device=self.args.device)).item()

    def _checkpoint_bytes(self) -> int:
        """What the next checkpoint takes: as much as the last one, or what it holds at the least."""
        if self.saved is not None:
            return sum(path.stat().st_size for path in self.saved.rglob("*") if path.is_file())
        return least_checkpoint_bytes(self.model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        # Trainer loads strictly unless the model is a PeftModel: in stage projector it is none, and a checkpoint leaves
        # frozen weights out.
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        leave_out_frozen(self.deepspeed)
        keep_gradient_norm(self.deepspeed)
        if resume_from_checkpoint is not None:
            deepspeed_load_checkpoint(self.deepspeed, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return model, loader


class MllmTrainer(StageTrainer):
    """Trains what `build_model` set to train.

    The loss of a step is the mean over the supervised tokens of the whole global batch, however it is split into
    micro-batches and ranks, plus the mean of the micro-batches' routing losses.
    """

    def __init__(self, *, config: TrainConfig, domains: list[str], base_card: str, **kwargs: Any) -> None:
        """Besides Trainer's own arguments: the run's settings, names of all domains, and the text of `base.json`."""
        super().__init__(**kwargs)
        self.config = config
        self.base_card = base_card
        self.model_accepts_loss_kwargs = True  # makes Trainer count a step's supervised tokens over all ranks
        self.figures = Figures(domains, self.args.device)
        self.routing = RunRouting(self.model, self.args.device)
        self.add_callback(self.routing)
        self.bad_rows = BadRows(config.run.output_dir / BAD_ROWS, self.train_dataset.mixture)
        self.add_callback(self.bad_rows)
        self.add_callback(GradientWatch(self.model, self.args.device))

    def get_train_dataloader(self) -> DataLoader:
        """The run's micro-batches for this rank as one epoch, so that Trainer's own skipping resumes exactly."""
        run, workers = self.config.run, self.config.data.workers
        order = RunOrder(
            self.train_dataset.mixture,
            seed=run.seed,
            steps=self.args.max_steps,
            batch_size=run.batch_size,
            micro_batch_size=run.micro_batch_size,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=order,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=begin_worker,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group for each part, and one more for its biases and norms."""
        if self.optimizer is None:
            optim = self.config.optim
            groups = parameter_groups(model or self.model, optim)
            self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """This micro-batch's share of the step's loss, times the number of ranks (DeepSpeed averages over ranks)."""
        inputs = dict(inputs)
        domains, wheres, labels_BS = inputs.pop("domains"), inputs.pop("wheres"), inputs.pop("labels")
        self.bad_rows.add(inputs.pop("bad_rows", []))
        self.routing.before_forward(domains)
        answers = answer_losses(model, inputs, labels_BS)
        loss_sum_B, tokens_B = answers.by_row(len(labels_BS))
        loss = loss_sum_B.sum() / num_items_in_batch * self.args.world_size
        loss = loss + self.routing.after_forward(domains) / self.current_gradient_accumulation_steps
        self.figures.add_answers(domains, loss_sum_B, tokens_B)
        stop_if_unusable(loss, tokens_B, wheres)
        return (loss, answers.outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was gathered since the last entry, at the end of a run too. All ranks call it together."""
        if not self.figures.is_empty:
            logs |= self.figures.drain() | self.routing.drain(self.state.global_step)
            new = self.bad_rows.gather(self.state.global_step)
            logs |= self.bad_rows.counts()
            if new:
                warning = f"{new} more rows cannot be used as they are; {self.bad_rows.path} says which and why"
                logs["warnings"] = [*logs.get("warnings", []), warning]
        # To Trainer the whole run is one epoch, see get_train_dataloader.
        rows = self.state.global_step * self.config.run.batch_size
        self.state.epoch = rows / self.train_dataset.mixture.epoch_length
        super().log(logs, start_time)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.bad_rows.gather(self.state.global_step)  # a run that resumes here finds the list complete
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write `<output_dir>/adapter`, whole under every ZeRO stage."""
        weights = gather_adapter(self.model)
        if self.args.should_save:
            write_adapter(
                Path(output_dir or self.config.run.output_dir) / ADAPTER,
                self.model,
                weights,
                base_card=self.base_card,
                start_from=self.config.model.start_from,
            )


def leave_out_frozen(engine: Any) -> None:
    """Keeps frozen weights out of checkpoints under each of their names: DeepSpeed leaves a tied head in."""
    whole_state = engine.module_state_dict

    def state_dict(*arguments: Any, **named: Any) -> dict[str, Any]:
        state = whole_state(*arguments, **named)
        if named.get("exclude_frozen_parameters"):
            for name, weight in engine.module.named_parameters(remove_duplicate=False):
                if not weight.requires_grad:
                    state.pop(name, None)
        return state

    engine.module_state_dict = state_dict


def keep_gradient_norm(engine: Any) -> None:
    """Under ZeRO 0 the engine clips gradients and forgets their norm, which the log shows."""

    def clip() -> None:
        norm = clip_grad_norm_(
            parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
        )
        engine.optimizer._global_grad_norm = norm.item()  # where the engine looks for it

    engine.clip_fp32_gradients = clip


def least_checkpoint_bytes(model: nn.Module) -> int:
    """Trained weights in fp32 as the engine has them, AdamW's two moments, and the adapter: four of four bytes."""
    return 16 * sum(getattr(weight, "ds_numel", weight.numel()) for _, weight in trained(model))


def check_space(folder: Path, needed: int) -> None:
    """Raises DiskFull if so many bytes do not fit on the disk of a folder, or of the folder it is to be made in."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskFull(
            f"{there} has {free / 1e6:,.1f} MB left, and at least {needed / 1e6:,.1f} MB are needed. Make room, set"
            " another run.output_dir, or lower run.keep"
        )


@contextmanager
def patched(owner: Any, name: str, around: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Lets a method of one object run within a context of ours."""
    method = getattr(owner, name)

    def within(*arguments: Any, **named: Any) -> None:
        with around():
            method(*arguments, **named)

    setattr(owner, name, within)
    try:
        yield
    finally:
        delattr(owner, name)


class AnswerLosses(NamedTuple):
    """Of the T supervised tokens of a batch: cross-entropy (fp32, [T]), whether each is the most probable one (bool,
    [T]), and the row it stands in (int64, [T]); `outputs` is what the model returned.
    """

    outputs: Any
    loss_T: Tensor
    is_right_T: Tensor
    row_T: Tensor

    def by_row(self, rows: int) -> tuple[Tensor, Tensor]:
        """Each row's summed loss (fp32, [B]) and number of supervised tokens (int64, [B])."""
        loss_sum_B = self.loss_T.new_zeros(rows).index_add(0, self.row_T, self.loss_T)
        return loss_sum_B, self.row_T.bincount(minlength=rows)


def answer_losses(model: nn.Module, inputs: dict[str, Any], labels_BS: Tensor) -> AnswerLosses:
    """The losses of a batch's answer tokens, by one forward.

    Logits are made only at positions where some row has a supervised token: answers are short beside pictures, and
    the head is the widest product of a small model and the largest activation of a large one.
    """
    is_answer_BS = labels_BS[:, 1:] != IGNORED
    positions_P = is_answer_BS.any(0).nonzero().flatten()
    outputs = model(**inputs, logits_to_keep=positions_P)
    is_answer_BP = is_answer_BS[:, positions_P]
    logits_TV, targets_T = outputs.logits[is_answer_BP].float(), labels_BS[:, 1:][:, positions_P][is_answer_BP]
    loss_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    return AnswerLosses(outputs, loss_T, logits_TV.argmax(-1) == targets_T, is_answer_BP.nonzero()[:, 0])


def stop_if_unusable(loss: Tensor, tokens_B: Tensor, wheres: list[str]) -> None:
    """Raises UserError for a loss that is not finite or a row without supervised tokens, naming the rows."""
    if not (tokens_B > 0).all():
        bare = [where for where, tokens in zip(wheres, tokens_B.tolist(), strict=True) if tokens == 0]
        raise UserError(f"nothing is supervised in {', '.join(bare)}: the answer is missing or was cut off.")
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss is {loss.item()} in a batch of {', '.join(wheres)}. Lower optim.lr or optim.max_grad_norm, try"
            " model.dtype=fp32, and resume from the last checkpoint."
        )


def begin_worker(worker: int) -> None:
    """One thread a loading process: they share the cores with training.

    Signals to stop are for the rank: Ctrl-C and a launcher send them to all processes, and Trainer still needs rows.
    """
    torch.set_num_threads(1)
    end_with_parent()  # torch's own watch takes five seconds
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class GradientWatch(TrainerCallback):
    """Stops a run in which a trained tensor had no gradient in all of its first steps.

    Seen by hooks that take themselves off: ZeRO leaves no rank a whole gradient to look at. A gradient of zeros counts,
    as a projector has among rows without pictures: what is meant is a weight that the loss does not depend on. In one
    step an expert of its own module may be left out by all tokens, in all of them it is not.
    """

    STEPS = 10

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.steps = 0
        self.seen: dict[str, bool] = {}
        self.hooks: dict[str, RemovableHandle] = {}
        for name, parameter in trained(model):
            self.seen[name] = False
            self.hooks[name] = parameter.register_hook(partial(self._see, name))

    def _see(self, name: str, gradient: Tensor) -> None:
        self.seen[name] = True
        self.hooks.pop(name).remove()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        if self.steps != self.STEPS and (self.steps > self.STEPS or state.global_step < state.max_steps):
            return
        counts = ranks.summed(torch.tensor([float(seen) for seen in self.seen.values()], device=self.device)).tolist()
        dead = [name for name, count in zip(self.seen, counts, strict=True) if not count]
        for handle in self.hooks.values():
            handle.remove()
        self.hooks = {}
        if dead:
            parts = Counter(part_of(name) for name in dead)
            raise UserError(
                f"after {self.steps} steps {len(dead)} of {len(counts)} trained tensors never had a gradient"
                f" ({', '.join(f'{part}: {number}' for part, number in parts.items())}), such as {dead[0]}: the loss"
                " does not depend on them. Leave their modules out of target_modules and modules_to_save of"
                " model.adapter."
            )


class Figures:
    """Sums of what the log shows of the answers, reduced over ranks when an entry is made."""

    def __init__(self, domains: list[str], device: torch.device) -> None:
        self.domains = domains
        self.device = device
        self.since: float | None = None  # monotonic seconds; from the first batch on, so that start-up does not count
        self._clear()

    def _clear(self) -> None:
        self.answers = torch.zeros(len(self.domains), 3, dtype=torch.float64)  # loss sum, tokens, samples

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last entry; the same on all ranks."""
        return not self.answers.any()

    def add_answers(self, domains: list[str], loss_sum_B: Tensor, tokens_B: Tensor) -> None:
        self.since = self.since or time.monotonic()
        rows = torch.tensor([self.domains.index(domain) for domain in domains])
        sums = torch.stack([loss_sum_B.detach(), tokens_B, torch.ones_like(tokens_B)], 1)
        self.answers.index_add_(0, rows, sums.double().cpu())

    def drain(self) -> dict[str, float]:
        """Means since the last call over all ranks, and samples a second."""
        answers = ranks.summed(self.answers.to(self.device)).cpu()
        loss_sum, tokens, samples = answers.sum(0).tolist()
        entry = {"answer_loss": loss_sum / tokens}
        for domain, (domain_loss, domain_tokens, _) in zip(self.domains, answers.tolist(), strict=True):
            if domain_tokens:
                entry[f"answer_loss/{domain}"] = domain_loss / domain_tokens
        now = time.monotonic()
        entry["samples_per_second"] = samples / (now - self.since)
        self.since = now
        self._clear()
        return entry


class ProgressLine(ProgressCallback):
    """Trainer's bar with rate and remaining time; the loss stands beside it, warnings above it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 10  # seconds: a file or a pipe gets a line now and then

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(
                loss=f"{logs.get('answer_loss', logs['loss']):.3f}", lr=f"{logs['learning_rate']:.1e}", refresh=False
            )
        for warning in logs.get("warnings", []):
            self.training_bar.write(f"warning: {warning}", file=sys.stderr)


class LogFile(TrainerCallback):
    """Every entry as one line of JSON. A resumed run first drops the entries after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if state.is_world_process_zero:
            length = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            except OSError as error:  # a full disk: the run goes on without this entry, half of which may be there
                with suppress(OSError):
                    os.truncate(self.path, length)
                print(f"\nwarning: {self.path} cannot be written: {error.strerror}.", file=sys.stderr, flush=True)
