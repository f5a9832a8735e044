"""How the processes of a training find one another: at an address of their node, and on no other."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_TEXT_BYTES = 4096
"""The longest path."""
_listening: list[socket.socket] = []
"""Of the first process: open from when its port is told to the others until its store has taken it over."""


@dataclass
class NodeAddressConfig(TorchConfig):
    """Ray Train's own, but for where the meeting point listens.

    Torch's own store, which every client may read and write without a token, listens on all addresses of the machine,
    and gloo on the one that the machine's name stands for. Here both take the address under which Ray knows the node,
    which is 127.0.0.1 where Ray runs for this machine alone.
    """

    @property
    def backend_cls(self) -> Any:
        return _NodeAddressBackend


_TorchBackend: Any = TorchConfig().backend_cls


class _NodeAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        host, port = worker_group.execute_single(0, _listen)
        size = len(worker_group)
        ray.get([
            worker_group.execute_single_async(rank, _meet, backend, host, port, rank, size, backend_config.timeout_s)
            for rank in range(size)
        ])  # fmt: skip


def _listen() -> tuple[str, int]:
    """Open the port of the meeting point; returns where it is."""
    for each in _listening:
        each.close()
    host = str(ray.util.get_node_ip_address())
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    _listening[:] = [socket.create_server((host, 0), family=family)]
    return host, int(_listening[0].getsockname()[1])


def _meet(backend: str, host: str, port: int, rank: int, size: int, timeout_s: int) -> None:
    """Wait for the others, and form a group with them."""
    address = str(ray.util.get_node_ip_address())
    interface = _interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if ipaddress.ip_address(address).is_loopback:  # on a network NCCL knows better which of several is fast
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray sets it: a hung collective ends its process
    timeout = timedelta(seconds=timeout_s)
    own = _listening.pop().detach() if rank == 0 else None  # the store's from now on
    store = TCPStore(host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=own)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def broadcast_text(text: str, device: torch.device) -> str:
    """The first process' text in all of them, sent as a tensor: what came as an object would be unpickled.

    Args:
        text: At most 4096 bytes of UTF-8, as a path has, without a zero; what the others give is not looked at.
        device: Where the group's backend has its tensors.
    """
    said = bytearray(text.encode().ljust(_TEXT_BYTES, b"\0"))
    sent = torch.frombuffer(said, dtype=torch.uint8).to(device)
    dist.broadcast(sent, src=0)
    return bytes(sent.tolist()).rstrip(b"\0").decode()


def _interface_of(address: str) -> str | None:
    """Name of the network interface that has an address."""
    psutil: Any = importlib.import_module("psutil")  # comes with Ray
    named = psutil.net_if_addrs().items()
    return next((str(name) for name, has in named if any(each.address == address for each in has)), None)
