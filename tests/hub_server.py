"""A loopback server that imitates the Hugging Face hub and a plain file server."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4


class HubServer(ThreadingHTTPServer):
    """Serves one file in several ways, selected by the URL, and repositories that take commits.

    `/timm/<name>/resolve/main/model.safetensors` imitates the hub. `ways[name]` is `"right"`,
    `"redirect"` (to a content server, as for large files), `"cut"` (the connection breaks once),
    `"wrong hash"` or `"truncated"` (half of the announced file); other names are not found.
    `/files/right/<name>` and `/files/cut/<name>` imitate a file server. `requests` lists
    (method, path). `repositories["user/name"]` is a dictionary of files.
    """

    daemon_threads = True

    def __init__(self, content: bytes, ways: dict):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ways, self.requests, self.repositories = content, ways, [], {}
        self.sha256 = hashlib.sha256(content).hexdigest()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        """Creates a repository or adds a commit to it, for any token."""
        self.server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.strip("/").split("/")
        if self.headers.get("Authorization") is None:
            self.send(401, {}, b"", True)
            return
        answer = {}
        if parts[1:] == ["repos", "create"]:
            facts = json.loads(body)
            name = f"{facts['organization']}/{facts['name']}"
            self.server.repositories.setdefault(name, {})
            answer = {"url": f"{self.server.address}/{name}"}
        elif parts[-2] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            answer = {"files": files}
        elif parts[-2] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            name = "/".join(parts[2:4])
            self.server.repositories[name] |= files
            answer = {"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1"}
        self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), True)

    def send_repository_file(self, repository: dict, name: str, with_body):
        commit = hashlib.sha1(repr(sorted(repository.items())).encode()).hexdigest()
        content = repository.get(name, b"")
        etag = hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if name not in repository:
            self.send(404, {**headers, "X-Error-Code": "EntryNotFound"}, b"", with_body)
        else:
            self.send(200, headers, content, with_body)

    def answer(self, with_body):
        self.server.requests.append((self.command, self.path))
        parts = self.path.strip("/").split("/")
        repository = self.server.repositories.get("/".join(parts[:2]))
        if repository is not None:
            self.send_repository_file(repository, parts[-1], with_body)
            return
        if parts[0] == "timm":
            way, headers = self.server.ways.get(parts[1]), self.hub_headers(parts[1])
        else:
            way, headers = parts[1] if parts[0] == "files" else None, {}
        if way is None:
            self.send(404, {**headers, "X-Error-Code": "EntryNotFound"}, b"", with_body)
        elif way == "redirect":
            # To another host, so that the client reads the headers of this response.
            port = self.server.server_port
            location = f"http://localhost:{port}/files/right/model.safetensors"
            self.send(302, {**headers, "Location": location}, b"", with_body)
        else:
            self.send_file(headers, way, with_body)

    def send_file(self, headers, way, with_body):
        content = self.server.content
        if way == "truncated":
            content = content[: len(content) // 2]
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        status = 206 if int(start) else 200
        self.send(status, headers, content[int(start) :], with_body, cut=way == "cut")

    def hub_headers(self, name):
        sha256 = self.server.sha256
        if self.server.ways.get(name) == "wrong hash":
            sha256 = "f" * 64
        return {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{sha256}"',
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(self.server.content)),
        }

    def send(self, status, headers, body, with_body, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            # Only a full response breaks: a resumed download gets the rest.
            cut = cut and len(body) == len(self.server.content)
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running(content: bytes, ways: dict):
    """Runs the server in a thread."""
    server = HubServer(content, ways)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
