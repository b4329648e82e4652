"""Questions to a report: loads each arm in turn, has it answer, and hands the text to ``mllm.evaluation``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from mllm.build import load, resolve
from mllm.common import ranks
from mllm.common.console import quieten
from mllm.common.digests import digest
from mllm.common.errors import UserError
from mllm.common.folders import check_writable
from mllm.common.provenance import provenance
from mllm.data.conversation import Conversation
from mllm.data.mixture import load_mixture
from mllm.evaluation.answers import Answer
from mllm.evaluation.benchmarks import Selection
from mllm.evaluation.questions import read_questions
from mllm.evaluation.recipe import Recipe
from mllm.evaluation.report import Arm, build_report, write_report
from mllm.evaluation.tables import print_report
from mllm.inference.answering import ResumableAnswers, answer_all, say
from mllm.inference.generate import own_ends, prompts_for
from mllm.inference.peers import is_peer, load_peer
from mllm.mole import routing_context

Adapter = str | Path | None | Mapping[str, str | Path]  # a folder; none; or a folder for each domain


def evaluate_arms(
    model: str,
    adapters: Mapping[str, Adapter],
    questions: Path | Selection,
    out: Path,
    *,
    peers: Mapping[str, tuple[str, str | Path | None]] | None = None,
    train_rows: Path | None = None,
    image_root: Path | None = None,
    blanked: bool = True,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    fresh: bool = False,
) -> dict:
    """Scores one model with each of several adapters on the same questions, prints the tables and writes the report.

    What a killed run has answered is kept; the same call goes on from there, and over a finished folder it asks nothing
    again. Under torchrun the ranks share the questions, and the report is that of one rank.

    Args:
        adapters: arm name -> adapter folder, None for the model alone, or {domain: adapter folder} for specialists,
            each of which answers the questions of its domain. The first arm is what others are compared with.
        questions: a file of them, or benchmarks below a folder.
        peers: more arms, each a model of its own: arm name -> (folder or hub id, adapter folder or None).
        train_rows: where the blind baseline learns the commonest answers; without it there is no baseline.
        limit: only the first so many questions of each source.
        batch_size: questions answered at once, by each rank.
        fresh: whether to ask everything again; answers that are there are moved aside.

    Returns:
        The report, as written to ``out/report.json``.

    Raises:
        UserError: questions, pictures, model or adapter cannot be read, or no question has an answer to score by.
    """
    quieten()
    rows, known, models = check_evaluation(
        model, adapters, questions, out, peers=peers or {}, train_rows=train_rows, image_root=image_root, limit=limit
    )
    if isinstance(questions, Selection):
        say(questions.told())
    with ranks.joined():
        arms = {
            name: (answer_specialists if isinstance(adapter, Mapping) else answer_arm)(
                path, adapter, rows, name=name, split=questions.stem, folder=out / "answers", blanked=blanked,
                batch_size=batch_size, max_new_tokens=max_new_tokens, fresh=fresh,
            )
            for name, (path, adapter) in models.items()
        }  # fmt: skip
        report = None
        if ranks.is_first():
            report = build_report(arms, known)
            report["about"] = {
                "model": str(model),
                "adapters": {name: _plain(adapter) for name, adapter in adapters.items() if adapter},
                "peers": {name: [str(part) for part in pair if part] for name, pair in (peers or {}).items()},
                "questions": questions.name,
                **({"benchmarks": questions.told()} if isinstance(questions, Selection) else {}),
                "decoding": {"greedy": True, "max_new_tokens": max_new_tokens},
                "measured": provenance(),
            }
            write_report(report, arms, out)
            print_report(report)
        return ranks.shared(report)


def _plain(adapter: Adapter) -> str | dict[str, str]:
    if isinstance(adapter, Mapping):
        return {domain: str(folder) for domain, folder in adapter.items()}
    return str(adapter)


def check_evaluation(
    model: str,
    adapters: Mapping[str, Adapter],
    questions: Path | Selection,
    out: Path,
    *,
    peers: Mapping[str, tuple[str, str | Path | None]],
    train_rows: Path | None,
    image_root: Path | None,
    limit: int | None,
) -> tuple[list[Conversation], Sequence[Conversation], dict[str, tuple[str, Adapter]]]:
    """Questions, training rows, and each arm's model and adapter: what `evaluate_arms` needs, found in order before any
    model is loaded or process started. Raises UserError as that does."""
    check_writable(out, "--out")
    rows = read_questions(questions, image_root=image_root, limit=limit)
    known = load_mixture(train_rows) if train_rows else []
    models = {name: (model, adapter) for name, adapter in adapters.items()} | dict(peers)
    check_arms(models, num_arms=len(adapters) + len(peers))
    return rows, known, models


def check_arms(models: Mapping[str, tuple[str, Adapter]], *, num_arms: int) -> None:
    """Raises UserError for what would otherwise be found only after the first arm has spent an hour answering."""
    if len(models) < num_arms:
        raise UserError("an arm and a peer have the same name; give each one of its own.")
    for name, (_, adapter) in models.items():
        for folder in adapter.values() if isinstance(adapter, Mapping) else [adapter]:
            if folder is not None and not Path(folder).is_dir():
                raise UserError(f"arm {name}: no adapter folder {folder}.")


def answer_specialists(
    model_path: str, adapters: Mapping[str, str | Path], rows: Sequence[Conversation], *, name: str, **options: Any
) -> Arm:
    """`answer_arm` with another adapter for each domain, as one arm: each row answered by its domain's specialist.

    Raises:
        UserError: a row's domain has no specialist.
    """
    missing = sorted({row.domain for row in rows} - set(adapters))
    if missing:
        raise UserError(f"arm {name}: no adapter for domain {missing[0]!r}; there are {', '.join(sorted(adapters))}.")
    places = {domain: [place for place, row in enumerate(rows) if row.domain == domain] for domain in adapters}
    parts = {
        domain: answer_arm(
            model_path, adapters[domain], [rows[place] for place in own], name=f"{name}.{domain}", **options
        )
        for domain, own in places.items()
        if own
    }

    def in_order(kind: str) -> list[Answer] | None:
        by_place = {
            place: answer
            for domain, part in parts.items()
            for place, answer in zip(places[domain], part[kind] or (), strict=bool(part[kind]))
        }
        return [by_place[place] for place in range(len(rows))] if by_place else None

    one = next(iter(parts.values()))["recipe"]
    whole = Recipe.of(rows, split=options["split"], template=None, decoding=one.decoding)
    return Arm(
        answers=in_order("answers"),
        blanked=in_order("blanked"),
        routing=None,
        recipe=replace(whole, template=one.template),
    )


def answer_arm(
    model_path: str,
    adapter: str | Path | None,
    rows: Sequence[Conversation],
    *,
    name: str,
    split: str,
    folder: Path,
    blanked: bool,
    batch_size: int,
    max_new_tokens: int,
    fresh: bool = False,
) -> Arm:
    """One arm's answers, with pictures and blanked, and where its experts' tokens went; kept in ``folder``."""
    model, processor = load_arm(model_path, adapter)
    recipe = Recipe.of(
        rows, split=split, template=template_of(processor), decoding=decoding_of(model, processor, max_new_tokens)
    )
    say(f"{name}: {len(rows)} questions, recipe {recipe.id}")

    def answered(blank: bool) -> tuple:
        asked, title = (recipe.blanked(), f"{name} (blanked)") if blank else (recipe, name)
        path = folder / f"{name}{'.blanked' if blank else ''}.jsonl"
        origin = {
            "prompt, template or decoding": asked.asked,
            "model": stamp(model_path, adapter),
            "code": code_stamp(),
        }
        answers_file = None
        if ranks.is_first():
            answers_file = ResumableAnswers(path, origin, model_id=title, recipe=asked, fresh=fresh)
            if answers_file.replies:
                say(f"{title}: {len(answers_file.replies)} of {len(rows)} were answered before")
        sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        return answer_all(model, processor, rows, answers_file, blank=blank, **sizes)

    answers, stats = answered(blank=False)
    return Arm(
        answers=answers,
        blanked=answered(blank=True)[0] if blanked else None,
        routing=stats.to_json() if routing_context(model) else None,
        recipe=recipe,
    )


def load_arm(model_path: str, adapter: str | Path | None) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """A LLaVA as `mllm.load` gives it, or any other vision-language model of transformers'; on this rank's device."""
    read = load_peer if is_peer(model_path) else load
    return read(model_path, adapter=adapter, device=ranks.own_device())


def template_of(processor: ProcessorMixin) -> str:
    return str(getattr(processor, "chat_template", None) or processor.tokenizer.chat_template)


def decoding_of(model: PreTrainedModel | PeftModel, processor: ProcessorMixin, max_new_tokens: int) -> str:
    """How replies are chosen, with what a checkpoint's own settings add: tokens that end them."""
    known = {processor.tokenizer.eos_token_id, *prompts_for(processor).ends}
    ends = processor.tokenizer.convert_ids_to_tokens(sorted(set(own_ends(model)) - known))
    return f"greedy, at most {max_new_tokens} tokens" + (f", ended also by {', '.join(map(str, ends))}" if ends else "")


def stamp(*paths: str | Path | None) -> str:
    """Changes when a file of these folders or bases does; of a hub id, the name is all there is to go by."""
    folders = [resolve(path) for path in paths if path is not None]
    return digest([[path if not Path(path).is_dir() else "", *_file_stamps(Path(path))] for path in folders])


def _file_stamps(folder: Path) -> list[tuple[str, int, int]]:
    found = sorted(path for path in folder.glob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def code_stamp() -> str:
    """Changes with the library's own text, as far as replies depend on it, and with the libraries below it."""
    root = Path(str(files("mllm")))
    sources = sorted(path for path in root.rglob("*.py") if root / "evaluation" not in path.parents)
    texts = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return digest([texts, *(version(library) for library in ("torch", "transformers", "peft"))])
