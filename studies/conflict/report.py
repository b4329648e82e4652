"""Finished runs read together: summary.json, README.md, two pictures and the tables on the terminal.

A arms, S seeds, N samples.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mllm.common.errors import UserError
from mllm.common.provenance import provenance
from mllm.evaluation.intervals import RESAMPLES
from mllm.evaluation.tables import Titled, markdown, percent, print_tables, signed, with_interval
from studies.conflict.analysis import Scores, analyse
from studies.conflict.arms import Arm
from studies.conflict.config import ConflictConfig
from studies.conflict.picture import draw_routing, draw_scores
from studies.conflict.study import Job, Study
from studies.runner import RunFolder, record_of

SINGLE = "single"
VERSUS = ("wide", "mole_frozen")  # what experts must beat beside the baseline: as many weights, and blind routing
SUMMARY, README, PICTURE, ROUTING, FACTS = "summary.json", "README.md", "conflict.png", "routing.png", "study.json"
# Settings of this machine alone, nothing that a figure follows from.
MACHINE = {
    "run": {"out", "limit_minutes", "threads"},
    "model": {"device"},
    "data": {"miniworld": {"folder"}},
}
FEW_STEPS = 100
MOST_LAYERS = 8  # shown one by one in a table; the picture has them all


def write_facts(study: Study, out: Path) -> None:
    """Keeps what the runs' recipes need beside them, so that a report needs neither base nor data."""
    out.mkdir(parents=True, exist_ok=True)
    (out / FACTS).write_text(json.dumps(study.facts, indent=1) + "\n", encoding="utf-8")


def read_study(config: ConflictConfig) -> Study:
    """The study as it was last run. Raises UserError where it was not."""
    path = config.run.out / FACTS
    if not path.is_file():
        raise UserError(f"run.out {config.run.out} holds no {FACTS}: run the study before asking for its report.")
    return Study(config, json.loads(path.read_text(encoding="utf-8")))


def report(study: Study, runs: RunFolder, console: Console) -> dict[str, Any] | None:
    """Writes and prints what is there. Returns the summary; None while no seed is complete."""
    summary = summarise(study, runs)
    if summary is None:
        console.print("No seed is complete yet: go on with the same command.")
        return None
    out = study.config.run.out
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_scores(summary, out / PICTURE)
    routed = draw_routing(summary, out / ROUTING)
    pictures = f"\n![scores by arm]({PICTURE})\n" + (f"\n![information of experts]({ROUTING})\n" if routed else "")
    said = "\n".join(f"- {sentence}" for sentence in sentences(summary))
    title = f"Conflict: {summary['regime']}\n\n{said}\n{pictures}"
    (out / README).write_text(markdown(title, tables(summary), notes(summary)), encoding="utf-8")
    print_tables(tables(summary), [*sentences(summary), *notes(summary)], console)
    return summary


# -- from runs to figures ----------------------------------------------------------------------------------------------


def summarise(study: Study, runs: RunFolder) -> dict[str, Any] | None:
    """All figures as JSON values: what `analyse` tells, and for each arm its rate, cost and routing.

    Of the seeds that every arm has which has any; None where there is no such seed, or no baseline.
    """
    done = {arm: _done_seeds(study, arm, runs) for arm in study.config.arms}
    arms = [arm for arm, seeds in done.items() if seeds]
    seeds = sorted(set.intersection(*(set(done[arm]) for arm in arms))) if arms else []
    if not seeds or study.config.run.baseline not in [arm.name for arm in arms]:
        return None
    jobs = {arm.name: [_final(study, arm, runs, seed) for seed in seeds] for arm in arms}
    names = {arm: [study.name(job) for job in group] for arm, group in jobs.items()}
    records = {arm: [record_of(study, job, runs) for job in group] for arm, group in jobs.items()}
    untrained = [arm.name for arm in arms if arm.trains == "nothing"]
    found = analyse(
        _scores(names, runs), baseline=study.config.run.baseline, single=SINGLE, versus=VERSUS, aside=untrained
    )
    for arm in arms:
        found["arms"][arm.name] |= _about(study, arm, runs, records[arm.name])
    finals = [record for group in records.values() for record in group]
    summary = {
        "regime": study.config.regime_name,
        "provenance": provenance(),
        "made": {key: sorted({record["made"][key] for record in finals}) for key in ("date", "commit", "device")},
        "config": study.config.model_dump(mode="json", exclude=MACHINE),
        "facts": study.facts,
        "baseline": study.config.run.baseline,
        "seeds": seeds,
        "left_out": _left_out(study, done, seeds, runs),
        "bootstrap": {"resamples": RESAMPLES, "level": 0.95, "unit": "seed and picture"},
        **found,
        "only_tuned": {
            arm.name: {"says": arm.says, "adapter": study.adapters[arm.name]} | _rates(study, arm, runs)
            for arm in study.config.arms
            if arm.name in study.config.only_tuned and study.tuned(arm, runs)
        },
    }
    return json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON knows no NaN: null stands for it


