"""Which errors a call may end with: those that name what the caller did."""

import functools
import re

EXPECTED = (ValueError, TypeError, NotImplementedError, IndexError)
# `function: expected ARGUMENT ...`, from Python or C++.
OURS = re.compile(
    r"^(attn_mask::)?[\w.<>]+: (expected|this build of attn_mask has no CUDA kernels)"
)
# The texts of upstream's own errors, which the mirrors raise in the same places.
UPSTREAM = re.compile(
    "|".join(
        [
            r"^Make sure that when passing `sliding_window`",
            r"^Please use `to_causal_4d` only if",
            r"^This attention mask converter is causal\.",
            r"^Incorrect 4D attention_mask shape: ",
            r"^Custom 4D attention mask should be passed in inverted form",
            r"^AttentionMaskConverter\._unmask_unattended expects a float `expanded_mask`",
            r"^Could not find an? `\w+` argument in the config, or it is not set",
            r"^Flash attention cannot handle chunked attention",
            r"^tuple index out of range$",
            r"^(too many|not enough) values to unpack \(expected \d",
            r"^dq_kv_order must be a bool",
            r"^All inputs should be callable mask_functions: ",
            r"^Sliding window is currently only implemented for causal masking",
            r"^~ \(operator\.invert\) is only implemented on",
            # Of mask functions that index tables that end too early.
            r"^index (-?\d+ )?is out of bounds for dimension|^too many indices for tensor",
            r"^select\(\): index 0 out of range for tensor of size \[0\]",
            # Of a mask that is trained, by upstream's masked_fill_ into it.
            r"^a leaf Variable that requires grad is being used in an in-place operation",
        ]
    )
)
# What torch says of values that a meta tensor has not, of ints beyond 64 bits, and of GPUs where
# there are none.
TORCH = re.compile(
    r"^Tensor\.item\(\) cannot be called on meta tensors|^Cannot copy out of meta tensor"
    r"|Overflow when unpacking long"
    r"|^Found no NVIDIA driver|^No CUDA GPUs are available"
)
# Of torch's dispatcher and of its jagged tensors, before an operator of ours is reached.
DISPATCHER = re.compile(
    r"^Could not run '(attn_mask::|aten::empty)|^ZeroTensors are immutable"
    r"|^attn_mask\.\w+\.(default|out)$"
)
NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|^(Storage size|Stride) calculation overflowed"
    r"|resulted in a negative output size|cannot be represented as a SymInt"
)


def returns(check):
    """The check, for which no error is right: AssertionErrors are never expected."""

    @functools.wraps(check)
    def checked(*args):
        try:
            check(*args)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    return checked


def is_expected(error):
    text = str(error)
    if any(pattern.search(text) for pattern in (UPSTREAM, TORCH, DISPATCHER, NO_MEMORY)):
        return True
    return isinstance(error, EXPECTED) and OURS.search(text) is not None
