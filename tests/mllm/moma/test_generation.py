"""Pictures from words and words from pictures, by a model of a few thousand weights."""

import pytest
import torch
from typer.testing import CliRunner

from mllm.cli import app
from mllm.common.errors import UserError
from mllm.moma import MomaConfig, MomaForCausalLM
from mllm.moma.generation import WholePictures, describe, draw, load_moma
from mllm.moma.processor import MomaProcessor
from tests.mllm.moma.helpers import FIELDS
from tests.mllm.moma.test_stream import CODES, SIDE, tiny_processor
from tests.tiny import tiny_image

PICTURES = [tiny_image("red", 16), tiny_image("blue", 16)]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_model(processor)


def tiny_model(processor, **changes) -> MomaForCausalLM:
    torch.manual_seed(0)
    fields = {**FIELDS, **processor.config_fields, **changes}
    model = MomaForCausalLM(MomaConfig.preset("2t2i", **fields))
    with torch.no_grad():
        model.train()(torch.randint(1, fields["vocab_size"], (4, 12)))  # calibrates thresholds
    return model.eval()


def allowed(processor, ids, **options) -> list[int]:
    scores = torch.zeros(1, processor.config_fields["vocab_size"])
    return (WholePictures(processor, **options)(torch.tensor([ids]), scores)[0] == 0).nonzero()[:, 0].tolist()


def test_after_a_begin_come_exactly_a_pictures_codes_then_the_end_then_words(processor):
    begin, end, first = processor.begin_image_id, processor.end_image_id, processor.image_token_start
    codes = list(range(first, first + CODES))
    words = list(range(processor.num_words))
    ids = [0, 5]
    assert allowed(processor, ids) == [*words, begin]
    assert allowed(processor, ids, may_begin=False) == words
    ids.append(begin)
    for _ in range(SIDE**2):
        assert allowed(processor, ids) == codes
        ids.append(first)
    assert allowed(processor, ids) == [end]
    assert allowed(processor, [*ids, end]) == [*words, begin]
    assert allowed(processor, [*ids, first]) == [end]  # a prompt with more than a picture has room for


def test_rows_are_held_to_the_rule_each_by_itself(processor):
    begin, first = processor.begin_image_id, processor.image_token_start
    ids = torch.tensor([[0, 5, begin, first], [0, 5, 6, 7]])
    scores = WholePictures(processor)(ids, torch.zeros(2, processor.config_fields["vocab_size"]))
    assert scores[0, first] == 0
    assert scores[1, first] == -torch.inf
    assert scores[0, 5] == -torch.inf
    assert scores[1, 5] == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_caption_becomes_a_picture_and_a_seed_repeats_it(model, processor, guidance):
    captions = ["red circle", "how many cells are there in the picture"]
    drawn = draw(model, processor, captions, guidance=guidance, seed=1)
    assert [picture.size for picture in drawn] == [(16, 16)] * 2
    again = draw(model, processor, captions, guidance=guidance, seed=1)
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in again]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_progress_is_told_by_codes_drawn(model, processor, guidance, capfd):
    codes = 2 * processor.image_tokenizer.num_tokens
    draw(model, processor, ["red", "green"], guidance=guidance)
    assert not capfd.readouterr().err
    draw(model, processor, ["red", "green"], guidance=guidance, progress=True)
    assert f"| {codes}/{codes} [" in capfd.readouterr().err


def test_a_picture_drawn_with_the_cache_is_the_one_of_full_recomputation(model, processor):
    ids = [*processor.open_ids(["red circle"]), processor.begin_image_id]
    for _ in range(SIDE**2):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(int(WholePictures(processor)(torch.tensor([ids]), logits).argmax()))
    expected = processor.image_tokenizer.decode(processor.codes(torch.tensor(ids))[None])[0]
    drawn = draw(model, processor, ["red circle"], temperature=0)[0]
    assert drawn.tobytes() == expected.tobytes()


def test_a_description_is_words_alone(model, processor):
    texts = describe(model, processor, PICTURES, max_new_tokens=6)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)


def test_a_model_that_would_rather_end_after_a_picture_says_a_word_first(model, processor):
    def end(module, inputs, logits):
        logits[..., processor.tokenizer.eos_token_id] += 1e4
        return logits

    hook = model.lm_head.register_forward_hook(end)
    texts = describe(model, processor, PICTURES, max_new_tokens=6)
    hook.remove()
    assert all(len(text.split()) == 1 for text in texts)


def test_nothing_of_a_folders_generation_config_reaches_pictures_and_descriptions(model, processor, monkeypatch):
    def made():
        drawn = draw(model, processor, ["red circle"])[0].tobytes()
        return drawn, describe(model, processor, PICTURES, max_new_tokens=4)

    plain = made()
    first = processor.image_token_start
    for name, value in {"top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0, "suppress_tokens": [5, first]}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert made() == plain


def test_words_that_spell_the_end_of_a_document_do_not_end_it(processor):
    ids = processor.document_ids(["red </s> circle <s>"])
    assert ids.count(processor.tokenizer.eos_token_id) == ids.count(processor.tokenizer.bos_token_id) == 1
    assert processor.text(torch.tensor(ids)) == "red </s> circle <s>"


def test_it_is_refused_where_experts_choose_over_the_batch(processor):
    model = tiny_model(processor)
    model.set_evaluation_routing("batch_leaky")
    with pytest.raises(UserError, match="batch_leaky"):
        draw(model, processor, ["red circle"])


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("moma")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_the_command_draws_and_describes(folder, tmp_path):
    runner, out = CliRunner(), tmp_path / "x.png"
    drawn = runner.invoke(app, ["generate", "--model", str(folder), "--text", "red circle", "--out", str(out)])
    assert drawn.exit_code == 0, drawn.output
    assert out.read_bytes()[:4] == b"\x89PNG"
    described = runner.invoke(app, ["generate", "--model", str(folder), "--image", str(out)])
    assert described.exit_code == 0, described.output
    assert runner.invoke(app, ["generate", "--model", str(folder)]).exit_code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", " "], "--text is empty"),
        (["--text", "red", "--out", "x.movie"], "expected a file .png"),
        (["--text", "red", "--out", "."], "expected a file .png"),
        (["--text", "red", "--out", "nowhere/x.png"], "no folder nowhere"),
        (["--text", "red", "--guidance", "0.5"], "--guidance"),
        (["--text", "red", "--temperature", "-1"], "--temperature"),
    ],
)
def test_what_cannot_be_drawn_or_written_is_told_before_the_model_is_read(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, ["generate", "--model", "no-model", *options])
    assert refused.exit_code == 2
    assert words in refused.output


def test_a_caption_that_leaves_no_room_for_a_picture_is_refused_before_any_is_drawn(processor):
    longest = len(processor.open_ids(["red circle"])) + 1 + SIDE**2
    fits, too_small = (tiny_model(processor, max_position_embeddings=longest - less) for less in (0, 1))
    assert len(draw(fits, processor, ["red circle"])) == 1
    with pytest.raises(UserError, match="as long a caption as this: 'red circle'"):
        draw(too_small, processor, ["red", "red circle"])


def test_a_folder_is_read_as_it_was_written(folder, model, processor):
    again, reader = load_moma(folder)
    assert draw(again, reader, ["red circle"])[0].tobytes() == draw(model, processor, ["red circle"])[0].tobytes()
    reader.image_tokenizer.codebook_size += 1
    with pytest.raises(UserError, match="vocab_size"):
        reader.check(again.config)


def test_a_folder_without_a_moma_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no Moma model"):
        MomaProcessor.from_pretrained(tmp_path)
