"""Comparing, drawing and laying out masks."""

import torch

OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

INT_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)

FLOAT8_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)

COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)

MASK_DTYPES = (torch.bool, *INT_DTYPES, *OUT_DTYPES, *FLOAT8_DTYPES)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# A NaN is compared as a NaN, whatever its payload: this pattern is one, in every format of 2 bytes
# and more, and no operator writes it.
_ANY_NAN = -1


def lowest(dtype):
    """What a masked cell holds."""
    return torch.finfo(dtype).min


def bits(tensor):
    """The cells as integers, different for 0.0 and -0.0; every NaN becomes the same integer."""
    cells = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
    if tensor.dtype in OUT_DTYPES:
        cells = cells.masked_fill(tensor.isnan(), _ANY_NAN)
    return cells


def _cell(value, closed):
    if value != value:
        return "?"
    if value == 0:
        return "~" if str(value).startswith("-") else "0"
    return "-" if value == closed else "*"


def draw(mask, rows=16, columns=48):
    """0 visible, ~ visible as -0.0, - masked, ? NaN, * anything else; one block per [b, h]."""
    if mask.dim() == 0:
        mask = mask[None]
    closed = lowest(mask.dtype) if mask.dtype.is_floating_point else None
    planes = mask.detach().reshape(-1, *mask.shape[-2:]) if mask.dim() > 2 else mask[None]
    blocks = []
    for plane in planes[:2]:
        plane = plane if plane.dim() == 2 else plane[None]
        lines = plane[:rows, :columns].tolist()
        blocks.append("\n".join("".join(_cell(value, closed) for value in row) for row in lines))
    return "\n\n".join(blocks)


def describe(result):
    if not isinstance(result, torch.Tensor):
        return repr(result)
    return f"{result.dtype} {list(result.shape)} on {result.device}"


def assert_same_mask(got, want):
    """Both None, or the same dtype, shape, device type and bits."""
    __tracebackhide__ = True
    if got is None or want is None:
        assert got is None and want is None, f"got {describe(got)}, want {describe(want)}"
        return
    assert isinstance(got, torch.Tensor), f"got {describe(got)}, want {describe(want)}"
    assert (got.dtype, got.shape, got.device.type) == (want.dtype, want.shape, want.device.type), (
        f"got {describe(got)}, want {describe(want)}"
    )
    if got.device.type == "meta":
        return
    different = bits(got) != bits(want)
    if not different.any():
        return
    places = different.nonzero()
    lines = [f"{len(places)} of {got.numel()} cells differ:"]
    for place in map(tuple, places[:6].tolist()):
        lines.append(f"  {list(place)}: got {got[place].item()!r}, want {want[place].item()!r}")
    raise AssertionError("\n".join([*lines, "got", draw(got), "want", draw(want)]))


def visibility(mask):
    """Per batch row and query, a string with 0 for a key that is seen and - for one that is not."""
    closed = lowest(mask.dtype)
    for value in mask.unique().tolist():
        assert value in (0.0, closed), f"{value} neither 0 nor the masked value"
    return [
        ["".join("0" if value == 0 else "-" for value in row) for row in plane]
        for plane in mask[:, 0].tolist()
    ]


def has_distinct_memory(tensor):
    """Whether writing one cell leaves all the others as they are. For small tensors only."""
    if tensor.numel() == 0:
        return True
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    addresses = torch.arange(reach + 1).as_strided(tensor.shape, tensor.stride())
    return addresses.unique().numel() == tensor.numel()


def _transposed(tensor):
    """The first dimension becomes the one whose cells are neighbours in memory."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def _stepped(tensor):
    """Gaps between the cells of every dimension, filled with something that would be noticed."""
    wide = torch.full([2 * n + 1 for n in tensor.shape], 3).to(tensor.dtype)
    view = wide[tuple(slice(0, 2 * n, 2) for n in tensor.shape)]
    view.copy_(tensor)
    return view


def _offset(tensor):
    """Starts three cells into its storage, which breaks the alignment of vector loads."""
    flat = torch.full([tensor.numel() + 3], 3).to(tensor.dtype)
    view = flat[3:].view(tensor.shape)
    view.copy_(tensor)
    return view


# The same cells at other addresses. The last two repeat one row, one column: stride 0.
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": _transposed,
    "stepped": _stepped,
    "offset": _offset,
    "one row": lambda tensor: tensor[:1].expand(tensor.shape),
    "one column": lambda tensor: tensor[..., :1].expand(tensor.shape),
}
