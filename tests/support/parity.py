"""Makes one call on a file of transformers and on ours; compares what comes back or is raised."""

import contextlib
import inspect
import linecache
import traceback
import warnings

import torch
from hypothesis import strategies as st
from masks import LAYOUTS, MASK_DTYPES, assert_same_mask, describe

FLOAT = torch.float32

FUNCTIONS = (
    "_prepare_4d_causal_attention_mask",
    "_prepare_4d_causal_attention_mask_for_sdpa",
    "_prepare_4d_attention_mask",
    "_prepare_4d_attention_mask_for_sdpa",
    "_create_4d_causal_attention_mask",
)
STATIC_METHODS = (
    "_make_causal_mask",
    "_expand_mask",
    "_unmask_unattended",
    "_ignore_causal_mask_sdpa",
)
METHODS = ("__init__", "to_causal_4d", "to_4d")

VALUES = (
    0,
    1,
    2,
    0.5,
    -1,
    255,
    256,
    257,
    1e-8,
    0.9999,
    0.99999,
    1.0001,
    float("nan"),
    float("inf"),
)
INT_VALUES = (0, 1, 2, 3, 100)


@st.composite
def padding_masks(draw, batch_size, kv_length):
    dtype = draw(st.sampled_from(MASK_DTYPES))
    values = VALUES if dtype.is_floating_point else INT_VALUES
    some = draw(st.lists(st.sampled_from(values), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**31))
    picks = torch.randint(
        len(some), (batch_size, kv_length), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.tensor(some, dtype=torch.float64)[picks].to(dtype)
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return LAYOUTS[layout](mask) if mask.numel() else mask


def embeds(batch_size, q_length, dtype=FLOAT):
    return torch.zeros(batch_size, q_length, 4, dtype=dtype)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def needed_default(dtype):
    """Upstream's causal masks in float64 need float64 to be the default dtype; ours do not."""
    return torch.float64 if dtype == torch.float64 else FLOAT


def outcome(call, module):
    try:
        return call(module), None
    except Exception as error:
        return None, error


class Parity:
    """Runs one call on upstream's module and on ours, and compares what comes back or is raised."""

    def __init__(self, upstream, ours):
        self.upstream = upstream
        self.ours = ours

    def __call__(self, name, *args, converter=(True,), default=FLOAT, **kwargs):
        """A function, a static method, or a method of a converter with these arguments."""
        __tracebackhide__ = True

        def call(module):
            if name in FUNCTIONS:
                return getattr(module, name)(*args, **kwargs)
            owner = module.AttentionMaskConverter
            owner = owner if name in STATIC_METHODS else owner(*converter)
            return getattr(owner, name)(*args, **kwargs)

        return self.call(call, default)

    def call(self, call, default=FLOAT):
        __tracebackhide__ = True
        with default_dtype(default), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want, expected = outcome(call, self.upstream)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got, error = outcome(call, self.ours)
        if expected is not None:
            assert error is not None, f"upstream raises {expected!r}, ours gives {describe(got)}"
            self._assert_same_error(error, expected)
        elif error is not None:
            raise AssertionError(f"upstream gives {describe(want)}, ours raises") from error
        elif isinstance(want, torch.Tensor) or want is None:
            assert_same_mask(got, want)
        else:
            assert (type(got), got) == (type(want), want)
        return got

    def _assert_same_error(self, error, expected):
        last = traceback.extract_tb(expected.__traceback__)[-1]
        line = linecache.getline(last.filename, last.lineno).lstrip()
        if last.filename == self.upstream.__file__ and line.startswith("raise "):
            text = str(expected).replace(self.upstream.__name__, self.ours.__name__)
            assert (type(error), str(error)) == (type(expected), text)
        else:
            # torch, or the unpacking of a shape, failed inside upstream's code.
            allowed = (ValueError, TypeError, IndexError)
            assert isinstance(error, allowed[: 3 if isinstance(expected, IndexError) else 2]), (
                f"upstream raises {expected!r}, ours {error!r}"
            )
            assert str(error)


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
