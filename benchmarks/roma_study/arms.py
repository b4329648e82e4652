"""The arms: what each trains, by which loss, with which neighbours; and the trials it may choose from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TRIALS = tuple({"lr": rate, "weight": weight} for rate in (1e-3, 3e-3) for weight in (0.3, 3.0))


@dataclass(frozen=True)
class Arm:
    """`settings` are fields of AlignSettings; `pool` says who are neighbours: "true" (the nearest that succeeded),
    "random" (others that succeeded, same weights), "any" (the nearest, successful or not), or "" (none needed)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    pool: str = ""
    trials: tuple[dict[str, float], ...] = TRIALS


CE = {"regulariser": "none"}
ONLY_RATES = tuple({"lr": rate} for rate in RATES)

ARMS = (
    Arm("base", trials=()),
    Arm("ce", CE, trials=ONLY_RATES),
    Arm("l2", {"regulariser": "initial"}),
    Arm("true", {"regulariser": "neighbours"}, "true"),
    Arm("random", {"regulariser": "neighbours"}, "random"),
    Arm("any", {"regulariser": "neighbours"}, "any"),
    Arm("true_stop", {"regulariser": "neighbours", "targets": "stop"}, "true"),
    Arm("entropy", {"regulariser": "entropy"}),
    Arm("dense", CE | {"dense_gradient": True}, trials=ONLY_RATES),
    Arm("lora", trials=ONLY_RATES),
    Arm("mixing", pool="true", trials=tuple({"alpha": alpha} for alpha in (0.1, 0.3, 0.6, 1.0))),
)
