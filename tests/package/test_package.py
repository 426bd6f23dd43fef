"""The installed package: its metadata, where its files are, what it needs."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import attn_mask
import pytest
import torch


def run_python(code, folder, environment=None):
    """What code prints in a new process, away from the sources."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def library():
    return Path(attn_mask.utils.library_path) / "libattn_mask.so"


def test_build_info():
    info = attn_mask.build_info()
    assert set(info) == {"version", "torch_version", "cuda_version", "cuda_archs", "cpu_capability"}
    assert info["version"] == attn_mask.__version__
    assert info["torch_version"] and torch.__version__.startswith(
        info["torch_version"].split("+")[0]
    )
    assert info["cuda_version"] is None or isinstance(info["cuda_version"], str)
    assert all(isinstance(arch, str) for arch in info["cuda_archs"])
    assert bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
    assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_build_info_is_a_copy():
    attn_mask.build_info().clear()
    assert attn_mask.build_info()["version"] == attn_mask.__version__


def is_installed():
    """Whether it is a wheel's package that is imported here, not that of the sources."""
    try:
        distribution = metadata.distribution("attn-mask")
    except metadata.PackageNotFoundError:
        return False
    package = Path(distribution.locate_file("attn_mask"))
    return (
        distribution.read_text("WHEEL") is not None and package == Path(attn_mask.__file__).parent
    )


def test_version_tells_what_it_was_built_for():
    """Also where no distribution is installed, as after `setup.py build_ext --inplace`."""
    info = attn_mask.build_info()
    minor = ".".join(info["torch_version"].split(".")[:2])
    cuda = info["cuda_version"]
    kind = "cpu" if cuda is None else f"cu{cuda.replace('.', '')}"
    assert attn_mask.__version__.endswith(f"+torch{minor}{kind}")


@pytest.mark.applies(is_installed())
def test_version_is_the_distributions():
    assert attn_mask.__version__ == metadata.version("attn-mask")


def test_all_folders_and_tables_are_packaged():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]
    root = Path(attn_mask.__file__).parent
    folders = {path.parent for path in root.rglob("*.py")}
    names = {".".join(("attn_mask", *folder.relative_to(root).parts)) for folder in folders}
    assert names == set(listed["packages"])
    data = {path for folder in folders for path in folder.iterdir() if path.suffix == ".json"}
    assert data == {
        root.joinpath(*package.split(".")[1:], name)
        for package, of_package in listed["package-data"].items()
        for name in of_package
        if name.endswith(".json")
    }
    assert data


def test_paths():
    assert library().is_file()
    assert (Path(attn_mask.utils.include_path) / "attn_mask" / "attn_mask.h").is_file()
    configs = list(Path(attn_mask.utils.cmake_prefix_path).rglob("attn_mask*onfig.cmake"))
    assert configs, "find_package(attn_mask) finds nothing under cmake_prefix_path"
    cuda = Path(attn_mask.utils.library_path) / "libattn_mask_cuda.so"
    assert cuda.is_file() == (attn_mask.build_info()["cuda_version"] is not None)


def test_import_from_another_folder(tmp_path):
    code = (
        "import json, sys, attn_mask, torch\n"
        # It takes seconds, and block_sparse waits until it needs it.
        "assert 'torch.nn.attention.flex_attention' not in sys.modules\n"
        "mask = torch.ops.attn_mask.to_causal_4d(1, 2, 2, dtype=torch.float32)\n"
        "print(json.dumps([attn_mask.__version__, (mask == 0).tolist()]))\n"
    )
    version, mask = json.loads(run_python(code, tmp_path))
    assert version == attn_mask.__version__
    assert mask == [[[[True, False], [True, True]]]]


def test_transformers_is_not_needed(tmp_path):
    """All is there with transformers hidden, and where it is installed it is not imported."""
    code = (
        "import sys\n"
        "hide = {hide}\n"
        "if hide: sys.modules['transformers'] = None\n"
        "import attn_mask, torch\n"
        "from attn_mask import modeling_attn_mask_utils as m\n"
        "mask = m._prepare_4d_attention_mask(torch.tensor([[0, 1]]), torch.float32)\n"
        "assert (mask == 0).tolist() == [[[[False, True], [False, True]]]]\n"
        "print(sorted(name for name, module in sys.modules.items()\n"
        "             if name.split('.')[0] == 'transformers' and module is not None))\n"
    )
    for hide in (True, False):
        assert run_python(code.format(hide=hide), tmp_path).strip() == "[]"


