"""Random values for arguments, and what is said of them where a case fails."""

import contextlib
import random

import masks
import torch


def any_int(rng):
    """Any 64-bit integer, small ones most often."""
    far = [2**31 - 1, 2**31, 2**59 - 1, 2**59, 2**59 + 1, 2**62, 2**63 - 1]
    if rng.random() < 0.2:
        return rng.choice([*far, *(-n for n in far), -(2**63)])
    return rng.choice([-2, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 8, 16])


def any_dtype(rng):
    names = ["float32", "float32", "float16", "bfloat16", "float64"]
    others = ["int64", "bool", "complex64", "float8_e4m3fn", "uint16", "quint8"]
    return getattr(torch, rng.choice(names if rng.random() < 0.7 else others))


def any_device(rng):
    return torch.device(rng.choice(["cpu"] * 6 + ["cpu:0", "meta", "cuda", "cuda:1", "xpu", "mps"]))


def any_shape(rng):
    sizes = [0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    return [rng.choice(sizes) for _ in range(rng.choice([0, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 5, 6]))]


def strided(rng, tensor):
    """The same sizes in another layout; elements may stand in one place of memory."""
    if not tensor.numel():
        return tensor
    kind = rng.randrange(6)
    if kind < 2:
        return tensor
    if kind == 2 and tensor.dim():
        return tensor[:1].expand(tensor.shape)
    if kind == 3:
        strides = [rng.randrange(4) for _ in tensor.shape]
        flat = tensor.flatten()
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, strides, strict=True))
        if reach < flat.numel():
            return flat.as_strided(tensor.shape, strides)
    layouts = [name for name in masks.LAYOUTS if name not in ("one row", "one column")]
    return masks.LAYOUTS[rng.choice(layouts)](tensor) if tensor.dim() else tensor


def any_tensor(rng, shape=None, dtypes=None, strange=range(8)):
    """Any dtype, rank, layout and device; of `shape` and one of `dtypes` where they are given."""
    shape = any_shape(rng) if shape is None else shape
    if dtypes is None:
        dtypes = (*masks.MASK_DTYPES, *masks.COMPLEX_DTYPES)
        if rng.random() < 0.6:
            dtypes = (torch.int64, torch.bool, torch.float32, torch.int32, torch.uint8)
    low, high = rng.choice([(0, 2), (0, 2), (1, 2), (0, 1), (-2, 9)])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values = torch.randint(low, high, shape, generator=generator)
    tensor = strided(rng, values.to(rng.choice(dtypes)))
    if rng.random() < 0.88:
        return tensor
    return strange_tensor(rng.choice(strange), rng, tensor)


def strange_tensor(kind, rng, tensor):
    """What masks seldom are."""
    if kind == 0:
        return tensor.to("meta")
    with contextlib.suppress(Exception):  # not every dtype comes in every layout
        if kind == 1:
            return tensor.float().requires_grad_()
        if kind == 2:
            return torch._neg_view(tensor.float())
        if kind == 3:
            return tensor.conj()
        if kind == 4:
            return rng.choice([torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])(tensor)
        if kind == 5:
            layout = rng.choice([torch.strided, torch.jagged])
            return torch.nested.nested_tensor([tensor, tensor], layout=layout)
        if kind == 6:
            return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    return tensor


def of_schema(rng, real_type):
    """A value for an argument of an operator."""
    if real_type.startswith("Optional["):
        return None if rng.random() < 0.5 else of_schema(rng, real_type[len("Optional[") : -1])
    if real_type == "List[Tensor]":
        return [any_tensor(rng) for _ in range(rng.randrange(4))]
    if real_type == "List[int]":
        return [any_int(rng) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 8]))]
    if real_type == "Tensor":
        # None is an undefined tensor.
        return None if rng.random() < 0.02 else any_tensor(rng)
    if real_type == "number":
        floats = [0.0, -0.0, float("nan"), float("inf"), -3.4028234663852886e38, 1e300, 1j, True]
        return rng.choice([any_int(rng), *floats])
    simple = {
        "int": any_int,
        "float": lambda rng: rng.choice([0.0, 1.0, -1.0, 1e300, float("nan"), float("inf")]),
        "bool": lambda rng: rng.random() < 0.5,
        "ScalarType": any_dtype,
        "Device": any_device,
    }
    return simple[real_type](rng)


def mirror_tensor(rng, shape=None, dtypes=None):
    """What torch's own functions take, too: mirrors hand it to them as upstream does."""
    dtypes = dtypes or (
        torch.int64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.float32,
    )
    return any_tensor(rng, shape, dtypes, strange=(0, 1, 2))


def describe(value):
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(describe, value)) + "]"
    if isinstance(value, random.Random):
        return "rng"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}={describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, torch.Tensor):
        with contextlib.suppress(Exception):
            strides = f" strides {list(value.stride())}" if value.layout == torch.strided else ""
            return f"{value.dtype}{list(value.shape)}{strides} {value.layout} on {value.device}"
        return f"a tensor of {value.layout}"
    try:
        return repr(value)
    except Exception:  # torch's BlockMask, where it is empty
        return f"a {type(value).__name__}"
