import json

import pytest
import torch
from torch.utils.data import DataLoader

from mllm.data import Collator, EncodedMixture, ImageError, Mixture, MixtureConfig
from mllm.errors import UserError
from tests.mllm.data.conftest import record


def mixture(root, images, policy, text="<image>", name="rows.json"):
    (root / name).write_text(json.dumps([record(text, f"answer {image}", image=image) for image in images]))
    return Mixture(MixtureConfig(sources=[{"path": name}], bad_images=policy), folder=root)


IMAGES = ["red.png", "truncated.png", "none.png", "blue.png"]


def test_error_policy_names_the_row(root, encoder):
    with pytest.raises(ImageError, match=r"rows.json: row 2: image .*truncated.png"):
        EncodedMixture(mixture(root, IMAGES, "error"), encoder)[1]


def test_skip_policy_gives_the_next_good_row_of_the_source_and_counts(root, encoder):
    rows = EncodedMixture(mixture(root, IMAGES, "skip"), encoder)
    assert [rows[index]["where"].rpartition(" ")[2] for index in range(4)] == ["1", "4", "4", "4"]
    assert rows.skipped == 2


def test_skips_are_counted_over_data_loading_processes(root, encoder, processor):
    rows = EncodedMixture(mixture(root, IMAGES, "skip"), encoder)
    loader = DataLoader(rows, batch_size=1, num_workers=2, collate_fn=Collator(processor))
    assert len(list(loader)) == 4
    assert rows.skipped == 2


def test_skip_policy_stops_at_a_source_without_any_good_row(root, encoder):
    rows = EncodedMixture(mixture(root, ["none.png", "truncated.png"], "skip"), encoder)
    with pytest.raises(ImageError, match=r"(?s)row 1: no image file.*Nor can"):
        rows[0]


def test_skip_policy_hides_no_other_error(root, encoder):
    rows = EncodedMixture(mixture(root, ["red.png", "blue.png"], "skip", text="<image>" + "x" * 600), encoder)
    encoder.max_length = 500
    try:
        with pytest.raises(UserError, match="more than max_length 500"):
            rows[0]
    finally:
        encoder.max_length = None


def test_good_rows_are_those_of_the_encoder(root, encoder):
    rows = mixture(root, IMAGES, "skip")
    assert torch.equal(EncodedMixture(rows, encoder)[3]["input_ids"], encoder.encode(rows[3])["input_ids"])
