"""Fails when an object file calls something that waits for a device or reads memory of one back.

A CUDA graph being captured allows neither. Only the operators that are host decisions by name,
which look at a mask's values, are exempt. Usage: no_host_sync.py OBJECT...
"""

import re
import subprocess
import sys

WAITS = re.compile(
    r"_local_scalar_dense|Tensor::item|Tensor::is_nonzero|[sS]ynchronize|cudaMemcpy(?!.*DeviceToDevice)"
    r"|cudaEventQuery|cudaMalloc|cudaFree|Tensor::(cpu|tolist|equal)\("
)
HOST_DECISIONS = ("attention/documents.cpp", "ops/block_list_widths.cpp", "ops/sdpa_decision.cpp")


def undefined_symbols(path: str) -> list[str]:
    command = ["nm", "--undefined-only", "--demangle", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> None:
    objects = sys.argv[1:]
    exempt = [path for path in objects if any(name in path for name in HOST_DECISIONS)]
    found = [
        f"{path}:{symbol}"
        for path in objects
        if path not in exempt
        for symbol in undefined_symbols(path)
        if WAITS.search(symbol)
    ]
    if found:
        sys.exit("\n".join(["a wait for the device, or a copy to the host:", *found]))
    # The search does find what it is for.
    if not any(WAITS.search(symbol) for path in exempt for symbol in undefined_symbols(path)):
        sys.exit(f"found no wait in {exempt or 'any host decision'} either: is the pattern right?")
    print(f"{len(objects) - len(exempt)} object files wait for nothing")


if __name__ == "__main__":
    main()
