"""C++ projects that use the library: from a prefix, from the Python package, from the sources.

The project is tests/cpp/consumer. It is built without a CUDA toolkit, which torch's own CMake
package requires.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import attn_mask
import pytest
import torch

ROOT = Path(__file__).parents[2]
CONSUMER = ROOT / "tests" / "cpp" / "consumer"
# CMake knows no local part.
VERSION = attn_mask.__version__.split("+")[0]
TAG = f"{sys.implementation.cache_tag}-torch{torch.__version__.split('+')[0]}"
BUILD_TREE = Path(os.environ.get("ATTN_MASK_BUILD_TREE", ROOT / "build" / f"cmake-{TAG}"))
TORCH = Path(torch.__file__).parent
PACKAGE_PREFIX = attn_mask.utils.cmake_prefix_path
KERNELS = "cpu cuda" if attn_mask.build_info()["cuda_version"] else "cpu"

# The tools of this environment, not those of the system.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which("c++")),
    reason="cmake, ninja or a C++ compiler is not installed",
)


def run(*command):
    """Where no CUDA toolkit is found by its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")}
    folders = environment["PATH"].split(os.pathsep)
    environment["PATH"] = os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())
    environment.pop("LD_LIBRARY_PATH", None)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def output_of(*command):
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(build, *arguments, source=CONSUMER):
    hidden = ("CUDA", "CUDAToolkit", "Python3", "Torch")
    return run(
        *("cmake", "-G", "Ninja", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE="),
        *(f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in hidden),
        *arguments,
    )


def build(folder, prefix, *targets):
    configured = configure(folder, f"-DCMAKE_PREFIX_PATH={prefix}")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    assert f"consumer: attn_mask {VERSION}" in configured.stdout
    output_of("cmake", "--build", folder, "-j2", "--target", *targets)
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A prefix as `cmake --install` leaves it."""
    if not (BUILD_TREE / "CMakeCache.txt").exists():
        pytest.skip(f"there is no build tree in {BUILD_TREE}: `make build` leaves one")
    folder = tmp_path_factory.mktemp("prefix")
    output_of("cmake", "--install", BUILD_TREE, "--prefix", folder)
    return folder


@pytest.fixture(scope="module")
def consumer(prefix, tmp_path_factory):
    return build(tmp_path_factory.mktemp("consumer"), prefix, "all")


def test_from_a_prefix(consumer, prefix):
    library = prefix / "lib" / "libattn_mask.so"
    assert output_of(consumer / "consumer", library).strip() == KERNELS


def test_from_the_python_package(tmp_path):
    build(tmp_path, PACKAGE_PREFIX, "consumer")
    library = Path(attn_mask.utils.library_path) / "libattn_mask.so"
    assert output_of(tmp_path / "consumer", library).strip() == KERNELS


def test_first_program_of_the_documentation(consumer):
    """docs/cpp.md shows the program that is compiled here, and what it prints."""
    document = (ROOT / "docs" / "cpp.md").read_text()
    code, printed = re.search(r"```cpp\n(.*?)```\n.*?```text\n(.*?)```", document, re.S).groups()
    assert code == (CONSUMER / "first.cpp").read_text()
    assert output_of(consumer / "first") == printed


PLUGIN_AND_MODULE = """
import sys, torch

def plugin():
    torch.ops.load_library({plugin!r})

def module():
    import attn_mask
    assert attn_mask._C.to_4d(torch.ones(1, 2), 1, torch.float32, None, True, None, False).numel()

for name in {order!r}:
    {{"plugin": plugin, "module": module}}[name]()
    mask = torch.ops.attn_mask.boolean([{causal}], [], 1, 3, 3)
    assert mask.equal(torch.ones(3, 3).tril().bool()[None, None])
assert torch.ops.attn_mask_consumer.causal(3).equal(mask)
"""


@pytest.mark.parametrize("order", [("plugin", "module"), ("module", "plugin")], ids="-".join)
def test_beside_the_python_module(consumer, order):
    """There are two copies of the library, the prefix's and the package's: both use one of them."""
    code = PLUGIN_AND_MODULE.format(
        plugin=str(consumer / "libplugin.so"), order=order, causal=attn_mask.rules.CAUSAL
    )
    output_of(sys.executable, "-W", "error", "-c", code)


def test_another_torch(prefix, tmp_path):
    """One error names both versions of torch; with the right one the same tree works."""
    fake = tmp_path / "torch"
    for name in ("include/ATen/ATen.h", *(f"lib/lib{n}.so" for n in ("torch", "torch_cpu", "c10"))):
        (fake / name).parent.mkdir(parents=True, exist_ok=True)
        (fake / name).touch()
    (fake / "version.py").write_text("__version__ = '1.2.3+cpu'\ncuda = None\n")
    tree = tmp_path / "build"
    failed = configure(tree, f"-DCMAKE_PREFIX_PATH={prefix}", f"-DATTN_MASK_TORCH_ROOT={fake}")
    assert failed.returncode != 0
    text = " ".join(failed.stderr.split())
    built_for = attn_mask.build_info()["torch_version"]
    assert text.count("CMake Error") == 1
    assert (
        f"attn_mask {VERSION} was built for torch {built_for}, but torch 1.2.3+cpu was found in {fake}: rebuild attn_mask for it, or point ATTN_MASK_TORCH_ROOT at the other"
    ) in text
    found = configure(tree, f"-DATTN_MASK_TORCH_ROOT={TORCH}")
    assert found.returncode == 0, found.stderr
    assert str(fake) not in (tree / "build.ninja").read_text()


PARENT = """
cmake_minimum_required(VERSION 3.26)
project(parent LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 17)
get_cmake_property(names VARIABLES)
list(FILTER names EXCLUDE REGEX "^(CMAKE_MATCH_|ARG|names$)")
foreach(name IN LISTS names)
  set("_before_${name}" "${${name}}")
endforeach()
add_subdirectory("${ATTN_MASK_SOURCE}" attn_mask)
foreach(name IN LISTS names)
  if(NOT "${_before_${name}}" STREQUAL "${${name}}")
    message(FATAL_ERROR "${name} was changed to ${${name}}")
  endif()
endforeach()
get_target_property(alias attn_mask::attn_mask ALIASED_TARGET)
message(STATUS "parent: ${alias}, build type <${CMAKE_BUILD_TYPE}>")
"""


def test_from_the_sources_a_parent_stays_as_it_is(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(PARENT)
    done = configure(
        tmp_path / "build",
        f"-DATTN_MASK_SOURCE={ROOT}",
        f"-DTorch_DIR={TORCH}/share/cmake/Torch",
        "-DATTN_MASK_USE_CUDA=OFF",
        source=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parent: attn_mask_and_kernels, build type <>" in done.stdout
    installed = (tmp_path / "build" / "attn_mask" / "cmake_install.cmake").read_text()
    assert "attn_mask.h" not in installed  # unless ATTN_MASK_INSTALL is on


@pytest.mark.slow
def test_from_the_sources(tmp_path):
    """Built by a parent, installed with it, and then used from there: torch stays where it was."""
    settings = (f"-DATTN_MASK_TORCH_ROOT={TORCH}", "-DATTN_MASK_USE_CUDA=OFF")
    tree, installed = tmp_path / "build", tmp_path / "prefix"
    done = configure(tree, f"-DATTN_MASK_SOURCE={ROOT}", "-DATTN_MASK_INSTALL=ON", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    output_of("cmake", "--build", tree, "-j2")
    library = tree / "attn_mask" / "libattn_mask.so"
    assert output_of(tree / "consumer", library).strip() == "cpu"
    output_of("cmake", "--install", tree, "--prefix", installed)
    shutil.rmtree(tree)
    build(tree, installed, "consumer")
    library = installed / "lib" / "libattn_mask.so"
    assert output_of(tree / "consumer", library).strip() == "cpu"
    assert "not found" not in output_of("ldd", library)
