"""A proxy in front of an S3 server that misbehaves on purpose: it loses answers, or says that it is busy."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REFUSAL = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>Not now.</Message></Error>"


@dataclass
class Faults:
    """What goes wrong with requests of `method` whose path holds `path`, and how often; `seen` counts them all."""

    method: str
    path: str
    lose_answers: int = 0
    """So many requests reach the server, but the connection closes before its answer comes back."""
    refusals: int = 0
    """So many requests never reach the server and are answered with `refusal`, a status and S3's code for it."""
    refusal: tuple[int, str] = (503, "SlowDown")
    seen: int = 0
    statuses: list[int] = field(default_factory=list)
    """Statuses of the server's answers, the lost ones included."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> str:
        """`lose`, `refuse` or `pass`, for the request at hand."""
        with self.lock:
            self.seen += 1
            if self.seen <= self.refusals:
                return "refuse"
            return "lose" if self.seen <= self.refusals + self.lose_answers else "pass"


@contextmanager
def fault_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Serve on a free loopback port what `endpoint` serves, with faults; yields the proxy's own endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(urlsplit(endpoint).netloc, faults))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(upstream: str, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            faulty = self.command == faults.method and faults.path in self.path
            fault = faults.next() if faulty else "pass"
            if fault == "refuse":
                status, code = faults.refusal
                return self.answer(status, {"Content-Type": "application/xml"}, REFUSAL.format(code=code).encode())
            status, headers, content = self.ask(body)
            if faulty:
                faults.statuses.append(status)
            if fault == "lose":
                self.close_connection = True
                return None
            return self.answer(status, headers, content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay

        def forwarded(self) -> dict[str, str]:
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
            return {**kept, "Connection": "close"}

        def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(upstream, timeout=30)
            connection.request(self.command, self.path, body, self.forwarded())
            response = connection.getresponse()
            content = response.read()
            connection.close()
            return response.status, dict(response.getheaders()), content

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            hop_by_hop = {"transfer-encoding", "connection", "content-length"}
            for name, value in headers.items():
                if name.lower() not in hop_by_hop:
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
