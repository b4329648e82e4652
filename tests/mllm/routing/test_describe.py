"""The list of what routing can be set to is whole, and reads."""

from mllm.mole.config import CHOICES
from mllm.routing import ROUTERS
from mllm.routing.describe import describe

LISTED = [(field, option) for field, options in describe().items() for option in options]


def test_every_setting_of_the_config_is_listed_and_nothing_else():
    listed = {field: {option.name for option in options} for field, options in describe().items()}
    assert listed == {field: set(names) for field, names in CHOICES.items()} | {"router": set(ROUTERS)}


def test_every_line_is_one_sentence():
    for field, option in LISTED:
        assert option.line.endswith("."), (field, option)
        assert ". " not in option.line, (field, option)
        assert len(option.line) <= 110, (field, option)


def test_routers_name_their_paper_from_their_docstrings():
    papers = {option.name: option.paper for option in describe()["router"]}
    assert papers["hash_token"] == "2106.04426"
    assert papers["learned"] == "2401.16160"
