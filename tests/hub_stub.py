"""A Hugging Face hub on a local port that keeps its files in memory: what huggingface_hub needs to upload and load."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_writer"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: bytes | dict | list, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        repos, url = self.server.repos, f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            repos.setdefault(name, {})
            return self.answer(200, {"url": f"{url}/{name}", "name": name})
        name, _, action = self.path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del repos[name][line["value"]["path"]]
        return self.answer(200, {"commitUrl": f"{url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        if name not in self.server.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = self.server.repos[name]
        if f"{name}/resolve/" in path:
            content = files[path.partition(f"/resolve/{COMMIT}/")[2]]
            return self.answer(200, content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        if f"{name}/tree/" in path:
            listed = {key: (len(content), sha1(content).hexdigest()) for key, content in files.items()}
            entries = [{"type": "file", "path": key, "size": n, "oid": oid} for key, (n, oid) in listed.items()]
            return self.answer(200, entries)
        return self.answer(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": key} for key in files]})

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def hub_stub() -> Iterator[ThreadingHTTPServer]:
    """Serve a hub at `http://127.0.0.1:<server_port>`; `repos` maps a name to its files' contents."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos = {}
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
