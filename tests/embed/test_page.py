"""The page of an embedding service, in Chromium: a real model, so that what is alike looks alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests import browser
from tests.embed.served import Service, served, standin
from tests.support import until

pytestmark = pytest.mark.engine

KEY = "sk-page"
LINES = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "Interest rates rose again in May.",
    "一只小猫在沙发上睡觉。",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, minilm: Path, torch_python: Path) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("minilm")
    (place / "keys").write_text(f"{KEY}\n")
    env = {"MDEPLOY_API_KEYS_FILE": str(place / "keys"), "OMP_NUM_THREADS": "1"}
    with served(place, minilm, python=torch_python, names=("minilm",), env=env, batch_tokens=512) as found:
        yield found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(chromium: webdriver.Chrome, service: Service) -> Iterator[webdriver.Chrome]:
    """The page, freshly loaded, by somebody who gave the key before."""
    chromium.get(service.url + "/")
    chromium.execute_script("sessionStorage.setItem('key', arguments[0])", KEY)
    chromium.refresh()
    until(lambda: "384 numbers" in chromium.find_element(By.ID, "about").text)
    yield chromium
    assert browser.complaints(chromium) == []


def write(page: webdriver.Chrome, lines: tuple[str, ...], query: str = "") -> None:
    """Paste lines and compare them."""
    script = (
        "document.getElementById('lines').value = arguments[0]; document.getElementById('query').value = arguments[1]"
    )
    page.execute_script(script, "\n".join(lines), query)
    page.find_element(By.ID, "compare").click()


def answered(page: webdriver.Chrome, text: str) -> str:
    answer = page.find_element(By.ID, "answer")
    found: str = until(lambda: text in answer.text and answer.text, 20, f"{text!r} on the page")
    return found


def cells(page: webdriver.Chrome) -> list[str]:
    script = "return [...document.querySelectorAll('#map td')].map((cell) => cell.textContent)"
    return list(page.execute_script(script))


def depth(page: webdriver.Chrome, i: int, j: int) -> float:
    """How strongly a cell is coloured."""
    colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    found: str = page.execute_script(colour, f'td[data-i="{i}"][data-j="{j}"]')
    channels = found[found.index("(") + 1 : -1].replace(",", " ").replace("/", " ").split()
    return float(channels[3]) if len(channels) > 3 else 1.0


def test_lines_become_a_map(page: webdriver.Chrome) -> None:
    write(page, LINES)
    answered(page, "4 rows")
    assert len(cells(page)) == 16
    assert [cells(page)[5 * i] for i in range(4)] == ["1.00"] * 4
    assert float(cells(page)[1]) > 0.6 > float(cells(page)[2])
    assert depth(page, 0, 0) > depth(page, 0, 1) > depth(page, 0, 2) + 0.3
    labels = [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#map tbody th")]
    assert [label[1:].strip() for label in labels] == list(LINES)
    ActionChains(page).move_to_element(page.find_element(By.CSS_SELECTOR, 'td[data-i="2"][data-j="3"]')).perform()
    pair = page.find_element(By.ID, "pair")
    until(lambda: LINES[2] in pair.text and LINES[3] in pair.text)


def test_a_query_ranks_the_lines(page: webdriver.Chrome) -> None:
    write(page, LINES, "How expensive is a mortgage?")
    answered(page, "4 rows")
    ranked = [line.text for line in page.find_elements(By.CSS_SELECTOR, "#ranking .bar")]
    assert ranked[0] == LINES[2] and sorted(ranked) == sorted(LINES)
    scores = [float(score.text) for score in page.find_elements(By.CSS_SELECTOR, "#ranking .score")]
    assert scores == sorted(scores, reverse=True)


def test_keyboard_alone(page: webdriver.Chrome) -> None:
    page.find_element(By.ID, "lines").send_keys(LINES[0], Keys.ENTER, LINES[2], Keys.CONTROL, Keys.ENTER)
    answered(page, "2 rows")
    page.find_element(By.CSS_SELECTOR, "td").send_keys(Keys.ARROW_RIGHT)
    assert not page.find_element(By.ID, "pair").text.startswith("1.00")
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    focus = page.switch_to.active_element
    assert (focus.get_attribute("data-i"), focus.get_attribute("data-j")) == ("1", "1")
    assert page.find_element(By.ID, "pair").text.startswith("1.000")


def test_users_text_is_text(page: webdriver.Chrome) -> None:
    hostile = ("<img src=x onerror=document.title='taken'>", "<b>bold</b>")
    write(page, hostile, "<i>query</i>")
    answered(page, "2 rows")
    assert page.find_elements(By.CSS_SELECTOR, "main b, main img, main i:not(th i)") == page.find_elements(
        By.CSS_SELECTOR, ".scale b, #pair > b"
    )
    assert page.title == "Similar texts"


def test_a_line_that_is_too_long(page: webdriver.Chrome) -> None:
    write(page, (LINES[0], "word " * 400, LINES[2]))
    assert "Line 2 is too long" in answered(page, "too long")
    box = page.switch_to.active_element
    assert box.get_attribute("id") == "truncate"
    box.send_keys(Keys.SPACE)
    page.find_element(By.ID, "compare").click()
    answered(page, "3 rows")
    assert len(cells(page)) == 9


def test_the_page_asks_for_a_key(page: webdriver.Chrome) -> None:
    page.execute_script("sessionStorage.clear()")
    page.refresh()
    write(page, LINES)
    answered(page, "asks for an API key")
    field = page.switch_to.active_element
    assert field.get_attribute("id") == "key"
    field.send_keys("wrong", Keys.ENTER)
    script = "return performance.getEntriesByType('resource').filter((one) => one.responseStatus === 401).length"
    until(lambda: page.execute_script(script) == 2)
    answered(page, "asks for an API key")
    field.clear()
    field.send_keys(KEY, Keys.ENTER)
    answered(page, "4 rows")
    page.refresh()
    assert page.find_element(By.ID, "key").get_attribute("value") == KEY


def test_a_service_that_is_gone(page: webdriver.Chrome) -> None:
    page.set_network_conditions(offline=True, latency=0, throughput=1)
    try:
        write(page, ("a line that was never asked before",))
        answered(page, "cannot be reached")
    finally:
        page.delete_network_conditions()


def test_nothing_and_too_much(page: webdriver.Chrome) -> None:
    write(page, ("", "  "))
    answered(page, "nothing to compare")
    write(page, tuple(f"line {i}" for i in range(121)))
    answered(page, "at most 120")


def test_forty_lines_fit(page: webdriver.Chrome, tmp_path: Path) -> None:
    write(page, tuple(f"{LINES[i % 4]} {i} {'and so on ' * (i % 7)}" for i in range(40)), "cat")
    answered(page, "40 rows")
    assert len(cells(page)) == 1600
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    shot = tmp_path / "page.png"
    page.save_screenshot(str(shot))
    assert len(Image.open(shot).convert("RGB").getcolors(1 << 24) or []) > 100


def test_light_and_dark(page: webdriver.Chrome) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    found = []
    for scheme in ("light", "dark", ""):
        browser.prefer(page, scheme)
        found.append(page.execute_script(colour))
    assert found[:2] == ["rgb(244, 245, 247)", "rgb(15, 18, 22)"]


def test_the_page_loads_nothing_from_elsewhere(page: webdriver.Chrome, service: Service) -> None:
    write(page, LINES)
    answered(page, "4 rows")
    entries = json.loads(page.execute_script("return JSON.stringify(performance.getEntriesByType('resource'))"))
    assert {entry["name"].partition("?")[0] for entry in entries if not entry["name"].startswith("data:")} == {
        f"{service.url}/health",
        f"{service.url}/v1/embeddings",
    }


# other models; their vectors do not matter, so hashes will do


def options(page: webdriver.Chrome, name: str) -> list[str]:
    script = "return [...document.getElementById(arguments[0]).options].map((one) => one.text)"
    return list(page.execute_script(script, name))


def test_sizes_and_queries(chromium: webdriver.Chrome, tmp_path: Path, embed_models: Path) -> None:
    with standin(tmp_path / "qwen", embed_models / "qwen3") as service:
        chromium.get(service.url + "/")
        until(lambda: options(chromium, "prompt"))
        assert options(chromium, "prompt")[:2] == ["documents", "queries"]
        assert options(chromium, "dimensions") == ["64", "32"]
        chromium.execute_script("document.getElementById('more').open = true")
        write(chromium, LINES[:2])
        answered(chromium, "2 rows")
        whole = cells(chromium)[1]
        chromium.find_element(By.ID, "dimensions").send_keys("32")
        chromium.find_element(By.ID, "compare").click()
        until(lambda: cells(chromium)[1] != whole)
        cut = cells(chromium)[1]
        chromium.find_element(By.ID, "prompt").send_keys("queries")
        chromium.find_element(By.ID, "compare").click()
        until(lambda: cells(chromium)[1] != cut)


def test_a_cross_encoder_ranks_only(chromium: webdriver.Chrome, tmp_path: Path, embed_models: Path) -> None:
    with standin(tmp_path / "ranker", embed_models / "cross", env={"STANDIN_SCORES": "1"}) as service:
        chromium.get(service.url + "/")
        until(lambda: "Which text answers?" in chromium.find_element(By.TAG_NAME, "h1").text)
        assert not chromium.find_element(By.ID, "compared").is_displayed()
        assert "scores of pairs" in chromium.find_element(By.ID, "about").text
        assert "may stay empty" not in chromium.find_element(By.TAG_NAME, "form").text
        write(chromium, LINES[:3])
        answered(chromium, "ranks lines by a query")
        write(chromium, LINES[:3], LINES[1])
        answered(chromium, "3 rows")
        assert chromium.find_element(By.CSS_SELECTOR, "#ranking .bar").text == LINES[1]
