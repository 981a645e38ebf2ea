"""A loopback HTTP server that fails on request, for the tests of downloads."""

import contextlib
import http.server
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, with Range. Each request takes the next of `moods`; with none left, all goes well.

    Moods: ("drop", n) closes after n bytes; ("stall", n) falls silent after n; ("slow",); ("no range",);
    ("wrong byte",) flips a bit in the middle; ("status", code, Retry-After or None); ("length", text) claims that
    Content-Length; ("raw", bytes) sends these bytes alone. A path that ends in .json gets `index`, without a mood.
    """

    def __init__(self, content, index=b""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.index, self.moods = content, index, []
        self.offsets = []  # the first byte that each request for `content` asked for
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path.endswith(".json"):
            return self.answer(200, self.server.index)
        content = self.server.content
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.offsets.append(start)
        mood, *value = self.server.moods.pop(0) if self.server.moods else ("well",)
        if mood == "status":
            return self.answer(value[0], retry_after=value[1])
        if mood == "raw":
            return self.wfile.write(value[0])
        if mood == "wrong byte":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if mood == "no range":
            start = 0
        if start >= len(content):
            return self.answer(416)
        span = f"bytes {start}-{len(content) - 1}/{len(content)}" if start else None
        body = content[start:][: value[0] if mood in ("drop", "stall") else None]
        length = value[0] if mood == "length" else len(content) - start
        self.answer(206 if start else 200, body, length, span, step=50_000 if mood == "slow" else None)
        if mood == "stall":
            self.rfile.read(1)  # until the client hangs up

    def answer(self, status, body=b"", length=None, span=None, retry_after=None, step=None):
        self.send_response(status)
        headers = {"Content-Length": length or len(body), "Content-Range": span, "Retry-After": retry_after}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body), step or max(len(body), 1)):
                self.wfile.write(body[i : i + (step or len(body))])
                time.sleep(0.02 if step else 0)


@contextlib.contextmanager
def serving(content, index=b""):
    """Run a Server in a thread until the block ends."""
    with Server(content, index) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def closed_address():
    """Return a loopback address where nobody listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        return f"http://127.0.0.1:{server.server_port}"
