"""`--push_to_hub`: the real client against a Hub of this test's own, on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sort_digits


pytestmark = pytest.mark.train
ROOT = Path(sort_digits.__file__).parents[2]


@dataclass
class Hub:
    """What a repository received: small files in commits, large ones by their hash."""

    created: list[dict] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    strange: list[str] = field(default_factory=list)


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


@pytest.fixture
def hub():
    """A running Hub and its address."""
    handler = type("HubHandler", (Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.mark.slow
def test_the_whole_report_reaches_the_hub(hub, tmp_path):
    received, address = hub
    tokenizer = sort_digits.build_tokenizer()
    sort_digits.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "init")
    tokenizer.save_pretrained(tmp_path / "init")
    sort_digits.build_data("N", tokenizer, 0, 8, 64, 16).save_to_disk(tmp_path / "data")
    command = [
        *(sys.executable, "recipes/dapo.py", "--config", "recipes/configs/quickstart_dapo.yaml"),
        *("--model_name_or_path", str(tmp_path / "init"), "--dataset_name", str(tmp_path / "data")),
        *("--reward_funcs", "tests/tiny.py:first_token_even", "--held_out_prompts", "4"),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--per_device_train_batch_size", "16"),
        *("--push_to_hub", "--hub_model_id", "someone/tiny", "--hub_token", "hf_from_the_command_line"),
    ]
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "no_proxy": "127.0.0.1",
    }
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Pushed to https://huggingface.co/someone/tiny" in run.stdout
    assert received.strange == []
    assert received.created[0]["name"] == "tiny"
    assert received.tokens == {"Bearer hf_from_the_command_line"}

    names = {"README.md", "learning.png", "summary.json", "model.safetensors", "config.json", "tokenizer.json"}
    assert names <= set(received.files)
    for name in names:
        assert received.files[name] == (tmp_path / "out" / name).read_bytes(), name
    card = received.files["README.md"].decode()
    assert "## Results" in card and "![" in card
    assert 'model="someone/tiny"' in card
    assert "training_args.bin" in received.files
    assert not [name for name, content in received.files.items() if b"hf_from_the_command_line" in content]
