"""What each arm's step costs beside dense, arms in turn, so that all meet the same machine."""

from __future__ import annotations

from statistics import median

import torch
from rich.progress import track
from rich.table import Table

from studies.moma.arms import DENSE, arm_model
from studies.moma.runs import Study, clock, learn

WARM_UP = 3

Speeds = dict[str, dict[str, float]]  # arm -> {"ratio": steps a second beside dense, "seconds": a step}, medians


def measure(study: Study, arms: list[str], batch_rows: int, rounds: int = 20) -> Speeds:
    """Each arm's steps of batch_rows, beside dense of the same round."""
    rows = study.few_rows((WARM_UP + rounds) * batch_rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {arm: arm_model(arm, study.scale, study.processor).to(device) for arm in arms}
    optimizers = {arm: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True) for arm, model in models.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in track(range(WARM_UP + rounds), f"{batch_rows} rows a step"):
        batch = rows.batch(range(turn * batch_rows, (turn + 1) * batch_rows))
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


def as_table(by_rows: dict[int, Speeds], length: int) -> Table:
    """Arms down, rows a step across."""
    table = Table("arm", *(f"{rows} rows of {length} tokens: s a step | beside dense" for rows in by_rows))
    for arm in next(iter(by_rows.values())):
        found = [speeds[arm] for speeds in by_rows.values()]
        table.add_row(arm, *(f"{one['seconds']:.3f} | {one['ratio'] - 1:+.1%}" for one in found))
    return table
