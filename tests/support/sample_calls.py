"""A few calls of every operator, which the tests of operators, threads and devices share."""

import contextlib
import warnings

import torch
from attn_mask._core.library import operators_that
from attn_mask.rules import (
    blockwise,
    causal,
    chunked,
    documents,
    padding,
    reindex,
    shift,
    union,
    window,
)

PADDING = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
ONES = torch.ones(2, 5, dtype=torch.int64)
MASK_4D = PADDING[:, None, None, :].expand(3, 1, 2, 5).to(torch.float32)
HALF = torch.float16
FLOAT = torch.float32
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2]])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0]])

PACKED = documents(DOCUMENTS) & reindex(window(2, None) & causal(), POSITIONS)
# More than kernels take at once.
LARGE = union(*[shift(causal(), 0, 1), padding(PADDING)] * 15)


def _embeds(batch_size, q_length, dtype=FLOAT):
    return torch.zeros(batch_size, q_length, 4, dtype=dtype)


def _additive():
    low = torch.finfo(FLOAT).min
    return torch.tensor([[[[low, low, low], [0.0, low, low], [-0.0, 0.0, low]]]])


SAMPLES = {
    "to_causal_4d": [
        ((2, 4, 4), {"dtype": FLOAT}),
        ((3, 2, 5), {"dtype": HALF, "sliding_window": 2}),
        ((1, 1, 7), {"dtype": torch.bfloat16}),
        ((2, 0, 3), {"dtype": torch.float64, "sliding_window": 1}),
    ],
    "to_4d": [
        ((PADDING, 5), {"dtype": FLOAT, "key_value_length": 5}),
        ((PADDING.bool(), 2), {"dtype": HALF, "key_value_length": 5, "sliding_window": 1}),
        ((PADDING.t().contiguous().t(), 3), {"dtype": torch.bfloat16, "is_causal": False}),
        ((PADDING.to(torch.uint16), 1), {"dtype": torch.float64}),
        (
            (PADDING, 4),
            {"dtype": HALF, "key_value_length": 5, "sliding_window": 1, "unmask_unattended": True},
        ),
    ],
    "_make_causal_mask": [
        (((2, 4),), {"dtype": FLOAT}),
        (((1, 3), 4, 2), {"dtype": torch.float64}),
        (((0, 3), 1), {"dtype": HALF}),
    ],
    "_expand_mask": [
        ((PADDING,), {"dtype": FLOAT}),
        ((PADDING.float()[:, ::2], 2), {"dtype": HALF}),
        ((PADDING.to(torch.uint8), 1), {"dtype": torch.bfloat16}),
        ((PADDING[:0], 4), {"dtype": torch.float64}),
    ],
    "_unmask_unattended": [
        ((_additive(), torch.finfo(FLOAT).min), {}),
        ((_additive().transpose(-1, -2), torch.finfo(FLOAT).min), {}),
        ((torch.tensor([7, 7]), 7), {}),
        ((_additive().expand(2, 1, 2, 3, 3, 3).transpose(0, 3), torch.finfo(FLOAT).min), {}),
    ],
    "_ignore_causal_mask_sdpa": [
        ((None, _embeds(2, 5), 0), {}),
        ((ONES, _embeds(2, 5), 0, 6), {}),
        ((PADDING, _embeds(3, 1), 4, None, True), {}),
    ],
    "_is_all_visible": [
        ((PADDING,), {}),
        ((ONES.bool(),), {}),
        ((torch.full((3, 4), -0.5).t(),), {}),
    ],
    "_prepare_4d_causal_attention_mask": [
        ((PADDING, (3, 2), _embeds(3, 2), 3), {}),
        ((None, (2, 4), _embeds(2, 4, HALF), 1, 2), {}),
        ((MASK_4D, (3, 2), _embeds(3, 2), 3), {}),
        ((None, (2, 1), _embeds(2, 1), 5), {}),
    ],
    "_prepare_4d_causal_attention_mask_for_sdpa": [
        ((PADDING, (3, 2), _embeds(3, 2), 3), {"allow_skip": False}),
        ((ONES, (2, 5), _embeds(2, 5, HALF), 0), {"allow_skip": False}),
        (
            (PADDING, (3, 2), _embeds(3, 2), 3),
            {"allow_skip": False, "unmask_unattended": True},
        ),
        ((None, (2, 5), _embeds(2, 5), 0, 3), {"allow_skip": False}),
        ((MASK_4D, (3, 2), _embeds(3, 2), 3), {"allow_skip": False}),
    ],
    "_prepare_4d_attention_mask": [
        ((PADDING, 2), {"dtype": FLOAT}),
        ((PADDING.double(),), {"dtype": torch.bfloat16}),
    ],
    "_prepare_4d_attention_mask_for_sdpa": [
        ((PADDING, 2), {"dtype": FLOAT, "allow_skip": False}),
        ((ONES,), {"dtype": HALF, "allow_skip": False}),
    ],
    "_create_4d_causal_attention_mask": [
        (((2, 4),), {"dtype": FLOAT}),
        (((2, 4), 3, 2), {"dtype": torch.bfloat16}),
        (((2, 1), 3), {"dtype": FLOAT}),
    ],
    "boolean": [
        ((*causal().encode(), 2, 4, 4), {}),
        ((*(causal() & padding(PADDING)).encode(), 3, 2, 5), {"q_offset": 3}),
        ((*PACKED.encode(), 1, 6, 6), {}),
        ((*(chunked(2) & causal() | blockwise(DOCUMENTS)).encode(), 2, 6, 6), {}),
        ((*causal().encode(), 3, 2, 5), {"q_positions": torch.tensor(3)}),
        ((*LARGE.encode(), 3, 2, 5), {}),
    ],
    "additive": [
        ((*(causal() & padding(PADDING)).encode(), 3, 5, 5), {"dtype": HALF}),
        (
            (*causal().encode(), 2, 4, 4),
            {"dtype": FLOAT, "bias": torch.arange(32.0).view(1, 2, 4, 4)},
        ),
        ((*shift(window(2, 0), 1, 0).encode(), 1, 3, 7), {"dtype": torch.float64, "kv_offset": 1}),
    ],
}

