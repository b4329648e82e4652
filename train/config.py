"""A run's settings: YAML checked by pydantic, overridden on the command line as `section.key=value`.

Every unknown key is refused with the nearest known name; `load_config` is the only way in, and `TrainConfig.save`
writes the settings as they were resolved, so that a run can be repeated from its own folder.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mllm.common import plain_yaml
from mllm.common.errors import UserError
from mllm.common.precision import has_bf16
from mllm.data.mixture import Limit
from train.fields import kinds_of, refuse_mistaken, suggest

CONFIGS = Path(__file__).parent / "configs"  # package data: in a wheel too


class Section(BaseModel):
    """A group of settings in which an unknown name is an error and assignments are checked too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    @field_validator("*", mode="before")
    @classmethod
    def mistaken_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what pydantic would take, and nobody means."""
        annotation = cls.model_fields[info.field_name].annotation
        kinds = kinds_of(annotation)
        if Any not in kinds and not any(hasattr(kind, "model_fields") for kind in kinds):  # those check their own
            refuse_mistaken(value, annotation)
        return value


Config = TypeVar("Config", bound=Section)
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
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
    train_projector: bool = True  # false keeps the projector frozen in stage instruct; stage projector always trains it
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, about a third more time
    # of the frozen base and of computation, trained weights are always fp32; default bf16 where the machine computes it
    dtype: Dtype = Field(default_factory=usual_dtype)


class DataSection(Section):
    """What is read. Order depends on `run.seed` alone, so two runs with one seed see the same samples."""

    mixture: Path  # a mixture YAML: sources, weights, domains
    max_length: int = Field(2048, ge=8)  # tokens after image places are expanded; a longer sample is `too_long`
    # what to do with rows that cannot be used: null leaves it to the mixture, see mllm/data/mixture.py
    bad_rows: Literal["error", "skip"] | None = None  # skip: another row of the same source takes the place
    max_bad: Limit | None = None  # with skip, how many there may be: a number of rows, or a share (1%)
    too_long: Literal["error", "skip", "truncate"] | None = None  # truncate: leave out the last turns
    # what "</s>" and other special tokens are in the words of a turn: their characters (text) or the tokens; by default
    # as the adapter started from has it, or else text. Kept with the adapter, for scoring and chat
    special_tokens_in_text: Literal["text", "tokens"] | None = None
    workers: int = Field(2, ge=0)  # processes a rank that read and encode samples; 0 encodes in the training process


class PartRates(Section):
    """A learning rate of its own for a part of the model; null takes `optim.lr`."""

    projector: float | None = Field(None, gt=0)
    attention: float | None = Field(None, gt=0)
    # LoRA experts of the MLPs (those in attention count as attention); in a plain LoRA run the MLPs' low-rank weights
    experts: float | None = Field(None, gt=0)
    router: float | None = Field(None, gt=0)
    tower: float | None = Field(None, gt=0)  # the vision tower, where modules_to_save or LoRA train it
    embeddings: float | None = Field(None, gt=0)  # the input embedding and the head
    other: float | None = Field(None, gt=0)  # what belongs to none of these, such as norms


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(2e-4, gt=0)  # peak rate
    part_lr: PartRates = PartRates()
    weight_decay: float = Field(0.0, ge=0)  # not on biases and norms
    warmup_ratio: float = Field(0.03, ge=0, lt=1)  # share of all steps in which the rate rises from zero
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after warm-up; the first two fall to zero


class RunSection(Section):
    """How long, how big a batch, and where the results go."""

    output_dir: Path  # gets adapter/, checkpoints/, tensorboard/, train_log.jsonl, config.yaml
    epochs: float | None = Field(None, gt=0)  # passes over the mixture; give this or steps
    steps: int | None = Field(None, gt=0)  # optimizer steps; give this or epochs
    batch_size: int = Field(128, gt=0)  # samples an optimizer step, over all ranks
    # most samples a rank holds at once; halve it when memory runs out. Plain LoRA learns the same by any split of the
    # batch; experts' routing losses are of a micro-batch, so that another one moves weights a little
    micro_batch_size: int = Field(16, gt=0)
    seed: Seed = 0
    log_every: int = Field(10, gt=0)  # steps between two entries of the log
    save_every: int = Field(500, ge=0)  # steps between two checkpoints to resume from; 0 writes none
    keep: int = Field(2, ge=1)  # checkpoints kept, the newest ones
    # auto: the newest checkpoint of output_dir if any · data: so too, on rows that have changed since · never · path of
    # a checkpoint you trust
    resume: str = "auto"
    overwrite: bool = False  # train anew in place of a finished run, which is removed
    max_hours: float | None = Field(None, gt=0)  # since the ranks started; then the run saves and stops, to be gone on
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


class RoutersSection(Section):
    """Stage routers (RoMA, 2511.07419): which routers, drawn to which neighbours, how strongly."""

    # the last so many decoder layers (all, where they are fewer), or their numbers from 0
    layers: Count | Annotated[list[Layer], Field(min_length=1)] = 5
    token: Literal["last", "first", "middle", "last3", "mean"] = "last"  # of the prompt: whose routing is compared
    space: Literal["probs", "logits"] = "probs"
    regulariser: Literal["none", "neighbours", "contrast", "initial", "entropy"] = "neighbours"
    # λ; 1 weighs as much as the answers at the start; of a list validation chooses
    weight: Weight | Annotated[list[Weight], Field(min_length=1)] = 1.0
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


class TrainConfig(Section):
    """What the stages on a LLaVA have; each is a subclass in its file of `train/stages/`."""

    stage: str
    model: ModelSection
    data: DataSection
    run: RunSection
    optim: OptimSection = OptimSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    def save(self, path: Path) -> None:
        """Write the settings as resolved."""
        aside = path.with_name(f".{path.name}.part")  # a start that is killed leaves whole settings
        aside.write_text(plain_yaml.write(self.model_dump(mode="json")), encoding="utf-8")
        os.replace(aside, path)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Any:
    """Read a run's YAML and apply `section.key=value` overrides, whose values are parsed as YAML.

    `path` may be the name of a config that ships: `load_config("experts")` from any folder.

    Returns the `Config` of the stage that the file names, see `train/stages/`.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest known one is named) or a value that does not fit.
    """
    return read_config(path, overrides)


def find_config(name: str | Path) -> Path:
    """The file of a config: a path that exists, or the name of a config that ships, such as `experts`.

    Raises:
        UserError: neither; the nearest shipped name is told.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    known = import_module("train.stages").OLD_NAMES.get(path.stem, path.stem)
    if known in shipped and (str(name) == path.stem or known != path.stem):  # also the old path of a renamed one
        return shipped[known]
    raise UserError(
        f"cannot read the config {name}: no such file, and no shipped config of that name"
        + suggest(path.stem, [*shipped])
    )


