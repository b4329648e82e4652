"""A run's settings: YAML checked by pydantic, overridden on the command line as `section.key=value`.

Every unknown key is refused with the nearest known name; `load_config` is the only way in, and `TrainConfig.save`
writes the settings as they were resolved, so that a run can be repeated from its own folder.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mllm.errors import UserError
from mllm.precision import has_bf16


class Section(BaseModel):
    """A group of settings in which an unknown name is an error and assignments are checked too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


Config = TypeVar("Config", bound=Section)
Dtype = Literal["bf16", "fp32"]


def usual_dtype() -> Dtype:
    """bf16, or fp32 on a CPU that has no instructions for bf16."""
    return "bf16" if has_bf16() else "fp32"


class ModelSection(Section):
    """What is trained, and on which frozen base."""

    path: str  # base model: a llava folder, a hub id such as llava-hf/llava-1.5-7b-hf, "miniworld", or "smol"
    adapter: dict[str, Any] | None = None  # {type: mole | lora, …}: the rest are fields of MoleConfig / LoraConfig
    start_from: Path | None = (
        None  # folder of an earlier run's adapter: its projector, or a whole adapter to go on with
    )
    train_projector: bool = True  # false keeps the projector frozen in stage instruct; stage align always trains it
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, about a third more time
    # of the frozen base and of computation, trained weights are always fp32; default bf16 where the machine computes it
    dtype: Dtype = Field(default_factory=usual_dtype)


class DataSection(Section):
    """What is read. Order depends on `run.seed` alone, so two runs with one seed see the same samples."""

    mixture: Path  # a mixture YAML: sources, weights, domains
    max_length: int = Field(2048, ge=8)  # tokens after image places are expanded; a longer sample stops the run by name
    workers: int = Field(2, ge=0)  # processes a rank that read and encode samples; 0 encodes in the training process


class PartRates(Section):
    """A learning rate of its own for a part of the model; null takes `optim.lr`."""

    projector: float | None = Field(None, gt=0)
    attention: float | None = Field(None, gt=0)
    # LoRA experts of the MLPs (those in attention count as attention); in a plain LoRA run the MLPs' low-rank weights
    experts: float | None = Field(None, gt=0)
    router: float | None = Field(None, gt=0)


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(2e-4, gt=0)  # peak rate
    part_lr: PartRates = PartRates()
    weight_decay: float = Field(0.0, ge=0)  # not on biases and norms
    warmup_ratio: float = Field(0.03, ge=0, lt=1)  # share of all steps in which the rate rises from zero
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; the first two fall to zero


class RunSection(Section):
    """How long, how big a batch, and where the results go."""

    output_dir: Path  # gets adapter/, checkpoints/, tensorboard/, train_log.jsonl, config.yaml
    epochs: float | None = Field(None, gt=0)  # passes over the mixture; give this or steps
    steps: int | None = Field(None, gt=0)  # optimizer steps; give this or epochs
    batch_size: int = Field(128, gt=0)  # samples an optimizer step, over all ranks
    micro_batch_size: int = Field(16, gt=0)  # samples a rank holds at once; halve it when memory runs out
    seed: int = 0
    log_every: int = Field(10, gt=0)  # steps between two entries of the log
    save_every: int = Field(500, ge=0)  # steps between two checkpoints to resume from; 0 writes none
    keep: int = Field(2, ge=1)  # checkpoints kept, the newest ones
    resume: str = "auto"  # auto: the newest checkpoint of output_dir if any · never · path of a checkpoint you trust
    report_to: Literal["tensorboard", "none"] = "tensorboard"

    @model_validator(mode="after")
    def one_length(self) -> "RunSection":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class DeepSpeedSection(Section):
    """How weights and optimizer states are spread over the ranks; see zero.py for the dictionary made of it."""

    zero: Literal[0, 1, 2, 3] = 2  # 0 copies all · 1 splits optimizer states · 2 gradients too · 3 weights too
    persist_below: int = Field(100_000, ge=0)  # zero 3: weights of fewer elements stay whole on every rank, not split
    offload: bool = False  # keep optimizer states (zero 1, 2, 3) and weights (zero 3) in host memory: slower, smaller

    @model_validator(mode="after")
    def something_to_offload(self) -> "DeepSpeedSection":
        if self.offload and self.zero == 0:
            raise ValueError("offload needs zero 1, 2 or 3")
        return self


