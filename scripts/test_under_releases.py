"""Runs the tests of install() with several releases of transformers, each really installed.

    python scripts/test_under_releases.py [--folder FOLDER] [VERSION ...] [-- PYTEST ARGUMENTS]

Every release gets a folder that comes before the environment on Python's path, and holds
transformers and whatever it needs in another version than the environment has; torch is shared. A
folder that is complete is used again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Besides the one that is installed.
RELEASES = ("4.57.6", "5.0.0", "5.9.0", "5.17.0", "5.23.0")
FILES = ("test_attention", "test_install", "test_models")
TESTS = tuple(f"tests/upstream/{name}.py" for name in FILES)


def found(folder: Path) -> dict[str, Distribution]:
    """What Python would find: the environment's distributions, under the folder's."""
    paths = [str(folder), *sys.path[1:]]
    by_name: dict[str, Distribution] = {}
    for distribution in distributions(path=paths):
        by_name.setdefault(canonicalize_name(distribution.name), distribution)
    return by_name


def missing(folder: Path, of: str) -> Iterator[Requirement]:
    """What a distribution needs, directly or not, and would not find."""
    have, seen, queue = found(folder), set(), [of]
    while queue:
        name = queue.pop()
        if name in seen or name not in have:
            continue
        seen.add(name)
        for text in have[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in have or not requirement.specifier.contains(
                have[needed].version, prereleases=True
            ):
                yield requirement
            queue.append(needed)


def install(folder: Path, requirement: str) -> None:
    print(f"  {folder.name}: installing {requirement}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(folder), requirement], check=True)


def prepare(folder: Path, release: str) -> None:
    """The release and what it needs, in a folder."""
    done = folder / ".complete"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install(folder, f"transformers=={release}")
    while needs := {str(requirement) for requirement in missing(folder, "transformers")}:
        for need in sorted(needs):
            install(folder, need)
    done.touch()


def run(folder: Path | None, arguments: list[str]) -> tuple[bool, str]:
    environment = dict(os.environ)
    paths = [] if folder is None else [str(folder)]
    paths += filter(None, [environment.get("PYTHONPATH")])
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TESTS, *arguments]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    summary = next((line for line in reversed(lines) if re.search(r" in [0-9.]+s", line)), "")
    return process.returncode == 0, summary.strip("= \n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {RELEASES}")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "releases")
    own = sys.argv[1:]
    arguments = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    installed = version("transformers")
    results = []
    for release in options.versions or dict.fromkeys((*RELEASES, installed)):
        folder = None if release == installed else options.folder / release
        print(f"transformers {release}", flush=True)
        start = time.perf_counter()
        if folder is not None:
            prepare(folder, release)
        passed, summary = run(folder, arguments)
        results.append((release, passed, summary, time.perf_counter() - start))
    for release, passed, summary, seconds in results:
        word = "passed" if passed else "FAILED"
        print(f"transformers {release}: {word} ({summary}; {seconds:.0f} s with its installation)")
    if not all(passed for _, passed, _, _ in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
