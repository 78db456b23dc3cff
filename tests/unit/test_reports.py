"""What a node says it has: its processors and memory, and GPUs as NVML tells of them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from squall.config import Config
from squall.node.reports import gpu_type, gpus, inventory


class Nvml(SimpleNamespace):
    """A driver with two GPUs, of which the second may not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, starts: bool = True, counts: bool = True, second_answers: bool = True) -> None:
        super().__init__(starts=starts, counts=counts, second_answers=second_answers, is_open=False)

    def nvmlInit(self) -> None:
        if not self.starts:
            raise self.NVMLError("driver not loaded")
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        if not self.counts:
            raise self.NVMLError("unknown error")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 1 and not self.second_answers:
            raise self.NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=40 << 30)

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA A100-SXM4-40GB"


def with_driver(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> list[dict[str, Any]]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = gpus()
    assert not nvml.is_open
    return found


def test_gpus_are_told_by_the_names_people_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_driver(monkeypatch, Nvml()) == [
        {"index": n, "uuid": f"GPU-{n}", "type": "A100-40GB", "memory_mib": 40 << 10} for n in range(2)
    ]


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_driver(monkeypatch, Nvml(starts=False)) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where the package is not installed
    assert gpus() == []


def test_a_gpu_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu["index"] for gpu in with_driver(monkeypatch, Nvml(second_answers=False))] == [0]
    assert with_driver(monkeypatch, Nvml(counts=False)) == []


@pytest.mark.parametrize(
    ("name", "memory_mib", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", 81_920, "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", 40_960, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 81_559, "H100"),
        ("NVIDIA H100 PCIe", 81_559, "H100"),
        ("NVIDIA L40S", 46_068, "L40S"),
        ("Tesla T4", 15_360, "T4"),
        ("NVIDIA B200", 183_359, "B200"),
        ("NVIDIA GeForce RTX 4090", 24_564, "RTX-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_887, "RTX-PRO-6000"),
        ("NVIDIA RTX A6000", 49_140, "RTX-A6000"),
        ("", 0, ""),
    ],
)
def test_short_names_of_gpus(name: str, memory_mib: int, kind: str) -> None:
    assert gpu_type(name, memory_mib) == kind


def test_the_operator_may_keep_some_of_the_machine() -> None:
    whole, part = inventory(Config()), inventory(Config(node_cpus=0.5, node_memory_mib=256))
    assert whole.cpus >= 1 and whole.memory_mib > 256 and whole.hostname
    assert (part.cpus, part.memory_mib) == (0.5, 256)