def read_config(path: str | Path, overrides: list[str] | None, kind: type[Config] | None = None) -> Config:
    """`load_config` for any root section; None: that of the stage which the file names."""
    path = find_config(path)
    values = read_yaml(Path(path), kind or TrainConfig)
    for override in overrides or []:
        apply_override(values, override)
    if kind is None:
        values = renamed(values)
    settings = kind or settings_of(values.get("stage"))
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(explain(problem, settings) for problem in error.errors())) from None


def settings_of(stage: object) -> type[Section]:
    """The class that checks a stage's settings. Raises UserError for an unknown or a missing stage."""
    stages = import_module("train.stages")  # by name: each of its files builds on this one
    if stage not in stages.names():
        raise UserError(
            "key stage is missing"
            if stage is None
            else f"stage: no stage {stage!r}" + suggest(str(stage), stages.names())
        )
    return stages.find(stage).Config


def renamed(values: dict[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Settings with the names that stages and sections have today; tells which old ones it met unless `quiet`.

    `align` was a stage, now `projector`, and the section of the stage `align_routers`, now `routers` both; every run of
    old wrote that section into its config.yaml, whatever its stage.
    """
    stage, hints = values.get("stage"), []
    new = import_module("train.stages").OLD_NAMES.get(stage, stage) if isinstance(stage, str) else stage
    values = dict(values, stage=new) if new != stage else dict(values)
    if new != stage:
        hints.append(f"stage {stage} is called {new} now")
    if "align" in values:
        section = values.pop("align")
        if new == "routers" and isinstance(section, dict):
            values["routers"] = section | (values.get("routers") or {})
            hints.append("section align is called routers now")
        else:
            hints.append(f"section align means nothing in stage {new} and is left out")
    if not quiet:
        print(*hints, sep="\n", end="\n" if hints else "", file=sys.stderr)
    return values


def read_yaml(path: Path, kind: type[Section] = TrainConfig) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        UserError: no such file, malformed YAML (with line and column), or no mapping at the top.
    """
    try:
        values = plain_yaml.read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}. Give the path of a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        value = plain_yaml.read(text)
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
