"""Debian's Chromium without a window, for the tests of pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver


@contextmanager
def chromium(profile: Path, *words: str) -> Iterator[webdriver.Chrome]:
    """A browser that knows nobody and calls nowhere by itself."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in (
        "--headless=new",
        "--no-sandbox",  # tests run as root
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--window-size=1200,1000",
        f"--user-data-dir={profile}",
        *words,
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Without our variables: it outlives the home of the test that starts it.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MDEPLOY_")}
    service = webdriver.ChromeService("/usr/bin/chromedriver", env={**clean, "HOME": str(profile)})
    with webdriver.Chrome(options, service) as driver:
        yield driver


def complaints(driver: webdriver.Chrome) -> list[str]:
    """What the page's console holds of errors; a request that the service refuses is none."""
    log: list[dict[str, str]] = driver.get_log("browser")  # type: ignore[no-untyped-call]
    severe = [entry["message"] for entry in log if entry["level"] == "SEVERE"]
    return [text for text in severe if "Failed to load resource" not in text]


def prefer(driver: webdriver.Chrome, scheme: str) -> None:
    """Light or dark; an empty word is the machine's own."""
    features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
