"""Headers compile alone, without a warning, under each compiler that is here."""

import shutil
import subprocess
from pathlib import Path

import attn_mask
import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent / "include"
PUBLIC = sorted((Path(attn_mask.utils.include_path) / "attn_mask").glob("*.h"))
INTERNAL = sorted([*CSRC.glob("rule/*.h"), *CSRC.glob("format/*.h")])

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
@pytest.mark.parametrize("header", INTERNAL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_rules_and_formats_know_no_torch(compiler, header):
    compile_alone(compiler, "c++17", header, f"-I{CSRC}")


def test_the_headers_are_here():
    assert [path.name for path in PUBLIC] == ["attn_mask.h", "export.h", "rules.h"]
    assert len(INTERNAL) > 15
