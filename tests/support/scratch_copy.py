"""A copy of the sources with additions, and its library: walks of CONTRIBUTING.md in it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def listed(title):
    """The files that the steps of a walk name."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (section,) = (part for part in text.split("\n## ") if part.startswith(title))
    return set(re.findall(r"^\d+\. \[[^]]+\]\(([^)]+)\)", section, re.MULTILINE))


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


class ScratchCopy:
    """``steps``: what stands in each file, and what it becomes; ``files``: those that are new."""

    def __init__(self, folder, steps, files):
        self.top = folder / "copy"
        ignored = shutil.ignore_patterns(".git", "build", ".venv*", "*.so", "lib", "__pycache__")
        shutil.copytree(ROOT, self.top, ignore=ignored, symlinks=True)
        for name, text in files.items():
            (self.top / name).write_text(text)
        for name, changes in steps.items():
            for old, new in changes:
                replace(self.top / name, old, new)

    def build(self):
        cmake = str(Path(sys.executable).with_name("cmake"))
        build, package = str(self.top / "build"), str(self.top / "python" / "attn_mask")
        options = ("PYTHON=ON", "USE_CUDA=OFF")
        configure = [cmake, "-S", str(self.top), "-B", build, "-G", "Ninja"]
        configure += [f"-DATTN_MASK_{option}" for option in options]
        configure += [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_INSTALL_LIBDIR=lib"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).with_name('ninja')}"]
        for command in (
            [*configure, "-DCMAKE_BUILD_TYPE=", "-DCMAKE_CXX_FLAGS=-O1"],
            [cmake, "--build", build, "--parallel", "2"],
            [cmake, "--install", build, "--prefix", package],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def run(self, *arguments):
        """Python in the copy; what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(self.top / "python")}
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=self.top,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout
