"""A loopback HTTP server that fails on request, for the tests of downloads."""

import contextlib
import http.server
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, with Range. Each request takes the next of `moods`; with none left, all goes well.

    Moods: ("drop", n) closes after n bytes; ("stall", n) falls silent after n; ("slow",); ("no range",);
    ("wrong byte",) flips a bit in the middle; ("status", code, Retry-After or None); ("length", text) claims that
    Content-Length; ("206",) answers a first request so; ("raw", bytes) sends these bytes alone.
    A path that ends in .json gets `index`, without a mood.
    """

    def __init__(self, content, index=b""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.index, self.moods = content, index, []
        self.offsets = []  # the first byte that each request for `content` asked for

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        if self.path.endswith(".json"):
            return self.answer(200, {"Content-Length": len(server.index)}, server.index)
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        server.offsets.append(start)
        mood, *value = server.moods.pop(0) if server.moods else ("well",)
        if mood == "status":
            return self.answer(value[0], {"Retry-After": value[1], "Content-Length": 0})
        if mood == "raw":
            return self.wfile.write(value[0])
        content = server.content
        if mood == "wrong byte":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        start = 0 if mood == "no range" else start
        if start >= len(content):
            return self.answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0})
        is_partial = start or mood == "206"
        self.answer(
            206 if is_partial else 200,
            {
                "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}" if is_partial else None,
                "Content-Length": value[0] if mood == "length" else len(content) - start,
            },
        )
        body = content[start:][: value[0] if mood in ("drop", "stall") else None]
        step = 50_000 if mood == "slow" else max(len(body), 1)
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body), step):
                self.wfile.write(body[i : i + step])
                time.sleep(0.02 if mood == "slow" else 0)
        if mood == "stall":
            self.rfile.read(1)  # until the client hangs up

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, text in headers.items():
            if text is not None:
                self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(body)


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
