"""tensor_to_mask_visual and AttentionMask: the strings of transformers 5.8, the last with them."""

import random
import re
import subprocess

import oracle_loader
import pytest
import torch
from attn_mask.masking_utils import AttentionMask, tensor_to_mask_visual

LAST = "5.8.0"


@pytest.fixture(scope="module")
def upstream():
    try:
        oracle_loader.fetch(LAST)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"transformers {LAST} can't be fetched: {error}")
    return oracle_loader.load_masking(LAST)


def some_mask(rng):
    shape = rng.choice([1, 2, 5, 19, 20, 21, 64]), rng.choice([1, 2, 5, 39, 40, 41, 100])
    mask = torch.ones(shape).tril(rng.randint(-9, 9))
    if rng.random() < 0.5:
        mask = torch.tensor([rng.random() < 0.5 for _ in range(mask.numel())]).view(shape).float()
    if rng.random() < 0.3:
        mask *= torch.tensor([rng.choice([0.0, 0.5, 1.0]) for _ in range(shape[1])])
    return mask.to(rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16]))


@pytest.mark.parametrize("style", ["majong", None, "blocks"])
@pytest.mark.parametrize("grid_size", [None, (5, 9), (3, 3), (30, 200), (1, 1)])
def test_pictures(upstream, grid_size, style):
    rng = random.Random(f"{grid_size}{style}")
    arguments = () if grid_size is None else (grid_size,)
    compared = 0
    for _ in range(60):
        mask = some_mask(rng)
        try:
            want = upstream.tensor_to_mask_visual(mask, *arguments, style=style)
        except IndexError:  # an average in a picture of one column
            assert len(tensor_to_mask_visual(mask, *arguments, style=style).split("\n")[0]) == 1
            continue
        assert tensor_to_mask_visual(mask, *arguments, style=style) == want
        compared += 1
    assert compared > 5


def test_booleans_and_integers(upstream):
    """Upstream can't average them."""
    for height in (7, 50):
        mask = torch.ones(height, height).tril()
        want = upstream.tensor_to_mask_visual(mask)
        for dtype in (torch.bool, torch.int64, torch.uint8):
            assert tensor_to_mask_visual(mask.to(dtype)) == want


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 5, 50), (0, 1, 4, 4)])
@pytest.mark.parametrize("style", ["majong", None])
@pytest.mark.parametrize("options", [{}, {"grid_size": (3, 6), "limit": 2}, {"limit": 9}])
def test_attention_masks(upstream, shape, style, options):
    """By upstream's method, which can't be called on upstream's own class."""
    mask = (torch.arange(torch.Size(shape).numel()) % 3 == 0).float().view(shape)
    ours = AttentionMask.from_tensor(mask, style)
    plain = mask.as_subclass(torch.Tensor)
    plain.style = style
    assert ours.to_string(**options) == upstream.AttentionMask.to_string(plain, **options)
    if not options:
        assert repr(ours) == str(ours) == ours.to_string()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool], ids=str
)
def test_other_dtypes_are_drawn_as_float32(dtype):
    mask = torch.ones(9, 9).tril()
    for grid_size in ((20, 40), (3, 3)):
        drawn = tensor_to_mask_visual(mask.to(dtype), grid_size)
        assert drawn == tensor_to_mask_visual(mask, grid_size)


def test_a_mask_on_meta_has_a_repr():
    mask = AttentionMask(torch.ones(3, 3, device="meta"))
    assert repr(mask) == str(mask) == repr(torch.ones(3, 3, device="meta"))


def test_attention_masks_are_tensors():
    mask = torch.ones(2, 3, 3).tril()
    ours = AttentionMask(mask)
    assert ours.data_ptr() == mask.data_ptr() and ours.style is None
    assert torch.equal(ours, mask)
    assert isinstance(ours[0], AttentionMask)
    assert str(ours[0]) == "█░░\n██░\n███\ntorch.Tensor(shape=(3, 3), dtype=torch.float32)"
    assert repr(ours[0, 0]) == "tensor([1., 0., 0.])"
    assert "dtype=torch.bool" in repr(ours.bool())
    scores = torch.zeros(2, 3, 3, requires_grad=True)
    (scores + ours).sum().backward()
    assert scores.grad is not None


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: tensor_to_mask_visual(torch.ones(3)),
            ValueError,
            "tensor_to_mask_visual: expecte",
        ),
        (
            lambda: tensor_to_mask_visual([[1]]),
            TypeError,
            "tensor_to_mask_visual: expected origina",
        ),
        *(
            (
                lambda grid_size=grid_size: tensor_to_mask_visual(torch.ones(3, 3), grid_size),
                ValueError,
                "tensor_to_mask_visual: expected grid_size to be (rows, columns), positive ints, b",
            )
            for grid_size in (3, (3,), (0, 3), (3, 2.0), (True, 3))
        ),
        (
            lambda: tensor_to_mask_visual(torch.ones(3, 3, dtype=torch.complex64)),
            TypeError,
            "tensor_to_mask_visual: expected original_tensor to be of a real dtype, but got torch",
        ),
        (lambda: AttentionMask([[1]]), TypeError, "AttentionMask: expected data to be a tensor"),
        (
            lambda: AttentionMask(torch.ones(3, 1, 3, 3)).to_string(limit="2"),
            TypeError,
            "AttentionMask.to_string: expected limit to be an int, but got str",
        ),
        (
            lambda: AttentionMask.from_tensor(None),
            TypeError,
            "AttentionMask.from_tensor: expected tensor to be a tensor, but got NoneType",
        ),
        (
            lambda: AttentionMask(torch.ones(3)).to_string(),
            ValueError,
            "AttentionMask.to_string: expected a mask of two dimensions at least, ",
        ),
    ],
)
def test_wrong_arguments(call, error, text):
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        call()
