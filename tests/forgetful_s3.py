"""A small server that speaks enough of S3, and ignores a put's condition, as some servers do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_PUT(self):
        self.objects[self._key()] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            return self._list(query.get("prefix", [""])[0])
        return self._object(self.command)

    def do_HEAD(self):
        self.do_GET()

    def do_DELETE(self):
        self.objects.pop(self._key(), None)
        self._answer(204)

    def do_POST(self):  # obstore deletes in bulk
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = [unquote(piece.partition("</Key>")[0]) for piece in body.split("<Key>")[1:]]
        for key in keys:
            self.objects.pop(key, None)
        rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode())

    def _object(self, command):
        data = self.objects.get(self._key())
        if data is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self._answer(200, data)

    def _list(self, prefix):
        below = {key[len(prefix) :] for key in self.objects if key.startswith(prefix)}
        folders = {key.partition("/")[0] for key in below if "/" in key}
        files = {key for key in below if "/" not in key}
        rows = [
            f"<CommonPrefixes><Prefix>{escape(prefix + name)}/</Prefix></CommonPrefixes>"
            for name in folders
        ]
        for name in files:
            size = len(self.objects[prefix + name])
            rows.append(
                f"<Contents><Key>{escape(prefix + name)}</Key><Size>{size}</Size><ETag>x</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        self._answer(200, f"<ListBucketResult>{''.join(rows)}</ListBucketResult>".encode())

    def _key(self):
        return unquote(urlsplit(self.path).path).removeprefix("/").partition("/")[2]

    def _answer(self, status, data=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{md5(data).hexdigest()}"')
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def forgetful_s3() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the server's URL, and the objects that it holds by key."""
    handler = type("Handler", (_Handler,), {"objects": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
