"""
Layouts: which GPUs there are, how they are linked, and how much memory the host has.
"""

import re
from dataclasses import dataclass, replace

from ..errors import meant, require


GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """
    GPUs of one kind, on one or several hosts.

    Attributes:
        name (`str`):
            As the user wrote it.
        gpus, nodes (`int`):
            GPUs of all hosts together, and hosts.
        gpu_bytes (`int`):
            Memory that a process can have of a GPU.
        flops (`float`):
            Dense bfloat16 operations a second, by the data sheet.
        memory_bandwidth (`float`):
            Bytes a second of the GPU's own memory, by the data sheet.
        link (`str`), link_bandwidth (`float`):
            What links the GPUs of a host, and its bytes a second in one direction for one GPU, by the data sheet.
        network_bandwidth (`float`):
            Bytes a second in one direction between hosts, for one GPU.
        pcie_bandwidth (`float`):
            Bytes a second between a GPU and the host's memory.
        host_bytes (`int`):
            Memory of one host.
    """

    name: str
    gpus: int
    nodes: int = 1
    # `torch.cuda.mem_get_info` of an A100-80G: 79.15 GiB
    gpu_bytes: int = int(79.15 * GIB)
    flops: float = 312e12
    memory_bandwidth: float = 2.039e12
    link: str = "NVLink"
    link_bandwidth: float = 300e9
    network_bandwidth: float = 25e9
    pcie_bandwidth: float = 32e9
    host_bytes: int = 170 * GIB

    @property
    def gpus_per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def slowest_link(self) -> float:
        """Bytes a second at which the GPUs can gather from each other."""
        return min(self.link_bandwidth, self.network_bandwidth) if self.nodes > 1 else self.link_bandwidth


def _a100(name: str, gpus: int, nodes: int = 1) -> Layout:
    # The host has what clouds give with these GPUs: 170 GiB for each
    return Layout(name, gpus, nodes, host_bytes=170 * GIB * gpus // nodes)


def _over_pcie(layout: Layout, name: str) -> Layout:
    """The same GPUs as cards: less bandwidth of their own memory, and PCIe 4.0 between them."""
    return replace(layout, name=name, link="PCIe", link_bandwidth=layout.pcie_bandwidth, memory_bandwidth=1.935e12)


_NVLINK = {
    "1xa100-80g": _a100("1xa100-80g", 1),
    "2xa100-80g": _a100("2xa100-80g", 2),
    "4xa100-80g": _a100("4xa100-80g", 4),
    "8xa100-80g": _a100("8xa100-80g", 8),
    "2x4xa100-80g": _a100("2x4xa100-80g", 8, nodes=2),
}
LAYOUTS: dict[str, Layout] = _NVLINK | {
    f"{name}-pcie": _over_pcie(layout, f"{name}-pcie") for name, layout in _NVLINK.items() if layout.nodes == 1
}


def find_layout(name: str) -> Layout:
    """The layout of a name, one of [`LAYOUTS`]. Raises `ValueError` if there is none."""
    found = LAYOUTS.get(re.sub("[ _]", "-", name.lower()))
    require(found is not None, f"--layout is '{name}'. Choose one of {', '.join(LAYOUTS)}.{meant(name, LAYOUTS)}")
    assert found is not None
    return found
