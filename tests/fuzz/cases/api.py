"""Calls of the public Python API with arguments of the right names, mostly of the right types."""

import inspect
import re
import types

import attn_mask
import masks
import torch

from cases.values import any_dtype, any_int, mirror_tensor


def some_block_mask(rng):
    if rng.random() < 0.1:
        return rng.choice([None, 5, mirror_tensor(rng)])
    length = rng.choice([0, 1, 5, 9])
    rule = attn_mask.rules.causal()
    return attn_mask.create_block_mask(rule, 2, 1, length, length, device="cpu", BLOCK_SIZE=4)


def tables(rng):
    """2-D, one row for each batch row, and longer than positions go, most often."""
    if rng.random() < 0.2:
        return mirror_tensor(rng)
    dtypes = (torch.int64, torch.int64, torch.int32, torch.bool, torch.float32)
    return mirror_tensor(rng, [rng.choice([1, 2, 2, 2]), rng.choice([5, 32, 32, 32])], dtypes)


def any_mask_function(rng, depth=2):
    r = attn_mask.rules
    leaves = [
        lambda: r.causal(),
        lambda: r.bidirectional(),
        lambda: r.sliding_window(rng.randint(1, 9)),
        lambda: r.window(rng.choice([None, 0, 3]), rng.choice([None, 0, 3])),
        lambda: r.chunked(rng.randint(1, 9), rng.choice([None, mirror_tensor(rng, [2])])),
        lambda: r.blockwise(tables(rng)),
        lambda: r.documents(tables(rng)),
        lambda: r.padding(tables(rng)),
        lambda: attn_mask.masking_utils.causal_mask_function,
        lambda: lambda b, h, q, k: (q + k) % 3 == 0,
        lambda: lambda b, h, q, k: q >= k,
    ]
    if rng.random() < 0.03:
        # What is no mask function, or none that can be called with tensors.
        return rng.choice([lambda b, h, q, k: True, lambda b, h, q: q > 0, lambda *_: [], None, 5])
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(leaves)()
    parts = [any_mask_function(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    joins = [
        lambda: r.intersection(*parts),
        lambda: r.union(*parts),
        lambda: r.reindex(parts[0], tables(rng)),
        lambda: r.shift(parts[0], rng.randint(-3, 3), rng.randint(-3, 3)),
    ]
    return rng.choice(joins)()


class Cache:
    """What create_causal_mask and the like read of a cache."""

    def __init__(self, rng):
        self.length = rng.choice([0, 0, 3, 7])
        self.is_compileable = rng.random() < 0.2
        self.is_sliding = [rng.random() < 0.5, rng.random() < 0.5]
        self.offset = rng.choice([0, 0, 2])

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_mask_sizes(self, q_length, layer_idx=0):
        if isinstance(q_length, torch.Tensor):
            q_length = q_length.shape[0]
        return self.length + q_length, self.offset

    def get_query_offset(self, layer_idx=0):
        return self.length


def any_config(rng):
    return types.SimpleNamespace(
        _attn_implementation=rng.choice(["sdpa", "sdpa", "eager", "flex_attention", "xxx"]),
        sliding_window=rng.choice([None, 1, 4, 4]),
        attention_chunk_size=rng.choice([None, 1, 4, 4]),
        layer_types=rng.choice([["full_attention", "sliding_attention"], ["chunked_attention"]]),
        num_hidden_layers=2,
        is_causal=rng.random() < 0.8,
        get_text_config=lambda **_: any_config(rng),
    )


def any_padding(rng):
    kind = rng.random()
    if kind < 0.3:
        return None
    if kind < 0.9:
        shape = [2, rng.choice([3, 4, 8, 10])]
        if rng.random() < 0.2:
            shape = [2, 1, 3, rng.choice([3, 8])]
        return mirror_tensor(rng, shape, (torch.int64, torch.bool, torch.float32))
    return mirror_tensor(rng)


def embeds(rng):
    if rng.random() < 0.1:
        return mirror_tensor(rng)
    return torch.zeros(
        2, 3, 4, dtype=rng.choice(masks.MASK_DTYPES if rng.random() < 0.1 else masks.OUT_DTYPES)
    )


def query(rng):
    if rng.random() < 0.1:
        return mirror_tensor(rng)
    return torch.zeros(2, 2, rng.choice([0, 1, 3, 3, 8]), 4)


def small_or_any_int(rng):
    return rng.choice([1, 2, 3, 4, 8]) if rng.random() < 0.8 else any_int(rng)


def offset(rng):
    return rng.choice([0, 0, 1, 5]) if rng.random() < 0.8 else any_int(rng)


# By name, since that is what says what an argument may be.
ARGUMENTS = {
    "B": lambda rng: rng.choice([None, 1, 2, 2, any_int(rng)]),
    "H": lambda rng: rng.choice([None, 1, 2, any_int(rng)]),
    "BLOCK_SIZE": lambda rng: rng.choice([1, 4, 128, (2, 3), any_int(rng), (any_int(rng), 4)]),
    "attention_mask": any_padding,
    "attention_mask_2d": any_padding,
    "block_mask": some_block_mask,
    "block_sequence_ids": lambda rng: rng.choice([None, tables(rng)]),
    "cache": Cache,
    "compact": lambda rng: rng.choice([False, True, small_or_any_int(rng), (2, any_int(rng))]),
    "config": any_config,
    "cu_seqlens": lambda rng: rng.choice(
        [None, torch.tensor([0, 2, 3]), torch.tensor([0, 3, 6]), mirror_tensor(rng)]
    ),
    "device": lambda rng: rng.choice(["cpu", "cpu", "cpu", "meta"]),
    "dim": lambda rng: rng.randint(-3, 9),
    "document_ids": lambda rng: rng.choice(
        [None, mirror_tensor(rng, [2, rng.choice([3, 6])], (torch.int64,)), mirror_tensor(rng)]
    ),
    "dtype": any_dtype,
    "encoder_hidden_states": lambda rng: rng.choice([None, None, embeds(rng)]),
    "input_ids_shape": lambda rng: (small_or_any_int(rng), small_or_any_int(rng)),
    "input_shape": lambda rng: (small_or_any_int(rng), small_or_any_int(rng)),
    "inputs_embeds": embeds,
    "key": query,
    "key_value_length": lambda rng: rng.choice([None, 3, 4, any_int(rng)]),
    "kv_offset": offset,
    "left": lambda rng: rng.choice([None, small_or_any_int(rng)]),
    "left_padding": lambda rng: mirror_tensor(rng, [2], (torch.int64, torch.int32)),
    "mask_function": any_mask_function,
    "mask_mod": any_mask_function,
    "masked_value": lambda rng: rng.choice([None, -1.0, -1e30, float("-inf"), any_int(rng)]),
    "min_dtype": lambda rng: rng.choice([0.0, torch.finfo(torch.float32).min, any_int(rng)]),
    "num_heads": small_or_any_int,
    "past_key_values": lambda rng: rng.choice([None, Cache(rng)]),
    "position_ids": lambda rng: rng.choice(
        [
            None,
            mirror_tensor(rng, [2, 3], (torch.int64, torch.int32)),
            mirror_tensor(rng, dtypes=(torch.int64, torch.int32)),
        ]
    ),
    "policy": lambda rng: rng.choice(["upstream", "never", "none", "xx", "always"]),
    "padding": lambda rng: rng.choice([None, "none", "xx"]),
    "packing": lambda rng: rng.choice([None, "none", "xx"]),
    "q_offset": offset,
    "query": query,
    "right": lambda rng: rng.choice([None, small_or_any_int(rng)]),
    "value": query,
    "version": lambda rng: rng.choice(["4.35.0", "4.57.1", "5.0.0", "1", "", "4.x", "99"]),
}
BY_ANNOTATION = (
    ("Callable", any_mask_function),
    ("torch.Tensor", tables),
    ("torch.dtype", any_dtype),
    ("bool", lambda rng: rng.random() < 0.5),
    ("int", small_or_any_int),
)


def api():
    """The public functions of the package, by module; the mirrors of transformers 4 included."""
    modules = [
        attn_mask,
        attn_mask.rules,
        attn_mask.masking_utils,
        attn_mask.modeling_attn_mask_utils,
        attn_mask.block_sparse,
        *(
            attn_mask.for_transformers(version).modeling_attn_mask_utils
            for version in ("4.35.0", "4.36.0", "4.40.0", "4.57.0")
        ),
    ]
    # These change the process, or need another package.
    left_out = {"plot", "install", "installed", "uninstall", "is_installed", "_flex_attention"}
    # These are expressions over whatever they are given.
    left_out |= {"_identity", "_causal", "_rel_bias", "_rel_causal"}
    found = []
    for module in modules:
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function) and name not in left_out:
                found.append((f"{module.__name__}.{name}", function))
        converter = getattr(module, "AttentionMaskConverter", None)
        if converter is not None:
            found.append((f"{module.__name__}.AttentionMaskConverter", converter))
    return found


def value_for(rng, parameter):
    annotation = str(parameter.annotation)
    if "int | torch.Tensor" in annotation and rng.random() < 0.2:
        return mirror_tensor(rng, rng.choice([[], [2, 1], [1], [2]]))
    is_dense = parameter.name == "block_mask" and "Tensor" in annotation
    if parameter.name in ARGUMENTS and not is_dense:
        value = ARGUMENTS[parameter.name](rng)
        while value is None and "None" not in annotation and "Any" not in annotation:
            value = ARGUMENTS[parameter.name](rng)
        return value
    if "None" in annotation and rng.random() < 0.3:
        return None
    for text, make in BY_ANNOTATION:
        if text in annotation or text in getattr(parameter.annotation, "__name__", ""):
            return make(rng)
    return rng.choice([None, any_int(rng), mirror_tensor(rng)])


def arguments_for(rng, function):
    args, kwargs = [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args += [any_mask_function(rng) for _ in range(rng.randrange(4))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif parameter.default is parameter.empty or rng.random() < 0.35:
            value = value_for(rng, parameter)
            if parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(value)
            else:
                kwargs[parameter.name] = value
    return args, kwargs


def api_case(rng):
    name, function = rng.choice(api())
    if not name.endswith("AttentionMaskConverter"):
        args, kwargs = arguments_for(rng, function)
        return function, args, kwargs

    def call():
        converter = function(**arguments_for(rng, function)[1])
        methods = [
            name for name in vars(type(converter)) if re.match(r"to_|_make|_expand|_unm", name)
        ]
        method = getattr(converter, rng.choice(methods))
        args, kwargs = arguments_for(rng, method)
        return method(*args, **kwargs)

    return call, (), {}
