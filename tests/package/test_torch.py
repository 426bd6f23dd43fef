"""The private names of torch: the page has those that the sources use, and they are there."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch
from private_torch import used

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "torch.md"
HEADERS = Path(torch.__file__).parent / "include"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the pages are not here")


def names_of_page():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


NAMES = names_of_page() if PAGE.exists() else []


def test_the_page_has_what_the_sources_use():
    assert len(NAMES) > 30 and len(set(NAMES)) == len(NAMES)
    files = used()
    assert set(NAMES) == set(files), {name: files.get(name) for name in set(NAMES) ^ set(files)}


def of_python(name):
    """The object; modules are imported as far as the name has them."""
    parts = name.split(".")
    found = None
    for end in range(1, len(parts) + 1):
        if found is not None and hasattr(found, parts[end - 1]):
            found = getattr(found, parts[end - 1])
        else:
            found = importlib.import_module(".".join(parts[:end]))
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("torch.")])
def test_python(name):
    assert of_python(name) is not None


# Where headers declare what is no function of ATen.
DECLARED = {
    "at::detail::empty_cpu": "ATen/EmptyTensor.h",
    "c10::impl::tls_is_dispatch_key_included": "c10/core/impl/LocalDispatchKeySet.h",
    "unsafeGetTensorImpl": "ATen/core/TensorBase.h",
    "HANDLE_TH_ERRORS": "torch/csrc/Exceptions.h",
    "torch::jit::Stack": "ATen/core/stack.h",
    "torch::jit::last": "ATen/core/stack.h",
    "torch::jit::peek": "ATen/core/stack.h",
}


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("torch.")])
def test_cpp(name):
    if name.endswith(".h"):
        assert (HEADERS / name).exists()
    elif name.startswith("at::_"):
        assert hasattr(torch.ops.aten, name.removeprefix("at::"))
    else:
        text = (HEADERS / DECLARED[name]).read_text()
        assert re.search(rf"\b{name.split('::')[-1]}\b", text)


def test_releases_are_those_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (requirement,) = (
        text for text in project["build-system"]["requires"] if text.startswith("torch")
    )
    least, beyond = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", requirement).groups()
    said = f"2.{least} to 2.{int(beyond) - 1}"
    for page in ("README.md", "docs/torch.md"):
        assert said in (ROOT / page).read_text(), page
    tested = project["tool"]["attn_mask"]["tested-torch"]
    assert tested.startswith(f"2.{int(beyond) - 1}.")