def _final(study: Study, arm: Arm, runs: RunFolder, seed: int) -> Job:
    return next(job for job in study.finals(arm, runs) if job.seed == seed)


def _done_seeds(study: Study, arm: Arm, runs: RunFolder) -> list[int]:
    return [job.seed for job in study.finals(arm, runs) if record_of(study, job, runs) is not None]


def _left_out(study: Study, done: dict[Arm, list[int]], seeds: list[int], runs: RunFolder) -> list[str]:
    """What the config names and the report lacks."""
    tuned = study.config.only_tuned
    missing = [arm.name for arm, finished in done.items() if not finished and arm.name not in tuned]
    untuned = [arm.name for arm in done if arm.name in tuned and not study.tuned(arm, runs)]
    due = [str(seed) for seed in range(study.config.run.seeds) if seed not in seeds]
    said = [f"arms without a finished seed: {', '.join(missing)}"] if missing else []
    said += [f"arms whose rates were not all tried: {', '.join(untuned)}"] if untuned else []
    return said + ([f"seeds that not every arm has: {', '.join(due)}"] if due else [])


def _scores(names: dict[str, list[str]], runs: RunFolder) -> Scores:
    arrays = {arm: [runs.arrays(name) for name in group] for arm, group in names.items()}
    any_run = next(iter(arrays.values()))[0]
    return Scores(
        {arm: np.stack([run["exact"] for run in group]) for arm, group in arrays.items()},
        any_run["domain"],
        any_run["source"],
        any_run["picture"],
    )


