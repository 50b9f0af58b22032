"""A store that speaks S3, on this machine alone: moto's server, behind a door that counts requests and can be shut for some."""

import contextlib
import http.client
import os
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from servers import Program, free_port

BUCKET = "zoos"
# Variables of the machine that would lead elsewhere.
NOT_OURS = ("AWS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


class Door(ThreadingHTTPServer):
    """Hands requests on to the store, but for those that `is_shut` names: they get a 503."""

    daemon_threads = True

    def __init__(self, port: int):
        self.store_port = port
        self.is_shut = lambda method, path: False
        self.requests: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def count(self, method: str, part: str) -> int:
        return sum(one == method and part in path for one, path in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path))
        if self.server.is_shut(self.command, self.path):
            status, headers, reply = 503, {}, b"<Error><Code>SlowDown</Code></Error>"
        else:
            store = http.client.HTTPConnection("127.0.0.1", self.server.store_port, timeout=60)
            store.request(self.command, self.path, body, dict(self.headers))
            answer = store.getresponse()
            status, headers, reply = answer.status, dict(answer.getheaders()), answer.read()
            store.close()
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        # The length of what a HEAD stands for is the store's to say.
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(reply)))
        try:
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # Whoever asked was stopped.

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, *_):
        pass


class Bucket:
    """The store, its door, and the variables that lead to it; they are in force until it stops."""

    def __init__(self, folder: Path):
        port = free_port()
        self.place = f"s3://{BUCKET}/a/zoo"
        self.store = Program([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], folder / "store.log")
        self.store.wait_for(f"http://127.0.0.1:{port}/moto-api/")
        self.door = Door(port)
        threading.Thread(target=self.door.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{self.door.server_port}"
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT"), timeout=10).close()
        self.before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith(NOT_OURS)]:
            del os.environ[name]
        os.environ |= {"AWS_ACCESS_KEY_ID": "key-of-the-test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"}
        os.environ |= {"AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}

    @contextlib.contextmanager
    def past_the_door(self):
        """Commands reach the store itself, so they are neither counted nor refused."""
        through = os.environ["AWS_ENDPOINT_URL"]
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{self.door.store_port}"
        try:
            yield
        finally:
            os.environ["AWS_ENDPOINT_URL"] = through

    def stop(self):
        os.environ.clear()
        os.environ.update(self.before)
        self.door.shutdown()
        self.door.server_close()
        self.store.terminate()
