"""attn_mask.plot: the colours of its image, and what is written beside it."""

import re
import subprocess
import sys

import attn_mask
import pytest
import torch
from attn_mask import rules

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

EMPTY, MASKED = (1.0, 1.0, 1.0), (0.89, 0.89, 0.89)
TAB = [torch.tensor(pyplot.get_cmap("tab10")(i)[:3]) for i in range(10)]
IDS = torch.tensor([[4] * 5 + [2] * 7, [3] * 12])


@pytest.fixture(autouse=True)
def closes_figures():
    yield
    pyplot.close("all")


def image(ax):
    (shown,) = ax.get_images()
    return torch.as_tensor(shown.get_array())


@pytest.mark.parametrize("batch", [0, 1])
def test_colours_of_elements(batch):
    rule = rules.documents(IDS) & rules.causal()
    mask = attn_mask.boolean(rule, 2, 12, 12)[batch, 0]
    colors = image(attn_mask.plot(rule, batch=batch, block_size=4))
    assert colors.shape == (12, 12, 3)
    first = IDS[batch] == IDS[batch].min()
    for q in range(12):
        for k in range(12):
            block = mask[q // 4 * 4 :, k // 4 * 4 :][:4, :4]
            color = TAB[0 if first[k] else 1]
            if not mask[q, k]:
                want = torch.tensor(MASKED if block.any() else EMPTY)
            elif block.all():
                want = color
            else:
                want = torch.tensor(MASKED) + (color - torch.tensor(MASKED)) * 0.6
            assert torch.allclose(colors[q, k].double(), want.double(), atol=1e-6), (q, k)


def test_what_is_written():
    ax = attn_mask.plot(rules.causal(), 20, 12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.get_title() == "20 queries, 12 keys, blocks of 4"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["full block", "partial block", "masked in it", "empty block"]
    assert ax.get_images()[0].get_extent() == [-0.5, 11.5, 19.5, -0.5]


def test_axes_that_are_given():
    figure, axes = pyplot.subplots(1, 2)
    assert attn_mask.plot(rules.causal(), 4, ax=axes[1]) is axes[1]
    assert not axes[0].get_images()
    assert pyplot.get_fignums() == [figure.number]


def test_a_block_mask_has_its_blocks():
    mask = attn_mask.create_block_mask(
        rules.causal(), None, None, 300, 200, device="cpu", BLOCK_SIZE=(64, 32)
    )
    assert attn_mask.plot(mask).get_title() == "300 queries, 200 keys, blocks of 64 x 32"


def test_large_masks_are_averaged():
    ids = torch.zeros(2048, dtype=torch.int64)
    with torch.device("meta"):  # the default device is not where it is drawn
        ax = attn_mask.plot(rules.causal() & rules.documents(ids))
    colors = image(ax)
    assert colors.shape == (512, 512, 3)
    assert torch.allclose(colors[511, 0].float(), TAB[0].float())
    assert colors[0, 511].tolist() == list(EMPTY)


@pytest.mark.parametrize(
    ("arguments", "how", "error", "text"),
    [
        ((rules.causal(),), {}, ValueError, "q_length to be given for a rule without tables"),
        ((torch.ones(3),), {}, ValueError, "mask_or_rule to be a mask [q_length, kv_length],"),
        ((torch.ones(0, 3),), {}, ValueError, "a mask with elements, but got 0 x 3"),
        ((torch.ones(2, 3, 3),), {"batch": 2}, IndexError, "batch to be below 2, but got 2"),
        (
            (torch.ones(3, 3),),
            {"block_size": 0},
            ValueError,
            "block_size to be positive, but got",
        ),
        (
            (torch.ones(3, 3),),
            {"block_size": True},
            TypeError,
            "block_size to be an int, but got",
        ),
        ((torch.ones(3, 3),), {"block_size": 2.0}, TypeError, "block_size to be an int, but got"),
        (
            (torch.ones(3, 3),),
            {"ax": 3},
            TypeError,
            "ax to be Axes of matplotlib, or None, but",
        ),
        ((torch.ones(3, 3),), {"ax": pyplot}, TypeError, "ax to be Axes of matplotlib, or None, b"),
    ],
)
def test_wrong_arguments(arguments, how, error, text):
    with pytest.raises(error, match=f"^plot: expected {re.escape(text)}"):
        attn_mask.plot(*arguments, **how)


def test_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import attn_mask\n"
        "try:\n    attn_mask.plot(attn_mask.causal(), 4)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("plot: expected matplotlib to be installed, "), done.stderr
    assert done.stdout.rstrip().endswith("install it, or the extra attn_mask[plot]")
