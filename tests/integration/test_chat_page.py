"""The chat page in a real browser, behind the real guard, in front of a server that stands for the
model."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import uvicorn

pytest.importorskip("selenium", reason="selenium is not installed")

from model_server import ModelServer
from queue_page import BROWSER, DRIVER, browser, enter, size, until
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from manta.serving.access import key_store, keys, usage
from manta.serving.guard.guard import Guard
from manta.serving.guard.limiter import LocalLimiter
from manta.spec.guard import GuardConfig, Limits

pytestmark = pytest.mark.skipif(
    not (BROWSER.exists() and DRIVER.exists()), reason="no chromium with its chromedriver here"
)

ODD = '<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> &amp; **bold**'
VISITS = itertools.count()
IN_TIME_S = 15


class Site:
    """The model with its guard on a port of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = str(root), ModelServer("hello , how are you")
        self.model.models = ["m", "other"]
        config = GuardConfig(chat_page=True)
        table, ledger = key_store.KeyTable(self.root), usage.Ledger(self.root, {})
        self.guard = Guard(self.model.app, config, table, LocalLimiter("replica"), ledger)
        self.key = self.make()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}/llm/chat"
        quick = {"log_level": "error", "timeout_graceful_shutdown": 1, "interface": "asgi3"}
        self.server = uvicorn.Server(uvicorn.Config(self.prefixed, port=port, **quick))  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    async def prefixed(self, scope: Any, receive: Any, send: Any) -> None:
        """As Serve asks an application with a route prefix."""
        await self.guard({**scope, "root_path": "/llm"}, receive, send)

    def make(self, limits: Limits | None = None) -> str:
        """A new key."""
        key, secret = keys.make(name="a", owner="me", now=time.time(), limits=limits)
        key_store.save(self.root, key)
        return secret

    def stop(self) -> None:
        """Be gone."""
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    served = Site(tmp_path_factory.mktemp("chat"))
    yield served
    served.stop()


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chrome: Chrome, site: Site) -> Iterator[Chrome]:
    """The page, opened with the key; what the browser complained of fails the test."""
    site.model.words, site.model.pause_s, site.model.fault = "hello , how are you", 0.0, None
    site.model.asked.clear()
    size(chrome, 1240, 900)
    if not chrome.current_url.startswith(site.url):
        chrome.get(site.url)
    chrome.execute_script("sessionStorage.setItem('manta-api-key', arguments[0])", site.key)
    chrome.get(f"{site.url}?{next(VISITS)}")  # another address: loads anew
    wait(chrome, lambda: element(chrome, "text").is_displayed())
    chrome.get_log("browser")
    yield chrome
    complaints = [line["message"] for line in chrome.get_log("browser")]
    answers = ("net::ERR_", "responded with a status of 4")  # written down whatever the page does
    assert [line for line in complaints if not any(word in line for word in answers)] == []
    assert chrome.execute_script("return window.hacked") is None


def element(page: Chrome, name: str) -> object:
    return page.find_element(By.ID, name)


def wait(page: Chrome, holds: Callable[[], object]) -> None:
    WebDriverWait(page, IN_TIME_S, 0.1).until(lambda _: holds())


def say(page: Chrome, text: str) -> None:
    page.find_element(By.ID, "text").send_keys(text)
    page.find_element(By.ID, "send").click()


def said(page: Chrome) -> list[str]:
    return [one.text.strip() for one in page.find_elements(By.CSS_SELECTOR, "#log .said")]


def ended(page: Chrome) -> None:
    wait(page, lambda: page.find_element(By.ID, "send").is_displayed())


def warning(page: Chrome) -> str:
    return page.find_element(By.ID, "alert").text


def test_its_files_need_no_key_are_strict_and_are_all_that_is_open(site: Site) -> None:
    base = site.url.removesuffix("/chat")
    for path in ("/chat", "/chat/main.js", "/chat/api.js", "/chat/style.css", "/chat/icon.svg"):
        with urlopen(base + path) as answer:
            assert answer.status == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
    others = (
        "/chat/",
        "/chat/index.html",
        "/chat/../guard.py",
        "/chat/%2e%2e/guard.py",
        "/v1/models",
    )
    for path in others:
        with pytest.raises(HTTPError, match="401"):
            urlopen(base + path)
    with pytest.raises(HTTPError, match="401"):
        urlopen(Request(base + "/chat", method="POST", data=b""))


def test_a_wrong_key_is_refused_in_words_and_the_right_one_opens_and_can_be_forgotten(
    chrome: Chrome, site: Site
) -> None:
    chrome.get(site.url)
    chrome.execute_script("sessionStorage.clear()")
    enter(chrome, site.url, "manta_wrong")
    wait(chrome, lambda: "not known" in chrome.find_element(By.ID, "key-error").text)
    enter(chrome, site.url, site.key)
    wait(chrome, lambda: chrome.find_element(By.ID, "text").is_displayed())
    names = [o.text for o in chrome.find_elements(By.CSS_SELECTOR, "#model option")]
    assert names == ["m", "other"]
    stores = "return [JSON.stringify({...localStorage}), document.cookie, location.href].join()"
    assert site.key not in chrome.execute_script(stores)
    chrome.find_element(By.ID, "forget").click()
    wait(chrome, lambda: chrome.find_element(By.ID, "key").is_displayed())
    assert chrome.execute_script("return sessionStorage.length") == 0
    assert not chrome.find_element(By.ID, "chat").is_displayed()


