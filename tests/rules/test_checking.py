"""validate_mask_properties, validate_mask and checked: against loops, and what torch refuses."""

import itertools
import logging
import threading

import attn_mask
import pytest
import torch
import torch.nn.functional as F
from attn_mask import rules
from hypothesis import given
from hypothesis import strategies as st
from masks import lowest
from torch.nn.functional import scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Whether query q attends to key k of batch row b, n being the size of a kind.
KINDS = {
    "causal": lambda b, q, k, n, tables: k <= q,
    "bidirectional": lambda b, q, k, n, tables: True,
    "sliding_window": lambda b, q, k, n, tables: q - n < k <= q,
    "chunked": lambda b, q, k, n, tables: k <= q and q // n == k // n,
    "padding": lambda b, q, k, n, tables: k <= q and tables["attention_mask"][b][k] != 0,
    "documents": lambda b, q, k, n, tables: (
        k <= q and tables["document_ids"][b][q] == tables["document_ids"][b][k]
    ),
    "prefix": lambda b, q, k, n, tables: k <= q or k < n,
}
SIZE = {
    "sliding_window": "sliding_window",
    "chunked": "chunk_size",
    "prefix": "prefix_length",
}
TABLE = {"padding": "attention_mask", "documents": "document_ids"}


@st.composite
def problems(draw):
    """(mask, kind, sizes): a mask of the kind, made by a loop."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    batch_size, q_length, offset = (draw(st.integers(*r)) for r in ((1, 2), (1, 6), (0, 4)))
    kv_length = q_length + offset
    n = draw(st.integers(1, 8))
    tables, sizes = {}, {"q_offset": offset}
    if kind in TABLE:
        row = st.lists(st.integers(0, 1), min_size=kv_length, max_size=kv_length)
        tables[TABLE[kind]] = draw(st.lists(row, min_size=batch_size, max_size=batch_size))
        sizes[TABLE[kind]] = torch.tensor(tables[TABLE[kind]])
    if kind in SIZE:
        sizes[SIZE[kind]] = n
    visible = torch.tensor(
        [
            [
                [[bool(KINDS[kind](b, q + offset, k, n, tables)) for k in range(kv_length)]]
                for q in range(q_length)
            ]
            for b in range(batch_size)
        ]
    ).transpose(1, 2)
    heads = draw(st.integers(1, 2))
    mask = visible.expand(batch_size, heads, q_length, kv_length).clone()
    dtype = draw(st.sampled_from([None, *FLOATING]))
    if dtype is not None:
        masked = draw(st.sampled_from([-torch.inf, lowest(dtype)]))
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, masked)
    return mask, kind, sizes


@given(problems(), st.data())
def test_a_mask_is_of_its_kind_until_one_element_changes(problem, data):
    mask, kind, sizes = problem
    assert attn_mask.validate_mask_properties(mask, kind, **sizes) is True
    place = tuple(data.draw(st.integers(0, size - 1)) for size in mask.shape)
    if mask.dtype == torch.bool:
        mask[place] = ~mask[place]
    else:
        values = [-torch.inf, -1.0, 1.0, torch.nan] if mask[place] == 0 else [0.0, 1.0, torch.nan]
        mask[place] = data.draw(st.sampled_from(values))
    assert attn_mask.validate_mask_properties(mask, kind, **sizes) is False


def test_masks_of_the_mirrors_are_of_their_kinds():
    m = attn_mask.masking_utils
    ids = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    shown = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) == 1
    masks = {
        "causal": (m.causal_mask_function, {}),
        "sliding_window": (m.sliding_window_causal_mask_function(3), {"sliding_window": 3}),
        "chunked": (
            m.and_masks(m.chunked_overlay(4, torch.zeros(2).long()), m.causal_mask_function),
            {"chunk_size": 4},
        ),
        "documents": (
            m.and_masks(m.packed_sequence_mask_function(ids), m.causal_mask_function),
            {"document_ids": ids},
        ),
    }
    for kind, (function, sizes) in masks.items():
        for make, padding in itertools.product((m.sdpa_mask, m.eager_mask), (None, shown)):
            mask = make(
                2,
                6,
                6,
                0,
                0,
                mask_function=function,
                attention_mask=padding,
                allow_is_causal_skip=False,
            )
            given = sizes if padding is None else sizes | {"attention_mask": padding}
            assert attn_mask.validate_mask_properties(mask, kind, **given), kind
            assert not attn_mask.validate_mask_properties(mask, "bidirectional")


def test_lengths_of_prefixes_and_rules_and_planes():
    lengths = torch.tensor([1, 3])
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4).clone()
    mask[1, :, :, :3] = True
    check = attn_mask.validate_mask_properties
    assert check(mask, "prefix", prefix_length=lengths)
    assert not check(mask, "prefix", prefix_length=lengths.flip(0))
    assert not check(mask, "prefix", prefix_length=3)
    assert check(mask[0, 0], "causal")
    assert check(mask[0, 0], rules.causal())
    assert check(mask[0, 0], lambda b, h, q, k: k <= q)
    assert not check(mask[0, 0], rules.causal() & rules.sliding_window(2))
    bits = rules.bits(torch.stack([mask[0], ~mask[0]], dim=1))
    of_heads = torch.cat([mask[:1], ~mask[:1]], dim=1)
    assert check(of_heads, bits) and not check(of_heads.flip(1), bits)
    # Keys after the end of a padding mask are padding; it may be one for all rows.
    shown = torch.tensor([[0, 1]])
    mask[:] = False
    mask[:, :, 1:, 1] = True
    assert check(mask, "padding", attention_mask=shown)
    assert not check(mask, "padding", attention_mask=torch.tensor([[0, 1, 1]]))
    # Queries after a cache.
    assert check(torch.ones(1, 5, dtype=torch.bool), "causal", q_offset=4)
    assert not check(torch.ones(1, 5, dtype=torch.bool), "causal")


TRUE = torch.ones(2, 1, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "kind", "sizes", "error", "text"),
    [
        (None, "causal", {}, TypeError, "expected mask to be a tensor, but got NoneType"),
        (TRUE.int(), "causal", {}, TypeError,
         "expected mask to be bool, float16, bfloat16, float32 or float64, but got torch.int32"),
        (TRUE.to(torch.float8_e5m2), "causal", {}, TypeError,
         "expected mask to be bool, float16, .*, but got torch.float8_e5m2"),
        (TRUE[0], "causal", {}, ValueError, r"expected mask to be 2-D .* but got 3-D \[1, 3, 3\]"),
        (TRUE, "casual", {}, ValueError, "expected kind to be one of causal, .*, but got 'casual'"),
        (TRUE, 3, {}, TypeError, "expected kind to be callable, but got int"),
        (TRUE, "chunked", {}, TypeError, 'expected chunk_size for kind "chunked", but got None'),
        (TRUE, "causal", {"chunk_size": 3}, TypeError, "expected no chunk_size for kind 'causal'"),
        (TRUE, "causal", {"q_offset": 1.5}, TypeError,
         "expected q_offset to be an int, but got float"),
        (TRUE, "prefix", {"prefix_length": "3"}, TypeError,
         "expected prefix_length to be an int, but got str"),
        (TRUE, "prefix", {"prefix_length": torch.ones(2)}, TypeError,
         "expected prefix_length to be an int or integers, but got torch.float32"),
        (TRUE, "sliding_window", {"sliding_window": True}, TypeError,
         "expected sliding_window to be an int, but got bool"),
        (TRUE, "chunked", {"chunk_size": torch.tensor(2)}, TypeError,
         "expected chunk_size to be an int, but got Tensor"),
        (TRUE, "prefix", {"prefix_length": torch.ones(3).int()}, ValueError,
         r"expected prefix_length to be an int or a tensor \[2\], .* but got \[3\]"),
        (TRUE, "padding", {"attention_mask": torch.ones(3, 3)}, ValueError,
         r"expected attention_mask to be 2-D \[2, kv_length\], .* but got \[3, 3\]"),
        (TRUE, "documents", {"document_ids": [0, 0, 1]}, TypeError,
         "expected document_ids to be a tensor, but got list"),
        (TRUE, "documents", {"document_ids": torch.zeros(2, 3)}, TypeError,
         "expected document_ids to be integers, but got torch.float32"),
        (TRUE, "documents", {"document_ids": torch.zeros(2, 2).int()}, ValueError,
         r"expected document_ids to be of length 3 or longer, .* but got \[2, 2\]"),
        (TRUE, rules.bits(TRUE.expand(2, 2, 3, 3)), {}, ValueError,
         r"expected mask to have 2 heads, as kind has, but got \[2, 1, 3, 3\]"),
    ],
)  # fmt: skip
def test_properties_of_what_is_no_mask_or_no_kind(mask, kind, sizes, error, text):
    with pytest.raises(error, match=f"^validate_mask_properties: {text}"):
        attn_mask.validate_mask_properties(mask, kind, **sizes)


def is_refused(mask, q, kv_length=5):
    key = torch.zeros(*q.shape[:-2], kv_length, q.shape[-1], dtype=q.dtype)
    try:
        scaled_dot_product_attention(q, key, key, attn_mask=mask)
    except (RuntimeError, IndexError):
        return True
    return False


def kinds(findings):
    return [finding.kind for finding in findings]


@given(
    st.sampled_from([(4, 8), (3, 4, 8), (2, 3, 4, 8)]),
    st.lists(st.integers(1, 4), max_size=5),
    st.sampled_from([torch.bool, torch.float32]),
)
def test_shapes_are_found_iff_torch_refuses_them(of_q, leading, dtype):
    q = torch.randn(of_q)
    mask = torch.zeros(*leading, 5) == 0
    mask = mask if dtype == torch.bool else torch.where(mask, 0.0, 1.5)
    found = kinds(attn_mask.validate_mask(mask, q=q))
    assert found == (["shape"] if is_refused(mask, q) else [])


@pytest.mark.parametrize("of_q", FLOATING, ids=str)
@pytest.mark.parametrize(
    "of_mask",
    [*FLOATING, torch.bool, torch.uint8, torch.int32, torch.int64, torch.complex64],
    ids=str,
)
def test_dtypes_are_found_iff_torch_refuses_them(of_q, of_mask):
    q = torch.zeros(2, 3, 4, 8, dtype=of_q)
    mask = torch.zeros(4, 5).to(of_mask) if of_mask != torch.bool else torch.ones(4, 5) > 0
    found = attn_mask.validate_mask(mask, q=q)
    assert kinds(found) == (["dtype"] if is_refused(mask, q) else [])
    if of_mask not in (*FLOATING, torch.bool):
        assert kinds(attn_mask.validate_mask(mask)) == ["dtype"]
        assert "pass mask.bool()" in found[0].mend


def test_memory_efficient_attention_takes_the_dtype_of_queries_only():
    q, mask = torch.zeros(1, 1, 8, 8, dtype=torch.float16), torch.zeros(8, 8)
    assert attn_mask.validate_mask(mask, q=q) == []
    (found,) = attn_mask.validate_mask(mask, q=q, device="cuda")
    assert str(found) == (
        "mask is float32 and q is float16, which memory-efficient attention refuses: "
        "pass mask.to(q.dtype), or a boolean mask"
    )


def test_numbers():
    lower = torch.ones(4, 4).tril()
    (found,) = attn_mask.validate_mask(lower)
    assert (found.kind, found.mend) == ("numbers", "pass mask.bool()")
    # They hide nothing: the last key is attended to by the first query.
    q = k = torch.zeros(1, 1, 4, 1)
    v = torch.tensor([0.0, 0, 0, 1]).reshape(1, 1, 4, 1)
    assert scaled_dot_product_attention(q, k, v, attn_mask=lower)[0, 0, 0] > 0
    assert scaled_dot_product_attention(q, k, v, attn_mask=lower.bool())[0, 0, 0] == 0
    assert attn_mask.validate_mask(lower.bool()) == []
    for value in (torch.nan, torch.inf):
        mask = torch.zeros(4, 4)
        mask[1, 2] = value
        assert kinds(attn_mask.validate_mask(mask)) == ["numbers"]
        assert scaled_dot_product_attention(q, k, v, attn_mask=mask).isnan().any()


@pytest.mark.parametrize("dtype", [torch.bool, *FLOATING], ids=str)
def test_rows_without_a_visible_key(dtype):
    for masked in [False] if dtype == torch.bool else [-torch.inf, lowest(dtype)]:
        mask = torch.full((2, 1, 3, 5), dtype == torch.bool, dtype=dtype)
        mask[..., 1:] = masked
        assert attn_mask.validate_mask(mask) == []
        mask[1, 0, 2] = masked
        (found,) = attn_mask.validate_mask(mask)
        assert found.kind == "rows" and "row mask[1, 0, 2]" in found.what
        q = torch.zeros(2, 1, 3, 4, dtype=torch.float32 if dtype == torch.bool else dtype)
        k = torch.zeros(2, 1, 5, 4, dtype=q.dtype)
        attention = scaled_dot_product_attention(q, k, torch.ones_like(k), attn_mask=mask)[1, 0, 2]
        alike = masked not in (False, -torch.inf)
        assert ("all keys count alike" in found.what) == alike
        assert (attention == float(alike)).all(), found.what


@given(
    st.sampled_from(["causal", "window", "chunks", "documents", "prefix"]),
    st.integers(1, 2), st.integers(1, 9), st.integers(0, 9),
    st.sampled_from([None, *FLOATING]),
    st.booleans(),
)  # fmt: skip
def test_masks_that_this_library_makes_are_taken(rule, batch_size, q_length, past, dtype, unmasks):
    kv_length = q_length + past
    ids = torch.arange(kv_length)[None] // 3
    made = {
        "causal": rules.causal(),
        "window": rules.causal() & rules.sliding_window(3),
        "chunks": rules.causal() & rules.chunked(4),
        "documents": rules.causal() & rules.documents(ids),
        "prefix": rules.causal() | rules.padding(ids < 1),
    }[rule]
    if unmasks:  # rows without keys, which it unmasks
        made = made & rules.padding(ids > 1)
    sizes = (made, batch_size, q_length, kv_length)
    options = {"q_offset": past, "unmask_unattended": unmasks}
    of_q = torch.float32 if dtype is None else dtype
    q = torch.zeros(batch_size, 2, q_length, 8, dtype=of_q)
    if dtype is None:
        mask = attn_mask.boolean(*sizes, **options)
    else:
        mask = attn_mask.additive(*sizes, **options, dtype=dtype)
    assert attn_mask.validate_mask(mask, q=q) == []
    assert not is_refused(mask, q, kv_length)
    if dtype is not None:
        wide = torch.empty(batch_size, 1, q_length, -(-kv_length // 8) * 8, dtype=dtype)
        out = wide[..., :kv_length]
        attn_mask.additive(*sizes, **options, dtype=dtype, out=out)
        assert attn_mask.validate_mask(out, q=q, device="cuda") == []


def test_strides_matter_on_cuda_only():
    mask = torch.zeros(1, 1, 4, 13)
    assert attn_mask.validate_mask(mask) == []
    (found,) = attn_mask.validate_mask(mask, device="cuda")
    assert found.kind == "strides" and "[52, 52, 13, 1]" in found.what
    assert kinds(attn_mask.validate_mask(torch.zeros(16, 16).T, device="cuda")) == ["strides"]
    assert attn_mask.validate_mask(torch.zeros(4, 1, 8, 16), device="cuda") == []
    assert attn_mask.validate_mask(mask == 0, device="cuda") == []  # converted in any case


@pytest.mark.cuda
def test_strides_and_dtypes_as_cuda_has_them():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def copies(mask):
        q = torch.zeros(1, 1, 4, 8, device="cuda", dtype=torch.float16)
        k = torch.zeros(1, 1, mask.shape[-1], 8, device="cuda", dtype=torch.float16)
        profile = torch.profiler.profile(acc_events=True)  # else some releases warn
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), profile:
            try:
                scaled_dot_product_attention(q, k, k, attn_mask=mask)
            except RuntimeError:  # some releases do not take the strides at all
                assert mask.dtype == q.dtype
                return True
        return any("pad" in event.key for event in profile.key_averages())

    wide = torch.zeros(1, 1, 4, 16, device="cuda", dtype=torch.float16)
    for mask in (wide, wide[..., :13], wide[..., :13].contiguous(), wide[..., ::2]):
        assert ("strides" in kinds(attn_mask.validate_mask(mask))) == copies(mask)
    with pytest.raises((AssertionError, RuntimeError)):
        copies(wide.float())


def test_findings_of_masks_without_values():
    meta = torch.ones(3, 4, 5, device="meta")
    assert attn_mask.validate_mask(meta) == []
    q = torch.zeros(2, 2, 4, 8)
    assert kinds(attn_mask.validate_mask(meta, q=q)) == ["shape"]
    assert attn_mask.validate_mask(torch.zeros(0, 1, 4, 0)) == []


@pytest.mark.parametrize(
    ("shape", "mend"),
    [((2, 5), "pass mask[:, None, None, :].bool()"), ((2, 4, 5), "pass mask[:, None],"),
     ((2, 2, 4, 5), "make it of the sizes of q")],
)  # fmt: skip
def test_what_mends_a_shape(shape, mend):
    (found,) = attn_mask.validate_mask(torch.zeros(shape), q=torch.zeros(2, 3, 4, 8))
    assert found.mend.startswith(mend)


@pytest.mark.parametrize(
    ("mask", "given", "error", "text"),
    [
        (None, {}, TypeError, "expected mask to be a tensor, but got NoneType"),
        (torch.ones(2, 2).to_sparse(), {}, TypeError, "expected mask to be a strided tensor"),
        (TRUE, {"q": 3}, TypeError, "expected q to be a tensor, but got int"),
        (TRUE, {"q": torch.ones(3)}, ValueError, r"expected q to be .*, but got 1-D \[3\]"),
        (
            TRUE,
            {"device": "gpu"},
            ValueError,
            "expected device to name a device, but got 'gpu'",
        ),
    ],
)
def test_findings_of_what_is_no_mask(mask, given, error, text):
    with pytest.raises(error, match=f"^validate_mask: {text}"):
        attn_mask.validate_mask(mask, **given)


def states(*shape):
    return [torch.zeros(shape)] * 3


LOWER = torch.ones(4, 4).tril()


def test_checked_sees_every_way_to_attention(caplog):
    attention = torch.nn.MultiheadAttention(8, 2)
    with caplog.at_level(logging.WARNING, "attn_mask"), attn_mask.checked() as findings:
        scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER.bool())
        assert findings == []
        for call in (scaled_dot_product_attention, F.scaled_dot_product_attention):
            call(*states(1, 2, 4, 8), attn_mask=LOWER)
        assert kinds(findings) == ["numbers"]  # once
        everything = torch.ones(4, 4, dtype=torch.bool)
        attention(*states(4, 1, 8), need_weights=False, attn_mask=everything)
        assert kinds(findings) == ["numbers", "rows"]
        with pytest.raises(RuntimeError, match="attn_mask dtype"):
            F.scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER.int())
        with pytest.raises(RuntimeError, match="must match the size"):
            F.scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER[:3].bool())
        assert kinds(findings) == ["numbers", "rows", "dtype", "shape"]
    texts = [record.getMessage() for record in caplog.records]
    where = "attn_mask.checked: scaled_dot_product_attention: "
    assert texts == [where + str(finding) for finding in findings]


def test_checked_gives_all_back():
    with pytest.raises(KeyError), attn_mask.checked():
        assert F.scaled_dot_product_attention is not scaled_dot_product_attention
        raise KeyError
    assert F.scaled_dot_product_attention is scaled_dot_product_attention
    with attn_mask.checked() as findings:
        pass
    F.scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER)
    assert findings == []


def test_blocks_nest_and_see_what_is_in_them():
    with attn_mask.checked() as outer:
        with attn_mask.checked() as inner:
            F.scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER)
            attention = torch.nn.MultiheadAttention(8, 2)
            nothing = torch.ones(4, 4, dtype=torch.bool)
            attention(*states(4, 1, 8), need_weights=False, attn_mask=nothing)
        assert inner == outer and kinds(inner) == ["numbers", "rows"]
        F.scaled_dot_product_attention(*states(1, 2, 4, 8), torch.full((4, 4), torch.nan))
        assert kinds(outer) == ["numbers", "rows"]  # the kind was named
        F.scaled_dot_product_attention(*states(1, 2, 4, 8), torch.zeros(1, 1, 4, 4))
    assert len(inner) == 2


def test_a_thread_sees_its_own_calls():
    inside, done = threading.Event(), threading.Event()
    of_thread = []

    def other():
        with attn_mask.checked() as findings:
            inside.set()
            assert done.wait(60)
            F.scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER)
        of_thread.append(kinds(findings))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with attn_mask.checked() as findings:
        assert F.scaled_dot_product_attention(*states(1, 2, 4, 8), None) is not None
    F.scaled_dot_product_attention(*states(1, 2, 4, 8), LOWER)
    done.set()
    thread.join()
    assert (of_thread, findings) == ([["numbers"]], [])
    assert F.scaled_dot_product_attention is scaled_dot_product_attention


def test_what_is_no_plain_mask_is_left_to_torch():
    from torch.nn.attention.bias import causal_lower_right

    q, meta = states(1, 2, 4, 8), torch.zeros(1, 2, 4, 8, device="meta")
    with attn_mask.checked() as findings:
        F.scaled_dot_product_attention(*q, causal_lower_right(4, 4))
        F.scaled_dot_product_attention(meta, meta, meta, LOWER.to("meta"))
        with pytest.raises(TypeError, match="scaled_dot_product_attention"):
            F.scaled_dot_product_attention(q[0], attn_mask=LOWER)
        with torch.autocast("cpu", torch.bfloat16):  # which casts the queries
            F.scaled_dot_product_attention(*q, LOWER.bfloat16() - 1)
    assert findings == []


def test_compiled_code_is_the_same_in_a_block():
    def attend(q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(1, 2, 4, 8)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with attn_mask.checked() as findings:
        torch.testing.assert_close(compiled(q, LOWER), attend(q, LOWER))
    assert kinds(findings) == ["numbers"]  # of the call that is not compiled
    torch.testing.assert_close(compiled(q, LOWER), attend(q, LOWER))
