"""Finds the distinct versions of transformers' modeling_attn_mask_utils.py.

    python scripts/find_releases.py

Gets the list of releases from pip (yanked ones and release candidates, too), downloads one wheel
after the other, hashes the file in it and deletes the wheel: some 130 wheels of 10 MB the first
time. What it finds, which releases hold which file, becomes tests/support/releases.json. Releases
that are there already are not downloaded again.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import Version

FILE = "transformers/modeling_attn_mask_utils.py"
FIRST = Version("4.35.0")
DATA = Path(__file__).resolve().parent.parent / "tests" / "support" / "releases.json"


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def released() -> list[Version]:
    """Every release with a wheel. Only pip's log tells of those that were yanked."""
    log = pip("index", "versions", "transformers", "--pre", "-vv")
    found = {Version(v) for v in re.findall(r"transformers-([^-/\s]+)-py3-none-any\.whl", log)}
    return sorted(version for version in found if version.release >= FIRST.release)


def sha256_in(version: Version) -> str | None:
    """Of the file in a release; None where the release has none."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", f"transformers=={version}")
        pip("download", "-q", "-d", folder, *wheel)
        (path,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            if FILE not in archive.namelist():
                return None
            return hashlib.sha256(archive.read(FILE)).hexdigest()


def main() -> None:
    known: dict[Version, str | None] = {}
    if DATA.exists():
        groups = json.loads(DATA.read_text())
        known = {Version(v): group["sha256"] for group in groups for v in group["versions"]}
    try:
        for version in released():
            if version not in known:
                known[version] = sha256_in(version)
                print(version, known[version], flush=True)
    finally:
        ordered = sorted(known)
        groups = [
            {"sha256": sha256, "versions": [str(v) for v in ordered if known[v] == sha256]}
            for sha256 in dict.fromkeys(known[version] for version in ordered)
        ]
        DATA.write_text(json.dumps(groups, indent=2) + "\n")
    print(f"{len(known)} releases, {len(groups)} kinds: {DATA}")


if __name__ == "__main__":
    main()
