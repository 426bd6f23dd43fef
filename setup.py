"""Builds the C++ libraries with CMake and puts them into the package.

Sources and flags stand in CMakeLists.txt, as does the version. More definitions for CMake go
through the environment variable CMAKE_ARGS. What can't be built is said in one line.
"""

import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:
    sys.exit("attn_mask: no packaging for this Python: run pip install packaging")

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "python" / "attn_mask"
REQUIRED = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
# Packaging reads versions, of torch and of transformers.
TORCH, PACKAGING = (
    next(one for one in REQUIRED if one.startswith(name)) for name in ("torch", "packaging")
)


def stop(text: str) -> NoReturn:
    raise SystemExit(f"attn_mask: {text}")


def tool(name: str) -> str | None:
    """The environment's own program first, also where the environment is not activated."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return shutil.which(name, path=path)


def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        stop(f"this failed, for the reason above: {shlex.join(command)} ({error})")


def torch_version() -> str:
    try:
        found = version("torch")
    except PackageNotFoundError:
        stop(f"no torch for {sys.executable}: first run pip install '{TORCH}'")
    if not Requirement(TORCH).specifier.contains(Version(found).base_version):
        stop(f"torch {found} is installed, but this needs another: pip install '{TORCH}'")
    return found


@functools.cache
def build_tree() -> tuple[str, Path]:
    """CMake, and where it builds: configured, so that it is known what the package will be."""
    # A tree for each Python and torch, so that changing to another and back builds nothing anew.
    tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch_version()}"
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        stop("no cmake found: run pip install cmake ninja (or apt-get install cmake ninja-build)")
    compiler = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compiler)):
        stop(f"no C++ compiler found ({', '.join(compiler)}): run apt-get install g++, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop(f"no Python.h for {sys.executable}: run apt-get install python3-dev")
    configure = [
        cmake,
        *("-S", str(ROOT), "-B", str(tree)),
        "-DATTN_MASK_PYTHON=ON",
        "-DCMAKE_INSTALL_LIBDIR=lib",
        f"-DPython3_EXECUTABLE={sys.executable}",
    ]
    cache = tree / "CMakeCache.txt"
    if cache.exists():
        kept = re.search(r"^CMAKE_MAKE_PROGRAM:\w+=(.*)", cache.read_text(), re.M)
        # pip removes the environment that it has made for a build.
        is_stale = kept is None or shutil.which(kept[1]) is None
        configure += ["--fresh"] if is_stale else []
    if ninja is not None and ("--fresh" in configure or not cache.exists()):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run(*configure, *shlex.split(os.environ.get("CMAKE_ARGS", "")))
    return cmake, tree


def identity() -> dict[str, Any]:
    """The version and what it depends on. Those of sources leave open what they are built for."""
    if not {"sdist", "egg_info", "clean"}.isdisjoint(sys.argv[1:]):
        text = (ROOT / "CMakeLists.txt").read_text()
        (plain,) = re.findall(r"^project\(attn_mask VERSION ([\d.]+)", text, re.M)
        return {"version": plain, "install_requires": [TORCH, PACKAGING]}
    is_wheel = not {"bdist_wheel", "dist_info", "editable_wheel"}.isdisjoint(sys.argv)
    if is_wheel and not any(map(find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        stop("setuptools before 70.1 needs another package: run pip install wheel")
    built_for = runpy.run_path(str(build_tree()[1] / "generated" / "_built_for.py"))
    minor = ".".join(built_for["TORCH_VERSION"].split(".")[:2])
    return {"version": built_for["VERSION"], "install_requires": [f"torch=={minor}.*", PACKAGING]}


class CMakeBuild(build_ext):
    """Builds and installs the CMake project into the package's folder."""

    def run(self) -> None:
        in_source = self.inplace or self.editable_mode
        prefix = PACKAGE if in_source else Path(self.build_lib).resolve() / "attn_mask"
        cmake, tree = build_tree()
        jobs = str(self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count())
        run(cmake, "--build", str(tree), "--parallel", jobs)
        # Of another torch, which may have had CUDA kernels where this one has none.
        shutil.rmtree(prefix / "lib", ignore_errors=True)
        run(cmake, "--install", str(tree), "--prefix", str(prefix))

    def get_outputs(self) -> list[str]:
        prefix = Path(self.build_lib) / "attn_mask"
        return [str(path) for path in prefix.rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install uses the files in the source tree as they are


setup(
    ext_modules=[Extension("attn_mask._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    **identity(),
)
