"""A Hub of the tests' own on this machine, for the real client: the part of its interface that an upload uses."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """What a repository received: small files in commits, large ones by their hash."""

    created: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    strange: list[str] = field(default_factory=list)
    refusing: bool = False  # every commit
    silent: threading.Event | None = None  # commits wait for it
    commits: int = 0  # that were asked for


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's interface that an upload uses."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        self.hub.tokens.add(self.headers.get("Authorization"))
        path, sent = self.path.split("?")[0], self.body()
        host = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            self.hub.created.append(json.loads(sent))
            self.answer({"url": f"{host}/someone/tiny", "id": "someone/tiny"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > 100_000 else "regular",
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
        self.hub.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/someone/tiny"):
            self.answer({"id": "someone/tiny", "sha": "0" * 40, "siblings": []})
        elif self.path.startswith("/api/whoami"):
            self.answer({"name": "someone", "type": "user", "orgs": []})
        else:
            self.unknown()

    def do_HEAD(self) -> None:
        self.answer({}, status=404)

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
