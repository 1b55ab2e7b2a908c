"""The page of image-to-text, in Debian's Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests import browser, support
from tests.examples.served import Service
from tests.examples.tiny_words import COLOURS

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(chromium: webdriver.Chrome, captions: Service) -> webdriver.Chrome:
    """The page, freshly loaded, by somebody who gave the key before."""
    chromium.get(captions.url + "/")
    chromium.execute_script("sessionStorage.setItem('key', arguments[0])", captions.key)
    chromium.refresh()
    return chromium


def picture(directory: Path, colour: str) -> Path:
    path = directory / f"{colour}.png"
    Image.new("RGB", (480, 320), COLOURS[colour]).save(path)
    return path


def upload(page: webdriver.Chrome, file: Path) -> None:
    page.find_element(By.ID, "file").send_keys(str(file))


def press(page: webdriver.Chrome, *keys: str) -> None:
    ActionChains(page).send_keys(*keys).perform()


def answer(page: webdriver.Chrome) -> str:
    return page.find_element(By.ID, "answer").text


def statuses(page: webdriver.Chrome) -> list[int]:
    """Of what the page asked the service, in order."""
    script = "return performance.getEntriesByName(arguments[0]).map((one) => one.responseStatus)"
    return list(page.execute_script(script, page.current_url + "caption"))


def answered(page: webdriver.Chrome, text: str) -> str:
    found: str = support.until(lambda: text in answer(page) and answer(page), 20, f"{text!r} on the page")
    return found


def test_upload_shows_the_caption(page: webdriver.Chrome, tmp_path: Path) -> None:
    assert "caption will stand here" in answer(page)
    upload(page, picture(tmp_path, "red"))
    assert "red.png" in answered(page, "a picture of red")
    preview = page.find_element(By.ID, "preview")
    assert preview.is_displayed() and page.execute_script("return arguments[0].naturalWidth", preview) == 480
    upload(page, picture(tmp_path, "blue"))
    answered(page, "a picture of blue")
    shot = tmp_path / "page.png"
    page.save_screenshot(str(shot))
    # The page is really drawn: the preview's blue is there, and not only it.
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24) or []
    assert max(count for count, colour in colours if colour == COLOURS["blue"]) > 50_000
    assert len(colours) > 50
    log: list[dict[str, str]] = page.get_log("browser")  # type: ignore[no-untyped-call]
    assert [entry for entry in log if entry["level"] == "SEVERE"] == []


def test_drop_and_paste(page: webdriver.Chrome, tmp_path: Path) -> None:
    data = list(picture(tmp_path, "green").read_bytes())
    make = """const given = new DataTransfer();
      given.items.add(new File([new Uint8Array(arguments[0])], "dropped.png", {type: "image/png"}));"""
    page.execute_script(
        make + 'document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: given, bubbles: true}))', data
    )
    assert "dropped.png" in answered(page, "a picture of green")
    data = list(picture(tmp_path, "white").read_bytes())
    page.execute_script(make + 'dispatchEvent(new ClipboardEvent("paste", {clipboardData: given}))', data)
    answered(page, "a picture of white")


def test_keyboard_alone(page: webdriver.Chrome, tmp_path: Path) -> None:
    press(page, Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "file"
    outline = page.execute_script("return getComputedStyle(document.getElementById('drop')).outlineStyle")
    assert outline == "solid"
    upload(page, picture(tmp_path, "red"))
    answered(page, "a picture of red")
    press(page, Keys.TAB, Keys.ENTER, Keys.TAB)
    press(page, "a photo of", Keys.ENTER)
    answered(page, "a photo of")


def test_errors_are_told(page: webdriver.Chrome, tmp_path: Path) -> None:
    upload(page, picture(tmp_path, "red"))
    answered(page, "a picture of red")
    text = tmp_path / "<b>notes.txt"
    text.write_text("no picture")
    upload(page, text)
    answered(page, "<b>notes.txt is no picture.")
    assert page.find_elements(By.CSS_SELECTOR, "#answer b") == []
    assert not page.find_element(By.ID, "preview").is_displayed()
    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    upload(page, fake)
    assert "status 415" in answered(page, "this is no image")
    support.until(lambda: not page.find_element(By.ID, "preview").is_displayed())
    empty = tmp_path / "empty.png"
    empty.touch()
    upload(page, empty)
    answered(page, "the image is empty")


def test_a_service_that_is_gone(page: webdriver.Chrome, tmp_path: Path) -> None:
    page.set_network_conditions(offline=True, latency=0, throughput=1)
    try:
        upload(page, picture(tmp_path, "red"))
        answered(page, "cannot be reached")
    finally:
        page.delete_network_conditions()


def test_light_and_dark(page: webdriver.Chrome) -> None:
    def page_colour(scheme: str) -> str:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    assert (page_colour("light"), page_colour("dark")) == ("rgb(244, 245, 247)", "rgb(15, 18, 22)")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_loads_nothing_from_elsewhere(page: webdriver.Chrome, captions: Service) -> None:
    names = page.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in names if not name.startswith((captions.url, "data:", "blob:"))] == []


def test_the_page_asks_for_a_key(page: webdriver.Chrome, captions: Service, tmp_path: Path) -> None:
    page.execute_script("sessionStorage.clear()")
    page.refresh()
    upload(page, picture(tmp_path, "red"))
    answered(page, "asks for an API key")
    field = page.switch_to.active_element
    assert field.get_attribute("id") == "key"
    field.send_keys("wrong", Keys.ENTER)
    support.until(lambda: statuses(page) == [401, 401])
    answered(page, "asks for an API key")
    field.clear()
    field.send_keys(captions.key, Keys.ENTER)
    answered(page, "a picture of red")
    page.refresh()
    upload(page, picture(tmp_path, "blue"))
    answered(page, "a picture of blue")
