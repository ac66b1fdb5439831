"""Builds flashx._C with CMake and Ninja. Metadata is in pyproject.toml, compiling in CMakeLists.txt."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_ARCH = 80
DEFAULT_ARCHS = "80;90;100;120"


def fail(message):
    sys.exit(f"\nflashx: {message}\n")


def find_tool(name):
    """The path of cmake or ninja: build isolation puts them on PATH, a venv keeps them beside its Python."""
    tool = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    return tool or fail(f"{name} not found; pip install {name}, or build without --no-build-isolation")


def setting(name, default, allowed):
    """An environment variable that must have one of the allowed values."""
    value = os.environ.get(name) or default
    if value not in allowed:
        fail(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


def cuda_compiler():
    """The nvcc to build csrc/cuda with, or None to leave CUDA out, as FLASHX_CUDA=auto|0|1 demands."""
    wanted = setting("FLASHX_CUDA", "auto", ("auto", "0", "1"))
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")
    if wanted == "1" and not nvcc:
        fail("FLASHX_CUDA=1, but nvcc was not found; put it on PATH, set CUDA_HOME, or set FLASHX_CUDA=0")
    return nvcc if wanted != "0" else None


def cuda_archs():
    """What to compile csrc/cuda for, as csrc/cuda/CMakeLists.txt takes it: ["80", "90+PTX"].

    FLASHX_CUDA_ARCHS ("80;90": machine code for each and PTX of the last, unless some item says +PTX itself), else
    TORCH_CUDA_ARCH_LIST in torch's syntax ("8.0;9.0+PTX", or with spaces).
    """
    for name, form, example in (
        ("FLASHX_CUDA_ARCHS", r"(\d{2,3})(\+PTX)?", DEFAULT_ARCHS),
        # a and f: what one chip or one family has beyond the rest. Kernels that use it are built so anyway.
        ("TORCH_CUDA_ARCH_LIST", r"(\d{1,2}\.\d)[af]?(\+PTX)?", "8.0;9.0+PTX"),
    ):
        value = os.environ.get(name, "").strip()
        if not value:
            continue
        archs = []
        for item in re.split(r"[;\s]+", value.strip("; ")):
            match = re.fullmatch(form, item)
            if not match:
                fail(f"{name} must be a list such as {example!r}, got {value!r}")
            number, ptx = match[1].replace(".", ""), match[2] or ""
            if int(number) < OLDEST_ARCH:
                fail(f"{name}: the CUDA kernels need compute capability 8.0 or newer, got {item!r}")
            archs.append(number + ptx)
        archs = list(dict.fromkeys(archs))
        if name == "FLASHX_CUDA_ARCHS" and "+PTX" not in value:
            archs[-1] += "+PTX"
        return archs
    return f"{DEFAULT_ARCHS}+PTX".split(";")


def generator():
    """CMake's arguments for the tool that runs the compilers: Ninja, or make where there is no Ninja."""
    make = shutil.which("make")
    if make and not (shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))):
        return ["-G", "Unix Makefiles"]
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            fail("Python.h not found; install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)")
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not (jobs.isdecimal() and int(jobs) > 0):
            fail(f"MAX_JOBS must be a positive integer, got {jobs!r}")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake, nvcc = find_tool("cmake"), cuda_compiler()
        configure = [cmake, *generator(), "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        configure.append(f"-DFLASHX_EMULATOR={EMULATOR}")
        configure.append(f"-DFLASHX_CUDA={1 if nvcc else 0}")
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DFLASHX_CUDA_ARCHS={';'.join(cuda_archs())}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))

        # The same configuration builds incrementally, another one from nothing: no cache goes stale.
        flags = [f"{name}={os.environ.get(name)}" for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
        record, wanted = build / "configuration.txt", "\n".join(configure + flags)
        if not record.exists() or record.read_text() != wanted:
            shutil.rmtree(build, ignore_errors=True)
        if subprocess.run(configure).returncode:
            fail("CMake could not configure the build, see above (most often: no g++ 10 or newer)")
        record.write_text(wanted)
        if "Ninja" not in configure and not jobs:
            jobs = str(os.cpu_count())  # Ninja's own choice is about that
        if subprocess.run([cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])]).returncode:
            fail("the C++ sources did not compile, see the compiler's message above")
        module = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(module.parent))
        self.copy_file(str(build / module.name), str(module))


# A bad setting stops every command at once, before any other output.
EMULATOR = setting("FLASHX_EMULATOR", "0", ("0", "1"))
if cuda_compiler():
    cuda_archs()
moved = find_packages(include=["bench", "bench.*", "triton_impl", "triton_impl.*"])
setup(
    packages=find_packages(include=["flashx", "flashx.*"]) + [f"flashx.{name}" for name in moved],
    package_dir={"flashx.bench": "bench", "flashx.triton_impl": "triton_impl"},
    ext_modules=[Extension("flashx._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
