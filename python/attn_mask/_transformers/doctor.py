"""``python -m attn_mask doctor``: what is here, whether it works, and what to do where not."""

import importlib.util
import platform
import re
import time
from typing import Any

import torch

from attn_mask._core import dense, library, mask_rules
from attn_mask._transformers import UPSTREAM
from attn_mask._transformers.install import Replacement, is_installed, replacement

__all__ = ["diagnose", "written"]


def _selftest_on(device: str) -> dict[str, bool]:
    """Some masks of each kind, compared with comparisons of positions."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]], device=device)
    attended = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]], device=device)
    keys = torch.arange(12, device=device)
    queries = keys[:, None]
    cases = {
        "causal": (mask_rules.causal(), keys <= queries),
        "window": (
            mask_rules.causal() & mask_rules.sliding_window(4),
            (keys <= queries) & (queries - keys < 4),
        ),
        "chunks": (mask_rules.chunked(5), keys // 5 == queries // 5),
        "documents": (mask_rules.documents(ids), ids[:, :, None] == ids[:, None]),
        "padding": (mask_rules.padding(attended), attended[:, None].bool().expand(1, 12, 12)),
    }
    passed = {}
    for name, (rule, expected) in cases.items():
        expected = expected.reshape(1, 1, 12, 12)
        right = [torch.equal(dense.boolean(rule, 1, 12, 12, device=device), expected)]
        for dtype in (torch.float32, torch.bfloat16):
            zeros = torch.zeros(expected.shape, dtype=dtype, device=device)
            filled = zeros.masked_fill(~expected, torch.finfo(dtype).min)
            right.append(
                torch.equal(dense.additive(rule, 1, 12, 12, device=device, dtype=dtype), filled)
            )
        passed[f"{name} on {device}"] = all(right)
    return passed


def _selftest(devices: list[str]) -> dict[str, Any]:
    start = time.perf_counter()
    checks: dict[str, bool] = {}
    error = None
    for device in devices:
        try:
            checks |= _selftest_on(device)
        except Exception as raised:
            checks[f"runs on {device}"] = False
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    seconds = round(time.perf_counter() - start, 3)
    return {"ok": all(checks.values()), "checks": checks, "error": error, "seconds": seconds}


def fits(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether kernels for these architectures run on a GPU.

    Those of its generation up to its own do, of later GPUs those with PTX; of ``9.0a`` that GPU's
    alone, of ``10.0f`` that generation's.
    """
    for arch in archs:
        major, minor, kind, ptx = re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)[0]
        built = int(major), int(minor)
        of_generation = kind != "a" and built[0] == capability[0]
        by_ptx = kind == "" and ptx != ""
        if built == capability or (built < capability and (of_generation or by_ptx)):
            return True
    return False


def _cuda(build: dict[str, Any], findings: list[dict[str, str]]) -> dict[str, Any]:
    devices = []
    if available := torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            name = f"{torch.cuda.get_device_name(index)} ({capability[0]}.{capability[1]})"
            devices.append(name)
            if build["cuda_archs"] and not fits(capability, build["cuda_archs"]):
                findings.append(
                    {
                        "what": f"no CUDA kernels for {name}, only for "
                        f"{', '.join(build['cuda_archs'])}",
                        "mend": "build again in a checkout: TORCH_CUDA_ARCH_LIST="
                        f"{capability[0]}.{capability[1]} pip install --no-build-isolation .",
                    }
                )
    notes = []
    if not available:
        notes.append("torch sees no GPU")
    if build["cuda_version"] is None:
        notes.append("this build has no CUDA kernels")
    return {
        "available": available,
        "torch": torch.version.cuda,
        "kernels": build["cuda_version"],
        "devices": devices,
        "notes": notes,
    }


def _install(findings: list[dict[str, str]]) -> dict[str, Any]:
    found = Replacement("", (), ())
    version = None
    notes = []
    if importlib.util.find_spec("transformers") is None:
        notes.append("transformers is not installed: install() has nothing to replace")
    else:
        try:
            found = replacement(planned=True) or found
            version = found.transformers
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            findings.append(
                {
                    "what": f"attn_mask.install() would raise {said}",
                    "mend": "use a release of transformers that is known here: "
                    f"pip install transformers=={UPSTREAM}",
                }
            )
    return {
        "transformers": version,
        "installed": is_installed(),
        "replaced": list(found.replaced),
        "stays": list(found.stays),
        "notes": notes,
    }


def usable_devices(cuda: dict[str, Any]) -> list[str]:
    """Where the self-test runs."""
    return ["cpu", "cuda"] if cuda["available"] and cuda["kernels"] is not None else ["cpu"]


def diagnose() -> dict[str, Any]:
    """What ``doctor --json`` prints: {ok, versions, build, cuda, install, selftest, findings}.

    ``findings`` are faults, each with what mends it; what is merely absent (a GPU, CUDA kernels,
    transformers) stands among the ``notes`` of ``cuda`` and ``install``.
    """
    findings: list[dict[str, str]] = []
    build = library.build_info()
    cuda = _cuda(build, findings)
    install = _install(findings)
    selftest = _selftest(usable_devices(cuda))
    if not selftest["ok"]:
        wrong = ", ".join(name for name, passed in selftest["checks"].items() if not passed)
        because = f" ({selftest['error']})" if selftest["error"] else ""
        findings.append(
            {
                "what": f"the self-test fails: {wrong}{because}",
                "mend": "build again in a checkout: pip install --no-build-isolation "
                "--force-reinstall --no-deps .",
            }
        )
    return {
        "ok": not findings,
        "versions": {
            "attn_mask": library.VERSION,
            "torch": torch.__version__,
            "transformers": install["transformers"],
            "python": platform.python_version(),
        },
        "build": build,
        "cuda": cuda,
        "install": install,
        "selftest": selftest,
        "findings": findings,
    }


def written(diagnosis: dict[str, Any]) -> str:
    """A diagnosis as lines of text."""
    build, cuda, install, selftest = (
        diagnosis[part] for part in ("build", "cuda", "install", "selftest")
    )
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis["versions"].items())
    archs = ", ".join(build["cuda_archs"])
    kernels = f"CUDA {build['cuda_version']} kernels for {archs}" if archs else "no CUDA kernels"
    version = install["transformers"]
    replaced = f"would replace this of transformers {version}:" if version else "nothing to replace"
    passed = sum(selftest["checks"].values())
    lines = [
        f"versions   {versions}",
        f"build      for torch {build['torch_version']}, {kernels}; CPU: {build['cpu_capability']}",
        f"cuda       {', '.join(cuda['devices']) or 'no GPU'}",
        f"install()  {replaced}",
        *(f"           {name}" for name in install["replaced"]),
        *(f"           stays: {text}" for text in install["stays"]),
        f"self-test  {passed} of {len(selftest['checks'])} passed in {selftest['seconds']} s",
        *(f"note       {note}" for note in (*cuda["notes"], *install["notes"])),
    ]
    for finding in diagnosis["findings"]:
        lines += [f"FAULT      {finding['what']}", f"           to mend it: {finding['mend']}"]
    return "\n".join([*lines, "all is well" if diagnosis["ok"] else "something is off: see FAULT"])
