"""Documents, their packing, and that packing changes nothing for a document."""

import pytest
import torch

from mllm.common.errors import UserError
from mllm.moma.image_tokens import ImageTokenizer
from mllm.moma.processor import MomaProcessor
from mllm.moma.stream import DIRECTIONS, UNCOUNTED, PackedRows, Sample, directions, documents, pack, write_rows
from tests.mllm.moma.helpers import tiny_moma
from tests.tiny import tiny_tokenizer

SIDE, CODES = 2, 16


def tiny_processor() -> MomaProcessor:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "side": SIDE, "codebook_size": CODES, "width": 32, "patch": 8}
    return MomaProcessor(tiny_tokenizer(), ImageTokenizer.small(**sizes))


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def samples(processor, count=200):
    rng = torch.Generator().manual_seed(0)
    for k in range(count):
        codes = torch.randint(CODES, (SIDE**2,), generator=rng)
        yield Sample(codes, processor.text_ids("red circle " * (1 + k % 3)))


def stream(processor, share=None, **weights):
    return list(documents(samples(processor), processor, weights=weights, image_share=share, seed=0))


def is_code(processor, document):
    return [processor.image_token_start <= token for token in document]


@pytest.mark.parametrize("form", ["image_to_text", "text_to_image", "text", "image", "interleaved"])
def test_a_form_puts_pictures_and_text_in_its_order(processor, form):
    document = stream(processor, **{form: 1})[0]
    begins, words = document.count(processor.begin_image_id), [t for t in document[1:-1] if t < processor.num_words]
    assert document[0] == processor.tokenizer.bos_token_id
    assert document[-1] == processor.tokenizer.eos_token_id
    assert begins == document.count(processor.end_image_id)
    assert bool(words) == (form != "image")
    assert begins == {"text": 0, "interleaved": begins}.get(form, 1)
    assert sum(is_code(processor, document)) == begins * SIDE**2
    if form in ("image_to_text", "text_to_image"):
        assert (document[1] == processor.begin_image_id) == (form == "image_to_text")
    if form == "interleaved":
        assert begins in (2, 3)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_share_of_image_tokens_is_what_was_asked_for(processor, share):
    found = stream(processor, share, image_to_text=1, text_to_image=1)
    codes = sum(sum(is_code(processor, document)) for document in found)
    words = sum(sum(i > 0 and t < processor.num_words for i, t in enumerate(document[:-1])) for document in found)
    assert codes / (codes + words) == pytest.approx(share, abs=0.02)


def test_an_unknown_form_and_an_impossible_share_are_refused(processor):
    with pytest.raises(UserError, match="pictures"):
        stream(processor, pictures=1)
    with pytest.raises(UserError, match="image_share"):
        stream(processor, 1.5, text=1)


def test_every_document_is_read_from_its_beginning_and_rows_are_full():
    found = [[number] * (3 + number % 5) for number in range(40)]
    rows = list(pack(found, 8))
    assert all(len(ids) == len(positions) == 8 for ids, positions in rows)
    seen = set()
    for ids, positions in rows:
        starts = [k for k, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], 8], strict=True):
            assert set(ids[start:end]) == {ids[start]}
            if end - start == len(found[ids[start]]):
                seen.add(int(ids[start]))
    assert seen >= set(range(38))


def test_a_document_longer_than_a_row_is_cut_to_its_beginning():
    rows = list(pack([list(range(20)), list(range(4))], 8))
    assert [ids.tolist() for ids, _ in rows] == [list(range(8))]


def test_directions_say_what_stood_before_in_the_same_document(processor):
    code, word, begin, end = processor.image_token_start, 5, processor.begin_image_id, processor.end_image_id
    bos, eos = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    ids = [bos, word, begin, code, end, word, eos, bos, begin, code, end, word, eos, bos, word]
    positions = [*range(7), *range(6), 0, 1]
    named = [
        DIRECTIONS[k] if k != UNCOUNTED else None
        for k in directions(torch.tensor([ids]), torch.tensor([positions]), processor)[0]
    ]
    first = [None, "text", None, "text_to_image", None, "image_to_text", None]
    assert named == [*first, None, None, "image", None, "image_to_text", None, None, "text"]


def test_rows_written_are_rows_read(processor, tmp_path):
    found = stream(processor, image_to_text=1)
    assert write_rows(found, tmp_path, "train", length=32, rows=5) == 5
    rows = PackedRows.read(tmp_path, "train")
    assert len(rows) == 5
    expected = next(iter(pack(found, 32)))[0]
    batch = rows.batch([0, 1])
    assert batch["input_ids"][0].tolist() == expected.tolist()
    assert ((batch["labels"] == -100) == (batch["position_ids"] == 0)).all()
    assert sorted(rows.order(0, 0)) == list(range(5))


def test_a_split_without_rows_is_named(tmp_path):
    with pytest.raises(UserError, match="'val'"):
        PackedRows.read(tmp_path, "val")


@pytest.mark.parametrize("depth", [None, 0.5])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [None, True, False])
def test_a_packed_document_is_scored_as_it_is_alone(depth, implementation, use_cache):
    model = tiny_moma("2t2i", mixture_of_depths=depth, attn_implementation=implementation)
    first, second = torch.randint(1, 40, (1, 7)), torch.randint(1, 40, (1, 5))
    positions = torch.tensor([[*range(7), *range(5)]])
    with torch.no_grad():
        together = model(torch.cat([first, second], 1), position_ids=positions, use_cache=use_cache).logits
        alone = model(second, use_cache=False).logits
    torch.testing.assert_close(together[:, 7:], alone)
