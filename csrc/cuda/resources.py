"""What a compiler alone can tell of the CUDA kernels: registers, shared memory, occupancy, spills, tensor cores.

    python csrc/cuda/resources.py build/cuda          objects, shared objects, or folders of them

Reads the machine code with cuobjdump (of the CUDA toolkit, else of the triton wheel), prints a table for each
architecture, and exits with 1 if a kernel has no tensor-core instruction or needs more shared memory than a block can
have; or if, at a default head dim, a plain one spills or any one's main loop reaches for local memory. Only the home of
these kernels, sm_80 with 16-bit elements, is held to none at all: elsewhere ptxas parks a few seldom used values.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

DEFAULT_DIMS = (64, 128)
# What is let pass outside of sm_80 and 16-bit elements: bytes of spilled registers a thread, and tensor-core
# instructions for each access to local memory in a loop.
SPILL = 32
PRODUCTS_PER_LOCAL = 8
# Kernels without matrix products.
SCALAR = ("Combine", "Delta")


@dataclass(frozen=True)
class Arch:
    """A multiprocessor's limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared: int  # bytes
    shared_of_block: int
    threads: int
    blocks: int


# Of each block's shared memory.
SYSTEM = 1024


def _arch(shared_kib: int, threads: int, blocks: int) -> Arch:
    return Arch(shared_kib * 1024, shared_kib * 1024 - SYSTEM, threads, blocks)


ARCHS = {
    "sm_80": _arch(164, 2048, 32),
    "sm_86": _arch(100, 1536, 16),
    "sm_87": _arch(164, 1536, 16),
    "sm_89": _arch(100, 1536, 24),
    "sm_90": _arch(228, 2048, 32),
    "sm_100": _arch(228, 2048, 32),
    "sm_103": _arch(228, 2048, 32),
    "sm_120": _arch(100, 1536, 24),
    "sm_121": _arch(100, 1536, 24),
}


