"""The CUDA kernels' build: setup.py's settings, CMake's instances, the checks on the machine code (resources.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[1]

SETTINGS = ("FLASHX_CUDA", "FLASHX_CUDA_ARCHS", "FLASHX_EMULATOR", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs setup.py under some settings, with a stand-in for nvcc on PATH; gives its functions and values."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)

    def run(nvcc: bool = True, **environment: str) -> dict[str, Any]:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path) if nvcc else "")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))

    return run


@pytest.mark.parametrize(
    "environment, archs",
    [
        ({}, "80;90;100;120+PTX"),
        ({"FLASHX_CUDA_ARCHS": "90"}, "90+PTX"),
        ({"FLASHX_CUDA_ARCHS": "80;90"}, "80;90+PTX"),
        ({"FLASHX_CUDA_ARCHS": " 80 90; "}, "80;90+PTX"),
        ({"FLASHX_CUDA_ARCHS": "80+PTX;120"}, "80+PTX;120"),
        ({"FLASHX_CUDA_ARCHS": "90", "TORCH_CUDA_ARCH_LIST": "8.0"}, "90+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "80;90+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6 9.0a 12.0"}, "86;90;120"),
        ({"FLASHX_CUDA_ARCHS": "", "TORCH_CUDA_ARCH_LIST": " 10.0 "}, "100"),
    ],
)
def test_architectures(settings: Any, environment: dict[str, str], archs: str) -> None:
    assert ";".join(settings(**environment)["cuda_archs"]()) == archs


@pytest.mark.parametrize(
    "environment, parts",
    [
        ({"FLASHX_CUDA": "yes"}, ("FLASHX_CUDA must be auto, 0 or 1", "'yes'")),
        ({"FLASHX_EMULATOR": "auto"}, ("FLASHX_EMULATOR must be 0 or 1", "'auto'")),
        ({"FLASHX_CUDA_ARCHS": "8.0"}, ("FLASHX_CUDA_ARCHS must be a list such as '80;90;100;120'", "'8.0'")),
        ({"FLASHX_CUDA_ARCHS": "sm_90"}, ("FLASHX_CUDA_ARCHS", "'sm_90'")),
        ({"FLASHX_CUDA_ARCHS": "80,90"}, ("FLASHX_CUDA_ARCHS", "'80,90'")),
        ({"FLASHX_CUDA_ARCHS": ";"}, ("FLASHX_CUDA_ARCHS", "';'")),
        ({"FLASHX_CUDA_ARCHS": "80;75"}, ("FLASHX_CUDA_ARCHS", "8.0 or newer", "'75'")),
        ({"TORCH_CUDA_ARCH_LIST": "7.5;8.0"}, ("TORCH_CUDA_ARCH_LIST", "8.0 or newer", "'7.5'")),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, ("TORCH_CUDA_ARCH_LIST must be a list such as '8.0;9.0+PTX'", "'Hopper'")),
        ({"nvcc": False, "FLASHX_CUDA": "1"}, ("FLASHX_CUDA=1, but nvcc was not found",)),
    ],
)
def test_bad_settings(settings: Any, environment: dict[str, Any], parts: tuple[str, ...]) -> None:
    """Each stops setup.py with a message that names the variable, the rule and the value."""
    with pytest.raises(SystemExit) as stopped:
        settings(**environment)
    assert all(part in str(stopped.value) for part in parts), stopped.value


def test_what_is_built(settings: Any, tmp_path: Path) -> None:
    assert settings()["cuda_compiler"]() == str(tmp_path / "nvcc")
    assert settings(CUDACXX="/opt/nvcc")["cuda_compiler"]() == "/opt/nvcc"
    assert settings(nvcc=False)["cuda_compiler"]() is None
    # Where CUDA is left out, nobody's list for other projects stands in the way.
    assert settings(FLASHX_CUDA="0", TORCH_CUDA_ARCH_LIST="7.0")["cuda_compiler"]() is None
    assert settings()["EMULATOR"] == "0" and settings(FLASHX_EMULATOR="1")["EMULATOR"] == "1"


def _cmake() -> str | None:
    return shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")


@pytest.mark.skipif(_cmake() is None, reason="CMake is not installed")
@pytest.mark.parametrize("dims", ["32;64;96;128;192;256", "64"])
def test_instances(dims: str, tmp_path: Path) -> None:
    """One translation unit per pass, element type and head dim, its text the same for nvcc and for the emulator."""
    options = ["-DFLASHX_CUDA=OFF", "-DFLASHX_EMULATOR=OFF", f"-DFLASHX_DIMS={dims}"]
    command = [_cmake(), "-S", str(ROOT / "csrc/cuda"), "-B", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    instances = tmp_path / "instances"
    for suffix in ("cu", "cpp"):
        units = {file.name: file.read_text() for file in instances.glob(f"*ward_*.{suffix}")}
        assert len(units) == 2 * 3 * len(dims.split(";"))
        for pass_, dtype in (("Forward", "Half"), ("Backward", "BFloat16"), ("Backward", "float")):
            text = units[f"{pass_}_{dtype}_64.{suffix}".lower()]
            assert f'#include "cuda/sm80/instance_{pass_.lower()}.cuh"' in text
            assert f"template struct {pass_}Instance<{dtype}, 64>;" in text
    assert f"#define FLASHX_DIMS {dims.replace(';', ', ')}\n" in (instances / "built.h").read_text()


# resources.py


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resources", ROOT / "csrc/cuda/resources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Zforward:
  REG:{registers} STACK:{stack} SHARED:16 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Zdelta:
  REG:20 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

MACHINE_CODE = """
arch = sm_80
\tcode for sm_80
\t\tFunction : _Zforward
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;       /* 0x00000a00ff017624 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;         /* 0x0000000804047220 */
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;         /* 0x0000000804047220 */
        /*0030*/                   LDSM.16.M88.4 R8, [R20] ;                     /* 0x000000001408783b */
{more}
\t\tFunction : _Zdelta
        /*0000*/                   FADD R1, R2, R3 ;                             /* 0x0000000302017221 */