class AlignSection(Section):
    """Stage align_routers (RoMA, 2511.07419): which routers, drawn to which neighbours, how strongly."""

    layers: int | list[int] = 5  # the last so many decoder layers (all, where they are fewer), or their numbers from 0
    token: Literal["last", "first", "middle", "last3", "mean"] = "last"  # of the prompt: whose routing is compared
    space: Literal["probs", "logits"] = "probs"
    regulariser: Literal["none", "neighbours", "contrast", "initial", "entropy"] = "neighbours"
    weight: float | list[float] = 1.0  # λ; 1 weighs as much as the answers at the start; of a list validation chooses
    weight_warmup: float = Field(0.0, ge=0, le=1)  # share of the steps over which λ rises from 0
    targets: Literal["live", "stop", "table", "detached_both"] = "live"  # whose vectors get gradients
    dense_gradient: bool = False  # experts that were not picked give routers a gradient too (DenseMixer's idea)
    embedding: str = "base"  # base · clip:NAME[,WEIGHTS] · sentence-transformers:NAME
    neighbours: int = Field(3, ge=1)  # k; with radius, at most so many
    radius: float | None = Field(None, gt=0)  # ε, a distance of unit vectors
    sigma: float | None = Field(None, gt=0)  # of the Gaussian kernel; null: the median distance of the k-th neighbour
    only_successful: bool = True  # only what the model answers correctly may be a neighbour
    least_grade: float = Field(1.0, gt=0, le=1)  # what counts as correct, by the source's own metric
    refresh_success: bool = False  # ask anew what is answered correctly when an epoch begins
    random_neighbours: bool = False  # the control: any others, with the weights of the true neighbours
    samples: int | None = Field(2000, ge=2)  # rows taken from the mixture, before some are held out; null: all
    validation: Path | None = None  # rows to validate on; null: held out from those taken
    validation_share: float = Field(0.1, gt=0, lt=1)
    cache: bool = True  # keep the states entering the first trained layer on disk, and run only what follows

    @property
    def weights(self) -> list[float]:
        """The λ to try."""
        return self.weight if isinstance(self.weight, list) else [self.weight]

    @model_validator(mode="after")
    def something_to_try(self) -> "AlignSection":
        if not self.weights or min(self.weights) < 0:
            raise ValueError("weight must be a number of at least 0, or a list of them")
        return self


class TrainConfig(Section):
    """One stage of training. `align` fits the projector alone; `instruct` an adapter (and the projector);
    `align_routers` the routers of an adapter that is there."""

    stage: Literal["align", "instruct", "align_routers"]  # those of the early-fusion model: train/moma/config.py
    model: ModelSection
    data: DataSection
    run: RunSection
    optim: OptimSection = OptimSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    align: AlignSection = AlignSection()  # of stage align_routers

    @model_validator(mode="after")
    def routers_to_align(self) -> "TrainConfig":
        if self.stage != "align_routers":
            return self
        if self.model.adapter is not None or self.model.start_from is None:
            raise ValueError(
                "stage align_routers goes on with a MoLE adapter: give its folder as model.start_from, and no"
                " model.adapter"
            )
        if self.deepspeed.zero == 3:
            raise ValueError("stage align_routers trains a few thousand weights: set deepspeed.zero to 0, 1 or 2")
        return self

    @model_validator(mode="after")
    def stage_fits_adapter(self) -> "TrainConfig":
        if self.stage == "align" and self.model.adapter is not None:
            raise ValueError("stage align trains the projector alone: leave model.adapter out, or set stage: instruct")
        if self.stage == "instruct" and self.model.adapter is None and self.model.start_from is None:
            raise ValueError("stage instruct needs model.adapter ({type: mole} or {type: lora}), or model.start_from")
        return self

    def save(self, path: Path) -> None:
        """Write the settings as resolved."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Any:
    """Read a run's YAML and apply `section.key=value` overrides, whose values are parsed as YAML.

    A TrainConfig, or for the stages of the early-fusion model one of `train.moma.config`.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest known one is named) or a value that does not fit.
    """
    return read_config(path, overrides)


def read_config(path: str | Path, overrides: list[str] | None, kind: type[Config] | None = None) -> Config:
    """`load_config` for any root section; None: that of the stage which the file names."""
    values = read_yaml(Path(path), kind or TrainConfig)
    for override in overrides or []:
        apply_override(values, override)
    settings = kind or settings_of(values.get("stage"))
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(explain(problem, settings) for problem in error.errors())) from None


def settings_of(stage: object) -> type[Section]:
    """The class that checks a stage's settings."""
    from train.moma.config import SETTINGS  # it builds on this file

    return SETTINGS.get(stage, TrainConfig) if isinstance(stage, str) else TrainConfig


def read_yaml(path: Path, kind: type[Section] = TrainConfig) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        UserError: no such file, malformed YAML (with line and column), or no mapping at the top.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}. Give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping with the sections {', '.join(kind.model_fields)}.")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in place; missing sections on the way are made."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(f"override {override!r} is not of the form section.key=value, such as optim.lr=1e-4.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from None
    for depth, key in enumerate(keys[:-1]):
        if values.get(key) is None:
            values[key] = {}
        if not isinstance(values[key], dict):
            raise UserError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is not a section.")
        values = values[key]
    values[keys[-1]] = value


def explain(problem: dict[str, Any], kind: type[Section] = TrainConfig) -> str:
    """One pydantic error as a sentence with the dotted key and, for an unknown key, the nearest known name."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}" + suggest(str(problem["loc"][-1]), known_keys(problem["loc"][:-1], kind))
    if problem["type"] == "missing":
        return f"key {key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]} (got {problem['input']!r})"


def known_keys(location: tuple[Any, ...], kind: type[Section] = TrainConfig) -> list[str]:
    """Names allowed in the section at a location such as ("optim", "part_lr")."""
    for part in location:
        annotation = kind.model_fields[part].annotation
        kind = next(each for each in (*get_args(annotation), annotation) if hasattr(each, "model_fields"))
    return list(kind.model_fields)


def suggest(name: str, known: list[str]) -> str:
    """` (did you mean …? known: …)` for a message about an unknown name."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    question = f"did you mean {near[0]}? " if near else ""
    return f" ({question}known: {', '.join(known)})"
