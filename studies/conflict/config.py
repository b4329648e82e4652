"""Settings of a conflict study: one regime, all arms. YAML and overrides as `train.config` reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mllm.common.errors import UserError
from mllm.common.folders import check_writable
from mllm.mole import MoleConfig
from studies.conflict.arms import ARMS, GROUPS, Arm, own_arm
from train.config import Dtype, OptimSection, Section, Seed, read_config, usual_dtype
from train.fields import checked_fields, suggest
from train.parts import known_fields


class BaseSection(Section):
    """The frozen base that every arm starts from."""

    path: str = "miniworld"  # a llava folder, a hub id, or "miniworld"
    dtype: Dtype = Field(default_factory=usual_dtype)  # bf16 where the machine computes it
    device: str | None = None  # cpu, cuda, cuda:1 …; null: a GPU where there is one


class ScenesSection(Section):
    """Pictures a domain and split."""

    train: int = Field(1000, gt=0)
    val: int = Field(100, gt=0)
    test: int = Field(300, gt=0)


class MiniworldSection(Section):
    """Drawn domains, whose conflict is a dial."""

    scenes: ScenesSection = ScenesSection()
    clash: int = Field(
        1, ge=0, le=2
    )  # 0 one convention for all · 1 the built-in ones · 2 look-alikes, all answers clash
    cue: bool = False  # put the domain's name before the question
    grounds: bool = True  # look-alikes on a ground for each domain; false: only the cue tells
    seed: Seed = 1  # the embedded base has seen scenes of seed 0
    folder: Path = Path("runs/conflict/scenes")  # where pictures are drawn to

    @model_validator(mode="after")
    def something_tells(self) -> "MiniworldSection":
        if not self.grounds and not (self.clash == 2 and self.cue):
            raise ValueError(
                "grounds: false is for look-alikes (clash: 2) with cue: true; nothing else would tell them"
            )
        return self


class DataSection(Section):
    """What is trained and scored: files of your own, or miniworld."""

    train: Path | None = None  # mixture YAML or LLaVA JSON, each row tagged with a domain
    val: Path | None = None  # chooses the learning rates; null: a share of the training pictures does
    val_share: float = Field(0.1, gt=0, lt=1)  # of the rows that are trained on
    test: Path | None = None  # scored once an arm and seed
    miniworld: MiniworldSection | None = None
    samples_per_domain: int | None = Field(None, gt=0)  # training rows a domain; more are left out at random

    @model_validator(mode="after")
    def one_origin(self) -> "DataSection":
        files = [name for name in ("train", "val", "test") if getattr(self, name) is not None]
        if self.miniworld is not None and (files or self.samples_per_domain):
            raise ValueError("give train, val and test (and samples_per_domain), or miniworld, not both")
        if "val_share" in self.model_fields_set and (self.miniworld or self.val):
            raise ValueError("val_share is for data without rows of its own to validate on: leave it or val out")
        if self.miniworld is None and not {"train", "test"} <= set(files):
            raise ValueError(f"give train, test and perhaps val ({', '.join(files) or 'none'} given), or miniworld")
        return self


class AdapterSection(Section):
    """The frame that arms share, fields of MoleConfig; how an arm routes is the arm's (arms.py)."""

    r: int = Field(16, ge=1)  # rank of one expert, and of LoRA
    lora_alpha: float = Field(32, gt=0)
    use_rslora: bool = False
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    num_experts: int | None = Field(None, ge=2)  # null: as many as domains
    balance_loss_weight: float = Field(0.01, ge=0)
    expert_modules: list[str] | str | None = None  # null: MLP blocks of the language model
    target_modules: list[str] | str | None = Field(
        []
    )  # plain LoRA beside the experts, the same in all arms; null: attention


class RunSection(Section):
    """How long, how often, how many at once."""

    out: Path  # gets runs/, summary.json, README.md, conflict.png and, where something is routed, routing.png
    arms: str | list[str] = "main"  # names, or main (those that answer the question), named, tries, all
    only_tuned: str | list[str] = Field([])  # arms, beside these, that validation alone looks at: never scored on test
    baseline: str = "mix"  # what conflict and recovery are measured from
    batch_size: int = Field(8, gt=0)  # small, so that `single` has steps enough; the report says where it has not
    eval_batch_size: int = Field(64, gt=0)
    passes: int = Field(1, gt=0)  # over the training rows
    lrs: list[float] = Field([1e-3, 3e-3, 1e-2], min_length=1)  # every arm tries these
    tune_seeds: int = Field(1, gt=0)  # trainings a rate; none of them is scored on test
    seeds: int = Field(5, gt=0)  # paired trainings that are scored on test
    threads: int | None = Field(None, gt=0)  # of this process; null: torch decides. Two processes with 1 use two cores
    limit_minutes: float | None = Field(None, gt=0)  # start no run that would end later; the same command goes on

    @model_validator(mode="after")
    def positive_rates(self) -> "RunSection":
        if min(self.lrs) <= 0 or len(set(self.lrs)) < len(self.lrs):
            raise ValueError(f"lrs must be different rates above 0 (got {self.lrs})")
        return self


