"""Servers on loopback whose answers can fail, stall or end early: plain http, and S3 (moto's)."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cpm_rcnn.remote import transfer

# Seconds that a stalled answer takes.
STALL = 0.8
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Server:
    """What a server has been asked, and how it will answer.

    Attributes:
        url: its address, without a slash at the end.
        files: the contents by path, of a server of plain http.
        faults: by path, what happens to the next requests: a status, ``stall``, ``truncate`` (the connection is closed
            before the end) or ``short`` (a complete answer with too few bytes).
        requests: method and path of each request, and the range of a ``GET``.
        ranges: whether it sends parts of files.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    ranges: bool = True
    lengths: bool = True

    def fault(self, path: str) -> int | str | None:
        return self.faults[path].pop(0) if self.faults.get(path) else None

    def asked(self, method: str, path: str = "") -> list[str]:
        """The ranges of the requests for files whose path ends in ``path``."""
        return [part for each, name, part in self.requests if each == method and name.endswith(path)]


@contextmanager
def http_server() -> Iterator[Server]:
    """A server of ``files`` by plain http."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            server.requests.append((self.command, path, self.headers.get("Range", "")))
            fault = server.fault(path) if self.command == "GET" else None
            if fault == "stall":
                time.sleep(STALL)
                return
            if isinstance(fault, int) or path not in server.files:
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            content, status = server.files[path], 200
            etag = f'"{hash(content):x}"'
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
            if part:
                content, status = content[int(part[1]) : int(part[2]) + 1], 206
            sent = content[: len(content) // 2] if fault in ("truncate", "short") else content
            self.send_response(status)
            self.send_header("ETag", etag)
            if server.lengths:
                self.send_header("Content-Length", str(len(sent if fault == "short" else content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(sent)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        server.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


@contextmanager
def s3_server() -> Iterator[Server]:
    """moto's server of S3; paths start with the bucket."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    server, moto = Server(), DomainDispatcherApplication(create_backend_app)

    class Handler(MotoRequestHandler):
        def log(self, *arguments: object) -> None:
            pass

    def application(environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        server.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        fault = server.fault(path) if method == "GET" else None
        if fault == "stall":
            time.sleep(STALL)
            fault = 500
        if isinstance(fault, int):
            start_response(f"{fault} fault", [("Content-Length", "0")])
            return [b""]
        if fault is None:
            return moto(environ, start_response)

        def start(status, headers, exc_info=None):
            if fault == "short":
                length = str(len(content) // 2)
                headers = [(name, length if name.lower() == "content-length" else value) for name, value in headers]
            return start_response(status, headers, exc_info)

        content = b""
        answers = []
        content = b"".join(moto(environ, lambda *arguments: answers.append(arguments)))
        start(*answers[0])
        return [content[: len(content) // 2]]

    listener = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()


def upload(server: Server, bucket: str, contents: dict[str, bytes]) -> None:
    """Put objects into a bucket of an S3 server, which is created."""
    import boto3

    client = boto3.client("s3", endpoint_url=server.url, aws_access_key_id="testing", aws_secret_access_key="testing")
    client.create_bucket(Bucket=bucket)
    for name, content in contents.items():
        client.put_object(Bucket=bucket, Key=name, Body=content)


def be_quick(monkeypatch) -> None:
    """Short waits between requests, in this process and those that it forks."""
    monkeypatch.setattr(transfer, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(transfer, "_file_systems", {})
