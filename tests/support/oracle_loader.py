"""Loads the mask files of any released transformers, each as a module of its own.

    import oracle_loader
    old = oracle_loader.load_attn("4.38.2")        # $TFW_ROOT/<version>/modeling_attn_mask_utils.py
    new = oracle_loader.load_masking("5.23.0")     # $TFW_ROOT/<version>/masking_utils.py
    any_file = oracle_loader.load_attn("some/dir/modeling_attn_mask_utils.py", version="5.23.0")
    gated = oracle_loader.load_masking("5.0.0", torch_version="2.5.1", xpu=False, flex=False)
    config = oracle_loader.Config(attn="sdpa", sliding_window=3)   # stands for a PreTrainedConfig
    cache = oracle_loader.FakeCache(seen=4)                        # stands for a DynamicCache
    new._tracing = True / False / None     # forces is_tracing() and is_torchdynamo_compiling();
                                           # None leaves it to torch. From 4.45 on: older files call
                                           # torch themselves, so trace those for real
    new._exporting = ...                   # the same for is_torchdynamo_exporting()
    oracle_loader.versions("modeling_attn_mask_utils.py")          # what is on disk
    oracle_loader.fetch("4.44.2")          # downloads one wheel, keeps the files that matter

Every load gives a new module (what one load registered or warned about is not shared): load once,
outside a loop. Only torch and packaging are needed, transformers is not imported. Where these files
are next to it, a release's own code is used: `deprecate_kwarg` from its utils/deprecation.py,
`GeneralInterface` and `is_flash_attention_requested` from utils/generic.py, is_tracing and the like
from utils/import_utils.py. The rest are small stand-ins.
"""

import ast
import enum
import functools
import glob
import itertools
import json
import logging as _pylog
import math
import os
import subprocess
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import ClassVar

import torch
from packaging.version import parse as _V

ROOT = os.environ.get("TFW_ROOT", os.path.expanduser("~/.cache/transformers-releases"))
FILES = [
    "modeling_attn_mask_utils.py",
    "masking_utils.py",
    "utils/import_utils.py",
    "utils/deprecation.py",
    "utils/generic.py",
]
_n = itertools.count()


def fetch(version):
    """Downloads a release's wheel with pip and keeps the few files, unless they are there."""
    d = f"{ROOT}/{version}"
    if os.path.isdir(d):
        return d
    os.makedirs(ROOT, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT) as t:
        subprocess.check_call(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                f"transformers=={version}",
                "-d",
                t,
            ]
        )
        w = glob.glob(t + "/*.whl")[0]
        o = os.path.join(t, "out")
        os.makedirs(o)
        with zipfile.ZipFile(w) as z:
            for f in FILES:
                if "transformers/" + f in z.namelist():
                    with open(f"{o}/{os.path.basename(f)}", "wb") as h:
                        h.write(z.read("transformers/" + f))
        try:
            os.rename(o, d)  # another process may have been first
        except OSError:
            if not os.path.isdir(d):
                raise
    return d


def versions(name="modeling_attn_mask_utils.py"):
    return sorted(
        (os.path.basename(os.path.dirname(p)) for p in glob.glob(f"{ROOT}/*/{name}")), key=_V
    )


def _pick(path, names, env):
    """Executes only the named top-level functions and classes of a source file, in env."""
    out = {}
    if not os.path.exists(path):
        return out
    src = Path(path).read_text()
    for node in ast.parse(src).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
            exec(compile(ast.Module([node], []), path, "exec"), env)
            out[node.name] = env[node.name]
    return out


class _Logger(_pylog.Logger):
    def __init__(self, name):
        super().__init__(name)
        self.records = []
        self.addHandler(_pylog.StreamHandler())  # like transformers' stderr handler
        self.warning_once = functools.lru_cache(None)(self._w1)

    def _w1(self, *a, **k):
        self.records.append((a, k))
        self.warning(*a, **k)


class Cache:
    pass


class PreTrainedConfig:
    pass


class Config(PreTrainedConfig):
    def __init__(self, attn="sdpa", **kw):
        self._attn_implementation = attn
        self.__dict__.update(kw)

    def get_text_config(self):
        return self


