"""Who succeeded, and where samples stand: answers graded by their own metric, embeddings that never see an answer."""

import json
import sys

import pytest
import torch
from torch import nn

from mllm.alignment import EncodedRows, answered, base_embeddings, embed, score, successful
from mllm.alignment.embeddings import centred, clip_embeddings
from mllm.common.errors import UserError
from mllm.data.sources import Source
from mllm.evaluation.answers import Answer
from tests.mllm.alignment.helpers import tiny, tiny_mole, token_rows
from tests.tiny import tiny_image, tiny_llava, tiny_tower


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    records = []
    for number, colour in enumerate(("red", "green", "red", "blue")):
        tiny_image(colour).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is the square?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(records))
    return list(Source(folder / "rows.json"))


def reply(text: str, metric: str = "exact_match", answers: tuple[str, ...] = ("12.50",)) -> Answer:
    return Answer("1", "s", "d", metric, answers, "How much?", text)


def test_success_goes_by_each_rows_own_metric():
    answers = [reply("12.50"), reply("12.40"), reply("12.40", "relaxed_accuracy"), reply("12.5", "anls")]
    assert successful(answers).tolist() == [True, False, True, False]
    assert successful(answers, least_grade=0.7).tolist() == [True, False, True, True]


def test_rows_that_are_not_graded_never_succeed_and_nobody_is_an_error():
    assert successful([reply("12.50"), reply("12.50", "not_graded")]).tolist() == [True, False]
    with pytest.raises(UserError, match="least_grade"):
        successful([reply("no")])


def test_answers_are_kept_and_asked_anew_of_another_model(rows, tmp_path, monkeypatch):
    model, processor = tiny_llava()
    first = answered(model, processor, rows, tmp_path / "a.jsonl", stamp="one", max_new_tokens=3)
    monkeypatch.setattr(type(model), "generate", None)  # nobody may be asked again
    again = answered(model, processor, rows, tmp_path / "a.jsonl", stamp="one", max_new_tokens=3)
    assert [each.prediction for each in again] == [each.prediction for each in first]
    with pytest.raises(TypeError):
        answered(model, processor, rows, tmp_path / "a.jsonl", stamp="two", max_new_tokens=3)


def test_one_forward_tells_what_greedy_decoding_would_write():
    model, data = tiny("olmoe"), token_rows(6)
    exact = score(model, data, batch_size=4).exact_N
    written = []
    for ids, labels in zip(data.ids, data.labels, strict=True):
        prompt, answer = ids[labels == -100], ids[labels != -100]
        reply = model.generate(
            prompt[None], max_new_tokens=len(answer), do_sample=False, pad_token_id=0, eos_token_id=[]
        )
        written.append(torch.equal(reply[0, len(prompt) :], answer))
    assert exact.tolist() == written


def test_embeddings_do_not_see_the_answer():
    data = token_rows(6)
    for ids, labels in zip(data.ids, data.labels, strict=True):
        ids[labels != -100] = torch.randint(4, 9, (int((labels != -100).sum()),))
    model = tiny_mole()
    torch.testing.assert_close(base_embeddings(model, data), base_embeddings(model, token_rows(6)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gives_the_embeddings_of_rows_alone(side):
    model, data = tiny("mixtral"), token_rows(6, side)
    torch.testing.assert_close(
        base_embeddings(model, data), base_embeddings(model, data, batch_size=1), rtol=0, atol=1e-6
    )


def test_embeddings_are_the_bases_whatever_the_adapter():
    model, data = tiny_mole(), token_rows(6)
    with model.disable_adapter():
        expected = base_embeddings(model.get_base_model(), data)
    assert torch.equal(base_embeddings(model, data), expected)


def test_pictures_take_part_in_the_bases_embedding(rows):
    model, processor = tiny_llava()
    embeddings = base_embeddings(model, EncodedRows(rows, processor))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embeddings[0], embeddings[2])  # the same picture and question
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-4)


def test_centred_embeddings_have_unit_length_and_no_common_part():
    embeddings = centred(torch.nn.functional.normalize(torch.rand(50, 6) + 5, dim=1))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(50))
    assert embeddings.mean(0).norm() < 0.3


class FirstLetters(nn.Module):
    """Stands for open_clip's tokenizer."""

    def forward(self, texts):
        ids = torch.zeros(len(texts), 8, dtype=torch.long)
        for row, text in enumerate(texts):
            for place, letter in enumerate(text[:7]):
                ids[row, place] = ord(letter) % 60
        ids[:, -1] = 63  # the highest id ends a text for CLIP
        return ids


def test_clip_embeds_picture_and_question_side_by_side(rows):
    clip, _ = tiny_tower()

    def preprocess(picture):
        return torch.tensor(list(picture.resize((24, 24)).tobytes())).view(24, 24, 3).permute(2, 0, 1) / 255

    embeddings = clip_embeddings(clip, preprocess, FirstLetters(), rows, batch_size=3)
    assert embeddings.shape == (4, 64)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(embeddings[0, 32:], embeddings[1, 32:])  # the question is the same
    assert not torch.allclose(embeddings[0, :32], embeddings[1, :32], atol=1e-4)


def test_what_cannot_be_embedded_is_refused(rows, monkeypatch):
    model, data = tiny_mole(), token_rows(2)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="expected base"):
        embed("bert", model, data)
    with pytest.raises(UserError, match="give the conversations"):
        embed("clip:ViT-B-32", model, data)
    with pytest.raises(UserError, match="sentence-transformers; install"):
        embed("sentence-transformers:all-MiniLM-L6-v2", model, data, rows)
    with pytest.raises(UserError, match="ViT-Z-99"):
        embed("clip:ViT-Z-99", model, data, rows)
