"""The report of a finished early-fusion run, on a model that knows nothing and on one that draws the truth."""

import json
from itertools import islice

import pytest
from PIL import Image

from mllm.common.errors import UserError
from mllm.moma.generation import load_moma
from mllm.moma.scoring import LEAKY, evaluating, held_out_losses
from tests.train.moma_data import write_moma_config
from train.check import SETTINGS
from train.config import load_config
from train.moma import report
from train.moma.data import captioned
from train.moma.model import MODEL, build_moma, write_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_moma_config(tmp_path_factory.mktemp("moma"), report="{pictures: 3, scored: 6, temperature: 1.0}")
    config = load_config(path)
    folder = config.run.output_dir
    folder.mkdir()
    config.save(folder / SETTINGS)
    model, processor = build_moma(config)
    write_model(folder / MODEL, model, model.state_dict(), processor, {})
    return folder


def test_a_report_has_losses_a_grid_and_a_score_that_an_untrained_model_does_not_get(run):
    made = report.write_report(run)
    assert made == json.loads((run / "report.json").read_text())
    assert {"threshold", LEAKY} == made["losses"].keys()
    samples = made["samples"]
    assert len(samples["captions"]) == len(samples["described"]) == 3
    assert samples["drawn_right"]["share"] < 0.2
    assert Image.open(run / "samples.png").size == (3 * 98 - 2, 3 * 98 - 2)
    page = (run / "report.md").read_text()
    assert "leaky" in page
    assert f"of {samples['drawn_right']['objects']}" in page


def test_without_pictures_in_the_grid_what_is_drawn_is_scored_all_the_same(run, tmp_path):
    (tmp_path / MODEL).symlink_to(run / MODEL)
    config = load_config(run / SETTINGS, ["report={pictures: 0, scored: 2}"])
    config.save(tmp_path / SETTINGS)
    assert report.write_report(tmp_path)["samples"]["drawn_right"]["objects"] > 1
    assert not (tmp_path / "samples.png").exists()
    assert "samples.png" not in (tmp_path / "report.md").read_text()


def test_a_held_out_caption_too_long_to_draw_is_passed_over(run, monkeypatch):
    config = load_config(run / SETTINGS)
    (_, first), (picture, second) = islice(captioned(config.data, "test"), 2)
    held_out = [(picture, first + 4096 * " red"), (picture, second)]
    monkeypatch.setattr(report, "captioned", lambda data, split: iter(held_out))
    assert report.write_report(run)["samples"]["captions"] == [second]


def test_losses_leave_the_model_as_it_was(run):
    model, processor = load_moma(run / MODEL)
    model.set_evaluation_routing(LEAKY)
    rows = report.held_out_rows(load_config(run / SETTINGS), processor)
    held_out_losses(model, rows, processor, mode="threshold")
    assert model.routing_mode == LEAKY
    with pytest.raises(UserError), evaluating(model.train(), "aux"):
        pass
    assert model.training
    with pytest.raises(RuntimeError), evaluating(model.train(), "threshold"):
        raise RuntimeError
    assert model.training
    assert model.evaluation_routing == LEAKY


def test_a_model_that_draws_what_is_named_scores_whole(run, monkeypatch):
    truth = {caption: picture for picture, caption in captioned(load_config(run / SETTINGS).data, "test")}
    monkeypatch.setattr(
        report, "draw", lambda model, processor, captions, **options: [truth[each] for each in captions]
    )
    right = report.write_report(run)["samples"]["drawn_right"]
    assert right["both"] == right["objects"] > 6
    assert right["share"] == 1
