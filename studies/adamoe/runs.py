"""One trained arm, what was measured of it, and the folder that keeps both so that a study can go on where it stopped.

N scored tokens, L routed layers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mllm.provenance import provenance
from train import kept


@dataclass(frozen=True)
class Arm:
    """`settings` are what the part's model is changed by; arms of one `family` differ in their load alone."""

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """Of every scored token: its loss, how many real experts it took, where it stands, how frequent it is."""

    loss_N: np.ndarray
    real_picks_NL: np.ndarray
    position_N: np.ndarray
    log_frequency_N: np.ndarray


@dataclass(frozen=True)
class Measured:
    """`figures` holds at least "loss", and "load", "variance" and "none" (share without an expert) over all tokens."""

    figures: dict[str, float]
    tokens: Tokens


class Study(Protocol):
    """One part: what its arms are, and how one of them is trained and measured."""

    part: str
    arms: Sequence[Arm]

    def recipe(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All that a run's figures follow from, as JSON values; a run kept under another recipe does not count."""

    def prepare(self) -> None:
        """Do what all runs need, so that a run's time is its own."""

    def run(self, arm: Arm, seed: int) -> Measured:
        """Train the arm and measure it on held-out data."""


@dataclass(frozen=True)
class RunFolder:
    """`<part>-<arm>-s<seed>.json` with the figures, and `.npz` beside it with the tokens."""

    folder: Path

    def is_done(self, study: Study, arm: Arm, seed: int) -> bool:
        """Whether the run is there, and was made by the same recipe."""
        record = self._runs.read(_name(study, arm, seed))
        return record is not None and record["recipe"] == digest(study, arm, seed)

    def keep(self, study: Study, arm: Arm, seed: int, measured: Measured, seconds: float) -> None:
        """Writes the run, whole or not at all."""
        record = {
            "recipe": digest(study, arm, seed),
            "part": study.part,
            "arm": asdict(arm),
            "seed": seed,
            "settings": study.recipe(arm, seed),
            "figures": measured.figures,
            "processor_seconds": round(seconds, 1),
            "made": provenance(),
        }
        self._runs.keep(_name(study, arm, seed), record, asdict(measured.tokens))

    def figures(self, study: Study, arm: Arm, seed: int) -> dict[str, float]:
        """What was measured."""
        return self.record(study, arm, seed)["figures"]

    def record(self, study: Study, arm: Arm, seed: int) -> dict[str, Any]:
        """Everything about a finished run but its tokens."""
        return self._runs.read(_name(study, arm, seed))

    def tokens(self, study: Study, arm: Arm, seed: int) -> Tokens:
        """The tokens of a run."""
        arrays = self._runs.arrays(_name(study, arm, seed))
        return Tokens(**{each.name: arrays[each.name] for each in fields(Tokens)})

    @property
    def _runs(self) -> kept.KeptRuns:
        return kept.KeptRuns(self.folder)


def _name(study: Study, arm: Arm, seed: int) -> str:
    return f"{study.part}-{arm.name}-s{seed}"


def digest(study: Study, arm: Arm, seed: int) -> str:
    """A short name of the recipe."""
    return kept.digest([study.recipe(arm, seed), arm.settings, seed])
