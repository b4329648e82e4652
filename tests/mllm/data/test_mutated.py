"""Rows and pictures spoilt at random: each loads or is refused by row, in `check` and on training's own way.

MUTATED=10000 tries so many rows, and a fifth as many pictures; each is made from its number as seed.
"""

import copy
import io
import json
import os
import random

import numpy as np
import pytest
from PIL import Image

from mllm.common.errors import UserError
from mllm.data import ConversationEncoder, EncodedMixture, check_mixture, load_mixture
from tests.mllm.data.conftest import record
from tests.mllm.data.test_formats import LAYOUTS

ROWS = int(os.environ.get("MUTATED", "400"))
JUNK = (
    None, True, 0, -1, 1e308, float("nan"), "", " ", "\x00", "\ud83d", "\udc00.png", "\x1b[2J", "<image>", "a/../../b",
    "/etc/passwd", "http://a/b.png", "data:", "data:image/png;base64,AAAA", "x" * 3000, "é" * 300, [], {}, [[]], [None],
    {"type": "image"}, {"bytes": "!"}, "</s>", "\ue000answer\ue001", "system", "gpt", 10**30, ["red.png", "blue.png"],
)  # fmt: skip


def places(value, way=()):
    """Ways to all values inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inside:
        yield (*way, key)
        yield from places(each, (*way, key))


def spoilt_line(seed: int) -> bytes:
    """A row of some layout with one or two values replaced, lost, doubled or renamed, or with its bytes changed."""
    rng = random.Random(seed)
    row = json.loads(json.dumps(rng.choice(list(LAYOUTS.values()))("What colour?", "red", "red.png")))
    for _ in range(rng.choice((1, 1, 2))):
        *way, last = rng.choice(list(places(row)) or [("id",)])
        place = row
        for key in way:
            place = place[key]
        action = rng.choice(("replace", "replace", "replace", "lose", "double", "rename"))
        if action == "replace" or last not in (place if isinstance(place, dict) else range(len(place))):
            place[last] = copy.deepcopy(rng.choice(JUNK))
        elif action == "lose":
            del place[last]
        elif isinstance(place, list):
            place.insert(last, copy.deepcopy(place[last]))
        else:
            place[str(last) + "s"] = place.pop(last) if action == "rename" else copy.deepcopy(place[last])
    line = bytearray(json.dumps(row).encode())
    if rng.random() < 0.1:
        line[rng.randrange(len(line))] = rng.randrange(256)
    return bytes(line).replace(b"\n", b" ")


def spoilt_picture(seed: int) -> bytes:
    """A picture of some format and size, with bytes changed, cut or added."""
    rng = random.Random(seed)
    modes = {"JPEG": "RGB", "PNG": rng.choice(("RGB", "RGBA", "P", "I;16", "1", "LA")), "GIF": "P", "WEBP": "RGBA",
             "BMP": "RGB", "TIFF": rng.choice(("RGB", "F", "I;16", "CMYK"))}  # fmt: skip
    kind = rng.choice(list(modes))
    size = rng.choice(((40, 30), (1, 1), (1, 400), (300, 1), (64, 64)))
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("I").convert("I;16") if modes[kind] == "I;16" else image.convert(modes[kind])
    file = io.BytesIO()
    image.save(file, kind)
    data = bytearray(file.getvalue())
    for _ in range(rng.randrange(4)):
        data[rng.randrange(min(len(data), rng.choice((30, 10**6))))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)


def tried(mixture, encoder):
    """How many rows load, each of the others being refused by name; the check and training agree on which."""
    encoder = ConversationEncoder(encoder.processor, 2000)
    bad = {row.index: row.error for row in check_mixture(mixture, encoder, progress=False).bad}
    refused = {}
    samples = EncodedMixture(mixture, encoder)
    for index in range(len(mixture)):
        try:
            samples[index]
        except UserError as error:
            refused[index] = str(error)
    assert refused.keys() == bad.keys()
    for index in bad:
        assert f"row {index + 1}" in bad[index]
        assert f"row {index + 1}" in refused[index]
        bad[index].encode("utf-8")
    return len(mixture) - len(bad)


def test_spoilt_rows_load_or_are_refused_by_row(root, encoder):
    (root / "mutated.jsonl").write_bytes(b"\n".join(map(spoilt_line, range(ROWS))))
    good = tried(load_mixture(root / "mutated.jsonl", keep_bad=True), encoder)
    assert 0.1 * ROWS < good < 0.9 * ROWS


@pytest.mark.filterwarnings("ignore")  # of Pillow, on files that are nearly right
def test_spoilt_pictures_load_or_are_refused_by_row(root, encoder, tmp_path):
    number = ROWS // 5
    for seed in range(number):
        (tmp_path / str(seed)).write_bytes(spoilt_picture(seed))
    rows = [record("<image>", "x", image=str(seed)) for seed in range(number)]
    (tmp_path / "pictures.json").write_text(json.dumps(rows))
    good = tried(load_mixture(tmp_path / "pictures.json", keep_bad=True), encoder)
    assert 0.1 * number < good < 0.95 * number
