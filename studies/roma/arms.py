"""The arms: what each trains, by which loss, with which neighbours; and the trials it may choose from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
TRIALS = tuple({"lr": rate, "weight": weight} for rate in (1e-3, 3e-3) for weight in (0.3, 3.0))


@dataclass(frozen=True)
class Arm:
    """`settings` are fields of AlignSettings; `pool` says who are neighbours: "true" (the nearest that succeeded),
    "random" (others that succeeded, same weights), "any" (the nearest, successful or not), or "" (none needed).

    `refresh`: who succeeds is measured anew each epoch. `by_family`: λ of a row is in proportion to how much of its
    family fails, 1 on average.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    pool: str = ""
    trials: tuple[dict[str, float], ...] = TRIALS
    refresh: bool = False
    by_family: bool = False


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


def _with_two_trials(arm: Arm) -> Arm:
    trials = tuple({"lr": 3e-3, "weight": weight} for weight in (0.3, 3.0)) if arm.trials == TRIALS else arm.trials[1:3]
    return replace(arm, trials=trials)


RIVALS = tuple(arm for arm in ARMS if arm.name not in ("true_stop", "dense", "mixing"))
FEW_TRIALS = tuple(_with_two_trials(arm) for arm in RIVALS)  # where a step costs more: two trials instead of four
TRUE = {"regulariser": "neighbours"}
# What might turn the method positive where it is not: explored after the arms above, never part of the claim.
TRIES = (
    Arm("token_first", TRUE | {"token": "first"}, "true"),
    Arm("layers_1", TRUE | {"layers": 1}, "true"),
    Arm("logits", TRUE | {"space": "logits"}, "true"),
    Arm("table", TRUE | {"targets": "table"}, "true"),
    Arm("rising", TRUE | {"weight_warmup": 0.5}, "true"),
    Arm("refresh", TRUE, "true", refresh=True),
    Arm("by_family", TRUE, "true", by_family=True),
    Arm(
        "gentle", TRUE, "true", tuple({"lr": rate, "weight": weight} for rate in (1e-3, 3e-3) for weight in (0.03, 0.1))
    ),
    Arm("contrast", {"regulariser": "contrast"}, "true"),
    Arm("contrast_random", {"regulariser": "contrast"}, "random"),
)
