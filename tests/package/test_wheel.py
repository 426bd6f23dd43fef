"""Source distribution, wheel and import, with the pip and setuptools of a new environment."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
VERSION = "0.2.0"

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")


def run(*command, folder=ROOT, **environment):
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked():
    """Those that are there: a file may have been deleted and not yet committed."""
    return {name for name in run("git", "ls-files").splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source distribution of a checkout with built files beside the sources."""
    checkout = tmp_path_factory.mktemp("checkout")
    listed = "\0".join(sorted(tracked()))
    packed = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"], cwd=ROOT, input=listed.encode(), capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", checkout], input=packed.stdout, check=True)
    for built in ("_built_for.py", "_C.cpython.so", "lib/libattn_mask.so", "include/x.h"):
        path = checkout / "python" / "attn_mask" / built
        path.parent.mkdir(exist_ok=True)
        path.touch()
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, folder=checkout)
    (archive,) = folder.iterdir()
    return archive


def test_sources_are_all_there(sources):
    assert sources.name == f"attn_mask-{VERSION}.tar.gz"
    with tarfile.open(sources) as archive:
        files = {
            member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()
        }
    added = {name for name in files if name.startswith("python/attn_mask.egg-info/")}
    assert files - added - {"PKG-INFO", "setup.cfg"} == tracked()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A new one, with the pip and setuptools that Python brings, and the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder


@pytest.fixture(scope="module")
def wheel(sources, environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(environment / "bin" / "python", "-m", "pip", "wheel", "-q", "-w", folder),
        *("--no-index", "--no-deps", "--no-build-isolation", sources),
        CMAKE_ARGS="-DATTN_MASK_USE_CUDA=OFF",
    )
    (file,) = folder.iterdir()
    return file


IMPORTED = """
import attn_mask, importlib.metadata, json, torch
mask = attn_mask.boolean(attn_mask.causal(), 1, 2, 2)
print(json.dumps([
    attn_mask.__file__, attn_mask.__version__, importlib.metadata.version("attn-mask"),
    mask.tolist(), attn_mask.status().installed,
]))
"""


@pytest.mark.slow
def test_sources_become_a_wheel_that_is_installed(wheel, environment, tmp_path):
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel)
    file, version, distribution, mask, installed = json.loads(
        run(python, "-c", IMPORTED, folder=tmp_path)
    )
    assert Path(file).is_relative_to(environment)
    minor = ".".join(torch.__version__.split(".")[:2])
    assert version == distribution == f"{VERSION}+torch{minor}cpu"
    assert mask == [[[[True, False], [True, True]]]]
    assert installed is False
    run(python, "-m", "attn_mask", "doctor", "--json", folder=tmp_path)


@pytest.mark.slow
def test_wheel_says_what_it_is(wheel):
    minor = ".".join(torch.__version__.split(".")[:2])
    assert wheel.name.startswith(f"attn_mask-{VERSION}+torch{minor}cpu-cp3")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (described,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(described).decode()
        libraries = {name: archive.read(name) for name in names if name.endswith(".so")}
    assert {"attn_mask/lib/libattn_mask.so", "attn_mask/py.typed"} <= set(names)
    lines = text.split("\n\n")[0].splitlines()
    assert f"Requires-Dist: torch=={minor}.*" in lines
    assert "Requires-Dist: packaging>=22" in lines
    assert "Classifier: Typing :: Typed" in lines
    assert "Classifier: License :: OSI Approved :: Apache Software License" in lines
    for field in ("Author:", "Keywords:", "Project-URL:", "Provides-Extra: cli"):
        assert any(line.startswith(field) for line in lines), field
    for name, data in libraries.items():
        assert b"$ORIGIN" in data, name
        assert str(ROOT).encode() not in data, f"{name} holds the path of the sources"


LACKING = """
import importlib.metadata, importlib.util, runpy, shutil, sys, sysconfig
which, version, spec = shutil.which, importlib.metadata.version, importlib.util.find_spec

def no_version(name):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

lacks = sys.argv[1].split()
if lacks == ["torch"]:
    importlib.metadata.version = no_version
elif lacks[0].startswith("torch=="):
    importlib.metadata.version = lambda name: lacks[0][7:] if name == "torch" else version(name)
shutil.which = lambda name, **kw: None if name in lacks else which(name, **kw)
importlib.util.find_spec = lambda name, *rest: None if name in lacks else spec(name, *rest)
if lacks == ["packaging"]:
    import setuptools.command.build_ext  # which may have one of its own
    sys.modules["packaging.version"] = None
if lacks == ["Python.h"]:
    sysconfig.get_path = lambda name: "/nowhere"
sys.argv = ["setup.py", "bdist_wheel"]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("torch", "attn_mask: no torch for .*: first run pip install 'torch"),
        ("torch==2.10.1", "attn_mask: torch 2.10.1 is installed, .*: pip install 'torch"),
        ("torch==2.16.0+cpu", r"attn_mask: torch 2.16.0\+cpu is installed, but this needs"),
        ("torch==2.16.0.dev20270101", "attn_mask: torch 2.16.0.dev20270101 is installed, but"),
        ("packaging", "attn_mask: no packaging for this Python: run pip install packaging"),
        ("cmake", "attn_mask: no cmake found: run pip install cmake ninja"),
        ("Python.h", "attn_mask: no Python.h for .*: run apt-get install python3-dev"),
        ("c++ g++ clang++", r"attn_mask: no C\+\+ compiler found .*: run apt-get install g\+\+"),
        ("wheel setuptools.command.bdist_wheel", "attn_mask: setuptools .*: run pip install wheel"),
    ],
)
def test_what_is_missing_is_one_line(lacks, says, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", LACKING, lacks], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(says, line), line


def test_what_cmake_refuses_is_above_one_line():
    done = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel"],
        cwd=ROOT,
        env={**os.environ, "CMAKE_ARGS": "-G Nonesuch"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Nonesuch" in done.stderr and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match("attn_mask: this failed, for the reason above: .*cmake -S .*Nonesuch", last)
