import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from mllm.common.errors import RowError, TooLongError, UserError
from mllm.data import Collator, ConversationEncoder, EncodedMixture, ImageError, Mixture, MixtureConfig, Turn
from tests.mllm.data.conftest import record


def mixture(root, images, policy="error", text="<image>", name="rows.json", **policies):
    rows = [image if isinstance(image, dict) else record(text, f"answer {image}", image=image) for image in images]
    (root / name).write_text(json.dumps(rows))
    return Mixture(MixtureConfig(sources=[{"path": name}], bad_rows=policy, **policies), folder=root)


IMAGES = ["red.png", "truncated.png", "none.png", "blue.png"]
LONG = record("Hello?", "hi", "Well? <image>", "x" * 600, image="red.png", id="long")


def rows_taken(samples):
    return [samples[index]["where"].rpartition(" ")[2] for index in range(len(samples))]


def test_error_policy_names_the_row(root, encoder):
    with pytest.raises(ImageError, match=r"rows.json: row 2: image .*truncated.png"):
        EncodedMixture(mixture(root, IMAGES), encoder)[1]


def test_skip_policy_gives_another_row_of_the_source_and_tells_so(root, encoder):
    rows = EncodedMixture(mixture(root, IMAGES, "skip"), encoder)
    taken = rows_taken(rows)
    assert (taken[0], taken[3], set(taken[1:3]) <= {"1", "4"}) == ("1", "4", True)
    told = [rows[index].get("bad_rows", []) for index in range(4)]
    assert [[(bad.index, bad.source, bad.reason, bad.action) for bad in each] for each in told] == [
        [], [(1, "rows", "picture", "skipped")], [(2, "rows", "missing picture", "skipped")], []]  # fmt: skip
    assert told[1][0].instead == rows[1]["where"]


def test_records_and_long_rows_are_skipped_as_pictures_are(root, processor):
    rows = EncodedMixture(
        mixture(root, ["red.png", record("Hello?"), LONG], "skip"), ConversationEncoder(processor, 300)
    )
    assert rows_taken(rows) == ["1"] * 3
    assert [rows[index]["bad_rows"][0].reason for index in (1, 2)] == ["record", "too long"]


def test_what_was_skipped_travels_with_the_batch_from_any_process(root, encoder, processor):
    rows = EncodedMixture(mixture(root, IMAGES, "skip"), encoder)
    told = []
    for workers in (0, 2):
        loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=Collator(processor))
        told.append([[(bad.index, bad.instead) for bad in batch["bad_rows"]] for batch in loader])
    assert told[0] == told[1]
    assert [[index for index, _ in batch] for batch in told[0]] == [[1], [2]]


def test_skip_policy_stops_at_a_source_without_any_good_row(root, encoder):
    rows = EncodedMixture(mixture(root, ["none.png", "truncated.png"], "skip"), encoder)
    with pytest.raises(RowError, match=r"(?s)row 1: no image file.*Nor can"):
        rows[0]


def test_long_rows_may_have_a_policy_of_their_own(root, processor):
    encoder = ConversationEncoder(processor, 300)
    strict = EncodedMixture(mixture(root, ["none.png", "red.png", LONG], "skip", too_long="error"), encoder)
    assert strict[0]["where"].endswith("row 2")
    with pytest.raises(TooLongError, match="more than max_length 300"):
        strict[2]
    lenient = EncodedMixture(mixture(root, ["none.png", "red.png", LONG], too_long="skip"), encoder)
    assert lenient[2]["where"].endswith("row 2")
    with pytest.raises(ImageError, match=r"none\.png"):
        lenient[0]


def test_a_truncated_row_ends_with_its_last_turn_that_fits(root, processor, encoder):
    rows = mixture(root, ["red.png", LONG], too_long="truncate")
    sample = EncodedMixture(rows, ConversationEncoder(processor, 300))[1]
    (root / "short.json").write_text(json.dumps([record("Hello?", "hi")]))
    short = encoder.encode(Mixture(MixtureConfig(sources=[{"path": "short.json"}]), folder=root)[0])
    assert torch.equal(sample["input_ids"], short["input_ids"])
    assert len(sample["pixel_values"]) == 0
    assert [(bad.index, bad.reason, bad.action) for bad in sample["bad_rows"]] == [(1, "too long", "cut")]


def test_truncation_does_not_cut_inside_the_first_answer(root, processor):
    rows = mixture(root, ["red.png", record("Hello?", "x" * 600)], too_long="truncate")
    with pytest.raises(TooLongError, match=r"row 2: .*up to the end of the first answer, more than max_length 300"):
        EncodedMixture(rows, ConversationEncoder(processor, 300))[1]


def test_good_rows_are_those_of_the_encoder(root, encoder):
    rows = mixture(root, IMAGES, "skip")
    assert torch.equal(EncodedMixture(rows, encoder)[3]["input_ids"], encoder.encode(rows[3])["input_ids"])


@pytest.mark.parametrize("end", range(1, 4))
def test_any_length_cuts_to_the_most_turns_that_fit(end, processor, encoder, conversation):
    texts = ["One <image>?", "yes", "Two?", "no", "Three <image>?", "maybe"]
    whole = conversation(*texts, image=["red.png", "blue.png"])
    part = conversation(*texts[: 2 * end], image=["red.png", "blue.png"][: 1 + (end == 3)])
    limit = len(encoder.encode(part)["input_ids"])
    assert encoder.measure(part) == limit
    if end < 3:
        for room in (0, 1):
            assert ConversationEncoder(processor, limit + room).shortened(whole).turns == part.turns


def test_half_a_character_is_refused_by_the_encoder_too(encoder, conversation):
    half = replace(conversation("Hello?", "hi"), turns=(Turn("user", "Hello?"), Turn("assistant", "caf\ud83d")))
    with pytest.raises(UserError, match=r"row 7, turn 2: \\ud83d is half of a character"):
        encoder.encode(half)


def test_what_surely_fits_is_no_longer_than_allowed(processor, conversation):
    for texts in (("Hello?", "hi"), ("a" * 60, "b" * 60, "é" * 20, "☺"), ("?", "x" * 200), ("<image> What?", "red")):
        row = conversation(*texts, image="red.png" if "<image>" in texts[0] else None)
        encoder = ConversationEncoder(processor)
        length = encoder.measure(row)
        fits = []
        for encoder.max_length in range(8, 700):
            fits += [encoder.max_length] * encoder.surely_fits(row)
        assert length <= fits[0] <= length + sum(map(len, texts)) + 100