def FakeCache(
    seen=0,
    mod=None,
    window=None,
    is_sliding=(False,),
    is_linear=None,
    is_dummy=None,
    compileable=False,
    static_len=None,
    tensor_offset=False,
):
    """Like a DynamicCache, or with static_len like a StaticCache.

    Full layers report kv = seen + q, sliding ones min(window - 1, seen) + q.
    """
    base = getattr(mod, "Cache", Cache)

    n = len(is_sliding)
    _FC = type(
        "_FC",
        (base,),
        dict(
            is_sliding=list(is_sliding),
            is_linear=list(is_linear or [False] * n),
            is_dummy=list(is_dummy or [False] * n),
            is_compileable=compileable,
            seen=seen,
            __len__=lambda self: n,
            __bool__=lambda self: True,
            __repr__=lambda self: f"FakeCache(seen={self.seen})",
            __init__=lambda self: None,
        ),
    )  # overrides the real Cache's properties
    c = _FC()

    def q_len(x):
        return x if isinstance(x, int) else x.shape[0]

    def get_mask_sizes(q, layer_idx):
        q = q_len(q)
        if c.is_sliding[layer_idx] and window is not None:
            off = max(seen - window + 1, 0)
            return (window, off) if seen >= window and q == 1 else (min(seen, window - 1) + q, off)
        if static_len is not None:
            return static_len, 0
        return seen + q, 0

    c.get_mask_sizes = get_mask_sizes
    c.get_seq_length = lambda *a: torch.tensor(seen) if tensor_offset else seen
    c.get_query_offset = lambda *a: torch.tensor(seen) if tensor_offset else seen
    c.has_previous_state = lambda *a: seen > 0
    return c


def _load(which, spec, version=None, torch_version=None, xpu=False, flex=True, source_edit=None):
    spec = os.fspath(spec)
    if spec.endswith(".py"):
        path, d = spec, os.path.dirname(os.path.abspath(spec))
        if version is None:
            raise ValueError("a file needs version=: releases' own deprecation checks read it")
        folders = [d, os.path.join(d, "utils")]
    else:
        version = spec
        path = f"{ROOT}/{spec}/{which}"
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"{which} of transformers {spec} is not in {ROOT}: fetch({spec!r}) gets it "
                "(4.35.0+; masking_utils 4.53.0+)"
            )
        folders = [f"{ROOT}/{spec}"]
    pkg = f"_tf_oracle_{next(_n)}"

    def aux(name):
        paths = [os.path.join(folder, name) for folder in folders]
        return next(filter(os.path.exists, paths), paths[-1])

    def mk(name, **kw):
        m = types.ModuleType(name)
        m.__dict__.update(kw)
        sys.modules[name] = m
        return m

    mk(pkg, __version__=version, __path__=[])
    state = types.SimpleNamespace(mod=None)

    # --- utils.import_utils
    env = {
        "torch": torch,
        "functools": functools,
        "lru_cache": functools.lru_cache,
        "is_torch_available": lambda: True,
        "__name__": pkg + ".iu",
    }
    exec("from typing import *", env)
    names = {
        "is_torchdynamo_compiling",
        "is_torchdynamo_exporting",
        "is_torch_fx_proxy",
        "is_fake_tensor",
        "is_jax_jitting",
        "is_jit_tracing",
        "is_cuda_stream_capturing",
        "is_xpu_stream_capturing",
        "is_tracing",
    }
    env["is_torch_fx_available"] = lambda: True
    real = _pick(aux("import_utils.py"), names, env)

    def wrap(name, flag, default):
        f = real.get(name, default)

        def g(*a, **k):
            v = getattr(state.mod, flag, None) if state.mod is not None else None
            return v if v is not None else f(*a, **k)

        return g

    iu = mk(
        pkg + ".utils.import_utils",
        is_torchdynamo_compiling=wrap(
            "is_torchdynamo_compiling", "_tracing", lambda: torch.compiler.is_compiling()
        ),
        is_torchdynamo_exporting=wrap(
            "is_torchdynamo_exporting", "_exporting", lambda: torch.compiler.is_exporting()
        ),
        is_tracing=wrap(
            "is_tracing",
            "_tracing",
            lambda t=None: torch.compiler.is_compiling() or torch.jit.is_tracing(),
        ),
        is_torch_flex_attn_available=lambda: flex,
        is_torch_greater_or_equal=lambda v, accept_dev=False: (
            _V(_V(torch_version or torch.__version__).base_version) >= _V(v)
        ),
    )
    # --- utils, utils.logging
    lg = mk(pkg + ".utils.logging", get_logger=lambda name=None: _Logger(name or "tf"))

    class ExplicitEnum(str, enum.Enum):  # noqa: UP042 - as the releases have it
        @classmethod
        def _missing_(cls, value):
            raise ValueError(value)

    mk(
        pkg + ".utils",
        __path__=[],
        logging=lg,
        import_utils=iu,
        is_torch_xpu_available=lambda *a: xpu,
        ExplicitEnum=ExplicitEnum,
        is_torch_available=lambda: True,
        is_torchdynamo_compiling=iu.is_torchdynamo_compiling,
    )
    # --- utils.deprecation (real file)
    p = aux("deprecation.py")
    if os.path.exists(p):
        dep = mk(pkg + ".utils.deprecation")
        dep.__package__ = pkg + ".utils"
        dep.__file__ = p
        exec(compile(Path(p).read_text(), p, "exec"), dep.__dict__)
    # --- utils.generic
    genv = {"torch": torch}
    exec("from typing import *", genv)
    genv.update(MutableMapping=MutableMapping, Callable=Callable)
    g = _pick(aux("generic.py"), {"GeneralInterface", "is_flash_attention_requested"}, genv)
    if "GeneralInterface" not in g:

        class GeneralInterface(dict):
            _global_mapping: ClassVar = {}

            def __getitem__(self, k):
                return self._global_mapping[k]

            @classmethod
            def register(cls, k, v):
                cls._global_mapping[k] = v

        g["GeneralInterface"] = GeneralInterface
    g.setdefault(
        "is_flash_attention_requested",
        lambda config=None, requested_attention_implementation=None: (
            "flash"
            in (
                config._attn_implementation
                if config is not None
                else requested_attention_implementation
            )
        ),
    )
    mk(pkg + ".utils.generic", **g)
    mk(pkg + ".cache_utils", Cache=Cache)
    mk(pkg + ".generation", __path__=[])
    mk(pkg + ".generation.continuous_batching", __path__=[])
    mk(
        pkg + ".generation.continuous_batching.cache",
        PagedAttentionCache=type("PagedAttentionCache", (), {}),
    )
    mk(
        pkg + ".configuration_utils",
        PretrainedConfig=PreTrainedConfig,
        PreTrainedConfig=PreTrainedConfig,
    )
    m = mk(pkg + "." + which[:-3])
    m.__package__ = pkg
    m.__file__ = path
    m._tracing = None
    m._exporting = None
    m._version = version
    state.mod = m
    src = Path(path).read_text()
    if source_edit:
        src = source_edit(src)
    exec(compile(src, path, "exec"), m.__dict__)
    return m


