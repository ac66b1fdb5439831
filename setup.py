"""Builds flashx._C with CMake and Ninja. Metadata is in pyproject.toml, compiling in CMakeLists.txt."""

import os
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


def fail(message):
    sys.exit(f"\nflashx: {message}\n")


def find_tool(name):
    """The path of cmake or ninja: build isolation puts them on PATH, a venv keeps them beside its Python."""
    tool = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    return tool or fail(f"{name} not found; pip install {name}, or build without --no-build-isolation")


def cuda_compiler():
    """The nvcc to build csrc/cuda with, or None to leave CUDA out, as FLASHX_CUDA=auto|0|1 demands."""
    setting = os.environ.get("FLASHX_CUDA") or "auto"
    if setting not in ("auto", "0", "1"):
        fail(f"FLASHX_CUDA must be auto, 0 or 1, got {setting!r}")
    has_sources = (ROOT / "csrc/cuda/CMakeLists.txt").exists()
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")
    if setting == "1" and not has_sources:
        fail("FLASHX_CUDA=1, but this version has no CUDA sources; set FLASHX_CUDA to auto or 0")
    if setting == "1" and not nvcc:
        fail("FLASHX_CUDA=1, but nvcc was not found; put it on PATH, set CUDA_HOME, or set FLASHX_CUDA=0")
    return nvcc if has_sources and setting != "0" else None


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            fail("Python.h not found; install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)")
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not (jobs.isdecimal() and int(jobs) > 0):
            fail(f"MAX_JOBS must be a positive integer, got {jobs!r}")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake, nvcc = find_tool("cmake"), cuda_compiler()
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}")
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        configure += ["-DFLASHX_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else ["-DFLASHX_CUDA=OFF"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))

        # The same configuration builds incrementally, another one from nothing: no cache goes stale.
        flags = [f"{name}={os.environ.get(name)}" for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
        record, wanted = build / "configuration.txt", "\n".join(configure + flags)
        if not record.exists() or record.read_text() != wanted:
            shutil.rmtree(build, ignore_errors=True)
        if subprocess.run(configure).returncode:
            fail("CMake could not configure the build, see above (most often: no g++ 10 or newer)")
        record.write_text(wanted)
        if subprocess.run([cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])]).returncode:
            fail("the C++ sources did not compile, see the compiler's message above")
        module = Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(module.parent))
        self.copy_file(str(build / module.name), str(module))


cuda_compiler()  # a bad FLASHX_CUDA stops every command at once, before any other output
moved = find_packages(include=["bench", "bench.*", "triton_impl", "triton_impl.*"])
setup(
    packages=find_packages(include=["flashx", "flashx.*"]) + [f"flashx.{name}" for name in moved],
    package_dir={"flashx.bench": "bench", "flashx.triton_impl": "triton_impl"},
    ext_modules=[Extension("flashx._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
