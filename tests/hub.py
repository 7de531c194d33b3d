"""
A Hub of the tests' own on this machine, for the real client: the part of its interface by which a model is uploaded
and loaded back.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


LARGE = 100_000  # bytes from which a file goes by its hash


@dataclass
class Hub:
    """What a repository received: small files in commits, large ones by their hash."""

    created: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    strange: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # method and path
    failed: int = 0  # requests that were answered with an error because of `every` or `away_after`
    every: int = 0  # every so many requests fail, with the status 503
    away_after: int | None = None  # commits; after them, no request gets an answer
    refusing: bool = False  # every commit
    silent: threading.Event | None = None  # commits wait for it
    commits: int = 0  # that were asked for
    lock: Any = field(default_factory=threading.Lock)

    @property
    def revision(self) -> str:
        return hashlib.sha1("".join(sorted(self.files)).encode()).hexdigest()

    def metadata_errors(self, card: str) -> list[str]:
        """What the Hub would refuse in the metadata of a card: its own rules, as its documentation has them."""
        parts = card.split("---\n")
        data = yaml.safe_load(parts[1]) if card.startswith("---\n") else {}
        errors = []
        for name, kind in {
            "library_name": str,
            "pipeline_tag": str,
            "license": str,
            "base_model": (str, list),
        }.items():
            if name in data and not isinstance(data[name], kind):
                errors.append(f'"{name}" must be a string')
        if not all(isinstance(tag, str) for tag in data.get("tags") or []):
            errors.append('"tags" must be strings')
        for i, model in enumerate(data.get("model-index") or []):
            where = f'"model-index[{i}]'
            if not isinstance(model.get("name"), str):
                errors.append(f'{where}.name" is required')
            for j, result in enumerate(model.get("results") or [{}]):
                at = f"{where}.results[{j}]"
                errors += [f'{at}.task.type" is required'] * ("type" not in result.get("task", {}))
                errors += [
                    f'{at}.dataset.{key}" is required' for key in ("type", "name") if key not in result["dataset"]
                ]
                for metric in result.get("metrics") or [{}]:
                    errors += [f'{at}.metrics.{key}" is required' for key in ("type", "value") if key not in metric]
        return errors


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's interface that uploads and downloads use."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a client that doesn't wait
            self.close_connection = True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), "application/json", status)

    def send(self, data: bytes, kind: str, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fails(self) -> bool:
        """Whether this request is one that the Hub fails to answer."""
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            away = self.hub.away_after is not None and self.hub.commits >= self.hub.away_after
            busy = self.hub.every > 0 and len(self.hub.requests) % self.hub.every == 0
            self.hub.failed += away or busy
        if away:  # as a machine that is gone: the connection ends
            self.close_connection = True
            return True
        if busy:
            self.body()
            self.answer({"error": "Busy"}, status=503)
        return busy

    def do_POST(self) -> None:
        if self.fails():
            return
        self.hub.tokens.add(self.headers.get("Authorization"))
        path, sent = self.path.split("?")[0], self.body()
        host = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(sent))
            self.answer({"url": f"{host}/someone/tiny", "id": "someone/tiny"})
        elif path == "/api/validate-yaml":
            errors = self.hub.metadata_errors(json.loads(sent)["content"])
            listed = {"errors": [{"message": error} for error in errors], "warnings": []}
            self.answer(listed, status=400 if errors else 200)
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(sent)["files"]
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{host}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(sent)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.hub.commits += 1
            if self.hub.silent is not None:
                self.hub.silent.wait(60)
            if self.hub.refusing:
                self.answer({"error": "The disk of the Hub is full"}, status=500)
                return
            for line in sent.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                elif entry["key"] == "lfsFile":
                    self.hub.files[entry["value"]["path"]] = self.hub.objects[entry["value"]["oid"]]
            self.answer({"commitUrl": f"{host}/someone/tiny/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.unknown()

    def do_PUT(self) -> None:
        if not self.fails():
            self.hub.objects[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

    def do_GET(self) -> None:
        if self.fails():
            return
        path = self.path.split("?")[0]
        siblings = [{"rfilename": name} for name in sorted(self.hub.files)]
        if path.startswith("/someone/tiny/resolve/"):
            self.file(path.split("/", 5)[5])
        elif "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in sorted(self.hub.files.items())
                ]
            )
        elif path.startswith("/api/models/someone/tiny"):
            self.answer({"id": "someone/tiny", "sha": self.hub.revision, "siblings": siblings, "private": True})
        elif path.startswith("/api/whoami"):
            self.answer({"name": "someone", "type": "user", "orgs": []})
        else:
            self.unknown()

    def do_HEAD(self) -> None:
        if self.fails():
            return
        path = self.path.split("?")[0]
        if path.startswith("/someone/tiny/resolve/"):
            self.file(path.split("/", 5)[5])
        else:
            self.answer({}, status=404)

    def file(self, name: str) -> None:
        data = self.hub.files.get(name)
        if data is None:
            self.send(b"", "text/plain", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.revision)
        else:
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.send(data, "application/octet-stream", ETag=tag, X_Repo_Commit=self.hub.revision)

    def unknown(self) -> None:
        self.hub.strange.append(f"{self.command} {self.path}")
        self.answer({"error": "unknown"}, status=404)


@contextmanager
def running_hub() -> Iterator[tuple[Hub, str]]:
    """A running Hub and its address."""
    handler = type("HubHandler", (Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.hub, f"http://127.0.0.1:{server.server_port}"
    if handler.hub.silent is not None:
        handler.hub.silent.set()
    server.shutdown()
    thread.join()
