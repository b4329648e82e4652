"""The report on hand-made replies: figures, tables, files."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from mllm.common.errors import UserError
from mllm.data.conversation import Conversation, Turn
from mllm.evaluation import picture
from mllm.evaluation.answers import Answer
from mllm.evaluation.picture import draw_report
from mllm.evaluation.report import build_report, write_report
from mllm.evaluation.tables import print_report

# source -> (domain, questions)
SOURCES = {"coco": ("general", 8), "nlvr": ("general", 2), "forms": ("document", 4)}
TRAIN = [
    Conversation(
        id="",
        turns=(Turn("user", "<image>\nWhich?"), Turn("assistant", answer)),
        source=source,
        domain=SOURCES[source][0],
    )
    for source, answer in [("coco", "a0"), ("nlvr", "a0"), ("forms", "none")]
]


def replies(right, metric="exact_match"):
    """`right` source -> how many of its questions are answered rightly, the first ones."""
    return [
        Answer(
            id=str(number),
            source=source,
            domain=domain,
            metric=metric,
            answers=(f"a{number % 2}",),
            question="Which?",
            prediction=f"a{number % 2}" if number < right[source] else "wrong",
        )
        for source, (domain, count) in SOURCES.items()
        for number in range(count)
    ]


def routing():
    """Two layers, two real experts, null experts: what RoutingStats.to_json() gives, as far as reports read it."""
    by_layer = {"layers.0.mlp": [0.6, 0.2, 0.2], "layers.1.mlp": [0.2, 0.4, 0.4]}
    figures = {"load": 0.7, "null_share": 0.3, "entropy": 0.51}
    told = {
        "mi_domain": 0.25,
        "mi_domain_ratio": 0.4,
        "mi_modality": 0.01,
        "mi_modality_ratio": 0.02,
        "dead_experts": 3.0,
    }
    return {
        "layers": list(by_layer),
        "experts": ["0", "1", "null"],
        "shares": dict.fromkeys(("document", "general"), by_layer),
        "modality_shares": {"text": by_layer, "image": by_layer},
        "summary": {f"routing/{name}": value for name, value in told.items()},
        "figures": {
            "domain": {"document": figures, "general": figures},
            "modality": {"text": figures, "image": figures | {"null_share": 0.9}},
        },
    }


@pytest.fixture(scope="module")
def arms():
    base = {"coco": 2, "nlvr": 0, "forms": 1}
    mole = {"coco": 6, "nlvr": 2, "forms": 2}
    return {
        "base": {"answers": replies(base), "blanked": None, "routing": None},
        "mole": {"answers": replies(mole), "blanked": replies(base), "routing": routing()},
    }


@pytest.fixture(scope="module")
def report(arms):
    return build_report(arms, TRAIN)


def test_each_arm_and_domain_has_exactly_the_agreed_keys(report):
    for arm in report["arms"].values():
        assert set(arm["domains"]) == {"general", "document"}
        assert set(arm["sources"]) == set(SOURCES)
        for figures in [*arm["domains"].values(), *arm["sources"].values(), arm["mean"]]:
            assert set(figures) == {"n", "score", "ci_low", "ci_high", "blind", "blanked"}


def test_scores_are_means_over_rows_and_the_mean_is_over_domains(report):
    mole = report["arms"]["mole"]
    assert (mole["domains"]["general"]["n"], mole["domains"]["general"]["score"]) == (10, 0.8)
    assert (mole["domains"]["document"]["n"], mole["domains"]["document"]["score"]) == (4, 0.5)
    assert mole["sources"]["coco"]["score"] == 0.75
    assert (mole["mean"]["n"], mole["mean"]["score"]) == (14, pytest.approx(0.65))


def test_scores_lie_in_their_intervals_which_narrow_with_more_rows(report):
    figures = report["arms"]["mole"]["sources"]
    for each in figures.values():
        assert each["ci_low"] <= each["score"] <= each["ci_high"]
    widths = {source: each["ci_high"] - each["ci_low"] for source, each in figures.items()}
    assert widths["coco"] < widths["forms"]


def test_the_blind_baseline_is_the_same_for_every_arm(report):
    for arm in report["arms"].values():
        assert arm["domains"]["general"]["blind"] == 0.5
        assert arm["domains"]["document"]["blind"] == 0.0
        assert arm["mean"]["blind"] == 0.25


def test_blanked_is_there_for_the_arms_that_have_it(report):
    assert report["arms"]["base"]["mean"]["blanked"] is None
    assert report["arms"]["mole"]["domains"]["general"]["blanked"] == 0.2


def test_without_training_rows_blind_is_none(arms):
    assert build_report(arms, [])["arms"]["base"]["domains"]["general"]["blind"] is None


def test_a_difference_is_the_mean_of_row_differences_with_its_interval(report):
    difference = report["differences"]["mole"]["base"]["domains"]["general"]
    assert set(difference) == {"difference", "ci_low", "ci_high"}
    assert difference["difference"] == pytest.approx(0.6)
    # six of ten rows won: binomial quantiles 3 and 9 of 10
    assert (difference["ci_low"], difference["ci_high"]) == (pytest.approx(0.3), pytest.approx(0.9))
    assert report["differences"]["mole"]["base"]["mean"]["difference"] == pytest.approx((0.6 + 0.25) / 2)


def test_differences_are_paired_so_an_arm_does_not_differ_from_itself(arms):
    twin = build_report({"base": arms["base"], "again": arms["base"]}, [])["differences"]["again"]["base"]
    assert twin["domains"]["general"] == {"difference": 0.0, "ci_low": 0.0, "ci_high": 0.0}


def test_every_later_arm_is_compared_with_every_earlier_one(arms):
    report = build_report({"base": arms["base"], "lora": arms["mole"], "mole": arms["mole"]}, [])
    assert {name: list(against) for name, against in report["differences"].items()} == {
        "lora": ["base"],
        "mole": ["base", "lora"],
    }


def test_the_same_seed_gives_the_same_report(arms, report):
    assert build_report(arms, TRAIN) == report
    assert build_report(arms, TRAIN, seed=1) != report


def test_one_question_makes_a_report():
    row = replies({"coco": 1, "nlvr": 0, "forms": 0})[:1]
    figures = build_report({"base": {"answers": row}}, [])["arms"]["base"]["mean"]
    assert (figures["n"], figures["score"], figures["ci_low"], figures["ci_high"]) == (1, 1.0, 1.0, 1.0)


def test_rows_that_are_not_graded_are_left_out_and_told():
    rows = replies({"coco": 8, "nlvr": 2, "forms": 4})
    captions = replies({"coco": 0, "nlvr": 0, "forms": 0}, metric="not_graded")
    report = build_report({"base": {"answers": rows + captions}}, [])
    assert report["arms"]["base"]["mean"]["score"] == 1.0
    assert report["notes"] == ["base: 14 rows that are not graded were left out"]


def test_a_report_without_any_graded_row_is_refused():
    captions = replies({"coco": 0, "nlvr": 0, "forms": 0}, metric="not_graded")
    with pytest.raises(UserError, match="no graded row"):
        build_report({"base": {"answers": captions}}, [])


def test_arms_with_other_questions_are_refused(arms):
    rows = arms["base"]["answers"]
    with pytest.raises(UserError, match="same questions in the same order: where 'base' has row '0' of coco"):
        build_report({"base": arms["base"], "mole": {"answers": rows[::-1]}}, [])
    with pytest.raises(UserError, match="arm 'mole' has 13 graded answers, 'base' 14"):
        build_report({"base": arms["base"], "mole": {"answers": rows[1:]}}, [])


def test_routing_is_carried_for_the_arms_that_route(report):
    assert report["routing"] == {"mole": routing()}


def test_an_adapter_without_routed_layers_has_no_routing(arms):
    unrouted = {"answers": arms["base"]["answers"], "routing": {"shares": {}}}
    assert build_report({"base": unrouted}, [])["routing"] == {}


def printed(report, width):
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text()


def test_the_table_shows_score_and_interval_then_blind_then_blanked(report):
    lines = printed(report, 160).splitlines()
    general = next(line for line in lines if line.strip().startswith("general"))
    mole = report["arms"]["mole"]["domains"]["general"]
    assert f"80.0 [{100 * mole['ci_low']:.1f}, {100 * mole['ci_high']:.1f}]" in general
    assert general.split()[-2:] == ["50.0", "20.0"]


def test_a_narrow_terminal_still_shows_every_figure(report):
    text = printed(report, 60)
    assert "…" not in text
    for figures in report["arms"]["mole"]["domains"].values():
        assert f"[{100 * figures['ci_low']:.1f}, {100 * figures['ci_high']:.1f}]" in text


def test_a_domain_name_with_brackets_is_text_and_no_markup(arms):
    rows = [Answer("1", "s", "[red]x[/red]", "anls", ("a",), "?", "a")]
    assert "[red]x[/red]" in printed(build_report({"base": {"answers": rows}}, []), 120)


def routing_lines(report):
    """First word -> words of the lines of the routing table."""
    table = printed(report, 120).partition("Routing, mole")[2]
    return {words[0]: words for words in map(str.split, table.splitlines()) if words}


def test_load_null_picks_entropy_and_shares_are_printed_by_domain_and_modality(report):
    lines = routing_lines(report)
    assert lines["general"] == ["general", "0.70", "30.0", "0.51", "40.0", "30.0"]
    assert lines["image"][:3] == ["image", "0.70", "90.0"]


def test_without_null_experts_there_is_no_column_for_them(arms):
    mole = routing()
    for shares in (mole["shares"], mole["modality_shares"]):
        shares |= {name: {"layers.0.mlp": [0.75, 0.25]} for name in shares}
    arm = arms["mole"] | {"routing": mole | {"experts": ["0", "1"]}}
    report = build_report({"mole": arm}, [])
    assert "null picks" not in printed(report, 120).partition("Per cent")[0]
    assert routing_lines(report)["general"] == ["general", "0.70", "0.51", "75.0", "25.0"]


def test_experts_too_many_for_a_table_are_left_to_the_picture(arms):
    many = {"layers.0.mlp": [1 / 64] * 64}
    mole = routing() | {"experts": [str(expert) for expert in range(64)]}
    mole["shares"], mole["modality_shares"] = {"general": many}, {"text": many}
    report = build_report({"mole": arms["mole"] | {"routing": mole}}, [])
    assert routing_lines(report)["general"] == ["general", "0.70", "0.51"]


def test_a_note_says_what_a_pick_tells_of_domain_and_modality(report):
    (note,) = [note for note in report["notes"] if "nats" in note]
    assert note == (
        "mole: a pick tells 0.25 nats of its token's domain (40 % of all there is) and 0.01 nats of its token's "
        "modality (2 % of all there is); 3 experts in 2 layers took no token."
    )


def test_the_folder_holds_report_picture_tables_and_answers(tmp_path, arms, report):
    write_report(report, arms, tmp_path / "out")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    answers = {"answers/base.jsonl", "answers/mole.jsonl", "answers/mole.blanked.jsonl"}
    assert files == {"report.json", "report.md", "report.png", "report.html"} | answers
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert len((tmp_path / "out" / "answers" / "mole.jsonl").read_text().splitlines()) == 14
    assert "| general | 10 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_failure_on_the_way_leaves_no_report_json(tmp_path, arms, report, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mllm.evaluation.report.draw_report", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(report, arms, tmp_path)
    assert not (tmp_path / "report.json").exists()


def size_of_picture(report, path):
    draw_report(report, path)
    return Image.open(path).size


def test_the_picture_grows_by_heat_maps_where_tokens_were_routed(tmp_path, report):
    routed = size_of_picture(report, tmp_path / "routed.png")
    dense = size_of_picture(report | {"routing": {}}, tmp_path / "dense.png")
    assert routed[0] == dense[0]
    assert routed[1] > dense[1]


def test_panels_are_the_domains_and_then_the_modalities(report):
    assert list(picture._panels(routing())) == ["document", "general", "text tokens", "image tokens"]
    text_only = routing() | {"modality_shares": {"text": routing()["modality_shares"]["text"]}}
    assert list(picture._panels(text_only)) == ["document", "general"]


def test_more_than_five_panels_take_a_second_row(tmp_path, report):
    def height(num_domains):
        shares = dict.fromkeys(map(str, range(num_domains)), routing()["shares"]["general"])
        routed = {"mole": routing() | {"shares": shares}}
        return size_of_picture(report | {"routing": routed}, tmp_path / f"{num_domains}.png")[1]

    assert height(2) == height(3) < height(4)
