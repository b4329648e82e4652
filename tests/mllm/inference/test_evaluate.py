"""One arm's answers and routing, with an adapter that routes by the domain it is told."""

import pytest
import torch
from peft import get_peft_model

from mllm.build import load, write_base_card
from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.inference.evaluate import answer_arm, answer_specialists
from mllm.mole import MoleConfig
from tests.tiny import write_tiny_llava

DOMAINS = ["general", "document", "general", "biomedical"]
ROWS = [
    Conversation(
        id=str(number),
        turns=(Turn("user", f"Question {number}?"), Turn("assistant", "red")),
        source="s",
        domain=domain,
        metric="exact_match",
        answers=("red",),
    )
    for number, domain in enumerate(DOMAINS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("base"))


def adapter_for(base, folder, domains):
    torch.manual_seed(0)
    config = MoleConfig(r=2, num_experts=3, router="oracle_domain", expert_domains=domains, balance="none")
    model, _ = load(base)
    get_peft_model(model, config).save_pretrained(folder)
    write_base_card(folder, model, base)
    return folder


def arm(base, folder, **options):
    options = {"name": "oracle", "split": "test", "blanked": True, "batch_size": 2, "max_new_tokens": 2} | options
    return answer_arm(base, folder, ROWS, folder=folder / "answers", **options)


def test_an_adapter_routed_by_domain_is_scored_with_each_row_told_its_domain(base, tmp_path):
    done = arm(base, adapter_for(base, tmp_path, ["document", "general", "biomedical"]))
    assert len(done["answers"]) == len(done["blanked"]) == 4
    shares = {domain: by_layer["layers.0.mlp"] for domain, by_layer in done["routing"]["shares"].items()}
    assert shares == {"document": [1, 0, 0], "general": [0, 1, 0], "biomedical": [0, 0, 1]}
    assert done["routing"]["summary"]["routing/mi_domain_ratio"] == pytest.approx(1)


def test_a_domain_without_an_expert_is_named(base, tmp_path):
    with pytest.raises(UserError, match="No expert is meant for domain 'biomedical'"):
        arm(base, adapter_for(base, tmp_path, ["document", "general"]))


def test_domains_are_forgotten_after_the_last_question(base, tmp_path, monkeypatch):
    models = []
    monkeypatch.setattr("mllm.inference.evaluate.load", lambda *a, **o: models.append(load(*a, **o)) or models[-1])
    arm(base, adapter_for(base, tmp_path, sorted(set(DOMAINS))), blanked=False)
    with pytest.raises(UserError, match="nobody has told the rows' domains"):
        models[0][0](input_ids=torch.ones(1, 3, dtype=torch.long))


def test_specialists_answer_the_rows_of_their_domain_in_the_order_asked(base, tmp_path):
    options = {"split": "test", "blanked": True, "batch_size": 2, "max_new_tokens": 2}
    folders = {domain: adapter_for(base, tmp_path / domain, [domain]) for domain in sorted(set(DOMAINS))}
    done = answer_specialists(base, folders, ROWS, name="apart", folder=tmp_path / "answers", **options)
    assert [answer.id for answer in done["answers"]] == [row.id for row in ROWS]
    assert len(done["blanked"]) == len(ROWS)
    whole = arm(base, adapter_for(base, tmp_path, sorted(set(DOMAINS))))
    assert done["recipe"] == whole["recipe"]


def test_a_domain_without_a_specialist_is_named(base, tmp_path):
    with pytest.raises(UserError, match="arm apart: no adapter for domain 'biomedical'; there are document, general"):
        answer_specialists(base, {"document": tmp_path, "general": tmp_path}, ROWS, name="apart")