def _about(study: Study, arm: Arm, runs: RunFolder, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What an arm is, what it was given, what it cost and how it routed: means over seeds."""
    costs = {name: float(np.mean([each["cost"][name] for each in records])) for name in records[0]["cost"]}
    peaks = [each["peak_mib"] for each in records if each["peak_mib"] is not None]
    routing = [each["routing"] for each in records if each["routing"] is not None]
    return {
        "says": arm.says,
        "is_control": arm.is_control,
        "adapter": None if arm.trains == "nothing" else study.adapters[arm.name],
        **_rates(study, arm, runs),
        "cost": costs | {"seconds": float(np.mean([each["seconds"] for each in records]))},
        "peak_mib": max(peaks, default=None),
        "routing": _mean_routing(routing),
    }


def _rates(study: Study, arm: Arm, runs: RunFolder) -> dict[str, Any]:
    tuned = sorted((study.tuned(arm, runs) or {}).items())
    return {
        "lr": None if arm.trains == "nothing" else study.chosen_rate(arm, runs) * arm.rate,
        "router_rate": arm.router_rate,
        "tuned": [{"lr": rate * arm.rate, "exact": exact, "loss": loss} for rate, (exact, loss) in tuned],
    }


def _mean_routing(routings: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not routings:
        return None
    summaries = [each["summary"] for each in routings]
    figures = {key: float(np.mean([each[key] for each in summaries])) for key in summaries[0]}
    return {"layers": routings[0]["layers"], "summary": figures}


# -- from figures to words ---------------------------------------------------------------------------------------------


def sentences(summary: dict[str, Any]) -> list[str]:
    """The answer first: whether mixing hurts, and who gets it back."""
    base, conflict = summary["baseline"], summary["conflict"]
    if conflict is None:
        return [f"Without the arm {SINGLE} nobody can tell whether mixing hurts: add it to run.arms."]
    points = with_interval(conflict["mean"]["difference"], conflict["mean"], sign="+")
    if not summary["hurts"]["mean"]:
        helps = conflict["mean"]["ci_high"] < 0
        return [
            f"No conflict is shown: mixing does not hurt here beyond chance ({SINGLE} − {base}: {points} points on the "
            f"mean of domains{', so it helps' if helps else ''}). There is nothing to recover, and no method can help.",
            *_hurt_domains(summary),
        ]
    said = [f"Mixing hurts: {SINGLE} − {base} is {points} points on the mean of domains.", *_hurt_domains(summary)]
    controls = {name for name, arm in summary["arms"].items() if arm["is_control"]}
    recovery = {arm: each["mean"] for arm, each in summary["recovery"].items() if arm not in controls}
    if recovery:
        arm = max(recovery, key=lambda name: recovery[name]["recovery"])
        said.append(f"Most is recovered by {arm}: {ratio(recovery[arm])} of the conflict (controls left aside).")
    return said


def _hurt_domains(summary: dict[str, Any]) -> list[str]:
    hurt = [domain for domain, is_hurt in summary["hurts"]["domains"].items() if is_hurt]
    if not hurt:
        return ["In no domain taken alone does the interval exclude zero."]
    return [f"Taken alone, the interval lies above zero in: {', '.join(hurt)}."]


def notes(summary: dict[str, Any]) -> list[str]:
    """How to read the tables, and what a reader should know of this study."""
    facts, made = summary["facts"], summary["made"]
    rows = "; ".join(
        f"{split} " + ", ".join(f"{domain} {count}" for domain, count in counts.items())
        for split, counts in facts["rows"].items()
    )
    said = [
        "Arms: " + "; ".join(f"{name}: {arm['says']}" for name, arm in _all_arms(summary).items()) + ".",
        "Per cent of answers right to the letter, told by teacher forcing: every answer token, its end included, is "
        "the most probable one, so greedy decoding gives that answer. Intervals: 95 %, bootstrap of "
        f"{summary['bootstrap']['resamples']:,} over seeds and pictures together; p by the same, Holm over arms; "
        "t: over seeds alone, not corrected.",
        f"conflict: {SINGLE} − {summary['baseline']}. recovery: (arm − {summary['baseline']}) / conflict, only where "
        "the conflict's interval lies above zero.",
        f"Seeds {', '.join(map(str, summary['seeds']))}, the same order of samples for all arms. Rows: {rows}.",
        f"Commit {', '.join(made['commit'])}; {', '.join(made['device'])}; {', '.join(made['date'])}.",
    ]
    if "twice" in summary["arms"]:
        said.append(f"The second half of what `twice` sees: {facts['twice']}.")
    at_edge = [name for name, arm in _all_arms(summary).items() if _is_at_edge(arm)]
    if at_edge:
        said.append(f"The best rate lies at an end of the grid for {', '.join(at_edge)}: widen run.lrs.")
    slow = [f"{name} {arm['router_rate']:g}" for name, arm in _all_arms(summary).items() if arm["router_rate"] != 1]
    if slow:
        said.append(f"Learning rate of routers beside that of all else, where it is not 1: {', '.join(slow)}.")
    run, alone = summary["config"]["run"], min(facts["rows"]["train"].values())
    if alone * run["passes"] / run["batch_size"] < FEW_STEPS:
        said.append(
            f"`{SINGLE}` has fewer than {FEW_STEPS} steps on some domain; part of a difference may be that weights "
            "on the mix are moved more often: take a smaller run.batch_size."
        )
    if facts["test_pictures_seen_in_training"]:
        said.append(f"{facts['test_pictures_seen_in_training']} test pictures were trained on or chose rates.")
    return said + [f"Left out: {left}." for left in summary["left_out"]]


def _all_arms(summary: dict[str, Any]) -> dict[str, Any]:
    return summary["arms"] | summary["only_tuned"]


def _is_at_edge(arm: dict[str, Any]) -> bool:
    rates = [each["lr"] for each in arm["tuned"]]
    return len(rates) > 1 and arm["lr"] in (rates[0], rates[-1])


def tables(summary: dict[str, Any]) -> Iterator[Titled]:
    """(title, heads, rows) of each table."""
    yield "Score per domain", *_scores_table(summary, "domains")
    any_arm = next(iter(summary["arms"].values()))
    if set(any_arm["sources"]) != set(any_arm["domains"]):
        yield "Score per source", *_scores_table(summary, "sources")
    if summary["conflict"] is not None:
        yield "Conflict and recovery", *_recovery_table(summary)
    yield "Differences, mean of domains", *_difference_table(summary)
    yield "Cost", *_cost_table(summary)
    if any(arm["routing"] for arm in summary["arms"].values()):
        yield "What experts tell of domain and modality", *_routing_table(summary)
    if any(arm["tuned"] for arm in summary["arms"].values()):
        yield "Learning rates on validation", *_rates_table(summary["arms"])
    if summary["only_tuned"]:
        yield "Tried on validation alone, not scored on test", *_rates_table(summary["only_tuned"])


def _scores_table(summary: dict[str, Any], level: str) -> tuple[list[str], list[list[str]]]:
    groups = list(next(iter(summary["arms"].values()))[level])
    with_mean = ["mean"] if level == "domains" else []
    rows = []
    for name, arm in summary["arms"].items():
        measured = [*(arm[level][group] for group in groups), *(arm[key] for key in with_mean)]
        rows.append([name, *(with_interval(each["score"], each) for each in measured)])
    return ["arm", *groups, *with_mean], rows


def ratio(found: dict[str, float] | None) -> str:
    """A recovery with its interval, 1 for all of the conflict; a dash where there is none."""
    return "–" if found is None else f"{found['recovery']:.2f} [{found['ci_low']:.2f}, {found['ci_high']:.2f}]"


def _recovery_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    conflict = summary["conflict"]
    domains = list(conflict["domains"])
    first = ["conflict (points)", *(signed(conflict["domains"][name]) for name in domains), signed(conflict["mean"])]
    rows = [
        [f"recovery, {arm}", *(ratio(each["domains"][name]) for name in domains), ratio(each["mean"])]
        for arm, each in summary["recovery"].items()
    ]
    return ["", *domains, "mean"], [first, *rows]


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _difference_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    others = summary["differences"]
    heads = [head for other in others for head in (f"− {other}", "p Holm", "p t")]
    rows = []
    for arm in summary["arms"]:
        cells = []
        for against in others.values():
            gain = against[arm]["mean"] if arm in against else None
            cells += ["–"] * 3 if gain is None else [signed(gain), _p(gain["p_holm"]), _p(gain["t"]["p"])]
        if set(cells) != {"–"}:
            rows.append([arm, *cells])
    return ["arm", *heads], rows


def _cost_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads = ["arm", "trained", "active", "MFLOP a token", "of these needed", "training s", "peak MiB"]
    rows = []
    for name, arm in summary["arms"].items():
        cost, peak = arm["cost"], arm["peak_mib"]
        rows.append(
            [
                name,
                f"{cost['trained_parameters']:,.0f}",
                f"{cost['active_parameters']:,.0f}",
                f"{cost['flops'] / 1e6:.3f}",
                f"{cost['needed_flops'] / 1e6:.3f}",
                f"{cost['seconds']:.1f}",
                "–" if peak is None else f"{peak:,.0f}",
            ]
        )
    return heads, rows


def _routing_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Mutual information in nats, mean over layers, its share of what there is to tell, and by layer."""
    heads = ["arm", "domain", "share", "by layer", "modality", "share", "by layer", "load", "entropy"]
    rows = []
    for name, arm in summary["arms"].items():
        if arm["routing"] is not None:
            layers, figures = arm["routing"]["layers"], arm["routing"]["summary"]
            cells = []
            for key in ("mi_domain", "mi_modality"):
                by_layer = [f"{figures[f'routing/{key}/{layer}']:.2f}" for layer in layers]
                ratio = percent(figures[f"routing/{key}_ratio"])
                shown = " ".join(by_layer) if len(layers) <= MOST_LAYERS else "see the picture"
                cells += [f"{figures[f'routing/{key}']:.3f}", ratio, shown]
            rows.append([name, *cells, f"{figures['routing/load']:.2f}", f"{figures['routing/entropy']:.2f}"])
    return heads, rows


def _rates_table(arms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Exact share for each rate, the chosen one starred; `full` counts its own, smaller rates."""
    places = range(max(len(arm["tuned"]) for arm in arms.values()))
    rows = []
    for name, arm in arms.items():
        if not arm["tuned"]:
            continue
        cells = [f"{each['lr']:g}: {percent(each['exact'])}{' *' * (each['lr'] == arm['lr'])}" for each in arm["tuned"]]
        rows.append([name, *cells])
    return ["arm", *(f"rate {place + 1}" for place in places)], rows
