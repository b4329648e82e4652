"""What each arm's step costs beside dense, arms in turn, so that all meet the same machine."""

from __future__ import annotations

from statistics import median

import torch

from benchmarks.moma_study.arms import DENSE, arm_model
from benchmarks.moma_study.runs import Study, clock, learn

WARM_UP = 3


def measure(study: Study, arms: list[str], batch_rows: int, rounds: int = 20) -> dict[str, dict[str, float]]:
    """Arm -> {"ratio": steps a second beside dense, median over rounds, "seconds": median of a step of batch_rows}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {arm: arm_model(arm, study.scale, study.processor).to(device) for arm in arms}
    optimizers = {arm: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for arm, model in models.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(WARM_UP + rounds):
        first = turn * batch_rows % (len(study.rows) - batch_rows)
        batch = study.rows.batch(range(first, first + batch_rows))
        for arm, model in models.items():
            began = clock()
            learn(model, batch, optimizers[arm])
            if turn >= WARM_UP:
                seconds[arm].append(clock() - began)
    return {
        arm: {
            "ratio": median(dense / mine for dense, mine in zip(seconds[DENSE], seconds[arm], strict=True)),
            "seconds": median(seconds[arm]),
        }
        for arm in arms
    }
