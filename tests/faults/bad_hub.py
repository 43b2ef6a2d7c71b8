"""A small HTTP server that behaves like the Hub, or misbehaves as the name of a repository says.

    any/good           serves the files of a folder
    any/unauthorized   answers 401, any/gated 403 of a gated model, any/busy 429, any/broken 500
    any/slow           answers after the client has given up
    any/cut            serves half of the weights and closes, until `healed` is set
    any/full           takes no weights; others take an upload, which `commits` then holds
While `down` is set, every connection is closed without an answer.
"""

import contextlib
import hashlib
import http.server
import json
import threading
import time
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CUT_ABOVE = 10_000_000  # the weights, and not the tokenizer
REFUSALS = {
    "unauthorized": (401, {"X-Error-Message": "Invalid username or password."}),
    "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}),
    "busy": (429, {}),
    "broken": (500, {}),
}


class BadHub(http.server.ThreadingHTTPServer):
    """Serves `folder` on a free port of this machine while the with-statement lasts."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.down, self.healed = folder, False, False
        self.requests: list[str] = []
        self.commits: list[tuple[str, set[str]]] = []  # path of the request, names of the files
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def mode_of(path: str) -> dict:
    return {"uploadMode": "lfs" if "safetensors" in path else "regular", "shouldIgnore": False}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"POST {self.path}")
        answer = {"url": f"{self.server.url}/any/new"}  # of create_repo, and for the rest
        if "/preupload/" in self.path:
            sent = json.loads(body)["files"]
            answer = {"files": [{"path": file["path"], **mode_of(file["path"])} for file in sent]}
        elif self.path.endswith("/objects/batch"):  # of large files: each gets an address
            address = {"href": f"{self.server.url}{self.path}"}
            answer = {"transfer": "basic", "objects": json.loads(body)["objects"]}
            for large in answer["objects"]:
                large["actions"] = {"upload": address}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            paths = {line["value"]["path"] for line in lines if line["key"] != "header"}
            self.server.commits.append((self.path, paths))
            answer = {
                "commitUrl": f"{self.server.url}/any/new/commit/{COMMIT}",
                "commitOid": COMMIT,
            }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"PUT {self.path}")
        self._send(500 if "any/full" in self.path else 200, {}, b"")

    def log_message(self, *arguments):
        pass

    def _answer(self, with_body: bool) -> None:
        asked = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {self.path} {asked}".strip())
        if self.path == "/switch/down":
            self.server.down = True
        elif self.path == "/switch/healed":
            self.server.healed = True
        elif self.server.down:
            return self.connection.close()
        else:
            return self._answer_for_repository(asked, with_body)
        self._send(200, {}, b"")

    def _answer_for_repository(self, asked: str, with_body: bool) -> None:
        if self.path.startswith("/api/whoami"):
            return self._send(*REFUSALS["unauthorized"], b"")
        if self.path.count("/") < 2:
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        kind = self.path.removeprefix("/api/models").split("/")[2].split("?")[0]
        if kind == "slow":
            time.sleep(5)
        if kind in REFUSALS:
            return self._send(*REFUSALS[kind], b"")
        file = self.server.folder / self.path.rpartition("/")[2]
        if "/resolve/" not in self.path:
            files = [self._describe(path) for path in self.server.folder.iterdir()]
            answer = {"id": kind, "sha": COMMIT, "siblings": files}
            body = json.dumps(files if "/tree/" in self.path else answer).encode()
            return self._send(200, {"Content-Type": "application/json"}, body * with_body)
        if not file.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
        self._send_file(file.read_bytes(), asked, with_body, kind)

    def _describe(self, file: Path) -> dict:
        """What the Hub says of a file: of a large one, which lies in LFS, the SHA-256 too."""
        size, sha256 = len(content := file.read_bytes()), digest(content)
        answer = {
            "type": "file",
            "path": file.name,
            "rfilename": file.name,
            "oid": "",
            "size": size,
        }
        if size > CUT_ABOVE:
            answer["lfs"] = {"size": size, "oid": sha256, "sha256": sha256, "pointerSize": 134}
        return answer

    def _send_file(self, content: bytes, asked: str, with_body: bool, kind: str) -> None:
        first = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        headers = {
            "ETag": f'"{digest(content)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - first),
        }
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        half = len(content) // 2 if len(content) > CUT_ABOVE else len(content)
        cut = kind == "cut" and not self.server.healed
        body = content[first : half if cut else None] if with_body else b""
        self._send(206 if first else 200, headers, body)

    def _send(self, status: int, headers: dict, body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client has given up
            self.wfile.write(body)