@dataclass
class Kernel:
    """One kernel's machine code for one architecture."""

    arch: str
    name: str  # "Forward<Half, 64, false>"
    threads: int
    shared: int  # bytes, dynamic and static
    registers: int = 0
    local: int = 0  # bytes of stack and local memory a thread
    loads: int = 0  # LDL: from local memory
    stores: int = 0  # STL
    looped: int = 0  # of the two, in loops around tensor-core instructions
    products: int = 0  # tensor-core instructions

    @property
    def dim(self) -> int | None:
        """The head dim that the kernel is compiled for; None if for all."""
        found = re.search(r", (\d+)", self.name)
        return int(found[1]) if found else None

    @property
    def plain(self) -> bool:
        """Whether it is the one for logits without bias, softcap and the like: its flag after the head dim is false."""
        return re.search(r", \d+, false", self.name) is not None

    def blocks(self) -> int:
        """Blocks that fit a multiprocessor at a time."""
        limits = ARCHS[self.arch]
        warps = -(-self.threads // 32)
        # Registers come by 256 a warp, from a quarter of 64 Ki for each of the four schedulers.
        by_registers = 4 * (16384 // _ceil(self.registers * 32, 256)) // warps if self.registers else limits.blocks
        by_shared = limits.shared // (_ceil(self.shared, 128) + SYSTEM)
        return min(by_registers, by_shared, limits.threads // (warps * 32), limits.blocks)

    def faults(self, default_dims: Sequence[int]) -> list[str]:
        """What must not be."""
        limit = ARCHS[self.arch].shared_of_block
        faults = []
        if self.shared > limit:
            faults.append(f"needs {self.shared} bytes of shared memory, a block has {limit}")
        if self.blocks() == 0:
            faults.append("does not fit a multiprocessor")
        if not self.products and not self.name.startswith(SCALAR):
            faults.append("has no tensor-core instruction")
        if self.dim is None or self.dim in default_dims:
            strict = self.arch == "sm_80" and "<float" not in self.name
            if self.plain and (self.local > (0 if strict else SPILL) or (strict and self.loads + self.stores)):
                faults.append(f"spills: {self.local} bytes, {self.loads} loads, {self.stores} stores")
            elif self.looped > (0 if strict else self.products // PRODUCTS_PER_LOCAL):
                faults.append(f"reaches {self.looped} times for local memory in its main loop")
        return faults


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def find_tool(name: str) -> str:
    """The toolkit's cuobjdump, or the one that the triton wheel carries."""
    found = shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    spec = None if found else importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends/nvidia/bin"))
    return found or sys.exit(f"{name} not found: put the CUDA toolkit's on PATH, or pip install triton")


def objects(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and every CUDA object under the folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*.cu.o")) if path.is_dir() else [path])]
    return files or sys.exit("no CUDA objects there")


def read(files: Sequence[Path]) -> list[Kernel]:
    """Every kernel in the files, once per architecture; but conformance.cuh's, which compute nothing."""
    cuobjdump = find_tool("cuobjdump")

    def kernels_of(file: Path) -> list[Kernel]:
        usage = _run(cuobjdump, "-res-usage", str(file))
        names = _demangle(sorted(set(re.findall(r"^ Function (\w+):", usage, re.MULTILINE))))
        found = parse_usage(usage.splitlines(), names)
        parse_machine_code(_run(cuobjdump, "-sass", str(file)).splitlines(), found)
        return list(found.values())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = {(kernel.arch, kernel.name): kernel for some in pool.map(kernels_of, files) for kernel in some}
    computing = (kernel for kernel in kernels.values() if "Conformance" not in kernel.name)
    return sorted(computing, key=lambda kernel: (_order(kernel.arch), kernel.name))


def _order(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


def parse_usage(lines: Iterable[str], names: dict[str, str]) -> dict[tuple[str, str], Kernel]:
    """The kernels of ``cuobjdump -res-usage``, by architecture and mangled name."""
    found: dict[tuple[str, str], Kernel] = {}
    arch = symbol = ""
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            symbol = line.removeprefix(" Function ").rstrip(":")
        elif line.startswith("  REG:"):
            numbers = {name: int(number) for name, number in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", line)}
            kernel = named(arch, names[symbol])
            kernel.registers, kernel.local = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
            # From sm_90 on the count includes the system's part of a block.
            kernel.shared += numbers["SHARED"] - (SYSTEM if numbers["SHARED"] and _order(arch) >= 90 else 0)
            found[arch, symbol] = kernel
    return found


def named(arch: str, name: str) -> Kernel:
    """The kernel that launch.cuh's entry<kernel, threads, shared bytes> runs.

    Dynamic shared memory is asked for at launch: the machine code has it nowhere but in this name.
    """
    found = re.search(r"\bentry<(.+), (\d+), (\d+)>\(", name)
    if found is None or arch not in ARCHS:
        sys.exit(f"cannot read the kernel {name!r} for {arch}")
    return Kernel(arch, re.sub(r"\b\w+::", "", found[1]), int(found[2]), int(found[3]))


def parse_machine_code(lines: Iterable[str], found: dict[tuple[str, str], Kernel]) -> None:
    """Counts instructions in the output of ``cuobjdump -sass``."""
    arch = symbol = ""
    # For each kernel the addresses of what counts, and its loops: from the target of a branch backwards to the branch.
    counted: dict[tuple[str, str], dict[str, list[int]]] = {}
    loops: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for line in lines:
        if line.startswith("\t\tFunction : "):
            symbol = line.removeprefix("\t\tFunction : ").strip()
            counted[arch, symbol], loops[arch, symbol] = {"MMA": [], "LDL": [], "STL": []}, []
        elif line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif any(kind in line for kind in _KINDS) and (match := _COUNTED.match(line)):
            address, kind = int(match[1], 16), match[2]
            if kind != "BRA":
                counted[arch, symbol][kind[-3:]].append(address)
            elif (target := int(match[3], 16)) < address:
                loops[arch, symbol].append((target, address))
    for key, addresses in counted.items():
        kernel, products, local = found[key], addresses["MMA"], addresses["LDL"] + addresses["STL"]
        kernel.products, kernel.loads, kernel.stores = len(products), len(addresses["LDL"]), len(addresses["STL"])
        main = [(first, last) for first, last in loops[key] if any(first <= at <= last for at in products)]
        kernel.looped = sum(any(first <= at <= last for first, last in main) for at in local)


_KINDS = ("MMA", "LDL", "STL", "BRA")
# An instruction's address, predicate, and opcode; a branch's target.
_COUNTED = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z]*MMA|LDL|STL|BRA)\b(?:.*?\b0x([0-9a-f]+) ?;)?")


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


def _demangle(symbols: Sequence[str]) -> dict[str, str]:
    names = _run("c++filt", text="\n".join(symbols)).splitlines()
    return dict(zip(symbols, names, strict=True))


HEAD = "regs  threads  shared KiB  blocks/SM  warps  tensor ops  local B  LDL  STL  looped"


def table(kernels: Sequence[Kernel]) -> str:
    """A row for each kernel, the architectures one after the other."""
    width = max(len(kernel.name) for kernel in kernels)
    lines = []
    for before, kernel in zip([None, *kernels], kernels, strict=False):
        if before is None or before.arch != kernel.arch:
            lines += ["", f"{kernel.arch:{width}}  {HEAD}"]
        warps = kernel.blocks() * kernel.threads // 32 / (ARCHS[kernel.arch].threads // 32)
        lines.append(
            f"{kernel.name:{width}}  {kernel.registers:4}  {kernel.threads:7}  {kernel.shared / 1024:10.1f}  "
            f"{kernel.blocks():9}  {warps:5.0%}  {kernel.products:10}  "
            f"{kernel.local:7}  {kernel.loads:3}  {kernel.stores:3}  {kernel.looped:6}"
        )
    return "\n".join(lines[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Table and checks of the CUDA kernels' machine code.")
    parser.add_argument("paths", nargs="+", type=Path, help="CUDA objects, shared objects, or folders with *.cu.o")
    options = parser.parse_args(arguments)
    kernels = read(objects(options.paths))
    print(table(kernels))
    faults = [f"{kernel.arch} {kernel.name} {fault}" for kernel in kernels for fault in kernel.faults(DEFAULT_DIMS)]
    print(f"\n{len(kernels)} kernels, {len(faults)} faults", *faults, sep="\n  ")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
