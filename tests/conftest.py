"""No test reaches the network, and tests marked `gpu` run only where there is a CUDA device."""

import os
import socket
from typing import Any

import pytest
import torch

# For import-linter, which the tests do not need.
collect_ignore = ["layers.py"]

# Read once, when the libraries are first imported, which is after this file.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
# A thread for each process unless somebody wants more: xdist's workers and the trainings that tests launch share the
# cores, and threads that wait for each other take several times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        # Launched training processes talk to each other on this machine, by Unix socket or loopback.
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"Tests must not use the network; one connects to {address}.")
        real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def _own_attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    # `set_attention_backend` of one model sets that of the process too.
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
