"""None, the 4D mask itself, or a mask: all that prepare one for sdpa decide alike."""

import itertools

import attn_mask
import pytest
import torch
from attn_mask import modeling_attn_mask_utils as mirror

LOWEST = torch.finfo(torch.float32).min


def mask_of(kind, q_length, kv_length):
    if kind == "none":
        return None
    if kind == "ones":
        return torch.ones(2, kv_length, dtype=torch.int64)
    if kind == "padded":
        mask = torch.ones(2, kv_length, dtype=torch.int64)
        mask[1, : (kv_length + 1) // 2] = 0
        return mask
    mask = torch.zeros(2, 1, q_length, kv_length)
    mask[0, 0, 0] = LOWEST
    return mask


def want(mask, q_length, past, window, skips, unmasks):
    """By loops: what upstream's functions are documented to give."""
    kv_length = q_length + past
    if mask is not None and mask.dim() == 4:
        rows = mask.clone()
        return rows.masked_fill((rows == LOWEST).all(-1, keepdim=True), 0.0) if unmasks else rows
    is_short = window is None or kv_length < window
    shows_all = mask is None or bool(mask.all())
    if skips and is_short and shows_all and (q_length == 1 or past == 0):
        return None
    if mask is None and q_length == 1 and window is None:
        return None
    result = torch.full((2, 1, q_length, kv_length), LOWEST)
    for b, i, j in itertools.product(range(2), range(q_length), range(kv_length)):
        position = i + past
        causal = j <= position and (window is None or j >= position - window)
        if causal and (mask is None or mask[b, j] == 1):
            result[b, 0, i, j] = 0.0
    if unmasks and mask is not None:
        result.masked_fill_((result == LOWEST).all(-1, keepdim=True), 0.0)
    return result


def agree(got, wanted):
    return got is None if wanted is None else got is not None and torch.equal(got, wanted)


KINDS = ["none", "ones", "padded", "4-D"]
every_shape = pytest.mark.parametrize(
    ("kind", "q_length", "past", "window"),
    list(itertools.product(KINDS, [1, 3], [0, 2], [None, 2, 100])),
)


@every_shape
def test_operator_and_its_decomposition(kind, q_length, past, window):
    operator = torch.ops.attn_mask._prepare_4d_causal_attention_mask_for_sdpa
    decomposition = attn_mask.decompositions()[operator.default]
    mask = mask_of(kind, q_length, q_length + past)
    arguments = mask, (2, q_length), torch.zeros(2, q_length, 4), past, window
    for skips, unmasks in itertools.product([True, False], [None, True, False]):
        wanted = want(mask, q_length, past, window, skips, unmasks)
        options = {"allow_skip": skips, "unmask_unattended": unmasks}
        for function in (operator, decomposition):
            assert agree(function(*arguments, **options), wanted), (function, options)


@every_shape
def test_mirror(kind, q_length, past, window):
    mask = mask_of(kind, q_length, q_length + past)
    arguments = mask, (2, q_length), torch.zeros(2, q_length, 4), past, window
    wanted = want(mask, q_length, past, window, skips=True, unmasks=False)
    got = mirror._prepare_4d_causal_attention_mask_for_sdpa(*arguments)
    assert agree(got, wanted)
    assert kind != "4-D" or got is mask
    ignores = mirror.AttentionMaskConverter._ignore_causal_mask_sdpa
    operator = torch.ops.attn_mask._ignore_causal_mask_sdpa
    assert ignores(mask, *arguments[2:]) == operator(mask, *arguments[2:])


def test_mirror_where_attention_gives_nan(monkeypatch):
    """As on CUDA, where rows without a key are unmasked."""
    monkeypatch.setattr(attn_mask._core.sdpa_decision, "UNMASKED_DEVICES", ("cpu",))
    for kind, window in itertools.product(["padded", "4-D"], [None, 2]):
        mask = mask_of(kind, 3, 5)
        got = mirror._prepare_4d_causal_attention_mask_for_sdpa(
            mask, (2, 3), torch.zeros(2, 3, 4), 2, window
        )
        assert torch.equal(got, want(mask, 3, 2, window, skips=True, unmasks=True))


class Prepare(torch.nn.Module):
    def __init__(self, skips, unmasks):
        super().__init__()
        self.options = {"allow_skip": skips, "unmask_unattended": unmasks}

    def forward(self, mask, queries):
        return torch.ops.attn_mask._prepare_4d_causal_attention_mask_for_sdpa(
            mask, (2, queries.shape[1]), queries, 2, **self.options
        )


@pytest.mark.parametrize("kind", ["none", "padded", "4-D"])
@pytest.mark.parametrize("unmasks", [None, True, False])
def test_export(kind, unmasks):
    mask, queries = mask_of(kind, 3, 5), torch.zeros(2, 3, 4)
    program = torch.export.export(Prepare(False, unmasks), (mask, queries))
    wanted = want(mask, 3, 2, None, skips=False, unmasks=unmasks)
    assert agree(program.module()(mask, queries), wanted)


@pytest.mark.parametrize("past", [-1, -2])
def test_4d_masks_of_fewer_keys_than_queries(past):
    """Such a mask decides by itself, whether it may be skipped or not."""
    mask, queries = mask_of("4-D", 3, 3 + past), torch.zeros(2, 3, 4)
    for skips in (True, False):
        got = torch.ops.attn_mask._prepare_4d_causal_attention_mask_for_sdpa(
            mask, (2, 3), queries, past, allow_skip=skips
        )
        assert torch.equal(got, mask)
    assert mirror._prepare_4d_causal_attention_mask_for_sdpa(mask, (2, 3), queries, past) is mask