def symbols(path, *options):
    """(type, name) of each dynamic symbol: T, D, B ... are definitions, W, V and u weak ones."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm, which lists the symbols of a library, is not installed")
    lines = subprocess.run(
        [nm, "-D", *options, path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines, f"nm lists nothing for {path}"
    return [line[17:].split(" ", 1) for line in lines]


def test_library_needs_no_python():
    """A C++ program without an interpreter loads it."""
    libraries = sorted(Path(attn_mask.utils.library_path).glob("libattn_mask*.so"))
    assert library() in libraries
    for path in libraries:
        names = {name for _, name in symbols(path)}
        assert not {n for n in names if n.startswith(("Py", "_Py", "THPVariable"))}


def test_exported_symbols():
    """The C++ API and what the CUDA kernels need; else only what templates of others leave."""
    exported = symbols(library(), "--demangle", "--defined-only")
    listed = (Path(__file__).parents[1] / "cpp" / "exported_symbols.txt").read_text().splitlines()
    assert sorted({name for kind, name in exported if kind not in "WVu"}) == sorted(listed)
    assert not [name for kind, name in exported if kind in "WVu" and name.startswith("attn_mask::")]


def test_another_torch_is_named_before_anything_is_loaded(tmp_path):
    code = (
        "import torch\n"
        "torch.__version__ = '1.2.3'\n"
        "try:\n"
        "    import attn_mask\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "assert not hasattr(torch.ops.attn_mask, 'to_4d')\n"
    )
    built_for = attn_mask.build_info()["torch_version"]
    assert run_python(code, tmp_path).startswith(
        f"attn_mask was built for torch {built_for}, but torch 1.2.3 is running. Build it again "
        "for this torch, in a checkout of attn_mask: pip install --no-build-isolation "
    )


def test_loading_the_library_again_is_harmless():
    before = torch.ops.attn_mask.to_causal_4d(1, 3, 3, dtype=torch.float32)
    torch.ops.load_library(str(library()))
    assert torch.equal(torch.ops.attn_mask.to_causal_4d(1, 3, 3, dtype=torch.float32), before)


# Prints what the masks of a few large calls hash to.
DIGEST = """
import attn_mask, hashlib, torch

generator = torch.Generator().manual_seed(0)
mask = torch.randint(0, 2, (3, 1003), generator=generator)
digest = hashlib.sha256()
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    for window in (None, 77):
        got = torch.ops.attn_mask.to_4d(
            mask, 500, dtype=dtype, key_value_length=1003, sliding_window=window)
        unmasked = torch.ops.attn_mask._unmask_unattended(got, torch.finfo(dtype).min)
        for result in (got, unmasked):
            digest.update(result.view(torch.uint8).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), attn_mask.build_info()["cpu_capability"])
print(digest.hexdigest())
"""


def digest(folder, capability):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    capabilities, hashed = run_python(DIGEST, folder, environment).splitlines()
    assert len(set(capabilities.split())) == 1, f"torch and attn_mask differ: {capabilities}"
    return hashed


@pytest.fixture(scope="module")
def plain_digest(tmp_path_factory):
    return digest(tmp_path_factory.mktemp("plain"), "default")


NEEDED_FLAGS = {"avx2": {"avx2"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}


def flags_of_the_processor():
    """ATen uses whatever capability is set: what the processor lacks ends the process."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


@pytest.mark.parametrize("capability", NEEDED_FLAGS)
def test_every_cpu_capability_gives_the_same_mask(capability, plain_digest, tmp_path):
    if not NEEDED_FLAGS[capability] <= flags_of_the_processor():
        pytest.skip(f"hardware: the processor has no {capability}")
    assert digest(tmp_path, capability) == plain_digest


def renamed_library(folder):
    """A copy of the library with another soname, as auditwheel makes."""
    name, other = b"libattn_mask.so\0", b"libattn_mast.so\0"
    data = library().read_bytes()
    assert data.count(name) == 1
    copy = folder / other.rstrip(b"\0").decode()
    copy.write_bytes(data.replace(name, other))
    return copy


def test_a_renamed_copy_of_the_library_in_the_process(tmp_path):
    """Its operators are called: a second copy could not register the same names."""
    code = f"""
import torch
torch.ops.load_library({str(renamed_library(tmp_path))!r})
import attn_mask
assert attn_mask.masking_utils.eager_mask(1, 2, 2).shape == (1, 1, 2, 2)
assert attn_mask.create_block_mask(attn_mask.causal(), 1, 1, 2, 2, "cpu") is not None
print("libattn_mask.so" in open("/proc/self/maps").read())
"""
    assert run_python(code, tmp_path).strip() == "False"


def test_operators_of_another_version(tmp_path):
    """Registered by another library of this process, with other arguments."""
    code = """
import torch
library = torch.library.Library("attn_mask", "DEF")
library.define("to_4d(Tensor mask) -> Tensor")
try:
    import attn_mask
except ImportError as error:
    print(error)
"""
    text = (
        "attn_mask: expected the operators that another library has registered in this process to"
    )
    assert run_python(code, tmp_path).startswith(text)
