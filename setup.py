"""Builds the C++ libraries with CMake and puts them into the package.

Sources and flags stand in CMakeLists.txt. More definitions for CMake go through the environment
variable CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "python" / "attn_mask"


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package's folder."""

    def run(self) -> None:
        in_source = self.inplace or self.editable_mode
        prefix = PACKAGE if in_source else Path(self.build_lib).resolve() / "attn_mask"
        # A tree for each Python and torch, so that changing to another and back builds nothing
        # anew.
        tag = f"{sys.implementation.cache_tag}-torch{version('torch')}"
        tree = ROOT / "build" / f"cmake-{tag}"
        cmake = shutil.which("cmake") or "cmake"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(tree)),
            "-DATTN_MASK_PYTHON=ON",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        if not (tree / "CMakeCache.txt").exists() and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = str(self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count())
        subprocess.check_call(configure)
        subprocess.check_call([cmake, "--build", str(tree), "--parallel", jobs])
        # Of another torch, which may have had CUDA kernels where this one has none.
        shutil.rmtree(prefix / "lib", ignore_errors=True)
        subprocess.check_call([cmake, "--install", str(tree), "--prefix", str(prefix)])

    def get_outputs(self) -> list[str]:
        prefix = Path(self.build_lib) / "attn_mask"
        return [str(path) for path in prefix.rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install uses the files in the source tree as they are


setup(
    ext_modules=[Extension("attn_mask._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
