"""A loopback HTTP server that fails on request, for the tests of downloads."""

import contextlib
import http.server
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, with Range. Each request takes the next of `moods`; with none left, all goes well.

    Moods: ("drop", n) closes after n bytes; ("stall", n) falls silent after n; ("slow", None); ("raw", bytes) sends
    these bytes alone. A path that ends in .json gets `index`, without a mood.
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
            return self.answer(self.server.index)
        content = self.server.content
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.offsets.append(start)
        mood, value = self.server.moods.pop(0) if self.server.moods else ("well", None)
        if mood == "raw":
            return self.wfile.write(value)
        if start >= len(content):
            return self.wfile.write(b"HTTP/1.1 416 \r\n\r\n")
        self.answer(content, start, value, step=50_000 if mood == "slow" else len(content))
        if mood == "stall":
            self.rfile.read(1)  # until the client hangs up

    def answer(self, content, start=0, n_bytes=None, step=1_000_000):
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        body = content[start:][:n_bytes]
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body), step):
                self.wfile.write(body[i : i + step])
                time.sleep(0.02 if step == 50_000 else 0)


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
