"""A real HTTP server that answers what the test says and remembers what it was asked; and the CLI, run in-process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

import rostra
from rostra.cli.main import main


class Asked(NamedTuple):
    method: str
    path: str  # unescaped
    query: dict[str, str]
    body: bytes
    headers: dict[str, str]
    target: str  # as sent

    def json(self) -> Any:
        return json.loads(self.body)


class Agent:
    """`answers[method, path]` is (status, body); a body that is not bytes is sent as JSON."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {}
        self.asked: list[Asked] = []
        self.headers: dict[str, str] = {}  # of every answer
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                query = dict(parse_qsl(parts.query, keep_blank_values=True))
                asked = Asked(self.command, unquote(parts.path), query, body, dict(self.headers), self.path)
                agent.asked.append(asked)
                status, answer = agent.answers.get((asked.method, asked.path), (404, b"not found"))
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in agent.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def on(self, method: str, path: str, answer: Any, status: int = 200) -> None:
        self.answers[method, path] = (status, answer)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    agent = Agent()
    thread = threading.Thread(target=agent.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("CONSUL_HTTP_ADDR", agent.address)
    yield agent
    agent.server.shutdown()
    agent.server.server_close()
    thread.join()


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def rostra_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the CLI with these words, in this process."""

    def run(*words: str) -> Done:
        status = main(list(words))
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return run


@pytest.fixture
def child_environment() -> dict[str, str]:
    """For CLI processes: imports work whether or not the package is installed."""
    source = str(Path(rostra.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": source}


@pytest.fixture
def rostra_process(child_environment: dict[str, str]) -> Callable[..., "subprocess.Popen[bytes]"]:
    def start(*words: str, **options: Any) -> "subprocess.Popen[bytes]":
        code = "import sys; from rostra.cli.main import main; sys.exit(main())"
        env = {**options.pop("env", os.environ), "PYTHONPATH": child_environment["PYTHONPATH"]}
        return subprocess.Popen([sys.executable, "-c", code, *words], env=env, **options)

    return start