BATCH = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
QUERIES = torch.zeros(2, 3, 4)


def closed_rows():
    mask = torch.full((2, 1, 3, 5), torch.finfo(FLOAT).min)
    mask[:, :, 1, 2] = 0.0
    return mask


_RULE = *(causal() & padding(BATCH)).encode(), 2, 3, 5

# A call of each operator that writes a mask, with nothing wrong and a result of [2, 1, 3, 5].
GOOD = {
    "to_causal_4d": ((2, 3, 5), {"dtype": FLOAT}),
    "to_4d": ((BATCH, 3), {"dtype": FLOAT, "key_value_length": 5}),
    "_make_causal_mask": (((2, 3), 2), {"dtype": FLOAT}),
    "_expand_mask": ((BATCH, 3), {"dtype": FLOAT}),
    "_unmask_unattended": ((closed_rows(), torch.finfo(FLOAT).min), {}),
    "_prepare_4d_causal_attention_mask": ((BATCH, (2, 3), QUERIES, 2), {}),
    "_prepare_4d_causal_attention_mask_for_sdpa": ((BATCH, (2, 3), QUERIES, 2), {}),
    "_prepare_4d_attention_mask": ((BATCH, 3), {"dtype": FLOAT}),
    "_prepare_4d_attention_mask_for_sdpa": ((BATCH, 3), {"dtype": FLOAT}),
    "_create_4d_causal_attention_mask": (((2, 3), 2), {"dtype": FLOAT}),
    "boolean": (_RULE, {"q_offset": 2}),
    "additive": (
        _RULE,
        {"dtype": FLOAT, "q_offset": 2, "bias": torch.arange(15.0).view(1, 1, 3, 5)},
    ),
}

