"""What this machine has: CPUs, memory, GPUs, room on its disk. What it uses is asked of the runtime's containers.

GPUs are found with NVML when the `nvidia-ml-py` package and the driver are there; a machine without them has none,
which is not an error. Tested in `tests/unit/test_reports.py`.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squall._observe import Logger
from squall.config import Config

log = Logger("agent")

FULL_BYTES = 1 << 20
"""With less than that nothing can be made."""
FREE_HINT = "free some space there; `squall image prune` removes images that nothing uses"


@dataclass(frozen=True)
class Inventory:
    hostname: str
    cpus: float
    memory_mib: int
    gpus: list[dict[str, Any]] = field(default_factory=list)


def inventory(config: Config) -> Inventory:
    """The machine, less what the operator keeps from it by `node_cpus` and `node_memory_mib`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = config.node_cpus or float(usable)
    memory = config.node_memory_mib or _memory_mib()
    return Inventory(socket.gethostname(), cpus, memory, gpus())


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def full_disk(home: Path) -> str:
    """Says that the disk of a home has no room, of bytes or of files; empty when it has."""
    try:
        status = os.statvfs(home)
    except OSError:
        return ""
    no_bytes = status.f_bavail * status.f_frsize < FULL_BYTES
    no_files = status.f_files > 0 and not status.f_favail
    return f"the disk of `{home}` is full" if no_bytes or no_files else ""


def gpus() -> list[dict[str, Any]]:
    """Each `{"index", "uuid", "type", "memory_mib"}`; empty where NVML or the driver is missing. One that does not
    answer is left out: it has fallen off its bus."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = (_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
        return [gpu for gpu in found if gpu is not None]
    except pynvml.NVMLError as error:
        log.error("the GPUs cannot be counted", error=str(error))
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any] | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory_mib = nvml.nvmlDeviceGetMemoryInfo(handle).total >> 20
        return {
            "index": index,
            "uuid": _text(nvml.nvmlDeviceGetUUID(handle)),
            "type": gpu_type(_text(nvml.nvmlDeviceGetName(handle)), memory_mib),
            "memory_mib": memory_mib,
        }
    except nvml.NVMLError as error:
        log.error("a GPU does not answer and is left out", index=index, error=str(error))
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def gpu_type(name: str, memory_mib: int) -> str:
    """The short name people ask for: `NVIDIA A100-SXM4-40GB` is `A100-40GB`, `NVIDIA H100 80GB HBM3` is `H100`, and
    `NVIDIA GeForce RTX 4090` is `RTX-4090`."""
    words = re.sub(r"^((NVIDIA|Tesla|GeForce|Quadro)\s+)+", "", name.strip()).split()
    numbered = next((n for n, word in enumerate(words) if any(map(str.isdigit, word))), 0)
    model = re.split(r"-(?=SXM|PCI)", "-".join(words[: numbered + 1]), flags=re.IGNORECASE)[0]
    if model == "A100":
        return "A100-80GB" if memory_mib > 60_000 else "A100-40GB"
    return model
