"""A page for conversations, served from this machine only; answers are streamed as they are written.

The browser keeps the conversation and sends all of it with every question, so the page can be open several times. The
model answers one question at a time, in the thread that loaded it; others wait for their turn.

    GET  /        the page
    POST /answer  {"messages": [{"role": …, "content": …}, …]} -> server-sent events, each a JSON object:
                  {"piece": text} · {"left_out": n} · {"end": reason} · {"error": message}

An answer ends early when the browser closes the request. Every request must name this server as its host and, if it
says where it comes from, as its origin: pages of other sites can neither ask nor read.
"""

from __future__ import annotations

import html
import json
import queue
import secrets
import sys
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from megalite.chat.interrupt import on_interrupt
from megalite.chat.speaker import Speaker
from megalite.errors import UserError

ADDRESS = "127.0.0.1"
LARGEST_QUESTION = 4 << 20
_ROLES = ("system", "user", "assistant")
_POLL_SECONDS = 0.5
"""How often a thread that has nothing to send looks whether the browser is still there."""


@dataclass
class Question:
    """A conversation that waits for its answer, and the events of the answer; None ends them."""

    messages: list[dict[str, str]]
    events: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)


class Site(ThreadingHTTPServer):
    """Takes questions; whoever runs the model takes them out of `questions`."""

    daemon_threads = True

    def __init__(self, name: str, system: str, port: int) -> None:
        self.questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()  # a signal may put something
        self.current: Question | None = None
        """The one that is being answered."""
        self.ending = False
        text = resources.files("megalite.chat").joinpath("page.html").read_text(encoding="utf-8")
        self.page = text.replace("{{ name }}", html.escape(name)).replace("{{ system }}", html.escape(system))
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port} cannot be used ({error.strerror}); give another, or 0") from None
        port = self.server_address[1]
        self.names = {f"{host}:{port}" for host in (ADDRESS, "localhost")}
        self.url = f"http://{ADDRESS}:{port}/"

    def end(self) -> None:
        """End the answer that is being written, and then the program."""
        self.ending = True
        if self.current is not None:
            self.current.stop.set()
        self.questions.put(None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Site
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if not self._from_here():
            return
        if self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is only /")
            return
        nonce = secrets.token_urlsafe(16)
        content = self.server.page.replace("{{ nonce }}", nonce).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        policy = f"default-src 'none'; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        self.send_header("Content-Security-Policy", f"{policy}; frame-ancestors 'none'; base-uri 'none'")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        if not self._from_here():
            return
        if self.path != "/answer" or self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.NOT_FOUND, "there is only /answer, for application/json")
            return
        messages = self._messages()
        if messages is not None:
            self._stream(Question(messages))

    def _stream(self, question: Question) -> None:
        """Send the events of an answer; each ends with an empty line, and a line with a colon says nothing."""
        self.server.questions.put(question)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.close_connection = True
        try:
            self.end_headers()
            while True:
                try:
                    event = question.events.get(timeout=_POLL_SECONDS)
                    if event is None:
                        return
                    line = f"data: {json.dumps(event)}\n\n"
                except queue.Empty:
                    line = ":\n\n"
                self.wfile.write(line.encode())
                self.wfile.flush()
        finally:
            question.stop.set()

    def _messages(self) -> list[dict[str, str]] | None:
        """The body's messages; None where it was refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or not int(length) <= LARGEST_QUESTION:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a conversation has at most {LARGEST_QUESTION} bytes")
            return None
        try:
            value = json.loads(self.rfile.read(int(length)))
            return [_message(entry) for entry in value["messages"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            self._refuse(HTTPStatus.BAD_REQUEST, 'not of the form {"messages": [{"role": …, "content": …}]}')
            return None

    def _from_here(self) -> bool:
        """Whether the page that asks is ours; refuses the others."""
        origin = self.headers.get("Origin")
        same = origin is None or origin.removeprefix("http://") in self.server.names
        if self.headers.get("Host") in self.server.names and same:
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"this server is {self.server.url}")
        return False

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        content = f"{reason}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal belongs to the user."""


def _message(entry: Any) -> dict[str, str]:
    if entry["role"] not in _ROLES or not isinstance(entry["content"], str):
        raise ValueError(entry)
    return {"role": entry["role"], "content": entry["content"]}


def serve(speaker: Speaker, name: str, system: str, port: int) -> None:
    """Rank 0: answer what the page asks until Ctrl-C."""
    with Site(name, system, port) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        print(f"{name} answers at {site.url} (Ctrl-C ends)", flush=True)
        with on_interrupt(site.end):
            while (question := speaker.waiting(site.questions.get)) is not None:
                site.current = question
                _answer(speaker, question, site.ending)
        site.shutdown()


def _answer(speaker: Speaker, question: Question, ending: bool) -> None:
    try:
        if question.stop.is_set() or ending:  # nobody waits any longer
            return
        prompt = speaker.prompt(question.messages)
        if prompt.left_out:
            question.events.put({"left_out": prompt.left_out})
        completion = speaker.answer(prompt, lambda piece: question.events.put({"piece": piece}), question.stop)
        question.events.put({"end": completion.reason})
    except UserError as error:
        question.events.put({"error": str(error)})
    finally:
        question.events.put(None)
