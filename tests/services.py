"""Services of other people: working, failing, refusing, hanging, dripping ones, on real ports."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def refused() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@contextmanager
def listening() -> Iterator[socket.socket]:
    """A socket that listens; a thread that waits for its next connection is told when it ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            yield server
        finally:
            server.shutdown(socket.SHUT_RDWR)


@contextmanager
def hanging() -> Iterator[str]:
    """Connections are accepted by the kernel; no byte ever comes back."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def dripping(gap_s: float = 0.05) -> Iterator[str]:
    """A header byte every `gap_s`, for ever: no single wait is long."""
    stop = threading.Event()
    with listening() as server:

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=drip, args=(connection,), daemon=True).start()

        def drip(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
                    while not stop.wait(gap_s):
                        connection.sendall(b"x")
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        stop.set()


class Scripted:
    """A service that answers each POST with the next of `answers` (status, body, headers), the last for ever."""

    def __init__(self, *answers: tuple[int, bytes, dict[str, str]]) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, bytes, dict[str, str]]] = []


@contextmanager
def scripted(service: Scripted) -> Iterator[str]:
    """It, on a port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            service.requests.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
            answer = service.answers[0] if len(service.answers) == 1 else service.answers.pop(0)
            status, content, headers = answer
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Mailbox:
    """What an SMTP server was given; it answers RCPT with `refuse` where that is set."""

    def __init__(self, refuse: str | None = None) -> None:
        self.refuse = refuse
        self.messages: list[str] = []
        self.commands: list[str] = []


@contextmanager
def smtp(mailbox: Mailbox) -> Iterator[int]:
    """A plain SMTP server (RFC 5321, one connection at a time), on a port."""

    def talk(connection: socket.socket) -> None:
        stream = connection.makefile("rwb")

        def say(line: str) -> None:
            stream.write(line.encode() + b"\r\n")
            stream.flush()

        say("220 here")
        for raw in stream:
            line = raw.decode().rstrip()
            mailbox.commands.append(line)
            verb = line.split(" ")[0].upper()
            if verb == "DATA":
                say("354 go on")
                message = b""
                for part in stream:
                    if part == b".\r\n":
                        break
                    message += part
                mailbox.messages.append(message.decode())
                say("250 taken")
            elif verb == "QUIT":
                say("221 bye")
                return
            elif verb == "RCPT" and mailbox.refuse:
                say(mailbox.refuse)
            else:
                say("250 ok")

    with listening() as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    talk(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
