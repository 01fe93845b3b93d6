"""Run a command as on a processor that has AVX2 and neither AVX-512, VNNI nor AMX, on a Linux machine that has them.

    sudo .venv/bin/python scripts/avx2_only.py .venv/bin/python benchmarks/run.py optimise
    sudo .venv/bin/python scripts/avx2_only.py .venv/bin/python -m pytest -p no:faulthandler tests/contract

Every library of the environment that asks the processor (`cpuid`) is copied, the copy made to ask `avx2_only.c` instead, and mounted
over the original for this command alone; so is /proc/cpuinfo. What is measured is the speed of AVX2 code on this processor. Needs root,
gcc, objdump and readelf; the copies (1 GB) are kept in the folder that AVX2_ONLY_DIR names (default: ~/.cache/triscope-avx2).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPUID, TRAP = b"\x0f\xa2", b"\x0f\x0b"
HIDDEN = re.compile(r" (avx512\w*|avx10\w*|avx_\w+|amx_\w+|gfni)\b")
GLIBC = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512CD,-AVX512DQ"


def main(command: list[str]) -> None:
    """Prepare the copies that are missing, then become the command."""
    if not command:
        sys.exit(__doc__)
    folder = Path(os.environ.get("AVX2_ONLY_DIR") or Path.home() / ".cache" / "triscope-avx2")
    folder.mkdir(parents=True, exist_ok=True)
    shim = folder / "avx2_only.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(shim), str(HERE / "avx2_only.c")], check=True)
    facts = folder / "cpuinfo"
    facts.write_text("".join(HIDDEN.sub("", line) for line in Path("/proc/cpuinfo").read_text().splitlines(keepends=True)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        copies = dict(pair for pair in pool.map(lambda path: patched(path, folder), askers()) if pair is not None)
    mounts = [f"mount --bind '{copy}' '{path}'" for path, copy in {**copies, Path("/proc/cpuinfo"): facts}.items()]
    # torch would give what it compiled for one instruction set to processes of the other
    environment = f"export LD_PRELOAD='{shim}' GLIBC_TUNABLES={GLIBC} TORCHINDUCTOR_CACHE_DIR='{folder}/inductor'"
    script = "\n".join(["set -e", *mounts, environment, 'exec "$@"'])
    os.execvp("unshare", ["unshare", "--mount", "bash", "-c", script, "avx2_only", *command])


def askers() -> list[Path]:
    """Libraries that may ask, the largest first: those of the environment and the project, libgcc, and the compiler that torch calls."""
    roots = [Path(sys.prefix), HERE.parent / "shared_runtime"]
    found = {path.resolve() for root in roots for path in root.rglob("*.so*") if path.is_file()}
    libgcc = subprocess.run(["gcc", "-print-file-name=libgcc_s.so.1"], capture_output=True, text=True, check=True).stdout.strip()
    found |= {Path(path).resolve() for path in (libgcc, shutil.which("gcc"), shutil.which("g++")) if path}
    return sorted((path for path in found if CPUID in path.read_bytes()), key=lambda path: -path.stat().st_size)


def patched(path: Path, folder: Path) -> tuple[Path, Path] | None:
    """The path and its copy in which each `cpuid` is an invalid instruction; None where the bytes are no such instruction."""
    facts = path.stat()
    copy = folder / f"{str(path).replace('/', '%')}%{facts.st_size}%{facts.st_mtime_ns}"
    if copy.exists():
        return (path, copy) if copy.stat().st_size else None
    places = instructions(path)
    content = bytearray(path.read_bytes()) if places else bytearray()
    for place in places:
        if content[place : place + 2] != CPUID:
            sys.exit(f"{path}: expected cpuid at byte {place}, found {content[place : place + 2].hex()}")
        content[place : place + 2] = TRAP
    half = copy.with_name(f"{copy.name}.half")
    half.write_bytes(content)
    half.chmod(facts.st_mode)
    half.replace(copy)
    return (path, copy) if places else None


def instructions(path: Path) -> list[int]:
    """Where in the file `cpuid` stands, by the disassembler: the same two bytes occur within other instructions."""
    pipe = f"objdump -d --no-show-raw-insn '{path}' | grep -E '[[:space:]]cpuid[[:space:]]*$' | cut -d: -f1"
    listed = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=True).stdout.split()
    headers = subprocess.run(["readelf", "-lW", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    loads = [[int(value, 16) for value in line.split()[1:6]] for line in headers if line.split()[:1] == ["LOAD"]]
    segments = [(offset, address, size) for offset, address, _, size, _ in loads]
    return [
        offset + int(place, 16) - address
        for place in listed
        for offset, address, size in segments
        if address <= int(place, 16) < address + size
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
