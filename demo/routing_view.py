"""What the experts did in one answer, as HTML: patches and tokens coloured by expert, and the load of every layer.

Drawn from what `generate.stream` recorded; computes shares and nothing else. Knows no page and no model.
L routed layers, T tokens that a forward has read, X experts, O outcomes: the real experts, and all null ones together.
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

import torch
from PIL import Image
from torch import Tensor

from mllm.inference.generate import Record

# Told apart by people who see few colours too (after Okabe and Ito), then repeated lighter.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f5fc4")
NULL = "#9aa3af"

CSS = """
.routing .patches { position: relative; display: inline-grid; width: min(100%, 300px); aspect-ratio: 1;
                    background-size: 100% 100%; margin: 0 .5rem .5rem 0; }
.routing .patches i { opacity: .55; }
.routing .patches i:hover { opacity: .1; }
.routing .words { line-height: 1.9; overflow-wrap: anywhere; white-space: pre-wrap; }
.routing .words span { border-bottom: 3px solid; border-radius: 2px; padding: 0 1px; }
.routing .bars { display: grid; grid-template-columns: auto 1fr 1fr; gap: 2px .5rem; align-items: center;
                 font-size: .75rem; }
.routing .bar { display: flex; height: .8rem; }
.routing .key { display: inline-block; width: .8rem; height: .8rem; margin: 0 .25rem 0 .75rem; }
"""


def outcomes(values_LTX: Tensor, num_experts: int) -> Tensor:
    """`[..., O]`: null experts, if there are any, added up in a last column."""
    real, null = values_LTX[..., :num_experts], values_LTX[..., num_experts:]
    return torch.cat([real, null.sum(-1, keepdim=True)], -1) if null.shape[-1] else real


def shares(record: Record, image_token_id: int) -> dict[str, Tensor]:
    """ "image", "text" -> `[L, O]` share of the picks of such tokens that went to each; only of what there was."""
    picks_LTO = outcomes(record.picks_LTX, record.num_experts)
    is_image_T = torch.tensor(read_ids(record)) == image_token_id
    counted = {"image": picks_LTO[:, is_image_T].sum(1), "text": picks_LTO[:, ~is_image_T].sum(1)}
    return {name: picks_LO / picks_LO.sum(1, keepdim=True) for name, picks_LO in counted.items() if picks_LO.sum()}


def read_ids(record: Record) -> list[int]:
    """The T tokens: those of prompt and answer, but for the last one if no forward has read it."""
    return [*record.prompt_ids, *record.reply_ids][: record.picks_LTX.shape[1]]


def routing_html(
    record: Record,
    pictures: Sequence[Image.Image],
    layer: int | None,
    *,
    image_token_id: int,
    decode: Callable[[list[int]], str],
) -> str:
    """The view of one layer, or of all together where `layer` is None.

    Args:
        record: of an answer whose routing was kept.
        pictures: what the model saw, in the order of the conversation.
        decode: token ids to text.
    """
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    probs_TO = outcomes(record.router_probs_LTX[layers], record.num_experts).mean(0)
    picks_TO = outcomes(record.picks_LTX[layers], record.num_experts).mean(0)
    names = outcome_names(record)
    # The most picked one; of several the most probable.
    best_T = (picks_TO + 1e-3 * probs_TO).argmax(1)
    cells = [
        (_colour(names, best) if taken else "transparent", _hover(names, probs, picks))
        for best, taken, probs, picks in zip(
            best_T.tolist(), picks_TO.sum(1).tolist(), probs_TO.tolist(), picks_TO.tolist(), strict=True
        )
    ]
    ids = read_ids(record)
    patches = [cell for cell, token in zip(cells, ids, strict=True) if token == image_token_id]
    parts = [_legend(names)]
    if pictures and patches:
        each = len(patches) // len(pictures)
        parts += [_patches(picture, patches[n * each : (n + 1) * each]) for n, picture in enumerate(pictures)]
    parts += [_words(record, cells, decode), _bars(record, image_token_id, names, layer)]
    return f'<div class="routing">{"".join(parts)}</div>'


def outcome_names(record: Record) -> list[str]:
    has_null = record.picks_LTX.shape[2] > record.num_experts
    return [str(number) for number in range(record.num_experts)] + (["null"] if has_null else [])


def _colour(names: Sequence[str], outcome: int) -> str:
    return NULL if names[outcome] == "null" else COLOURS[outcome % len(COLOURS)]


def _hover(names: Sequence[str], probs: Sequence[float], picks: Sequence[float]) -> str:
    told = (f"{name}: {prob:.2f}{' ✓' if pick else ''}" for name, prob, pick in zip(names, probs, picks, strict=True))
    return "probability of expert " + ", ".join(told)


def _legend(names: Sequence[str]) -> str:
    keys = (
        f'<span class="key" style="background:{_colour(names, n)}"></span>{"expert " * (name != "null")}{name}'
        for n, name in enumerate(names)
    )
    return f"<p>{''.join(keys)}</p>"


def _patches(picture: Image.Image, cells: Sequence[tuple[str, str]]) -> str:
    side = round(len(cells) ** 0.5)
    columns = side if side * side == len(cells) else len(cells)
    file = io.BytesIO()
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    squares = "".join(f'<i style="background:{colour}" title="{hover}"></i>' for colour, hover in cells)
    return (
        f'<div class="patches" style="grid-template-columns:repeat({columns},1fr);'
        f'background-image:url(data:image/png;base64,{data})">{squares}</div>'
    )


def _words(record: Record, cells: Sequence[tuple[str, str]], decode: Callable[[list[int]], str]) -> str:
    of_reply = cells[len(record.prompt_ids) :]
    spans = []
    for number, (colour, hover) in enumerate(of_reply):
        # A token may be part of a character: what it adds to the text is what it stands for.
        before, after = decode(record.reply_ids[:number]), decode(record.reply_ids[: number + 1])
        text = after[len(before) :] if after.startswith(before) else "�"
        spans.append(f'<span style="border-color:{colour}" title="{hover}">{escape(text)}</span>')
    return f'<p class="words">{"".join(spans)}</p>'


def _bars(record: Record, image_token_id: int, names: Sequence[str], layer: int | None) -> str:
    of_kind = shares(record, image_token_id)
    rows = ["<b>layer</b><b>picture</b><b>text</b>"]
    for number, name in enumerate(record.layers):
        bars = "".join(
            _bar(of_kind[kind][number].tolist(), names) if kind in of_kind else "<span>–</span>"
            for kind in ("image", "text")
        )
        label = f"<b>{number}</b>" if number == layer else str(number)
        rows.append(f'<span title="{escape(name)}">{label}</span>{bars}')
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar(shares_O: Sequence[float], names: Sequence[str]) -> str:
    pieces = (
        f'<i style="width:{share:.2%};background:{_colour(names, n)}" title="{names[n]}: {share:.1%}"></i>'
        for n, share in enumerate(shares_O)
    )
    return f'<div class="bar">{"".join(pieces)}</div>'
