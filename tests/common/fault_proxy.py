"""A proxy in front of an S3 server that misbehaves on purpose: see `Kind` for the ways."""

import http.client
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.common.faults import OF_ANSWERS, Fault, Faults, Kind, Request
from tests.s3_server import ADMIN

REFUSAL = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>Not now.</Message></Error>"
HOP_BY_HOP = {"transfer-encoding", "connection", "content-length"}


@dataclass(frozen=True)
class Answer:
    """What a client is told; `length` is what Content-Length promises."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    length: int


class _Server(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exc_info()[1], ConnectionError
        ):  # a client that was killed, or waits no longer, is no news
            super().handle_error(request, client_address)


@contextmanager
def fault_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """Serve on a free loopback port what `endpoint` serves, with faults; yields the proxy's own endpoint.

    At the end of the context a request that is still stalled is dropped, and never reaches the server.
    """
    closing = threading.Event()
    server = _Server(("127.0.0.1", 0), partial(_Handler, urlsplit(endpoint).netloc, faults, closing))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Relays one connection's requests to `upstream`, with what goes wrong on the way."""

    protocol_version = "HTTP/1.1"
    status: int | None = None  # of the server's answer to the request at hand

    def __init__(self, upstream: str, faults: Faults, closing: threading.Event, *connection: Any) -> None:
        self.upstream, self.faults, self.closing = upstream, faults, closing
        super().__init__(*connection)  # which serves the connection to its end

    def relay(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        self.status = None
        if len(body) < size:
            raise ConnectionResetError("the client died while it sent")
        fault = self.faults.choose(self.command, self.path)
        answer = self.fail(fault, body) if fault else self.ask(body)
        self.faults.requests.append(Request(self.command, self.path, self.status, fault.kind if fault else None))
        if answer is None:
            self.close_connection = True
        else:
            self.send(answer)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = relay

    def fail(self, fault: Fault, body: bytes) -> Answer | None:
        """The answer as the fault leaves it; None for none."""
        if fault.kind not in OF_ANSWERS:
            self.faults.count(fault)
        if fault.kind == Kind.DROP or (fault.kind == Kind.STALL and self.closing.wait(fault.seconds)):
            return None
        if fault.kind == Kind.REFUSE:
            return _refusal(fault)
        body = self.faults.flipped(body) if fault.kind == Kind.ALTER else body
        answer = self.ask(body, forget=fault.kind == Kind.FORGET)
        if fault.kind == Kind.LOSE or (fault.kind == Kind.HANG and self.closing.wait(fault.seconds)):
            return None
        if fault.kind in OF_ANSWERS and answer.status in (200, 206) and answer.body:
            self.faults.count(fault)
            return _spoilt(answer, fault, self.faults)
        return answer

    def ask(self, body: bytes, forget: bool = False) -> Answer:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        if forget:
            headers = _signed_anew(self.command, f"http://{headers['Host']}{self.path}", headers, body)
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        connection.request(self.command, self.path, body, {**headers, "Connection": "close"})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        self.status = response.status
        given = dict(response.getheaders())
        return Answer(response.status, given, content, int(given.get("Content-Length", len(content))))

    def send(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body)
        if len(answer.body) < answer.length:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def _refusal(fault: Fault) -> Answer:
    body = REFUSAL.format(code=fault.code).encode()
    return Answer(fault.status, {"Content-Type": "application/xml"}, body, len(body))


def _spoilt(answer: Answer, fault: Fault, faults: Faults) -> Answer:
    kept = {
        name: value
        for name, value in answer.headers.items()
        if fault.checksums or not name.lower().startswith("x-amz-checksum")
    }
    half = answer.body[: len(answer.body) // 2]
    if fault.kind == Kind.CUT:
        return Answer(answer.status, kept, half, len(answer.body))
    if fault.kind == Kind.SHORTEN:
        return Answer(answer.status, kept, half, len(half))
    return Answer(answer.status, kept, faults.flipped(answer.body), len(answer.body))


def _signed_anew(method: str, url: str, headers: Mapping[str, str], body: bytes) -> dict[str, str]:
    """The headers without `If-None-Match`, which the signature covered."""
    kept = {name: value for name, value in headers.items() if name.lower() not in ("if-none-match", "authorization")}
    request = AWSRequest(method, url, headers=kept, data=body)
    S3SigV4Auth(Credentials(*ADMIN), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())
