"""Names in settings: each must match something, and a slip is told with the nearest name."""

import pytest

from mllm.common.errors import UserError
from mllm.common.names import check_keys, check_names

NAMES = ["layers.0.attn.q_proj", "layers.0.attn.v_proj", "layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["q_proj", "v_porj"], r"'v_porj' matches no module \(nearest: v_proj"),
        (r".*\.(q_proj|v_porj)", r"'v_porj' matches no module \(nearest: v_proj"),
        (r".*(?:attn|mpl)\..*", r"'mpl' matches no module"),
        (r".*\.q_proj|.*\.v_porj", r"v_porj' matches no module"),
        (r".*\.w_proj", r"w_proj' matches no module"),
        (r".*(q_proj", "is no regular expression"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_beside_others_that_do(patterns, told):
    with pytest.raises(UserError, match=told):
        check_names("target_modules", patterns, NAMES, where="module")


@pytest.mark.parametrize("patterns", [["q_proj"], r".*(q|v)_proj", r".*(?!x|y)q_proj", r"layers.[0|1]\..*", [], None])
def test_names_that_all_match_are_taken(patterns):
    check_names("target_modules", patterns, NAMES, where="module")


def test_tables_that_older_releases_saved_may_be_left_over():
    check_keys("It", "LLaVA", {"missing_keys": [], "unexpected_keys": ["a.rotary_emb.inv_freq", "b.position_ids"]})
