"""The page on which people rate, in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from posttrain.preferences.filled import read_ratings, votes_of
from posttrain.preferences.key import Key, read_key
from tests.unit.preferences.sheets_made import good, make_sheets

pytestmark = [
    pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")
    for name in ("chromium", "chromedriver")
]

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> good\n  <b>&amp;</b>\u2028`${1}`"


class Browser:
    """As much of WebDriver as these tests need (W3C, WebDriver 2)."""

    def __init__(self, port: str, profile: Path, downloads: Path) -> None:
        self._root = f"http://127.0.0.1:{port}"
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        options = {
            "binary": shutil.which("chromium"),
            "args": arguments,
            "prefs": {"download.default_directory": str(downloads)},
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = f"/session/{self._call('POST', '/session', wanted)['sessionId']}"

    def open(self, page: Path) -> None:
        self._call("POST", f"{self._session}/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        body = {"script": f"return ({script})", "args": []}
        return self._call("POST", f"{self._session}/execute/sync", body)

    def press(self, *keys: str) -> None:
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": presses}]
        self._call("POST", f"{self._session}/actions", {"actions": actions})

    def prefer(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self._call("POST", f"{self._session}/goog/cdp/execute", command)

    def quit(self) -> None:
        self._call("DELETE", self._session)

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    (tmp_path / "downloads").mkdir()
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert driver.stdout is not None
    try:
        said = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)
        port = next(match.group(1) for match in said if match)
        opened = Browser(port, tmp_path / "profile", tmp_path / "downloads")
        try:
            yield opened
        finally:
            opened.quit()
    finally:
        driver.terminate()
        driver.wait(30)
        driver.stdout.close()


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Four items, one of them hostile."""
    rows = [
        {"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(3)
    ]
    rows += [{"prompt": HOSTILE, "chosen": f"good {HOSTILE}", "rejected": f"bad {HOSTILE}"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_sheets(tmp_path / "out", path, "html", raters=1)
    return tmp_path / "out" / "sheets" / "rater-1.html"


def text(browser: Browser, name: str) -> str:
    return str(browser.run(f"document.getElementById('{name}').textContent"))


def downloaded(folder: Path) -> Path:
    """The file, once the browser has given it its name."""
    end = monotonic() + 20
    while monotonic() < end:
        if done := list(folder.glob("*.csv")):
            return done[0]
        sleep(0.05)
    raise AssertionError(f"nothing came into {folder}: {list(folder.iterdir())}")


def better(browser: Browser) -> str:
    """A or B, by what stands there."""
    return "A" if text(browser, "text-A").startswith("good") else "B"


def test_people_rate_leave_come_back_and_download(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    key = read_key(tmp_path / "out")
    browser.open(page)
    assert text(browser, "count") == "0 of 4 rated"
    browser.press(better(browser).lower())
    assert text(browser, "where") == "Item 2 of 4"
    browser.run(f"document.querySelector('[data-choice={better(browser)}]').click()")
    browser.run("document.getElementById('note').focus()")
    browser.press("=", "b", "t")
    assert text(browser, "where") == "Item 3 of 4", "keys in the note are text"

    browser.open(page)
    assert text(browser, "count") == "2 of 4 rated"
    assert text(browser, "where") == "Item 3 of 4"
    note = browser.run("document.getElementById('note').value")
    assert note == "=bt"
    browser.press({"A": "1", "B": "2"}[better(browser)])
    browser.press("s")
    assert text(browser, "end-head") == "All items are rated"
    browser.press("\ue012")  # the left arrow
    assert browser.run("document.querySelector('[aria-pressed=true]').dataset.choice") == "skip"

    browser.run("document.getElementById('download').click()")
    file = downloaded(tmp_path / "downloads")
    assert file.name == f"{key.sheets}-rater-1.csv"
    assert "'=bt" in file.read_text("utf-8-sig")
    check_votes(file, key)


def check_votes(file: Path, key: Key) -> None:
    ratings = read_ratings([file], key)
    names = list(key.orders["rater-1"])
    assert [rating.item for rating in ratings] == names
    assert ratings[-1].choice == "skip"
    assert votes_of(ratings, key) == {"rater-1": {n: good(key.items[n]) for n in names[:-1]}}


def test_text_is_shown_as_it_is_and_runs_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    seen = set()
    for _ in range(4):
        seen |= {text(browser, name) for name in ("prompt", "text-A", "text-B")}
        browser.press("\ue014")  # the right arrow
    assert {HOSTILE, f"good {HOSTILE}", f"bad {HOSTILE}"} <= seen
    assert text(browser, "end-head") == "The last item is behind you"
    assert str(browser.run("document.title")).startswith("Which answer is better?")
    assert browser.run("document.images.length") == 0


def test_what_can_be_pressed_has_a_name_and_the_colours_can_be_read(
    browser: Browser, page: Path
) -> None:
    browser.open(page)
    names = browser.run(
        "[...document.querySelectorAll('button, input')].filter(e => e.offsetParent)"
        ".map(e => (e.labels?.[0] || e).textContent.trim())"
    )
    assert len(names) == 8
    assert all(names)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.press("t", "\ue012")  # back to a choice that was made
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        for element in ("body", ".count", "#back:enabled, #next", ".answer", "[aria-pressed=true]"):
            ratio = browser.run(CONTRAST % json.dumps(element))
            assert ratio >= 4.5, (scheme, element, ratio)


CONTRAST = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const own = getComputedStyle(document.querySelector(%s));
  const clear = own.backgroundColor === "rgba(0, 0, 0, 0)";
  const behind = clear ? getComputedStyle(document.body).backgroundColor : own.backgroundColor;
  const [dark, bright] = [light(own.color), light(behind)].sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
})()"""
"""The contrast of an element's text: WCAG 2.2, success criterion 1.4.3, asks for 4.5."""