def test_a_conversation_sends_what_was_said_before_and_the_settings(
    page: Chrome, site: Site
) -> None:
    page.find_element(By.CSS_SELECTOR, "summary").click()
    page.find_element(By.ID, "system").send_keys("You are a pirate.")
    page.find_element(By.CSS_SELECTOR, "#model option:nth-child(2)").click()
    page.execute_script("document.getElementById('temperature').value = '0.2'")
    say(page, "who are you?")
    ended(page)
    assert said(page) == ["who are you?", "hello , how are you 1"]
    page.find_element(By.ID, "text").send_keys(
        "and\ue008\ue007\ue000now?\ue007"
    )  # shift+enter, enter
    wait(page, lambda: len(said(page)) == 4)
    ended(page)
    first, second = site.model.asked
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][-1]["content"] == "and\nnow?"
    assert second["messages"][:2] == first["messages"]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("other", 0.2, 512)
    notes = [one.text for one in page.find_elements(By.CSS_SELECTOR, "#log .note")]
    assert all("7 + 6 tokens" in one and "first after" in one for one in notes)
    page.find_element(By.ID, "anew").click()
    assert said(page) == []


def test_words_appear_as_they_come_and_stop_ends_the_answer_at_the_model(
    page: Chrome, site: Site
) -> None:
    site.model.words, site.model.pause_s = "word " * 400, 0.1
    say(page, "tell me everything")
    wait(page, lambda: said(page)[-1].count("word") >= 3)
    assert not page.find_element(By.ID, "send").is_displayed()
    page.find_element(By.ID, "stop").click()
    ended(page)
    until(lambda: site.model.num_running == 0)
    assert 3 <= said(page)[-1].count("word") < 300
    assert page.find_element(By.CSS_SELECTOR, "#log .note").text == "stopped"
    site.model.words, site.model.pause_s = "done", 0
    say(page, "go on")
    wait(page, lambda: "done" in said(page)[-1])
    assert [m["role"] for m in site.model.asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_what_a_model_says_is_text_whatever_it_says(page: Chrome, site: Site) -> None:
    site.model.words = ODD
    say(page, ODD)
    ended(page)
    assert said(page) == [ODD, f"{ODD} 1"]
    assert page.find_elements(By.CSS_SELECTOR, "#log img, #log script") == []


@pytest.mark.parametrize(("fault", "words"), [("event", "engine is gone"), ("cut", "")])
def test_an_answer_that_breaks_off_says_so_and_the_next_one_is_asked_without_a_gap(
    page: Chrome, site: Site, fault: str, words: str
) -> None:
    site.model.fault, site.model.words = fault, ""
    say(page, "hello")
    wait(page, lambda: warning(page) != "")
    assert words in warning(page)
    site.model.fault = None
    say(page, "again")
    wait(page, lambda: len(said(page)) == 4)
    ended(page)
    assert warning(page) == ""


def test_a_key_that_is_over_its_limit_or_revoked_is_told_so(page: Chrome, site: Site) -> None:
    site.model.words = "ok"
    secret = site.make(Limits(requests_per_min=1))
    site.guard._table.refresh()
    page.execute_script("sessionStorage.setItem('manta-api-key', arguments[0])", secret)
    for _ in range(2):
        say(page, "hello")
        ended(page)
    assert "1 requests per minute" in warning(page)
    assert page.find_element(By.ID, "text").get_property("value") == "hello", "not lost"
    key_store.revoke(site.root, secret.split("_")[1], 0, "me")
    site.guard._table.refresh()
    page.find_element(By.ID, "send").click()
    wait(page, lambda: "revoked" in page.find_element(By.ID, "key-error").text)


@pytest.mark.parametrize(("width", "height"), [(360, 640), (768, 1024)])
def test_on_a_phone_nothing_is_cut_off(page: Chrome, site: Site, width: int, height: int) -> None:
    size(page, width, height)
    site.model.words = "a-very-long-word-" * 40
    say(page, "x" * 300)
    ended(page)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.find_element(By.ID, "send").is_displayed()


def test_in_the_dark_it_is_dark_and_every_field_has_a_name(page: Chrome, site: Site) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(16, 21, 27)"
    light = [{"name": "prefers-color-scheme", "value": "light"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
    nameless = """return [...document.querySelectorAll('input, select, textarea')]
        .filter((field) => !field.labels.length).map((field) => field.id)"""
    assert page.execute_script(nameless) == []
