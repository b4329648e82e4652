import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm.common.errors import UserError
from mllm.routing import ExpertLayout
from tests.mllm.routing.slow import few, slow_target

SIZE = st.integers(0, 3)


@st.composite
def layouts(draw):
    if draw(st.booleans()):
        return ExpertLayout.of(draw(st.integers(1, 4)), None, draw(SIZE))
    shared = draw(SIZE)
    own = st.integers(0 if shared else 1, 3)
    groups = {"image": draw(own), "text": draw(own), "shared": shared}
    nulls = draw(st.one_of(SIZE, st.fixed_dictionaries({"text": SIZE, "image": SIZE})))
    return ExpertLayout.of(sum(groups.values()), groups, nulls)


@few(60)
@given(layouts(), st.sampled_from([None, 0.25, 0.9]))
def test_targets_equal_their_definition_and_rows_sum_to_one(layout, real_share):
    if real_share is not None and len(layout.null_sets) < len(layout.allowed_PX):
        real_share = None  # a population without null experts has nothing to give the rest to; MoleConfig refuses it
    target_PX = layout.target_PX(real_share)
    torch.testing.assert_close(target_PX, torch.tensor(slow_target(layout, real_share)))
    torch.testing.assert_close(target_PX.sum(1), torch.ones(len(target_PX)))


@few(60)
@given(layouts())
def test_every_expert_has_an_owner_and_null_sets_follow_the_real_experts(layout):
    assert layout.allowed_PX.any(0).all()
    assert layout.allowed_PX.shape[1] == layout.num_experts + layout.num_null_experts
    ids = [x for null_set in layout.null_sets for x in range(null_set.start, null_set.stop)]
    assert ids == list(range(layout.num_experts, layout.num_experts + layout.num_null_experts))
    for null_set in layout.null_sets:
        assert (layout.allowed_PX[:, null_set] == layout.allowed_PX[:, null_set.start, None]).all()


def test_a_modality_takes_its_own_and_the_shared_experts_and_its_own_nulls():
    layout = ExpertLayout.of(4, {"text": 1, "image": 2, "shared": 1}, {"text": 1, "image": 2})
    text, image = layout.allowed_PX.int().tolist()
    assert text == [1, 0, 0, 1, 1, 0, 0]
    assert image == [0, 1, 1, 1, 0, 1, 1]


def test_the_order_groups_are_given_in_does_not_matter():
    one = ExpertLayout.of(4, {"text": 3, "image": 1}, {"text": 2, "image": 1})
    other = ExpertLayout.of(4, {"image": 1, "text": 3}, {"image": 1, "text": 2})
    assert one.group_of_expert == other.group_of_expert == ["text"] * 3 + ["image"]
    assert one.null_sets == other.null_sets == [slice(4, 6), slice(6, 7)]


def test_a_number_of_nulls_counts_for_each_modality():
    layout = ExpertLayout.of(2, {"text": 1, "image": 1}, 3)
    assert layout.num_null_experts == 6
    assert layout.nulls == {"text": 3, "image": 3}


@pytest.mark.parametrize(
    ("groups", "nulls", "said"),
    [
        ({"txet": 1, "image": 1}, 0, "has a group 'txet'; groups are text, image, shared"),
        ({"text": -1, "image": 1}, 0, r"expert_groups\['text'\] must be a whole number from 0 on"),
        ({"text": 2}, 0, "leaves image tokens without an expert"),
        ({"image": 2}, 0, "leaves text tokens without an expert"),
        ({"shared": 2}, {"shared": 1}, "num_null_experts has a group 'shared'; groups are text, image"),
        (None, {"text": 1}, "there are no expert_groups"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups, nulls, said):
    with pytest.raises(UserError, match=said):
        ExpertLayout.of(2, groups, nulls)


@pytest.mark.parametrize(
    ("layout", "num_domains", "due"),
    [
        (ExpertLayout.of(3), 3, [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]),
        (ExpertLayout.of(4), 3, [[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]]),
        (ExpertLayout.of(2), 3, [[[1, 0], [0, 1], [1, 0]]]),
        (
            ExpertLayout.of(3, {"text": 1, "image": 1, "shared": 1}, 2),
            2,
            [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]],
        ),
    ],
)
def test_experts_are_dealt_to_domains_in_turn_among_those_a_token_may_take(layout, num_domains, due):
    assert layout.due_PDE(num_domains).int().tolist() == due
