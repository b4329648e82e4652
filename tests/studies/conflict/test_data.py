"""What a study refuses to read, and how it cuts its data."""

import json
import re

import pytest

from mllm.common.errors import UserError
from studies.conflict import data as data_module
from studies.conflict.config import DataSection, MiniworldSection, ScenesSection, load_conflict_config
from studies.conflict.data import read_rows
from tests.studies.conflict.toy import write_rows

SCENES = ScenesSection(train=4, val=1, test=1)


@pytest.fixture
def paths(tmp_path):
    return {split: write_rows(tmp_path, split) for split in ("train", "val", "test")}


def read(paths, with_twice=True, **settings):
    return read_rows(DataSection(**paths, **settings), with_twice=with_twice)


def test_rows_of_files_are_counted_by_domain(paths):
    rows = read(paths)
    facts = rows.facts()
    assert facts["domains"] == ["document", "general"]
    assert facts["rows"]["train"] == {"document": 6, "general": 6}
    assert facts["test_pictures_seen_in_training"] == 0
    assert rows.twice == "a second pass"


def test_a_cap_takes_the_same_rows_with_and_without_the_arm_twice(paths):
    rows, without = read(paths, samples_per_domain=2), read(paths, samples_per_domain=2, with_twice=False)
    assert len(rows.train) == 8
    assert rows.train[:4] == without.train
    assert rows.mixed == without.mixed == 4
    assert not set(rows.train[:4]) & set(rows.train[4:])
    assert (rows.twice, without.twice) == ("new samples", "a second pass")
    assert rows.facts()["data"] == without.facts()["data"]
    assert read(paths, samples_per_domain=4).twice == "a second pass"  # six rows a domain are not twice four


def test_without_val_a_share_of_training_pictures_is_held_out_with_all_their_rows(paths):
    twice = json.loads(paths["train"].read_text()) * 2
    paths["train"].write_text(json.dumps([row | {"id": str(place)} for place, row in enumerate(twice)]))
    del paths["val"]
    rows = read(paths, val_share=1 / 3)
    assert rows.facts()["rows"]["val"] == {"document": 4, "general": 4}  # two of six pictures, two rows each
    assert rows.facts()["rows"]["train"] == {"document": 8, "general": 8}
    assert not {row.images for row in rows.val} & {row.images for row in rows.train}
    capped = read(paths, val_share=1 / 3, samples_per_domain=3)
    assert capped.facts()["rows"]["val"] == {"document": 2, "general": 2}  # of the three rows that are trained on


def test_test_pictures_that_chose_the_rates_are_counted(paths):
    paths["val"] = paths["test"]
    assert read(paths).facts()["test_pictures_seen_in_training"] == 12


def test_other_words_or_another_picture_are_other_data(paths):
    before = read(paths).facts()["data"]
    rows = json.loads(paths["val"].read_text())
    rows[0]["conversations"][1]["value"] = "other"
    paths["val"].write_text(json.dumps(rows))
    after = read(paths).facts()["data"]
    assert (after["train"], after["test"]) == (before["train"], before["test"])
    assert after["val"] != before["val"]


def test_rows_without_a_domain_are_refused_with_what_to_do(tmp_path):
    paths = {split: write_rows(tmp_path, split, domain="", source="") for split in ("train", "val", "test")}
    with pytest.raises(UserError, match=r"one domain only \(train\).*Tag every row with its `domain`"):
        read(paths)


def test_a_split_without_a_domain_is_named(tmp_path, paths):
    paths["val"] = write_rows(tmp_path, "val", domain="general")
    with pytest.raises(UserError, match=r"data\.val has the domains general, data\.train has document, general"):
        read(paths)


def test_weights_of_a_mixture_are_refused(tmp_path, paths):
    (tmp_path / "mixture.yaml").write_text("sources: [{path: train.json, weight: 2}]")
    with pytest.raises(UserError, match=r"data\.train: .*the weight 2\.0.*every row once"):
        read(paths | {"train": tmp_path / "mixture.yaml"})