class ConflictConfig(Section):
    """One regime of the study."""

    regime: str | None = None  # its name in reports; null: said from the settings
    model: BaseSection = BaseSection()
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    optim: OptimSection = OptimSection()  # but lr, which is chosen from run.lrs
    # arms of your own: name -> fields of MoleConfig over the frame, and perhaps router_rate (beside the arm's rate)
    own_arms: dict[str, dict[str, Any]] = Field({})
    run: RunSection

    @model_validator(mode="after")
    def rates_are_tuned(self) -> "ConflictConfig":
        if "lr" in self.optim.model_fields_set:
            raise ValueError("optim.lr: every arm's rate is chosen on validation; give the rates to try as run.lrs")
        if self.optim.part_lr.router is not None:
            raise ValueError("optim.part_lr.router: every arm says its own (Arm.router_rate; own_arms: router_rate)")
        if taken := sorted(set(self.own_arms) & (set(ARMS) | set(GROUPS))):
            raise ValueError(f"own_arms.{taken[0]}: there is an arm of that name already")
        return self

    @property
    def arms(self) -> list[Arm]:
        """The arms to run, the baseline among them. Raises UserError for a name that is not known."""
        known = ARMS | {name: own_arm(name, settings) for name, settings in self.own_arms.items()}
        if self.run.baseline not in known or known[self.run.baseline].trains not in ("mix", "twice"):
            raise UserError(
                f"run.baseline must be one arm that trains on the mix, such as mix, not {self.run.baseline!r}."
            )
        scored, tuned = _names(self.run.arms), _names(self.run.only_tuned)
        for key, names in (("arms", scored), ("only_tuned", tuned)):
            for name in names:
                if name not in known:
                    raise UserError(f"run.{key}: no arm {name!r}" + suggest(name, [*known, *GROUPS]))
        if tuned and len(self.run.lrs) == 1:
            raise UserError("run.only_tuned: with one rate in run.lrs validation has nothing to choose; give several.")
        if "base" in tuned:
            raise UserError("run.only_tuned: base is not trained, so it has no rate to choose; put it into run.arms.")
        if both := sorted({self.run.baseline, *scored} & set(tuned)):
            raise UserError(f"run.only_tuned: {both[0]} is among the arms that are scored on test; name it once.")
        return [arm for name, arm in known.items() if name in {self.run.baseline, *scored, *tuned}]

    @property
    def only_tuned(self) -> list[str]:
        """Names of the arms that validation alone looks at."""
        return _names(self.run.only_tuned)

    @property
    def regime_name(self) -> str:
        """One line that tells this study from another."""
        if self.regime is not None:
            return self.regime
        world, experts = self.data.miniworld, self.adapter.num_experts or "one a domain"
        data = f"{self.data.train}"
        if world is not None:
            cue = ("with" if world.grounds else "only the") if world.cue else "no"
            data = f"miniworld, clash {world.clash}, {cue} cue, {world.scenes.train} scenes"
        return f"{data}; rank {self.adapter.r}, experts: {experts}"


def _names(named: str | list[str]) -> list[str]:
    words = [named] if isinstance(named, str) else named
    return [name for word in words for name in GROUPS.get(word, [word])]


def load_conflict_config(path: str | Path, overrides: list[str] | None = None) -> ConflictConfig:
    """Raises UserError for whatever is wrong with the settings, arms included."""
    config = read_config(path, overrides, ConflictConfig)
    check_writable(config.run.out, "run.out")
    for name, settings in config.own_arms.items():
        check_own_arm(f"own_arms.{name}", settings)
    config.arms  # noqa: B018
    return config


def check_own_arm(key: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError for what MoleConfig has no field for, or no such value, and for a rate that is none."""
    fields = {name: value for name, value in settings.items() if name != "router_rate"}
    checked_fields(fields, MoleConfig, known_fields(MoleConfig), key)
    rate = settings.get("router_rate", 1.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise UserError(f"{key}.router_rate must be a number above 0 (got {rate!r})")
