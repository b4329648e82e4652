"""Settings, data and models of the early-fusion stages, without the engine."""

import json

import pytest
import torch
from PIL import Image

from mllm.common.errors import UserError
from mllm.moma import MomaConfig, MomaForCausalLM
from mllm.moma.image_tokens import ImageTokenizer
from mllm.moma.processor import MomaProcessor
from tests.tiny import tiny_language_model, tiny_tokenizer
from tests.train.moma_data import write_moma_config
from train.config import load_config
from train.moma.config import PictureSection
from train.moma.data import as_experts, captioned, check_length, data_digest, held_out_documents, training_rows
from train.moma.model import build_moma, config_of, rows_seen, write_model
from train.moma.run import check_moma
from train.stages import image_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_moma_config(tmp_path_factory.mktemp("moma"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.presett=4t4i"], "did you mean preset"),
        (["run.steps=null", "run.epochs=1"], "run.steps"),
        (["model.start_from=x"], "upcycle"),
        (["stage=upcycle"], "model.start_from"),
        (["model.image_tokenizer=null"], "image_tokenizer"),
        (["data.miniworld=0"], "nothing to read"),
        (["model.router_noise=0.7"], "no use for model.router_noise"),
        (["model.fresh=[image]"], "no use for model.fresh"),
        (["stage=train_causal_routers", "model={start_from: x, preset: 2t2i}"], "no use for model.preset"),
        (["stage=train_causal_routers", "model={start_from: x, fields: {image_side: 2}}"], "no use for model.fields"),
        (
            ["stage=train_causal_routers", "model={start_from: x, gradient_checkpointing: true}"],
            "no use for model.gradient_checkpointing",
        ),
        (["stage=upcycle", "model={start_from: x, text_tokenizer: y}"], "no use for model.text_tokenizer"),
        (["stage=upcycle", "model={start_from: x, keep_flops: false}"], "no use for model.keep_flops"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(path, overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.fields={hidden_sise: 16}"], "did you mean hidden_size"),
        (["model.preset=many"], "preset"),
        (["model.image_tokenizer=nowhere"], "image tokenizer"),
        (["data.forms={picture: 1}"], "data.forms"),
        (["data.captions=[nowhere.json]"], "nowhere.json"),
        (["run.batch_size=3"], "batch_size"),
        (["model.fields.causal_routing=aux"], "train_causal_routers"),
        (["model.fields.max_position_embeddings=7"], r"max_position_embeddings \(7\)"),
        (["model.fields.pad_token_id=7"], "unknown key model.fields.pad_token_id"),
    ],
)
def test_a_run_that_cannot_go_is_refused_before_it_starts(path, overrides, words):
    with pytest.raises(UserError, match=words):
        check_moma(load_config(path, overrides), ranks=1)


@pytest.mark.parametrize(
    ("stage", "seed", "model", "words"),
    [
        ("upcycle", "1t1i", "preset: 2t2i, fields: {rooting: 1}", "unknown key model.fields.rooting"),
        ("upcycle", "1t1i", "preset: many", "preset"),
        ("upcycle", "1t1i", "preset: 2t2i, fields: {hidden_size: 32}", "seed's weights decide hidden_size"),
        ("upcycle", "1t1i", "preset: 2t2i, image_tokenizer: x", "leave model.image_tokenizer out"),
        ("upcycle", "2t2i", "preset: 4t4i", "A seed has one expert a group"),
        ("upcycle", "1t1i", "preset: 4x", "no expert for the group"),
        ("upcycle", "1t1i", "preset: 2t2i, fields: {causal_routing: aux}", "begin_auxiliary_stage"),
        ("train_causal_routers", "1t1i", "", "causal already"),
    ],
)
def test_a_stage_that_cannot_go_on_is_refused_before_it_starts(path, tmp_path, stage, seed, model, words):
    built, processor = build_moma(load_config(path, [f"model.preset={seed}"]))
    write_model(tmp_path / "model", built, built.state_dict(), processor, {})
    section = f"model={{start_from: '{tmp_path}/model'{', ' * bool(model)}{model}}}"
    with pytest.raises(UserError, match=words):
        check_moma(load_config(path, [f"stage={stage}", section]), ranks=1)


def test_a_stage_that_can_go_on_is_not_refused(path, tmp_path):
    built, processor = build_moma(load_config(path, ["model.preset=1t1i"]))
    write_model(tmp_path / "model", built, built.state_dict(), processor, {})
    section = (
        f"model={{start_from: '{tmp_path}/model', preset: 2t2i, fields: {{routing: token_choice, norm_position: pre}}}}"
    )
    config = load_config(path, ["stage=upcycle", section])
    check_moma(config, ranks=1)
    model, processor = build_moma(config)
    assert model.config.router_noise == 0  # which routers of token choice do not know
    found = config_of(config, processor).to_dict() | {"_name_or_path": model.config._name_or_path}
    assert model.config.to_dict() == found


def test_a_row_that_holds_no_picture_with_a_word_is_refused(path):
    config = load_config(path, ["data.length=16"])
    check_moma(config, ranks=1)
    _, processor = build_moma(config)
    check_length(config.data.model_copy(update={"length": 8}), MomaConfig(), processor)
    with pytest.raises(UserError, match="A picture and a word are 8 tokens"):
        check_length(config.data.model_copy(update={"length": 7}), MomaConfig(), processor)


def test_mixture_of_depths_gets_the_layers_that_keep_its_cost(path):
    fields = ["model.fields.num_hidden_layers=8", "model.fields.mixture_of_depths=0.25"]
    assert build_moma(load_config(path, fields))[0].config.num_hidden_layers == 14
    assert build_moma(load_config(path, [*fields, "model.keep_flops=false"]))[0].config.num_hidden_layers == 8


@pytest.mark.parametrize(("preset", "share"), [("6t2i", 0.25), ("4t4i", 0.5), ("8x", 0.5), ("1t1i2s", 0.5)])
def test_pictures_have_the_share_of_tokens_that_they_have_of_experts(path, preset, share):
    data = load_config(path, ["data.image_share=experts"]).data
    assert as_experts(data, MomaConfig.preset(preset).layout).image_share == share


def test_rows_of_another_vocabulary_or_size_of_pictures_are_not_taken(path, monkeypatch):
    config = load_config(path)
    _, processor = build_moma(config)
    name = data_digest(config.data, processor)
    with monkeypatch.context() as changed:
        changed.setattr(processor.image_tokenizer, "num_tokens", 9)
        assert data_digest(config.data, processor) != name
    wider = MomaProcessor(processor.tokenizer, processor.image_tokenizer, processor.num_words + 64)
    assert data_digest(config.data, wider) != name


def test_captions_that_leave_nothing_to_train_on_are_refused(path, tmp_path):
    _, processor = build_moma(load_config(path))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": "a caption"}]
    (tmp_path / "captions.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}]))
    captions = [f"data.captions=['{tmp_path}/captions.json']", "data.miniworld=0", "data.rows=5"]
    with pytest.raises(UserError, match="no sample is left to train on"):
        training_rows(load_config(path, captions).data, processor)


def test_rows_are_made_once_and_anew_for_other_settings(path):
    config = load_config(path)
    _, processor = build_moma(config)
    rows = training_rows(config.data, processor)
    folder = config.data.cache / data_digest(config.data, processor)
    before = (folder / "train-00000.safetensors").stat().st_mtime_ns
    assert len(training_rows(config.data, processor)) == len(rows)
    assert (folder / "train-00000.safetensors").stat().st_mtime_ns == before
    assert data_digest(config.data.model_copy(update={"image_share": 0.25}), processor) != folder.name
    assert data_digest(config.data.model_copy(update={"held_out": 3}), processor) == folder.name


def test_captions_are_known_by_what_they_say_wherever_they_lie(path, tmp_path):
    config = load_config(path)
    _, processor = build_moma(config)
    here, there, other = (tmp_path / name for name in ("here.json", "there.json", "other.json"))
    here.write_text("[]")
    there.write_text("[]")
    other.write_text("[ ]")
    names = [
        data_digest(config.data.model_copy(update={"captions": [each]}), processor) for each in (here, there, other)
    ]
    assert names[0] == names[1] != names[2]
    assert data_digest(config.data, processor) not in names


def test_samples_come_again_in_other_forms_until_there_are_rows_enough(path):
    config = load_config(path, ["data.rows=90"])
    _, processor = build_moma(config)
    assert len(training_rows(config.data, processor)) == 90


def test_every_held_out_sample_is_scored_in_both_orders(path):
    config = load_config(path)
    _, processor = build_moma(config)
    documents = held_out_documents(config.data, processor)
    begins = [document[1] == processor.begin_image_id for document in documents]
    assert begins == [True] * 8 + [False] * 8


def test_captions_of_files_are_split_by_picture(tmp_path):
    rows = []
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": f"caption {number}"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    rows.append(rows[20] | {"id": "another caption of a picture for test"})
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    section = PictureSection(miniworld=0, captions=[tmp_path / "captions.json"])
    held_out, validation = ([caption for _, caption in captioned(section, split)] for split in ("test", "val"))
    learned = list(captioned(section, "train"))
    assert held_out == ["caption 0", "caption 20", "caption 20"]
    assert validation == ["caption 10", "caption 30"]
    assert [picture.getpixel((0, 0))[0] for picture in image_tokenizer.held_out_pictures(section)] == [0, 20]
    assert len(learned) == 36
    assert learned[0][0].getpixel((0, 0)) == (1, 0, 0)
    assert learned[0][1] == "caption 1"


def test_an_ordinary_language_model_is_upcycled_and_reads_text_as_before(path, tmp_path):
    llama = tiny_language_model()
    llama.save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    start = f"model={{start_from: '{tmp_path}/llama', image_tokenizer: '{path.parent}/tokenizer', preset: 1t1i}}"
    model, processor = build_moma(load_config(path, ["stage=upcycle", start]))
    ids = torch.tensor([processor.text_ids("What colour is the square?")])
    words = slice(0, processor.num_words)
    with torch.no_grad():
        expected, found = llama(ids).logits, model.eval()(ids).logits[..., words]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_data_go_on_only_where_they_are_the_same(path, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"data": "abc", "seed": 0, "rows_seen": 24}))
    config = load_config(path, ["stage=upcycle", f"model={{start_from: '{tmp_path}'}}"])
    assert rows_seen(config, "abc") == 24
    assert rows_seen(config, "other") == 0
    assert rows_seen(load_config(path), "abc") == 0


def test_stage_image_tokenizer_learns_and_shows_what_it_learned(tmp_path):
    config = image_tokenizer.Config.model_validate(
        {
            "stage": "image_tokenizer",
            "data": {"miniworld": 16, "held_out": 4},
            "tokenizer": {
                "side": 4,
                "patch": 24,
                "width": 32,
                "codebook_size": 16,
                "revive_every": 10,
                "kept_codes": 12,
            },
            "optim": {"lr": 3e-3},
            "run": {"output_dir": tmp_path / "run", "steps": 30, "batch_size": 8, "log_every": 10},
        }
    )
    image_tokenizer.run(config)
    entries = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    assert entries[-1]["reconstruction_loss"] < entries[0]["reconstruction_loss"]
    figures = json.loads((tmp_path / "run" / "report.json").read_text())["figures"]
    assert figures["pictures"] == 4
    assert 1 <= figures["code_perplexity"] <= figures["codes_used"] <= 12
    assert Image.open(tmp_path / "run" / "reconstructions.png").size == (4 * 98 - 2, 2 * 98 - 2)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "run" / "image_tokenizer")
    assert (tokenizer.num_tokens, tokenizer.codebook_size) == (16, 12)


def test_routers_stage_freezes_all_else(path, tmp_path):
    model, processor = build_moma(load_config(path))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = load_config(path, ["stage=train_causal_routers", f"model={{start_from: '{tmp_path}'}}"])
    routers, _ = build_moma(config)
    learning = [name for name, weight in routers.named_parameters() if weight.requires_grad]
    assert learning
    assert all("auxiliary" in name for name in learning)
    assert isinstance(routers, MomaForCausalLM)