"""


def _kernels(
    resources: ModuleType,
    registers: int = 128,
    stack: int = 0,
    shared: int = 32768,
    dim: int = 64,
    flag: str = "false",
    more: str = "",
    code: str = MACHINE_CODE,
) -> list[Any]:
    half, space = "flashx::Half", "flashx::cuda::"
    names = {
        "_Zforward": f"void {space}entry<{space}Forward<{half}, {dim}, {flag}>, 128, {shared}>"
        f"({space}Forward<{half}, {dim}, {flag}>::Params)",
        "_Zdelta": f"void {space}entry<{space}Delta<{half}>, 128, 0>({space}Delta<{half}>::Params)",
    }
    found = resources.parse_usage(USAGE.format(registers=registers, stack=stack).splitlines(), names)
    resources.parse_machine_code(code.format(more=more).splitlines(), found)
    return list(found.values())


def test_what_the_machine_code_says(resources: ModuleType) -> None:
    forward, delta = _kernels(resources)
    assert (forward.arch, forward.name, forward.dim) == ("sm_80", "Forward<Half, 64, false>", 64)
    assert (forward.threads, forward.shared, forward.registers) == (128, 32768 + 16, 128)
    assert (forward.products, forward.local, forward.loads, forward.stores) == (2, 0, 0, 0)
    assert (delta.name, delta.dim, delta.products) == ("Delta<Half>", None, 0)
    assert forward.faults((64, 128)) == delta.faults((64, 128)) == []
    shown = resources.table([forward, delta]).splitlines()
    assert shown[0].split()[:2] == ["sm_80", "regs"]
    assert shown[1].split()[3:] == ["128", "128", "32.0", "4", "25%", "2", "0", "0", "0", "0"]


LOCAL = "        /*{address}*/                   {opcode}.64 R8, [R1+0x8] ;                  /* 0x0000000001087983 */"
BRANCH = "        /*0060*/              @!P1 BRA {target} ;                              /* 0xfffffca000008947 */"


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"more": LOCAL.format(address="0040", opcode="LDL")}, "spills: 0 bytes, 1 loads, 0 stores"),
        ({"more": LOCAL.format(address="0040", opcode="STL")}, "spills: 0 bytes, 0 loads, 1 stores"),
        ({"stack": 48}, "spills: 48 bytes"),
        ({"shared": 164 * 1024}, "a block has 166912"),
        ({"code": MACHINE_CODE.replace("HMMA", "FFMAX")}, "has no tensor-core instruction"),
    ],
)
def test_faults(resources: ModuleType, changes: dict[str, Any], fault: str) -> None:
    forward, _ = _kernels(resources, **changes)
    assert fault in "; ".join(forward.faults((64, 128)))


@pytest.mark.parametrize(
    "more, looped",
    [
        (LOCAL.format(address="0040", opcode="LDL"), 0),
        (LOCAL.format(address="0040", opcode="LDL") + "\n" + BRANCH.format(target="0x80"), 0),  # forwards
        (LOCAL.format(address="0040", opcode="LDL") + "\n" + BRANCH.format(target="0x30"), 0),  # no product in the loop
        (LOCAL.format(address="0040", opcode="LDL") + "\n" + BRANCH.format(target="0x20"), 1),
        (LOCAL.format(address="0040", opcode="STL") + "\n" + BRANCH.format(target="P2, 0x10"), 1),
        (BRANCH.format(target="0x10") + "\n" + LOCAL.format(address="0070", opcode="LDL"), 0),  # after the loop
    ],
)
def test_local_memory_in_the_main_loop(resources: ModuleType, more: str, looped: int) -> None:
    """A general kernel may spill outside of its main loop."""
    forward, _ = _kernels(resources, stack=16, more=more, flag="true")
    assert forward.looped == looped
    fault = ["reaches 1 times for local memory in its main loop"]
    assert forward.faults((64, 128)) == (fault if looped else [])


@pytest.mark.parametrize(
    "changes, faults",
    [({"local": 32}, 0), ({"local": 40}, 1), ({"products": 16, "looped": 2}, 0), ({"products": 16, "looped": 3}, 1)],
)
def test_newer_architectures_may_spill_a_little(resources: ModuleType, changes: dict[str, int], faults: int) -> None:
    forward, _ = _kernels(resources)
    newer = dataclasses.replace(forward, arch="sm_90", name=forward.name.replace("false", "true"), **changes)
    if "local" in changes:
        newer.name = forward.name
    assert len(newer.faults((64, 128))) == faults
    assert len(dataclasses.replace(newer, arch="sm_80").faults((64, 128))) == 1


def test_other_head_dims_may_spill(resources: ModuleType) -> None:
    forward, _ = _kernels(resources, stack=48, dim=256)
    assert forward.faults((64, 128)) == [] and forward.faults((256,)) != []


@pytest.mark.parametrize(
    "registers, shared, blocks",
    [
        (255, 0, 2),  # 8 warps of 8192 registers each
        (168, 0, 3),  # 12 warps of 5376
        (128, 0, 4),
        (32, 0, 16),  # 2048 threads
        (32, 80 * 1024, 2),  # 164 KiB, 1 of them the system's for each block
        (32, 82 * 1024, 1),
        (32, 163 * 1024 - 16, 1),
    ],
)
def test_occupancy(resources: ModuleType, registers: int, shared: int, blocks: int) -> None:
    forward, _ = _kernels(resources, registers=registers, shared=shared)
    assert forward.blocks() == blocks


@pytest.mark.parametrize(
    "arch, static, shared, blocks",
    [
        ("sm_80", 0, 49 * 1024, 3),
        ("sm_90", 1024, 49 * 1024, 4),  # 1 KiB of static shared memory is the system's, counted once
        ("sm_120", 1024, 49 * 1024, 2),
        ("sm_120", 1040, 49 * 1024 + 16, 1),
    ],
)
def test_the_systems_shared_memory(resources: ModuleType, arch: str, static: int, shared: int, blocks: int) -> None:
    usage = USAGE.format(registers=64, stack=0).replace("sm_80", arch).replace("SHARED:16", f"SHARED:{static}")
    name = f"void entry<Forward<Half, 64, false>, 128, {49 * 1024}>(int)"
    found = resources.parse_usage(usage.splitlines(), {"_Zforward": name, "_Zdelta": name})
    kernel = found[arch, "_Zforward"]
    assert (kernel.shared, kernel.blocks()) == (shared, blocks)


def test_an_unknown_name_stops_the_check(resources: ModuleType) -> None:
    """A kernel that the check cannot read must not pass it."""
    with pytest.raises(SystemExit, match="cannot read the kernel 'mystery"):
        resources.named("sm_80", "mystery(int)")
    with pytest.raises(SystemExit, match="sm_70"):
        resources.named("sm_70", "entry<Forward<Half, 64>, 128, 0>(int)")
