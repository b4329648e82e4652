"""The report as one HTML file: whole in itself, harmless whatever the data says, and readable in a browser."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from mllm.evaluation.answers import Answer
from mllm.evaluation.graded import Graded, grade
from mllm.evaluation.page import write_page
from mllm.evaluation.report import build_report
from mllm.evaluation.samples import MOST, pick_samples
from tests.mllm.evaluation.test_report import routing
from tests.tiny import tiny_image

NASTY = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }}"
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


def answers(right, folder=None, prediction=None, question="What colour?", domains=("general", "document")):
    """Eight rows a domain; the first `right` of them are right."""
    return [
        Answer(id=str(number), source=f"{domain}-s", domain=domain, metric="exact_match", answers=("red",),
               question=question, prediction="red" if number < right else prediction or "blue",
               image=str(folder / "red.png") if folder else "")
        for domain in domains
        for number in range(8)
    ]  # fmt: skip


def page_of(arms, path):
    report = build_report(arms, [])
    write_page(report, arms, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def arms(tmp_path):
    tiny_image("red", 600).save(tmp_path / "red.png")
    base, mole = answers(2, tmp_path), answers(6, tmp_path)
    return {"base": {"answers": base}, "mole": {"answers": mole, "blanked": answers(1, tmp_path), "routing": routing()}}


class Outside(HTMLParser):
    """Collects tags that run or fetch something."""

    def __init__(self):
        super().__init__()
        self.found, self.pictures = [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "link", "iframe", "object", "embed", "base", "form"):
            self.found.append(tag)
        self.found += [name for name in attributes if name.startswith("on") or name in ("href", "srcset")]
        if tag == "img":
            self.pictures.append(attributes["src"])


def test_nothing_in_the_page_runs_or_is_fetched(arms, tmp_path):
    page = page_of(arms, tmp_path / "report.html")
    reader = Outside()
    reader.feed(page)
    assert reader.found == []
    assert reader.pictures
    assert all(source.startswith("data:image/jpeg;base64,") for source in reader.pictures)
    assert not re.search(r"https?://|url\(|@import", page)


@pytest.mark.parametrize("place", ["prediction", "question", "domain", "arm"])
def test_whatever_data_say_is_shown_as_text(place, tmp_path):
    if place == "domain":
        rows = answers(2, domains=(NASTY,))
    else:
        rows = answers(2, **({place: NASTY} if place != "arm" else {}))
    page = page_of({NASTY if place == "arm" else "base": {"answers": rows}}, tmp_path / "report.html")
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34; {{ 7 * 7 }}" in page


def test_bars_and_intervals_have_the_lengths_of_the_scores(arms, tmp_path):
    page = page_of(arms, tmp_path / "report.html")
    report = build_report(arms, [])
    figures = report["arms"]["mole"]["domains"]["general"]
    assert f"width:{100 * figures['score']}%" in page
    assert f"left:{100 * figures['ci_low']}%;width:{100 * figures['ci_high'] - 100 * figures['ci_low']}%" in page


def test_pictures_are_made_small(arms, tmp_path):
    page = page_of(arms, tmp_path / "report.html")
    assert max(map(len, re.findall(r"base64,([^\"]+)", page))) < 20_000


def test_a_picture_that_is_not_at_hand_leaves_its_sample_in_place(arms, tmp_path):
    (tmp_path / "red.png").unlink()
    page = page_of(arms, tmp_path / "report.html")
    assert "<img" not in page
    assert page.count('<div class="none">no picture</div>') == page.count('<div class="card">') > 0


def test_the_routing_of_every_domain_is_there_and_null_experts_have_a_scale_of_their_own(arms, tmp_path):
    page = page_of(arms, tmp_path / "report.html")
    section = page.partition("Routing by domain, mole")[2]
    assert re.findall(r"<caption>(\w+)</caption>", section) == ["document", "general"]
    cells = re.findall(r'rgba\((\d+),\d+,\d+,([\d.]+)\);color:[^"]+">(\d+)</td>', section)
    assert cells[:3] == [("0", "1.000", "60"), ("0", "0.333", "20"), ("60", "0.200", "20")]


def test_samples_are_where_the_last_arm_gains_and_loses_most():
    base, mole = grade(answers(2)), grade(answers(6))
    picked = pick_samples({"base": base, "mole": mole})["general"]
    assert all(mole.scores[row] > base.scores[row] for row in picked.best)
    assert all(mole.scores[row] <= base.scores[row] for row in picked.worst)
    assert len(picked.best) == len(picked.worst) == MOST


def test_of_one_arm_the_best_samples_owe_their_score_to_the_picture():
    seen, blanked = grade(answers(6)), grade(answers(3))
    picked = pick_samples({"base": seen}, blanked)["general"]
    assert {int(seen.rows[row].id) for row in picked.best} == {3, 4, 5}
    assert {int(seen.rows[row].id) for row in picked.worst} >= {6, 7}


def test_a_row_is_never_both_best_and_worst():
    for size in range(1, 8):
        rows = answers(2, domains=("general",))[:size]
        picked = pick_samples({"base": Graded(rows, np.zeros(size))})["general"]
        assert not set(picked.best) & set(picked.worst)
        assert len(picked.best) + len(picked.worst) == min(size, 2 * MOST)


@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
def test_a_browser_shows_bars_to_scale_and_every_picture(arms, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    page_of(arms, tmp_path / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(switch)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_argument("--window-size=1200,900")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get((tmp_path / "report.html").as_uri())
        tracks, fills = (driver.find_elements(By.CSS_SELECTOR, name) for name in (".track", ".fill"))
        shares = [fill.size["width"] / track.size["width"] for fill, track in zip(fills, tracks, strict=True)]
        assert shares == pytest.approx([0.25, 0.75] * 3, abs=0.01)
        pictures = driver.find_elements(By.TAG_NAME, "img")
        assert len(pictures) == 2 * 2 * MOST
        assert all(picture.get_property("naturalWidth") == 224 for picture in pictures)
        wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0
    finally:
        driver.quit()
