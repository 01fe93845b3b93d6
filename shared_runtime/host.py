"""What this machine is: cores, vector instructions, memory, GPUs; and a fingerprint of it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import msgspec

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
VECTOR_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "asimd", "sve")


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as its driver names it."""

    name: str
    memory_mib: int
    driver: str


class Host(msgspec.Struct, frozen=True):
    """The facts that a plan or a benchmark depends on."""

    cpu: str
    cores: int
    memory_gib: float
    vector: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    system: str
    python: str

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when a fact does."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]

    @property
    def saturates(self) -> bool:
        """Whether this CPU adds two products of bytes in 16 bits (`pmaddubsw`; no VNNI), which U8 times full S8 weights overflows."""
        return "avx2" in self.vector and not set(self.vector) & set(VNNI)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, bounded by the control group's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return affinity
    return affinity if quota == "max" else max(1, min(affinity, -(-int(quota) // int(period))))


def asked_cores(threads: int | None) -> int:
    """The threads that were asked for, every usable core without. Raises ValueError below 1."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more, or None for every core that can be used")
    return threads or usable_cores()


def peak_resident_mib() -> float:
    """The most memory that this process has held at once [MiB].

    On Linux `ru_maxrss` of a process that another one started may be the other one's: the kernel's own count of this
    program's memory is read instead.
    """
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Linux" else 2**20)


def _cpu_facts() -> tuple[str, tuple[str, ...]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), ()
    facts: dict[str, str] = {}
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return facts.get("model name", platform.machine()), tuple(flag for flag in VECTOR_FLAGS if flag in flags)


def _gpus() -> tuple[Gpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if answer.returncode:
        return ()
    rows = [[field.strip() for field in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return tuple(Gpu(name, int(float(memory)), driver) for name, memory, driver in rows)


@cache
def host() -> Host:
    """This machine's facts, read once."""
    cpu, vector = _cpu_facts()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Host(cpu, usable_cores(), round(memory, 1), vector, _gpus(), platform.platform(), platform.python_version())
