"""Counts what the dense CUDA kernel costs: host instructions to a 16-byte store, by callgrind over
the emulated grid, one lane after the other. Prints JSON and nothing else to stdout.

An H100 has time for some 150 instructions of a lane between two of its stores.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RULES = ("device_tables", "numbers", "runs", "spans")
SOURCES = ("bench/cpp/cuda_cost.cpp", *(f"csrc/rule/levels/{stem}.cpp" for stem in RULES))
FLAGS = ("-std=c++20", "-O2", "-fno-tree-vectorize", "-Icsrc", "-Itests/cpp")
CASES = (
    "causal",
    "causal+padding",
    "causal+window+padding",
    "causal+window+documents+padding",
    "causal|blocks+padding",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def main() -> None:
    folder = ROOT / "build/cuda-cost"
    folder.mkdir(parents=True, exist_ok=True)
    program = str(folder / "cuda_cost")
    run(os.environ.get("CXX", "g++"), *FLAGS, *SOURCES, "-o", program)
    report = []
    for case in CASES:
        done = run(
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={folder}/callgrind.out",
            "--toggle-collect=*count_me*",
            program,
            case,
        )
        (collected,) = re.findall(r"Collected : (\d+)", done.stderr)
        stores = int(done.stdout)
        report.append({"case": case, "instructions_per_store": round(int(collected) / stores, 1)})
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
