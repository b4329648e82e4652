"""The chat as a person uses it: the real page in headless Chromium, a tiny model behind it."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from peft import get_peft_model
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from demo.app import build_app, launch
from demo.session import ChatSession, Limits, Message
from mllm import MoleConfig
from tests.demo.talker import Talker
from tests.tiny import tiny_image, tiny_llava, tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--window-size=1100,900",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]


class Page:
    """The chat page with words for what a person does and sees."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.find("#box textarea"))

    def wait(self, condition, seconds=60):
        passing = [StaleElementReferenceException]  # the page redraws the answer as it grows
        return WebDriverWait(self.driver, seconds, 0.05, passing).until(lambda _: condition())

    def find(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def attach(self, path):
        chooser = self.find("#box input[type=file]")[0]
        self.driver.execute_script("arguments[0].value = ''", chooser)  # as the upload button does
        chooser.send_keys(str(path))
        self.wait(lambda: path.name in self.find("#box")[0].get_attribute("innerHTML"))

    def ask(self, text):
        box = self.wait(lambda: self.find("#box textarea:enabled"))[0]
        box.send_keys(text, Keys.ENTER)

    def press(self, label):
        def pressed():
            buttons = self.find(f"[aria-label='{label}']:enabled")
            if buttons:
                buttons[0].click()
            return bool(buttons)

        self.wait(pressed)

    def stop(self):
        self.press("Stop")
        self.wait(self.ready)
        assert not self.errors()

    def answers(self):
        return [answer.text for answer in self.find("#chat [data-testid=bot]")]

    def ready(self):
        return self.find("#box .submit-button") and self.find("#box textarea:enabled")

    def errors(self):
        """What Gradio itself shows over the page where one of its events failed."""
        return [element.text for element in self.find("#chat .error") if element.is_displayed()]

    def notice(self):
        return " ".join(element.text for element in self.find("[role=alert]"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in [*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def served():
    model, processor = tiny_llava()
    talker = Talker(model, processor, delay=0.1)
    app = build_app(ChatSession(model, processor), model="tiny")
    yield launch(app, port=None), talker
    app.close()


@pytest.fixture
def page(driver, served):
    return Page(driver, served[0])


@pytest.fixture
def talker(served):
    return served[1]


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        tiny_image(path.stem).save(path)
    return paths


def test_a_picture_is_asked_about_and_the_answer_streams_until_it_is_stopped(page, talker, pictures):
    page.attach(pictures[0])
    page.ask("What colour is it?")
    first = page.wait(lambda: page.answers() and page.answers()[0])
    second = page.wait(lambda: page.answers()[0] != first and page.answers()[0])
    assert first.startswith("red")
    assert second.startswith(first)
    assert len(talker.pictures) == 1
    page.stop()
    stopped = page.answers()
    page.wait(lambda: talker.is_silent(during=1.0), seconds=15)
    assert page.answers() == stopped

    page.attach(pictures[1])  # a later turn sees the earlier picture too
    page.ask("And this one?")
    page.wait(lambda: len(page.answers()) == 2)
    page.stop()
    assert len(talker.pictures[-1]) == 2
    assert len(page.find("#chat [data-testid=user] img")) == 2

    page.press("Undo")
    page.wait(lambda: len(page.answers()) == 1)
    page.wait(lambda: page.find("#box textarea")[0].get_attribute("value") == "And this one?")

    page.press("Retry")
    page.wait(lambda: len(talker.prompts) == 3 and page.answers())
    page.stop()
    assert talker.prompts[2] == talker.prompts[0]

    page.press("Clear")
    page.wait(lambda: not page.answers())


def test_clear_while_answering_ends_the_generation_and_leaves_an_empty_page(page, talker):
    page.ask("Go on.")
    page.wait(page.answers)
    page.press("Clear")
    page.wait(page.ready)
    page.wait(lambda: talker.is_silent(during=1.0), seconds=15)
    assert page.answers() == []


def test_a_bad_picture_is_said_in_the_page_and_the_question_stays(page, tmp_path):
    bad = tmp_path / "torn.png"
    tiny_image(size=200).save(bad)
    bad.write_bytes(bad.read_bytes()[:80])
    page.attach(bad)
    page.ask("What colour?")
    page.wait(page.notice)
    assert "torn.png cannot be read" in page.notice()
    assert page.find("#box textarea")[0].get_attribute("value") == "What colour?"
    assert page.answers() == []


SHOWN = [
    "![](http://127.0.0.1:{sink}/a.png) <img src=http://127.0.0.1:{sink}/b.png>",
    "The tag is <total> and x < y, List<int>.",
    "1*2*3 _x_ $5 and $6 ~7~ **b** `c` # d",
    "<script>document.title = 'x'</script> <style>* {{ display: none }}</style> &lt;b&gt;",
    "[link](http://127.0.0.1:{sink}/c) http://127.0.0.1:{sink}/d",
    "    - a\n    - b",
]


class Echo(ChatSession):
    """Says what it is asked."""

    def __init__(self):
        pass

    def reply(self, messages, **_):
        yield messages[-1].text


@pytest.fixture
def sink():
    """A server that notes what it is asked for: its port, and the paths."""
    paths = []

    class Note(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Note)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, paths
    server.shutdown()


def test_questions_and_answers_are_shown_letter_by_letter_and_load_nothing(driver, sink):
    port, paths = sink
    app = build_app(Echo(), model="tiny")
    page = Page(driver, launch(app, port=None))
    expected = [words.format(sink=port) for words in SHOWN]
    for number, words in enumerate(expected, 1):
        box = page.wait(lambda: page.find("#box textarea:enabled"))[0]
        driver.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            box, words,
        )  # fmt: skip
        box.send_keys(Keys.ENTER)
        page.wait(lambda number=number: len(page.answers()) == number and page.ready())
    for side in ("user", "bot"):
        texts = [message.get_attribute("textContent") for message in page.find(f"#chat [data-testid={side}]")]
        assert texts == expected
    assert page.find("#chat a, #chat [data-testid] img") == []
    assert paths == []
    app.close()


def test_a_picture_dropped_anywhere_goes_into_the_box(page, pictures):
    where = page.find("#chat")[0].rect
    at = {"x": where["x"] + where["width"] / 2, "y": where["y"] + where["height"] / 2}
    data = {"items": [], "files": [str(pictures[0])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **at, "data": data})
    page.wait(lambda: page.find("#box img"))
    assert len(page.driver.window_handles) == 1


@pytest.fixture
def phone(driver):
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_on_a_phone_the_page_opens_at_its_top_and_fits(phone, page):
    page.wait(lambda: page.find("#settings"))
    top, width = page.driver.execute_script("return [scrollY, document.documentElement.scrollWidth]")
    assert (top, width) == (0, 390)


CONTRAST = """
const light = c => { const v = c.map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
                     return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                      if (c.length == 3 || c[3] == 1) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && e.innerText &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && !e.closest("button:disabled")).map(e => {
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
  return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.innerText.slice(0, 40)];
}).filter(([ratio]) => ratio < 4.5);
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_words_stand_out_from_their_background(driver, served, theme):
    page = Page(driver, f"{served[0]}?__theme={theme}")
    page.find("#settings button")[0].click()
    page.wait(lambda: "Temperature" in page.find("#settings")[0].text)
    assert driver.execute_script(CONTRAST) == []


@pytest.fixture(scope="module")
def routed():
    """The page of a model with experts."""
    model, processor = tiny_llava()
    model = get_peft_model(model, MoleConfig(r=2, num_experts=3))
    app = build_app(ChatSession(model, processor), model="tiny", adapter="experts")
    yield launch(app, port=None)
    app.close()


def test_the_routing_of_an_answer_is_drawn_by_layer_and_answered_again_without_an_expert(driver, routed, pictures):
    page = Page(driver, routed)
    page.find("#experts input")[0].click()
    page.wait(lambda: page.find("#view"))
    page.attach(pictures[0])
    page.ask("What colour?")
    page.wait(lambda: page.find(".routing .patches i"))
    patches = [patch.get_attribute("title") for patch in page.find(".routing .patches i")]
    assert all(title.startswith("probability of expert 0: ") for title in patches)
    assert page.find(".routing .words span")
    assert len(page.find(".routing .bars .bar")) == 4  # two layers, picture and text

    slider = page.find("#layer input[type=number]")[0]
    slider.send_keys(Keys.CONTROL, "a")
    slider.send_keys("1", Keys.ENTER)
    page.wait(lambda: [patch.get_attribute("title") for patch in page.find(".routing .patches i")] != patches)

    page.find("#left input")[0].click()
    page.wait(lambda: page.find("#left [role=option]"))
    option = next(option for option in page.find("#left [role=option]") if "only expert 2" in option.text)
    driver.execute_script("arguments[0].dispatchEvent(new MouseEvent('mousedown', {bubbles: true}))", option)
    page.find("#again")[0].click()
    page.wait(lambda: page.ready() and all("2: 1.00" in i.get_attribute("title") for i in page.find(".routing i")[:3]))

    page.find("#experts input")[0].click()
    page.wait(lambda: not page.find("#view"))


def test_an_example_is_one_click_from_its_answer(driver, pictures):
    examples = [Message("user", f"What <b> {number}?", (pictures[number % 2],)) for number in range(6)]
    model, processor = tiny_llava()
    Talker(model, processor)
    app = build_app(ChatSession(model, processor, limits=Limits(new_tokens=6)), model="tiny", examples=examples)
    page = Page(driver, launch(app, port=None))
    offered = page.wait(lambda: len(page.find("#chat .example")) == 6 and page.find("#chat .example"))
    offered[3].click()
    page.wait(lambda: page.answers() and page.ready())
    assert page.find("#chat [data-testid=user]")[-1].text.endswith("What <b> 3?")
    assert len(page.find("#chat [data-testid=user] img")) == 1
    app.close()


def test_a_system_prompt_is_read_before_the_question(page, talker):
    page.find("#settings button")[0].click()
    written = page.wait(lambda: page.find("#system textarea"))[0]
    written.send_keys("Be brief.")
    page.wait(lambda: written.get_attribute("value") == "Be brief.")
    page.find("#header")[0].click()
    page.ask("Go on.")
    page.wait(page.answers)
    page.stop()
    assert tiny_tokenizer().decode(talker.prompts[-1]).index("Be brief.") < 20


def test_adapters_are_switched_and_compared_side_by_side(driver):
    sessions = {}
    for words in ("red ", "three "):
        model, processor = tiny_llava()
        Talker(model, processor, words)
        sessions[words.strip()] = ChatSession(model, processor)
    app = build_app(sessions["red"], model="tiny", adapter="red", others={"three": sessions["three"]})
    page = Page(driver, launch(app, port=None))
    slider = page.find("#settings button")[0]
    slider.click()
    length = page.wait(lambda: page.find("#settings input[type=number]"))[1]
    length.send_keys(Keys.CONTROL, "a")
    length.send_keys("12", Keys.ENTER)
    page.ask("What?")
    page.wait(lambda: page.answers() and page.ready())
    assert page.answers()[0].startswith("red")
    page.find("#adapter input")[1].click()
    page.ask("And now?")
    page.wait(lambda: len(page.answers()) == 2 and page.ready())
    assert page.answers()[1].startswith("three")
    page.find("#compare")[0].click()
    page.wait(lambda: all("…" not in said.text for said in page.find("#compared .said")) and page.find("#compared"))
    first, second = (said.text for said in page.find("#compared .said"))
    assert set(first.split()) == {"red"}
    assert "three" in second
    app.close()


def test_two_users_wait_for_one_another_and_see_their_own_chat_only(page, talker, served):
    page.ask("Mine.")
    page.wait(page.answers)
    mine = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    other = Page(page.driver, served[0])
    other.ask("Theirs.")
    assert other.answers() == []
    other.stop()  # while it still waits for its turn
    assert other.find("#box textarea")[0].get_attribute("value") == "Theirs."
    other.ask("")
    page.driver.switch_to.window(mine)
    page.stop()
    assert "Theirs." not in page.find("#chat")[0].text
    theirs = next(handle for handle in page.driver.window_handles if handle != mine)
    page.driver.switch_to.window(theirs)
    other.wait(other.answers)
    other.stop()
    assert "Mine." not in other.find("#chat")[0].text
    assert talker.most_at_once == 1
    page.driver.close()
    page.driver.switch_to.window(mine)


def test_closing_the_tab_ends_the_generation(page, talker, served):
    mine = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    other = Page(page.driver, served[0])
    other.ask("Go on.")
    other.wait(other.answers)
    page.driver.close()
    page.driver.switch_to.window(mine)
    page.wait(lambda: talker.is_silent(during=0.5), seconds=15)
    assert talker.is_silent(during=0.5)


def test_the_page_asks_no_other_host_for_anything(page):
    page.driver.get_log("performance")
    page.driver.refresh()
    page.wait(lambda: page.find("#box textarea"))
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))} == {"127.0.0.1"}
