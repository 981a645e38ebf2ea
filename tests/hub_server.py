"""A Hugging Face Hub on this machine, for tests: it keeps what it gets, and refuses or stalls on request.

It answers the requests that services/hub.py makes through huggingface_hub 2.4: create a repository, upload (preupload,
git LFS, commit), look up, download. It has no Xet storage; HF_HUB_DISABLE_XET selects git LFS.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
from base64 import b64decode
from urllib.parse import unquote, urlsplit

TOKEN, USER = "hf_token_of_me", "me"
LFS_ENDINGS = (".pkl", ".safetensors", ".png")  # some of a new repository's .gitattributes


def oid(path, data):
    """Return a file's id as the Hub gives it: sha256 for an LFS file, git's blob sha1 for another."""
    if path.endswith(LFS_ENDINGS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """The server, listening while the `with` block runs. Keys of repositories are "owner/name", "datasets/owner/name".

    commits: {key: [(id, {path: bytes})]}, oldest first; private: keys of private repositories; objects: {sha256: bytes}
    of LFS; requests: "METHOD path" as they came; uploads: sha256 of each LFS upload; rules: see `answer`.
    """

    def __init__(self):
        self.commits, self.private, self.objects = {}, set(), {}
        self.requests, self.uploads, self.rules = [], [], []

    def __enter__(self):
        self.listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.listener.daemon_threads, self.listener.block_on_close = True, False
        self.endpoint = f"http://127.0.0.1:{self.listener.server_port}"
        threading.Thread(target=self.listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown()
        self.listener.server_close()

    def environment(self, home):
        """Return the environment variables that make a client use this server; its caches lie below `home`."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**names, "NO_PROXY": "*", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}

    def answer(self, on, status, text=""):
        """Answer requests whose "METHOD path" has the regular expression `on` with this; status None: never."""
        self.rules.append((re.compile(on), (status, {"X-Error-Message": text}, text.encode())))

    def files(self, key):
        """Return {path: bytes} of a repository's newest commit."""
        return self.commits[key][-1][1]

    def put(self, key, files):
        """Commit {path: bytes} to a repository, which is made if needed."""
        commits = self.commits.setdefault(key, [])
        self.objects.update({hashlib.sha256(data).hexdigest(): data for data in files.values()})
        content = {**(commits[-1][1] if commits else {}), **files}
        commits.append((hashlib.sha1(f"{key} {len(commits)}".encode()).hexdigest(), content))


class Handler(http.server.BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    # A (regular expression on "METHOD path", method) each; a key of a repository is a group
    ROUTES = (
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate_card"),
        (r"POST /api/((?:models|datasets)/[^/]+/[^/]+)/preupload/main", "preupload"),
        (r"POST /(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"PUT /lfs/([0-9a-f]{64})", "lfs_put"),
        (r"POST /api/((?:models|datasets)/[^/]+/[^/]+)/commit/main", "commit"),
        (r"GET /api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/main)?", "info"),
        (r"(?:GET|HEAD) /((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", "resolve"),
        (r"GET /lfs/([0-9a-f]{64})", "lfs_get"),
    )

    def handle_request(self):
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(request)
        self.send(*self.answer_to(request))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer_to(self, request):
        """Return (status, headers, body)."""
        for on, answer in self.hub.rules:
            if on.search(request):
                if answer[0] is None:
                    time.sleep(3600)
                return answer
        if "/lfs/" not in request and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.problem(401, "", "Invalid credentials in Authorization header")
        for pattern, name in self.ROUTES:
            if match := re.fullmatch(pattern, request):
                groups = [group.removeprefix("models/") for group in match.groups()]
                if name in ("info", "resolve") and groups[0] not in self.hub.commits:
                    return self.problem(404, "RepoNotFound", "Repository not found")
                return getattr(self, name)(*groups)
        return self.problem(404, "", f"no route {request}")

    def send(self, status, headers, body):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):  # a client that was killed
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def log_message(self, *_):
        """Print nothing: `requests` has it."""

    # Each of these returns (status, headers, body).

    def problem(self, status, code, message):
        return status, {"X-Error-Code": code, "X-Error-Message": message}, {"error": message}

    def create(self):
        asked = json.loads(self.body)
        if asked.get("organization", USER) != USER:
            return self.problem(403, "", "You don't have the rights to create a repo under this namespace")
        key = "datasets/" * (asked["type"] == "dataset") + f"{USER}/{asked['name']}"
        if key in self.hub.commits:
            return 409, {}, {"url": f"{self.hub.endpoint}/{key}"}
        self.hub.private |= {key} if asked["visibility"] == "private" else set()
        self.hub.put(key, {".gitattributes": b"*.pkl filter=lfs\n"})
        return 200, {}, {"url": f"{self.hub.endpoint}/{key}"}

    def validate_card(self):
        return 200, {}, {"errors": [], "warnings": []}

    def preupload(self, key):
        files = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(LFS_ENDINGS) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in self.hub.files(key):
                files[-1]["oid"] = oid(path, self.hub.files(key)[path])
        return 200, {}, {"files": files}

    def lfs_batch(self):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        return 200, {}, {"transfer": "basic", "objects": objects}

    def lfs_put(self, sha256):
        assert hashlib.sha256(self.body).hexdigest() == sha256
        self.hub.objects[sha256] = self.body
        self.hub.uploads.append(sha256)
        return 200, {}, b""

    def commit(self, key):
        _, *items = [json.loads(line)["value"] for line in self.body.splitlines()]
        contents = [self.hub.objects[item["oid"]] if "oid" in item else b64decode(item["content"]) for item in items]
        self.hub.put(key, {item["path"]: content for item, content in zip(items, contents, strict=True)})
        commit_id = self.hub.commits[key][-1][0]
        return 200, {}, {"commitOid": commit_id, "commitUrl": f"{self.hub.endpoint}/{key}/commit/{commit_id}"}

    def info(self, key):
        siblings = [{"rfilename": path} for path in self.hub.files(key)]
        return 200, {}, {"id": key.removeprefix("datasets/"), "sha": self.hub.commits[key][-1][0], "siblings": siblings}

    def resolve(self, key, path):
        commit_id, files = self.hub.commits[key][-1]
        if path not in files:
            status, headers, body = self.problem(404, "EntryNotFound", "Entry not found")
            return status, {**headers, "X-Repo-Commit": commit_id}, body
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{oid(path, files[path])}"'}
        if not path.endswith(LFS_ENDINGS):
            return 200, headers, files[path]
        storage = self.hub.endpoint.replace("127.0.0.1", "localhost")  # a different host's, as the Hub's is
        linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": len(files[path])}
        return 302, {**headers, **linked, "Location": f"{storage}/lfs/{oid(path, files[path])}"}, b""

    def lfs_get(self, sha256):
        return 200, {}, self.hub.objects[sha256]
