"""The page in a browser: keys, taking back, reload, two voters, and a server that goes away."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lit_rlft.kit.preferences import read_preferences
from lit_rlft.runs.lines import read_lines
from tests.browser import Browser, headless
from tests.voting.client import TOKEN, Voter, fixed, serving

pytestmark = pytest.mark.slow  # a browser takes seconds to start


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless(width=900, height=700) as opened:
        yield opened


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what a page does by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def press(browser: Browser, keys: str) -> None:
    """Press keys one after the other, as fast as the page takes them."""
    for key in keys:
        before = count(browser)
        browser.driver.find_element("tag name", "body").send_keys(key)
        until(lambda before=before: count(browser) != before)


def count(browser: Browser) -> str:
    """Return "3 of 6", once the page waits for a person or shows nothing more."""
    until(lambda: bool(browser.run("return !busy && document.getElementById('count').textContent")))
    return str(browser.run("return document.getElementById('count').textContent"))


def label(browser: Browser) -> str:
    return str(browser.run("return document.getElementById('label').textContent"))


def status(browser: Browser) -> str:
    return str(browser.run("return document.getElementById('status').textContent"))


def test_keys_undo_reload_and_the_end(browser: Browser, tmp_path: Path) -> None:
    with serving(fixed(tmp_path, 4)) as server:
        url = server.urls()[0]
        browser.open(url)
        assert count(browser) == "0 of 4" and label(browser) == "prompt 0"
        press(browser, "1")
        press(browser, "2")
        press(browser, " ")
        assert (count(browser), label(browser)) == ("3 of 4", "prompt 3")
        press(browser, "u")
        assert (count(browser), label(browser)) == ("2 of 4", "prompt 2")
        browser.driver.refresh()
        assert (count(browser), label(browser)) == ("2 of 4", "prompt 2")
        sizes = browser.run("return [...document.querySelectorAll('#samples img')].map(i => i.src)")
        assert len(sizes) == 2
        press(browser, "1")
        browser.driver.find_element("css selector", "#samples button:nth-child(2)").click()
        until(lambda: "All is answered" in status(browser))
        assert browser.run("return document.getElementById('tie').disabled") is True
        requests = browser.requests()
        assert requests and all(request.startswith(url.split(TOKEN)[0]) for request in requests)
        assert not browser.errors()
    lines = list(read_lines(tmp_path / "votes.jsonl"))
    assert len(lines) == len({line["question"] for line in lines}) == 4
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 4
    shown = browser.run("return document.documentElement.lang + '|' + document.title")
    assert shown == "en|lit-rlft vote"


def test_a_server_that_goes_away_loses_no_vote(browser: Browser, tmp_path: Path) -> None:
    with serving(fixed(tmp_path, 3)) as server:
        port = server.server_address[1]
        browser.open(server.urls()[0])
        press(browser, "1")
    browser.driver.find_element("tag name", "body").send_keys("2")
    until(lambda: "No connection" in status(browser))
    browser.driver.find_element("tag name", "body").send_keys("1")  # nothing else meanwhile
    with serving(fixed(tmp_path, 3), port):
        until(lambda: count(browser) == "2 of 3")
        press(browser, " ")
        assert count(browser) == "3 of 3"
    lines = list(read_lines(tmp_path / "votes.jsonl"))
    assert [line.get("tie", False) for line in lines] == [False, False, True]


def test_what_another_voter_answered_is_not_asked_again(browser: Browser, tmp_path: Path) -> None:
    ballot = fixed(tmp_path, 3)
    with serving(ballot) as server:
        browser.open(server.urls()[0])
        count(browser)
        other = Voter(server.server_address[1], "bo")
        first, second, third = ballot.source.known
        told = other.vote(first, 0)[1]
        assert told["question"]["id"] == second  # bo looks at it
        browser.driver.find_element("tag name", "body").send_keys("1")
        until(lambda: label(browser) == "prompt 2")
        assert count(browser) == "1 of 3" and "first vote counts" in status(browser)
        press(browser, "2")
        until(lambda: "Others look at the rest" in status(browser))
    lines = list(read_lines(tmp_path / "votes.jsonl"))
    assert [line["question"] for line in lines] == [first, third]
    assert lines[0]["voter"] == "bo" != lines[1]["voter"]


def test_groups_fit_a_phone_and_can_be_used_without_a_mouse(
    browser: Browser, tmp_path: Path
) -> None:
    with serving(fixed(tmp_path, 2, 4)) as server:
        browser.driver.set_window_size(390, 780)
        browser.open(server.urls()[0])
        count(browser)
        assert "Keys 1 to 4" in status(browser)
        inner, scroll = browser.run("return [innerWidth, document.documentElement.scrollWidth]")
        assert scroll <= inner
        tall = browser.run(
            "return Math.max(...[...document.querySelectorAll('button')].map(b => "
            "b.getBoundingClientRect().bottom))"
        )
        assert tall < 780
        names = browser.run(
            "return [...document.querySelectorAll('img')].map(i => i.alt).join('|')"
        )
        assert names == "|".join(f"Sample {i} of 4" for i in range(1, 5))
        body = browser.driver.find_element("tag name", "body")
        body.send_keys("9")  # there is no ninth
        body.send_keys("\t\t\n")  # the second sample by the keyboard alone
        until(lambda: count(browser) == "1 of 2")
        body.send_keys("4")
        until(lambda: count(browser) == "2 of 2")
        browser.driver.set_window_size(900, 700)
    assert len(list(read_lines(tmp_path / "votes.jsonl"))) == 6
