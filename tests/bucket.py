"""A Google Cloud Storage bucket on this machine, which counts what is asked of it.

`gcp-storage-emulator` is the server. Added here is what clients of the real one rely on and it
lacks: several requests at a time, ranges from the end, moves, and generations as preconditions.
"""

import collections
import contextlib
import importlib.util
import logging
import re
import socket
import threading
import urllib.parse
from http import server

import pytest

NAME = "runs"


class Counts(collections.Counter):
    """Requests by kind ("GET object", "GET list", "PUT", ...) and "bytes" that objects gave."""


@contextlib.contextmanager
def serve():
    """Environment variables with which every client finds the bucket `NAME`; and its counts."""
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no fake bucket")
    if importlib.util.find_spec("gcsfs") is None:  # it reads the variables when it is imported
        pytest.skip("needs mae_jax[gcs]")
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # of what is not there
    storage, counts, lock = Storage(use_memory_fs=True), Counts(), threading.RLock()
    storage._write_config_to_file = lambda: None  # nothing is to outlive it
    buckets.create_bucket(NAME, storage)
    read = storage.get_file

    def get_file(*args, **options):
        with lock:  # as the writers: what is read is one version of it
            return read(*args, **options)

    storage.get_file = get_file

    class Handler(emulator.RequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open

        def __init__(self, *args):
            super().__init__(storage, *args)

        def handle_method(self, method):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            found = re.match(r"(?:/\w+)?/storage/v1/b/\w+/o(?:/([^/]+)(.*))?$", url.path)
            name = urllib.parse.unquote((found and found[1]) or query.get("name", ""))
            known = storage.objects.get(NAME, {}).get(name)
            media = query.get("alt") == "media"
            kind = "media" if media else "object" if found and found[1] else "list"
            with lock if method != "GET" else contextlib.nullcontext():
                counts[f"{method} {kind}"] += 1
                expected = query.get("ifGenerationMatch")
                if expected is not None and expected != (known["generation"] if known else "0"):
                    self.answer(412)
                    return
                if found and (found[2] or "").startswith("/moveTo/o/"):
                    if known is not None:
                        target = urllib.parse.unquote(found[2].removeprefix("/moveTo/o/"))
                        content = storage.get_file(NAME, name)
                        storage.create_file(NAME, target, content, {**known, "name": target})
                        storage.delete_file(NAME, name)
                    self.answer(200 if known else 404)
                    return
                self.known = known if media else None
                wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
                if self.known and wanted:
                    size = int(known["size"])
                    first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
                    last = int(wanted[2]) if wanted[1] and wanted[2] else size - 1
                    self.headers.replace_header("Range", f"bytes={first}-{min(last, size - 1)}")
                    if first >= size:
                        self.answer(416)
                        return
                emulator.Router(self).handle(method)

        def answer(self, status):
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def send_header(self, keyword, value):
            if keyword == "Content-Length" and self.known:
                super().send_header("x-goog-generation", self.known["generation"])
            super().send_header(keyword, value)

        def write(self, content):
            """In pieces: a client may leave before it has read all that it asked for."""
            for start in range(0, len(content), 1 << 16):
                piece = content[start : start + (1 << 16)]
                self.connection.sendall(piece)
                counts["bytes"] += len(piece) if self.known else 0
            return len(content)

        def setup(self):
            super().setup()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            self.wfile = self
            self.flush = lambda: None
            self.closed = True

        known = None

    for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
        setattr(Handler, f"do_{method}", lambda self, m=method: self.handle_method(m))

    class Server(server.ThreadingHTTPServer):
        daemon_threads = True
        handle_error = lambda *_: None  # noqa: E731 (clients leave in mid-answer)

    httpd = Server(("localhost", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    url = f"http://localhost:{httpd.server_port}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # TensorStore
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket it is
    }
    try:
        yield variables, counts
    finally:
        httpd.shutdown()
        httpd.server_close()
