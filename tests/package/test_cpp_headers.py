"""Headers compile alone, and kernels without torch, under each compiler that is here."""

import shutil
import subprocess
from pathlib import Path

import attn_mask
import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent / "include"
PUBLIC = sorted((Path(attn_mask.utils.include_path) / "attn_mask").glob("*.h"))
INTERNAL = sorted([*CSRC.glob("rule/**/*.h"), *CSRC.glob("format/*.h")])
# All but what deals kernels out to threads and processors.
KERNELS = sorted(
    path for path in [*CSRC.glob("rule/**/*.cpp"), *CSRC.glob("cpu/*")] if path.stem != "dispatch"
)
OF_AN_ISA = [path for path in KERNELS if "namespace attn_mask::ATTN_MASK_ISA" in path.read_text()]


def name(path):
    return f"{path.parent.name}/{path.name}"


compilers = pytest.mark.parametrize("compiler", ["g++", "clang++"])


def compile_alone(compiler, standard, header, *includes):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [
        *(compiler, f"-std={standard}", "-fsyntax-only", "-x", "c++", "-"),
        *("-Wall", "-Wextra", "-Wpedantic", "-Werror", *includes),
    ]
    code = f'#include "{header}"\n'
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compilers
@pytest.mark.parametrize("header", PUBLIC, ids=lambda path: path.name)
def test_public_headers(compiler, header):
    torch_headers = ("-isystem", TORCH, "-isystem", TORCH / "torch/csrc/api/include")
    compile_alone(compiler, "c++20", header, f"-I{header.parents[1]}", *torch_headers)


@compilers
@pytest.mark.parametrize("header", INTERNAL, ids=name)
def test_rules_and_formats_know_no_torch(compiler, header):
    compile_alone(compiler, "c++17", header, f"-I{CSRC}")


@compilers
@pytest.mark.parametrize("source", KERNELS, ids=name)
def test_cpu_kernels_know_no_torch(compiler, source):
    compile_alone(compiler, "c++20", source, f"-I{CSRC}", "-DATTN_MASK_ISA=isa_default")


@pytest.mark.parametrize("source", [path for path in OF_AN_ISA if path.suffix == ".cpp"], ids=name)
def test_instruction_sets_share_no_function(source, tmp_path):
    made = tmp_path / "made.o"
    # Without optimization every function that may be shared is emitted, unless it is forced inline.
    flags = ["-std=c++20", "-O0", f"-I{CSRC}", "-DATTN_MASK_ISA=isa_only"]
    subprocess.run(["g++", *flags, "-c", source, "-o", made], check=True)
    symbols = subprocess.check_output(["nm", "-C", "--defined-only", made], text=True).splitlines()
    assert any("isa_only" in line for line in symbols)
    assert [line for line in symbols if line.split()[1] in "wW" and "isa_only" not in line] == []


def test_the_headers_are_here():
    assert [path.name for path in PUBLIC] == [
        "attention.h",
        "attn_mask.h",
        "export.h",
        "rules.h",
    ]
    assert len(INTERNAL) > 15
    assert len(KERNELS) > 15
    assert len(OF_AN_ISA) > 5