def load_attn(spec, **kw):
    return _load("modeling_attn_mask_utils.py", spec, **kw)


def load_last_attn():
    """That of the last release which had the file, fetched where it is not on disk."""
    files = json.loads(Path(__file__).with_name("releases.json").read_text())
    version = [file for file in files if file["sha256"]][-1]["versions"][-1]
    fetch(version)
    return load_attn(version)


def load_masking(spec, **kw):
    return _load("masking_utils.py", spec, **kw)


def show(t):
    """A picture: . is 0, - is -0.0, # is finfo.min, ! is infinite or NaN; booleans are 1 and 0."""
    if t is None:
        return "None"
    out = [f"shape={tuple(t.shape)} {t.dtype}"]
    fm = torch.finfo(t.dtype).min if t.is_floating_point() else None

    def cell(v):
        if t.dtype == torch.bool:
            return "1" if v else "0"
        if v == 0:
            return "-" if fm is not None and math.copysign(1, v) < 0 else "."
        return "#" if v == fm else "!" if v != v or v in (math.inf, -math.inf) else f"{v:g}"

    x = t if t.dim() > 1 else t.reshape(1, -1)
    for b in x.reshape(-1, *x.shape[-2:]):
        out += [" ".join(map(cell, r.tolist())) for r in b] + [""]
    return "\n".join(out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for v in versions():
        n = int(
            (
                load_attn(v)
                .AttentionMaskConverter(True, 3)
                .to_causal_4d(1, 6, 6, dtype=torch.float32)[0, 0, 5]
                == 0
            ).sum()
        )
        want = 3 if _V(v) < _V("4.39") else 4
        assert n == want, (v, n)
    for v in versions("masking_utils.py"):
        load_masking(v)
    print(
        len(versions()),
        "legacy files,",
        len(versions("masking_utils.py")),
        "masking files load; windows as the history says",
    )
