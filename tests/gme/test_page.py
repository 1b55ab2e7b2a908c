"""The page of a multimodal service: pictures stand beside lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests import browser
from tests.embed.served import Service
from tests.support import until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser.chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(chromium: webdriver.Chrome, gme: Service) -> webdriver.Chrome:
    chromium.get(gme.url + "/")
    until(lambda: chromium.find_element(By.ID, "drop").is_displayed())
    return chromium


def picture(directory: Path, colour: str) -> Path:
    path = directory / f"{colour}.png"
    Image.new("RGB", (120, 80), colour).save(path)
    return path


def answered(page: webdriver.Chrome, text: str) -> None:
    answer = page.find_element(By.ID, "answer")
    until(lambda: text in answer.text, 30, f"{text!r} on the page")


def test_pictures_join_the_lines(page: webdriver.Chrome, tmp_path: Path) -> None:
    page.find_element(By.ID, "lines").send_keys("a red square")
    page.find_element(By.ID, "query").send_keys("something red")
    page.find_element(By.ID, "file").send_keys(f"{picture(tmp_path, 'red')}\n{picture(tmp_path, 'blue')}")
    until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#pictures img")) == 2)
    page.find_element(By.ID, "compare").click()
    answered(page, "3 rows")
    cells = [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#map td")]
    assert len(cells) == 9 and cells[::4] == ["1.00"] * 3
    names = [image.get_attribute("alt") for image in page.find_elements(By.CSS_SELECTOR, "#map tbody th img")]
    assert names == ["red.png", "blue.png"]
    drawn = "return [...document.querySelectorAll('#map img')].every((image) => image.naturalWidth === 120)"
    until(lambda: page.execute_script(drawn))
    assert len(page.find_elements(By.CSS_SELECTOR, "#ranking img")) == 2
    page.find_element(By.CSS_SELECTOR, "#pictures button").click()
    page.find_element(By.ID, "compare").click()
    answered(page, "2 rows")
    assert browser.complaints(page) == []


def test_dropped_files(page: webdriver.Chrome, tmp_path: Path) -> None:
    drop = """const given = new DataTransfer();
      given.items.add(new File([new Uint8Array(arguments[0])], arguments[1], {type: arguments[2]}));
      document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true}))"""
    page.execute_script(drop, list(picture(tmp_path, "green").read_bytes()), "dropped.png", "image/png")
    until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#pictures img")) == 1)
    page.execute_script(drop, list(b"text"), "<b>notes.txt", "text/plain")
    answered(page, "<b>notes.txt is no PNG, JPEG or WebP picture.")
    page.execute_script(drop, list(b"no picture"), "fake.png", "image/png")
    until(lambda: len(page.find_elements(By.CSS_SELECTOR, "#pictures img")) == 2)
    page.find_element(By.ID, "compare").click()
    answered(page, "fake.png: ")
    assert page.find_element(By.ID, "answer").get_attribute("class") == "bad"
