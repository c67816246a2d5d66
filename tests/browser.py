"""A headless Chromium for tests of pages: what the page logged, and what it asked the network for.

Tests open it once per module and skip where there is none:

    @pytest.fixture(scope="module")
    def browser() -> Iterator[Browser]:
        with headless() as opened:
            yield opened
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--force-device-scale-factor=1"),
)
_OWN = ("data:", "blob:", "about:", "chrome:", "chrome-extension:")
"""Schemes of what a browser makes or holds itself."""


class Browser:
    """An open browser.

    Attributes:
        driver: Selenium's, for finding elements, typing and clicking.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path | str) -> None:
        """Open a file or an address; what earlier pages logged is forgotten."""
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def run(self, script: str, *args: Any) -> Any:
        """Return what a script returns, `return document.title`; `arguments` holds `args`."""
        return self.driver.execute_script(script, *args)

    def errors(self) -> list[str]:
        """Return the errors and warnings that the console has shown since the last call."""
        logged = self.driver.get_log("browser")
        return [one["message"] for one in logged if one["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Return the addresses asked for since the last call, with the page's own."""
        events = [json.loads(one["message"]) for one in self.driver.get_log("performance")]
        sent = [e["message"] for e in events]
        urls = [
            e["params"]["request"]["url"] if "request" in e["params"] else e["params"]["url"]
            for e in sent
            if e["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")
        ]
        return [url for url in urls if not url.startswith(_OWN)]

    def screenshot(self, path: Path, width: int | None = None, height: int | None = None) -> Path:
        """Write a picture of the window, resized before where a size is given."""
        if width and height:
            self.driver.set_window_size(width, height)
        self.driver.save_screenshot(str(path))
        return path


@contextmanager
def headless(width: int = 1200, height: int = 900) -> Iterator[Browser]:
    """Open a headless Chromium; skip the test, with the reason, where that cannot be done."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("chromium or chromedriver is not installed")
    options = Options()
    options.binary_location = chromium
    for one in (*_OPTIONS, f"--window-size={width},{height}"):
        options.add_argument(one)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(chromedriver))
    driver.set_page_load_timeout(60)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