# Operators of several tensors, or of none that is a mask; test_block_mask.py calls them.
BLOCK_SAMPLES = {
    "block_mask": [
        ((*causal().encode(), 2, 2, 40, 50, 16, 16), {}),
        ((*(causal() & padding(PADDING)).encode(), 3, 1, 2, 5, 2, 4), {"q_offset": 3}),
        ((*documents(DOCUMENTS).encode(), 2, 3, 6, 6, 4, 2), {"separate_full_blocks": False}),
        (
            (*(window(3, None) & causal()).encode(), 1, 1, 90, 90, 8, 16),
            {"kv_width": 3, "q_width": 4},
        ),
        ((*LARGE.encode(), 3, 1, 2, 5, 2, 2), {}),
        ((*causal().encode(), 3, 1, 2, 5, 2, 2), {"q_positions": torch.tensor([[3], [1], [0]])}),
    ],
    "_block_states": [
        ((*causal().encode(), 2, 2, 40, 50, 16, 16), {}),
        ((*(causal() & padding(PADDING)).encode(), 3, 1, 2, 5, 2, 4), {"q_offset": 3}),
    ],
    "_block_mask_widths": [((*causal().encode(), 2, 2, 40, 50, 16, 16), {})],
}


def attention_inputs(q_length, kv_length, heads=2, key_heads=2, width=8, dtype=FLOAT):
    """(query, key, value) of a batch of 2."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, q_length), (key_heads, kv_length), (key_heads, kv_length)
    return [
        torch.randn(2, *shape, width, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


_ATTENTION = [
    ((*causal().encode(), *attention_inputs(6, 6)), {}),
    ((*(causal() & padding(BATCH)).encode(), *attention_inputs(5, 5, dtype=HALF)), {}),
    (
        (*(causal() & window(2, None)).encode(), *attention_inputs(4, 7, heads=4)),
        {"q_offset": 3, "enable_gqa": True, "scale": 0.5},
    ),
    ((*documents(DOCUMENTS).encode(), *attention_inputs(6, 6, dtype=torch.float64)), {}),
    ((*causal().encode(), *attention_inputs(0, 3)), {}),
    ((*causal().encode(), *attention_inputs(3, 0)), {}),
    (
        (*causal().encode(), *attention_inputs(2, 5)),
        {"q_positions": torch.tensor([[3], [1]])},
    ),
    ((*union(*[shift(causal(), 0, 1), padding(BATCH)] * 15).encode(), *attention_inputs(5, 5)), {}),
]


def _backward(args, kwargs):
    out, lse = torch.ops.attn_mask.scaled_dot_product_attention(*args, **kwargs)
    grad = torch.ones_like(out).add_(out)
    return (*args[:2], grad, *args[2:], out, lse), kwargs


ATTENTION_SAMPLES = {
    "scaled_dot_product_attention": _ATTENTION,
    "scaled_dot_product_attention_backward": [_backward(*call) for call in _ATTENTION],
    "_attention_plan": [((*causal().encode(), 2, 4, 8, 8), {"dtype": HALF})],
    "_document_limits": [((*documents(DOCUMENTS).encode(), 1, 6, 6), {})],
}

ATTENTION_OPERATORS = list(ATTENTION_SAMPLES)
BLOCK_OPERATORS = [
    name
    for name in operators_that(takes_rule=True, writes_mask=False)
    if name not in ATTENTION_OPERATORS
]
OPERATORS = [
    name for name in operators_that() if name not in (*BLOCK_OPERATORS, *ATTENTION_OPERATORS)
]

# A bool is decided on the host and cannot stand in a graph.
HOST_DECISIONS = operators_that(is_host_decision=True, takes_rule=False)

# All that take no program; test_rules.py compares and fuzzes the others with a reference of their
# own.
LEGACY_OPERATORS = operators_that(takes_rule=False)

CALLS = [(name, args, kwargs) for name in SAMPLES for args, kwargs in SAMPLES[name]]

CALL_IDS = [f"{name}-{i}" for name in SAMPLES for i in range(len(SAMPLES[name]))]


def operator(name):
    return getattr(torch.ops.attn_mask, name)


def map_tensors(function, arguments):
    """``arguments`` (args or kwargs) with every tensor replaced, those in lists included."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, function, arguments)


def as_on_cuda(name, kwargs):
    """``kwargs`` with which the CPU unmasks fully masked rows where CUDA does by itself."""
    arguments = operator(name).default._schema.arguments
    by_device = [
        a.name for a in arguments if a.name == "unmask_unattended" and a.default_value is None
    ]
    return dict.fromkeys(by_device, True) | kwargs


@contextlib.contextmanager
def nothing_waits():
    """An error where something in the block waits for the GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