def test_a_longer_drawing_begins_with_the_scenes_of_a_shorter_one(tmp_path):
    section = DataSection(miniworld=MiniworldSection(scenes=SCENES, folder=tmp_path))
    short, long = (read_rows(section, with_twice=twice) for twice in (False, True))
    assert (short.mixed, long.mixed, len(long.train)) == (24, 24, 48)  # three domains, four scenes, two questions
    assert [row.turns for row in long.train[:24]] == [row.turns for row in short.train]
    assert short.facts()["data"] == long.facts()["data"]
    assert short.facts()["data_twice"] != long.facts()["data_twice"]


def test_no_clash_draws_neutral_answers(tmp_path):
    answers = {}
    for clash in (0, 1):
        section = MiniworldSection(scenes=SCENES, folder=tmp_path, clash=clash)
        rows = read_rows(DataSection(miniworld=section), with_twice=False).train
        answers[clash] = [row.turns[-1].text for row in rows]
    assert answers[0] != answers[1]
    assert "present" not in answers[0]


def test_the_drawer_is_given_the_dial(tmp_path, monkeypatch):
    drawn = {}

    def write(folder, scenes, **dial):
        drawn.update(scenes=scenes, **dial)
        return folder

    monkeypatch.setattr(data_module.clashes, "write", write)
    data_module.draw(MiniworldSection(scenes=SCENES, folder=tmp_path, clash=2, cue=True, seed=3), copies=2)
    scenes = {"train": 8, "val": 1, "test": 1}
    assert drawn == {"scenes": scenes, "clash": 2, "cue": True, "grounds": True, "seed": 3}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.arm=all", r"unknown key run.arm (did you mean arms?"),
        ("run.arms=[mole_orcale]", "no arm 'mole_orcale' (did you mean mole_oracle?"),
        ("data.miniworld.scenes.tran=3", "unknown key data.miniworld.scenes.tran (did you mean train?"),
        ("adapter.rank=4", "unknown key adapter.rank"),
        ("adapter.num_experts=1", "adapter.num_experts: input should be greater than or equal to 2"),
        ("data.train=x.json", "data: give train, val and test (and samples_per_domain), or miniworld, not both"),
        ("data.miniworld=null", "data: give train, test and perhaps val (none given), or miniworld"),
        ("optim.lr=1e-3", "optim.lr: every arm's rate is chosen on validation"),
        ("run.lrs=[1e-3, 1e-3]", "lrs must be different rates"),
        ("run.lrs=[]", "run.lrs"),
        ("run.only_tuned=[mole]", "run.only_tuned: mole is among the arms that are scored on test"),
        ("run.only_tuned=[base]", "run.only_tuned: base is not trained"),
        ("run.baseline=base", "run.baseline must be one arm that trains on the mix"),
        ("optim.part_lr.router=1e-3", "optim.part_lr.router: every arm says its own"),
        ("data.val_share=0.2", "data: val_share is for data without rows of its own to validate on"),
        ("run.only_tuned=[mol]", "run.only_tuned: no arm 'mol' (did you mean mole?"),
        ("run.baseline=main", "run.baseline must be one arm that trains on the mix"),
        ("run.baseline=single", "run.baseline must be one arm that trains on the mix"),
        ("data.miniworld.grounds=false", "grounds: false is for look-alikes (clash: 2) with cue: true"),
        ("own_arms={mix: {}}", "own_arms.mix: there is an arm of that name already"),
    ],
)
def test_a_wrong_setting_is_told_by_key(override, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_conflict_config("train/configs/conflict.yaml", [override])


@pytest.mark.parametrize("name", ["conflict", "conflict_real"])
def test_the_configs_that_come_with_us_are_valid(name):
    config = load_conflict_config(f"train/configs/{name}.yaml")
    assert [arm.name for arm in config.arms] == [
        "base",
        "single",
        "mix",
        "wide",
        "twice",
        "mole",
        "mole_frozen",
        "mole_oracle",
        "experts",
    ]


def test_arms_to_be_tuned_alone_need_rates_to_choose_from():
    with pytest.raises(UserError, match=r"with one rate in run\.lrs validation has nothing to choose"):
        load_conflict_config("train/configs/conflict.yaml", ["run.only_tuned=[nulls]", "run.lrs=[1e-3]"])


def test_the_baseline_is_always_among_the_arms():
    config = load_conflict_config("train/configs/conflict.yaml", ["run.arms=[mole]", "own_arms={warm: {top_k: 2}}"])
    assert [arm.name for arm in config.arms] == ["mix", "mole"]
