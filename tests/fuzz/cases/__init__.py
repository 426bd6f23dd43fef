"""Random cases: each is a call (function, args, kwargs), drawn from a seed.

A case passes if it returns, and what it returns is right where a reference says what that is, or if
it raises an error that names what the caller did.
"""

import random

import torch

from cases import api, attention, operators, views
from cases.errors import is_expected
from cases.values import describe

__all__ = ["describe_call", "is_expected", "make_case"]

KINDS = (
    (operators.operator_case, 4),
    (operators.compared_case, 2),
    (api.api_case, 4),
    (views.view_case, 6),
    (attention.attention_case, 4),
)


def make_case(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(2 if seed % 8 == 0 else 1)
    kinds, weights = zip(*KINDS, strict=True)
    return rng.choices(kinds, weights)[0](rng)


def describe_call(function, args, kwargs):
    name = getattr(function, "__name__", function)
    return f"{name} {describe(args)} {describe(kwargs)}"
