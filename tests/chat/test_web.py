"""`tools/chat.py --web`: the page in a real browser, and what the server gives and refuses."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import NAMES, Browser, find_browser
from tests.support.patience import PATIENCE_SECONDS
from tests.support.talker import TEMPLATE, make_talker

CHAT = Path(__file__).parents[2] / "tools" / "chat.py"
WATCH = """
window.lengths = new Set();
new MutationObserver(() => lengths.add(log.querySelector(".assistant")?.textContent.length)).observe(
  log, {subtree: true, childList: true, characterData: true}
)
"""
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """(address, port) of a running program. It ends on Ctrl-C with code 0 and without a word."""
    talker = make_talker(tmp_path_factory.mktemp("web") / "talker", TEMPLATE, positions=1024)
    words = [sys.executable, str(CHAT), "--checkpoint", str(talker), "--web", "--port", "0"]
    words += ["--max-new-tokens", "700", "--temperature", "0", "--system", "</template>&"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"talker answers at http://([\d.]+):(\d+)/ \(Ctrl-C ends\)\n", line)
            assert found, line
            yield found[1], int(found[2])
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
            assert (process.returncode, out, err) == (0, "", "")
        finally:
            process.kill()


def _request(
    site: tuple[str, int], method: str, path: str, body: Any = None, read: bool = True, **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*site, timeout=PATIENCE_SECONDS)
    content = body if isinstance(body, str | None) else json.dumps(body)
    usual = {"Content-Type": "application/json"} if content is not None else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, content, {**usual, **named})
    response = connection.getresponse()
    text = response.read().decode() if read else ""
    connection.close()
    return response.status, text


def _events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: ")]


def test_an_answer_is_a_stream_of_events(site: tuple[str, int]) -> None:
    status, text = _request(site, "POST", "/answer", HELLO)
    *pieces, end = _events(text)
    assert status == 200
    assert len(pieces) > 3 and all(set(piece) == {"piece"} for piece in pieces)
    assert end == {"end": "length"}
    assert sum(len(piece["piece"]) for piece in pieces) > 500
    long = {"messages": [{"role": "user", "content": f"question {number} " * 40} for number in range(9)]}
    assert "left_out" in _events(_request(site, "POST", "/answer", long)[1])[0]
    (refused,) = _events(_request(site, "POST", "/answer", {"messages": [{"role": "user", "content": "x" * 2000}]})[1])
    assert refused["error"].startswith("the message is too long")


def test_only_its_own_page_may_ask(site: tuple[str, int]) -> None:
    """Other hosts and origins (a page elsewhere that asks through the user's browser), other paths, other forms."""
    assert site[0] == "127.0.0.1"
    own = f"http://127.0.0.1:{site[1]}"
    assert _request(site, "POST", "/answer", HELLO, read=False, Origin=own)[0] == 200
    assert _request(site, "GET", "/", Host=f"localhost:{site[1]}")[0] == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert _request(site, "POST", "/answer", HELLO, **headers)[0] == 403
        assert _request(site, "GET", "/", **headers)[0] == 403
    assert _request(site, "POST", "/answer", HELLO, Content_Type="text/plain")[0] == 404
    assert _request(site, "GET", "/etc/passwd")[0] == 404
    for body in ("", "{", "[]", {"messages": 3}, {"messages": [{"role": "tool", "content": "x"}]}, "[" * 10**5):
        assert _request(site, "POST", "/answer", body)[0] == 400
    assert _request(site, "POST", "/answer", "x", Content_Length="99999999")[0] == 413
    assert _events(_request(site, "POST", "/answer", {"messages": []})[1]) == [
        {"error": "a conversation needs a message of the user"}
    ]


def test_who_leaves_does_not_keep_the_others_waiting(site: tuple[str, int]) -> None:
    for _ in range(3):
        connection = http.client.HTTPConnection(*site, timeout=PATIENCE_SECONDS)
        connection.request("POST", "/answer", json.dumps(HELLO), {"Content-Type": "application/json"})
        connection.close()
    assert _events(_request(site, "POST", "/answer", HELLO)[1])[-1] == {"end": "length"}


@pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
def test_the_page_in_a_browser(site: tuple[str, int], tmp_path: Path) -> None:
    """Typing, streaming, stopping, another turn, a new conversation; the model's text is never taken for HTML."""
    with Browser(tmp_path) as browser:
        browser.open(f"http://{site[0]}:{site[1]}/")
        assert browser.evaluate("document.querySelector('h1').textContent") == "talker"
        assert browser.evaluate("system") == "</template>&"
        browser.evaluate(WATCH)
        browser.type("<b>hello</b>")
        browser.press_enter()
        browser.wait("document.querySelector('.assistant:not(.writing)')")
        assert browser.evaluate("window.lengths.size") > 20  # it grew piece by piece
        assert browser.evaluate("document.querySelector('.user').textContent") == "<b>hello</b>"
        assert browser.evaluate("document.querySelector('.user b')") is None
        assert browser.evaluate("messages.map((message) => message.role)") == ["system", "user", "assistant"]
        browser.type("and then?")
        browser.click("#send")
        browser.wait("document.querySelectorAll('.assistant').length === 2")
        browser.wait("document.querySelectorAll('.assistant')[1].textContent.length > 2")
        browser.click("#stop")
        browser.wait("!document.querySelector('.writing') && !document.getElementById('send').hidden")
        assert browser.evaluate("document.querySelector('#log > :last-child').textContent") == "Stopped."
        assert browser.evaluate("messages[4].content.length < messages[2].content.length")
        browser.click("#reset")
        browser.wait("document.querySelectorAll('#log > *').length === 0")
        assert browser.evaluate("messages.length") == 1
        assert browser.picture().startswith(b"\x89PNG")
        assert browser.problems == []
