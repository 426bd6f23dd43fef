"""Makes the table by which install() knows transformers' own mask functions.

    python scripts/hash_upstream.py

Fetches transformers' masking_utils.py of each release (some 70 wheels of 10 MB the first time; they
are kept in tests/support/oracle_loader.py's folder) and writes
python/attn_mask/_transformers/known.json.
"""

import json
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

from attn_mask._transformers.source import Source, hashes  # noqa: E402
from find_releases import released  # noqa: E402
from oracle_loader import fetch  # noqa: E402

FIRST = Version("4.53.0")
TABLE = ROOT / "python" / "attn_mask" / "_transformers" / "known.json"


def main() -> None:
    # By name and hash: the first release that has this function.
    known: dict[str, str] = {}
    for version in released():
        if version < FIRST:
            continue
        source = Source(Path(fetch(str(version)), "masking_utils.py").read_text())
        for name, digest in hashes(source).items():
            known.setdefault(f"{name} {digest}", str(version))
    # By name, in the order of releases.
    by_name = dict(sorted(known.items(), key=lambda item: item[0].split()[0]))
    TABLE.write_text(json.dumps(by_name, indent=2) + "\n")
    print(f"{len(known)} hashes: {TABLE}")


if __name__ == "__main__":
    main()
