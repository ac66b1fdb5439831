"""The environment stamp: what must be known to read or repeat a measurement."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flashx

# Above this load before the start, a run on the CPU is not alone.
IDLE_LOAD = 0.5
# A clock that has lost more than this share of its pace since the start was throttled, or was boosted before.
THROTTLED = 0.9


def stamp(device: str = "cpu") -> dict[str, Any]:
    """CPU model, threads, instruction set, clock, load, versions and, in a checkout of flashx, its commit."""
    found = {
        "device": device,
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mhz": cpu_mhz(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "flashx": flashx.build_info(),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return found | ({"gpu": gpu_stamp()} if device == "cuda" else {})


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """How two stamps differ in what decides on times, one sentence each; empty if they do not."""
    pairs = {name: (one.get(name), other.get(name)) for name in ("device", "cpu", "threads", "torch", "commit")}
    pairs |= {
        f"flashx's {name}": (one.get("flashx", {}).get(name), other.get("flashx", {}).get(name))
        for name in ("version", "cpu_isa")
    }
    pairs["gpu"] = (one.get("gpu", {}).get("name"), other.get("gpu", {}).get("name"))
    return [f"{name} is {first!r} and {second!r}" for name, (first, second) in pairs.items() if first != second]


def warnings(before: dict[str, Any], mhz_after: float | None = None) -> list[str]:
    """What makes the timings of a run on the CPU doubtful."""
    doubts = []
    load = before["load"]
    if before["device"] == "cpu" and load is not None and load > IDLE_LOAD:
        doubts.append(f"load average {load:.2f} before the start (over {IDLE_LOAD}): other work shares this machine")
    if before["mhz"] and mhz_after and mhz_after < THROTTLED * before["mhz"]:
        doubts.append(f"CPU clock fell from {before['mhz']:.0f} to {mhz_after:.0f} MHz: throttled, or boosted before")
    if before.get("gpu", {}).get("throttled"):
        doubts.append(f"the GPU is throttled: {before['gpu']['throttled']}")
    return doubts


def cpu_mhz() -> float | None:
    """The mean clock of all CPUs now, where the system tells."""
    clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return sum(map(float, clocks)) / len(clocks) if clocks else None


def gpu_stamp() -> dict[str, Any]:
    """What must be known of the GPU."""
    device = torch.cuda.get_device_properties(0)
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks_throttle_reasons.active")
    driver, clock, limit, throttled = (_nvidia_smi(name) for name in names)
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory": device.total_memory,
        "driver": driver,
        "clock": clock,
        "max_clock": limit,
        # Bit 0 is an idle GPU.
        "throttled": throttled if throttled and int(throttled, 16) & ~1 else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _nvidia_smi(name: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = next(iter(done.splitlines()), "").strip()
    return found if found and not found.startswith("[") else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, "-dirty" behind it if files differ; None for an installed flashx."""
    here = Path(__file__).resolve()
    # An environment may lie inside somebody else's repository: only one that tracks this file is flashx's.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
