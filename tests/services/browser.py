"""A headless Chromium that reads pages and clicks on what it finds there, as a person does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.services.servers import program

# A page of MLflow stands after two seconds on an idle machine; one with other work needs far more.
_PATIENCE = 180.0

_ASSISTANT = "//button[@data-component-id='mlflow.assistant.chat_panel.close']"
_CLOSE = f"//*[@role='dialog']//button[@aria-label='Close'] | {_ASSISTANT}"

_T = TypeVar("_T")


class Browser:
    """One window after the other; what opens in a new one is followed there."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Go to an address. (Between two addresses that differ after # only, a page would stay.)"""
        self.driver.get("about:blank")
        self.driver.get(url)

    @property
    def address(self) -> str:
        """Of the page."""
        return self.driver.current_url

    def text(self) -> str:
        """All that can be read on the page, open shadows not included."""
        return self.driver.find_element(By.TAG_NAME, "body").text

    def await_text(self, *texts: str) -> str:
        """Wait until all of these can be read; the page's text."""

        def there() -> str | None:
            page = self.text()
            if all(text in page for text in texts):
                return page
            self._unfold()
            return None

        return self._await(there, f"no {texts} on {self.address}")

    def click_link(self, text: str, part_of_address: str = "") -> None:
        """Click on the link of that text, and be on the page that it leads to.

        Args:
            part_of_address: tells it from other links of the same text.
        """
        before, windows = self.address, len(self.driver.window_handles)

        def click() -> bool:
            for link in self.driver.find_elements(By.LINK_TEXT, text):
                if part_of_address in (link.get_attribute("href") or "") and self._clicked(link):
                    return True
            self._unfold()
            return False

        self._await(click, f"no link {text!r} on {before}")

        def gone() -> bool:
            if len(self.driver.window_handles) > windows:
                self.driver.switch_to.window(self.driver.window_handles[-1])
            return self.address not in (before, "about:blank")

        self._await(gone, f"the link {text!r} leads nowhere from {before}")

    def click(self, xpath: str) -> None:
        """Click on the first thing found there that can be clicked on."""

        def click() -> bool:
            return any(self._clicked(e) for e in self.driver.find_elements(By.XPATH, xpath))

        self._await(click, f"nothing to click at {xpath} on {self.address}")

    def fill(self, xpath: str, text: str) -> None:
        """Put `text` into a field in place of what it holds."""

        def filled() -> bool:
            field = self.driver.find_element(By.XPATH, xpath)
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text)
            return field.get_attribute("value") == text

        self._await(filled, f"no field at {xpath} on {self.address}")

    def _clicked(self, element: WebElement) -> bool:
        try:
            self.driver.execute_script(
                "arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element
            )
            element.click()
        except ElementClickInterceptedException:
            self.close_dialogs()
            return False
        except ElementNotInteractableException:
            return False
        return True

    def close_dialogs(self) -> None:
        """Close what lies over the page, such as MLflow's praise of itself."""
        self._close(_CLOSE)

    def close_assistant(self) -> None:
        """Close the panel of MLflow's assistant, which takes a third of the page."""
        self._close(_ASSISTANT)

    def _close(self, xpath: str) -> None:
        for close in self.driver.find_elements(By.XPATH, xpath):
            with contextlib.suppress(
                ElementClickInterceptedException, ElementNotInteractableException
            ):
                close.click()

    def _unfold(self) -> None:
        """MLflow folds long descriptions."""
        for more in self.driver.find_elements(By.XPATH, "//*[text()='Show more']"):
            self._clicked(more)

    def unfold(self) -> None:
        """Open what is folded on the page."""
        with contextlib.suppress(StaleElementReferenceException):
            self._unfold()

    def element(self, xpath: str) -> WebElement:
        """The first element there, waited for."""
        return self._await(
            lambda: next(iter(self.driver.find_elements(By.XPATH, xpath)), None),
            f"nothing at {xpath} on {self.address}",
        )

    def picture(self, path: Path) -> None:
        """Keep what is seen as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(path))

    def _await(self, ask: Callable[[], _T | None], what: str) -> _T:
        end = time.monotonic() + _PATIENCE
        while True:
            # Pages draw themselves again while they are read.
            with contextlib.suppress(StaleElementReferenceException, NoSuchElementException):
                if answer := ask():
                    return answer
            assert time.monotonic() < end, f"{what}; it says:\n{self.text()[:3000]}"
            time.sleep(0.1)


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in `folder`, ended with the block.

    Raises:
        ServerMissing: when Chromium or its driver is not installed.
    """
    folder.mkdir(exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium")
    words = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    words += ["--window-size=1500,1000", "--disable-background-networking", "--no-first-run"]
    for word in [*words, f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(word)
    service = Service(program("chromedriver", "chromium-driver"), log_output=str(folder / "log"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(_PATIENCE)
        yield Browser(driver)
    finally:
        driver.quit()
