"""The report in a real browser: it opens at once, switches and keys work, and it reads in light and in dark."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import run_folders
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from launch import report
from launch.reporting.watch import Server

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver (packages of Debian) here"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1300,1000"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",  # /dev/shm of a container is small
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of a run with 50,000 rollouts and of small runs, whose seeds decide claims of the paper."""
    folder = tmp_path_factory.mktemp("runs")
    large = run_folders.write(folder / "large", rewards=[1.0] * 3125, passes={0: 0.2, 3125: 0.5})
    with (large / "rollouts.jsonl").open("w") as file:
        for step in range(1, 3126):
            records = [run_folders.rollout(step, index // 4, index) for index in range(16)]
            file.write("".join(json.dumps(record) + "\n" for record in records))
    small = [
        run_folders.write(
            folder / name,
            method=name,
            alpha=None,
            passes={0: 0.2, 4: 0.5},
            rollouts_per_step=8,
            settings={"run": {"max_staleness": ahead}},
            separate=bool(ahead),
        )
        for name, ahead in (("sa-ah-grpo", 0), ("ah-grpo", 1))
    ]
    small.append(run_folders.write(folder / "again", alpha=None, seed=2, passes={0: 0.2, 4: 0.51}))
    out = folder / "out.html"
    report.write([*small, large], out)
    report.write([large], folder / "large.html")  # a run alone has the most samples
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(200)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """The page as a new reader finds it; whatever it does, the console stays empty."""
    set_scheme(browser, "light")
    browser.get(page.as_uri())
    browser.execute_script("sessionStorage.clear()")
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def set_scheme(browser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def press(browser, *keys: str) -> None:
    browser.execute_script("document.activeElement.blur()")
    ActionChains(browser).send_keys(*keys).perform()


def text(browser, element_id: str) -> str:
    return browser.find_element(By.ID, element_id).get_property("textContent")


def chosen(browser, element_id: str) -> str:
    return Select(browser.find_element(By.ID, element_id)).first_selected_option.text


def load_end(browser) -> float:
    """Milliseconds that the page took; 0 until it is loaded."""
    return browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")


@pytest.mark.parametrize("name", ["out.html", "large.html"])
def test_it_opens_in_under_two_seconds(opened, page, name):
    opened.get(page.with_name(name).as_uri())
    loads = []
    for _ in range(3):  # the best of three: the machine may have other work
        opened.refresh()
        loads.append(WebDriverWait(opened, 30).until(load_end))
    assert min(loads) < 2000
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0  # nothing was fetched
    Select(opened.find_element(By.ID, "run")).select_by_visible_text("large")
    assert "of 50,000 recorded" in text(opened, "sampled")


def test_cards_show_the_group_side_by_side(opened):
    cards = opened.find_elements(By.CSS_SELECTOR, ".card")
    assert len(cards) == 4
    assert len({card.rect["y"] for card in cards}) == 1
    assert len({card.rect["x"] for card in cards}) == 4
    incorrect, correct = cards[0].text, cards[3].text
    assert "reward 0.10" in incorrect
    assert "✗ incorrect" in incorrect
    assert "The horizon closes at token 4 of 30" in incorrect
    assert "✓ correct" in correct
    assert "horizon" not in correct
    before = opened.execute_script(
        "const marks = document.querySelectorAll('.card .closes');"
        "return [marks.length, marks[0].previousSibling.textContent, marks[0].nextSibling.title]"
    )
    assert before == [3, " is", "entropy 0.250 nats, weight 0.410, advantage -0.58"]


def colours(browser, card: int) -> list[str]:
    """Background of the first tokens of a card."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.card')[arguments[0]].querySelectorAll('.tokens span:not(.closes)')]"
        ".slice(0, 5).map((span) => getComputedStyle(span).backgroundColor)",
        card,
    )


def test_tokens_are_coloured_by_what_is_chosen(opened):
    seen = {"entropy": colours(opened, 0)}
    assert len(set(seen["entropy"])) == 1  # every token has the same entropy
    for key, name in (("w", "weight"), ("a", "advantage")):
        press(opened, key)
        assert opened.find_element(By.CSS_SELECTOR, f"input[value={name}]").is_selected()
        seen[name] = colours(opened, 0)
        assert name in text(opened, "scale")
    assert len(set(seen["weight"])) == 5  # each has less weight than the one before
    assert seen["advantage"][0] != colours(opened, 3)[0]  # negative and positive
    opened.find_element(By.CSS_SELECTOR, "input[value=entropy]").click()
    assert colours(opened, 0) == seen["entropy"]


def test_keys(opened):
    assert (chosen(opened, "run"), chosen(opened, "step"), text(opened, "group")) == ("sa-ah-grpo", "1", "group 1 of 2")
    press(opened, "j")
    assert text(opened, "group") == "group 2 of 2"
    press(opened, "j", "k", "k")
    assert text(opened, "group") == "group 1 of 2"
    press(opened, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert chosen(opened, "step") == "2"
    press(opened, "n")
    assert (chosen(opened, "run"), text(opened, "settings-of")) == ("ah-grpo", "ah-grpo")
    press(opened, "p", "p")
    assert chosen(opened, "run") == "sa-ah-grpo"
    for key, section in enumerate(("runs", "samples", "timeline", "tables"), start=1):
        press(opened, str(key))
        top = opened.execute_script("return document.getElementById(arguments[0]).getBoundingClientRect().top", section)
        assert abs(top) < 120, section
    press(opened, "?")
    assert opened.find_element(By.ID, "keys").get_property("open")
    ActionChains(opened).send_keys(Keys.ESCAPE).perform()
    assert not opened.find_element(By.ID, "keys").get_property("open")


def test_the_paper_is_closed_until_it_is_asked_for_and_stays_open(opened):
    def visible() -> bool:
        return opened.find_element(By.CSS_SELECTOR, ".verdict").is_displayed()

    assert not visible()
    opened.find_element(By.ID, "paper-title").click()
    assert visible()
    opened.refresh()  # as a watched page does
    assert visible()


def test_everything_is_reached_by_tab(opened):
    opened.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = set()
    for _ in range(80):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        reached.add(opened.execute_script("return document.activeElement.id || document.activeElement.name"))
    assert {"theme", "help", "run", "step", "step-on", "group-on", "colour"} <= reached


def test_controls(opened):
    opened.find_element(By.ID, "step-on").click()
    assert chosen(opened, "step") == "2"
    Select(opened.find_element(By.ID, "step")).select_by_visible_text("4")
    assert not opened.find_element(By.ID, "step-on").is_enabled()
    opened.find_element(By.ID, "group-on").click()
    assert text(opened, "group") == "group 2 of 2"
    Select(opened.find_element(By.ID, "run")).select_by_visible_text("large")
    assert chosen(opened, "step") != ""


def bars(browser) -> list[float]:
    """Left end and width of each bar of the timeline, lane by lane, in percent."""
    script = "return [...document.querySelectorAll('.gantt .track i')].flatMap((i) => [i.style.left, i.style.width])"
    return [float(value.removesuffix("%")) for value in browser.execute_script(script)]


def test_timeline(opened):
    assert "sa-ah-grpo, step 1: 7.50 s, of which 2.50 s waiting" in text(opened, "timeline-of")
    assert text(opened, "gantt").startswith("device 0: learner 0idle 7 %device 0: actor 0idle 7 %0.0 s")
    assert bars(opened) == pytest.approx([x / 0.075 for x in (2.5, 4, 6.5, 0.5, 0, 2, 2, 0.5, 7, 0.5)], abs=0.01)
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).backgroundColor)"
    assert opened.execute_script(script, ".gantt i") == opened.execute_script(script, "#kinds .dot")[:5]


def test_timeline_of_a_prefetching_step(opened):
    Select(opened.find_element(By.ID, "run")).select_by_visible_text("ah-grpo")
    press(opened, Keys.ARROW_RIGHT)
    assert "step 2: 6.50 s, of which 0.00 s waiting for rollouts and 1.50 s draining" in text(opened, "timeline-of")
    assert text(opened, "gantt").startswith("device 0: learner 0idle 31 %device 1: actor 0idle 8 %0.0 s")
    assert bars(opened) == pytest.approx([x / 0.065 for x in (0, 4, 5.5, 0.5, 0, 2.5, 2.5, 3, 6, 0.5)], abs=0.01)


def test_settings_that_differ_are_marked(opened):
    rows = opened.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('#all-settings .differs')]"
        ".map((row) => [row.cells[0].textContent, row.cells[2].textContent]))"
    )
    assert rows["method.name"] == "ah-grpo"
    assert "model.path" not in rows


def contrast(browser, selector: str) -> float:
    """WCAG contrast of an element's text and background, which the first ancestor that has one gives."""
    script = """
      const parse = (c) => c.match(/[\\d.]+/g).map(Number);
      let ground = document.querySelector(arguments[0]);
      const ink = parse(getComputedStyle(ground).color);
      while (ground && parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
      const light = (c) => c.slice(0, 3).map((x) => x / 255)
        .map((x) => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
      const both = [light(ink), light(parse(getComputedStyle(ground).backgroundColor))].sort((a, b) => b - a);
      return (both[0] + .05) / (both[1] + .05);"""
    return browser.execute_script(script, selector)


READ = (
    *("body", "nav a", ".caption", "tr.paper td", "sup a", "button:enabled", ".verdict", ".horizon", ".closes"),
    *("#prompt", ".card h4 span", ".tag"),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_in_both_themes(opened, scheme):
    set_scheme(opened, scheme)
    for selector in READ:
        assert contrast(opened, selector) >= 4.5, selector
    ink = opened.execute_script("return getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == opened.execute_script("return getComputedStyle(document.body).color")


def test_the_theme_switch(opened):
    def ground() -> str:
        return opened.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = ground()
    press(opened, "t", "t")
    assert text(opened, "theme") == "Theme: dark"
    dark = ground()
    assert dark != light
    set_scheme(opened, "dark")
    opened.refresh()
    assert text(opened, "theme") == "Theme: dark"  # a reload keeps it
    press(opened, "t", "t")
    assert (text(opened, "theme"), ground()) == ("Theme: light", light)


def test_a_watched_page_reloads_when_the_run_has_written(browser, tmp_path):
    folder = run_folders.write(tmp_path / "run", rewards=[1.0] * 3, steps=4)
    with Server([folder], lambda: report.write([folder], tmp_path / "r.html").html, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        assert "3 of 4" in text(browser, "settings")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "reward/mean": 2.0}\n')
        WebDriverWait(browser, 120).until(lambda b: "4 of 4" in text(b, "settings"))
        server.shutdown()
    WebDriverWait(browser, 30).until(lambda b: text(b, "watch") == "the server has ended")
