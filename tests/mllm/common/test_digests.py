import pytest

from mllm.common.digests import digest
from studies import runner


def test_kept_names_stay_valid():
    assert (digest(["a", 1]), runner.digest(["a", 1])) == ("2657442bb4", "2657442bb4a4")
    assert runner.digest({"λ": 1}) == "a0afb0efc8b7"


def test_the_order_of_keys_does_not_matter():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


@pytest.mark.parametrize("text", ["caf\ud83d", "λ"])
def test_any_text_has_a_name(text):
    assert len(digest([text])) == 10
