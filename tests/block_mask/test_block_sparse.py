"""attn_mask.block_sparse against lists made block by block, and attention made cell by cell."""

import itertools
import math

import pytest
import torch
from attn_mask import block_sparse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

IDENTITY = block_sparse._identity


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_blocks(seed, *shape, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def spread(blocks, q_size, kv_size):
    """The mask of those blocks, cell by cell."""
    *batch, q_blocks, kv_blocks = blocks.shape
    mask = torch.empty(*batch, q_blocks * q_size, kv_blocks * kv_size, dtype=blocks.dtype)
    for q, k in itertools.product(range(mask.shape[-2]), range(mask.shape[-1])):
        mask[..., q, k] = blocks[..., q // q_size, k // kv_size]
    return mask


def states(seed, batch_size, heads, q_length, kv_length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch_size, heads, length, size, generator=generator, dtype=dtype)
        for length, size in ((q_length, 8), (kv_length, 8), (kv_length, 5))
    ]


def dense_attention(query, key, value, mask):
    """With zeros where nothing is attended to."""
    out = scaled_dot_product_attention(query, key, value, mask)
    return out.where(mask.any(-1, keepdim=True), 0.0)


def attention_by_cell(query, key, value, score_of, blocks, q_size, kv_size):
    """score_of(score, b, h, q, k): plain numbers, None where it masks."""
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for b, h, q in itertools.product(*map(range, query.shape[:3])):
        weights = {}
        for k in range(key.shape[2]):
            row = blocks[b % blocks.shape[0], h % blocks.shape[1], q // q_size]
            if row[k // kv_size]:
                score = (query[b, h, q] @ key[b, h, k]).item() / math.sqrt(query.shape[3])
                score = score_of(score, b, h, q, k)
                if score is not None:
                    weights[k] = math.exp(score)
        for k, weight in weights.items():
            out[b, h, q] += value[b, h, k] * (weight / sum(weights.values()))
    return out


# Making masks.


@settings(max_examples=60)
@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    q_blocks=st.integers(0, 4),
    kv_blocks=st.integers(0, 4),
    q_size=st.integers(1, 5),
    kv_size=st.integers(1, 5),
    density=st.sampled_from([0.0, 0.02, 0.1, 1.0]),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_create_block_sparse_mask(
    batch, q_blocks, kv_blocks, q_size, kv_size, density, turned, seed
):
    mask = random_blocks(seed, *batch, q_blocks * q_size, kv_blocks * kv_size, density=density)
    if turned:
        mask = mask.mT.contiguous().mT
    got = block_sparse._create_block_sparse_mask(mask, kv_size, q_size)
    blocks = block_sparse._convert_mask_to_block_mask(mask, kv_size, q_size)

    four = mask.reshape([1] * (2 - len(batch)) + list(mask.shape))
    assert (kv_size, q_size) == (got.KV_BLOCK_SIZE, got.Q_BLOCK_SIZE)
    for name, shape in (
        ("kv_num_blocks", (*four.shape[:2], q_blocks)),
        ("kv_indices", (*four.shape[:2], q_blocks, kv_blocks)),
        ("q_num_blocks", (*four.shape[:2], kv_blocks)),
        ("q_indices", (*four.shape[:2], kv_blocks, q_blocks)),
    ):
        tensor = getattr(got, name)
        assert tensor.shape == shape, name
        assert tensor.dtype == torch.int32 and tensor.is_contiguous(), name
    assert blocks.shape == got.kv_indices.shape and blocks.dtype == torch.bool

    for b, h in itertools.product(*map(range, four.shape[:2])):
        attended = set()
        for q, k in itertools.product(range(q_blocks), range(kv_blocks)):
            cells = four[b, h, q * q_size : (q + 1) * q_size, k * kv_size : (k + 1) * kv_size]
            if any(itertools.chain(*cells.tolist())):
                attended.add((q, k))
            assert blocks[b, h, q, k].item() == ((q, k) in attended)
        for q in range(q_blocks):
            first = [k for k in range(kv_blocks) if (q, k) in attended]
            rest = [k for k in range(kv_blocks) if (q, k) not in attended]
            assert got.kv_num_blocks[b, h, q] == len(first)
            assert got.kv_indices[b, h, q].tolist() == first + rest
        for k in range(kv_blocks):
            first = [q for q in range(q_blocks) if (q, k) in attended]
            rest = [q for q in range(q_blocks) if (q, k) not in attended]
            assert got.q_num_blocks[b, h, k] == len(first)
            assert got.q_indices[b, h, k].tolist() == first + rest


def test_blocks_of_128():
    mask = torch.zeros(256, 384, dtype=torch.bool)
    mask[128, 383] = True
    got = block_sparse._create_block_sparse_mask(mask)
    assert (got.KV_BLOCK_SIZE, got.Q_BLOCK_SIZE) == (128, 128)
    assert got.kv_num_blocks.tolist() == [[[0, 1]]]
    assert got.kv_indices.tolist() == [[[[0, 1, 2], [2, 0, 1]]]]
    assert got.q_num_blocks.tolist() == [[[0, 0, 1]]]
    assert got.q_indices.tolist() == [[[[0, 1], [0, 1], [1, 0]]]]
    back = block_sparse._convert_block_mask_to_mask(block_sparse._convert_mask_to_block_mask(mask))
    assert back.shape == (1, 1, 256, 384)
    assert back[..., 128:, 256:].all() and back.sum() == 128 * 128


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8])
def test_convert_block_mask_to_mask(dtype):
    blocks = random_blocks(0, 2, 3, 4, 5).to(dtype)
    got = block_sparse._convert_block_mask_to_mask(blocks, 2, 3)
    assert got.dtype == dtype and torch.equal(got, spread(blocks, 3, 2))


def test_create_empty_block_sparse_mask():
    query, key, value = states(0, 2, 3, 5, 7)
    got = block_sparse._create_empty_block_sparse_mask(query, key, value)
    assert (got.KV_BLOCK_SIZE, got.Q_BLOCK_SIZE) == (7, 5)
    assert got.kv_num_blocks.tolist() == got.q_num_blocks.tolist() == [[[1]]]
    assert got.kv_indices.tolist() == got.q_indices.tolist() == [[[[0]]]]
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        assert getattr(got, name).dtype == torch.int32


def test_mask_of_tensors():
    """Fields and defaults."""
    tensors = [torch.zeros(n) for n in range(4)]
    got = block_sparse._BlockSparseMask(*tensors)
    assert got.kv_num_blocks is tensors[0] and got.kv_indices is tensors[1]
    assert got.q_num_blocks is tensors[2] and got.q_indices is tensors[3]
    assert (got.KV_BLOCK_SIZE, got.Q_BLOCK_SIZE) == (128, 128)
    assert block_sparse._BlockSparseMask(*tensors, 4, Q_BLOCK_SIZE=8).KV_BLOCK_SIZE == 4


def test_broadcast_to_dim():
    x = torch.zeros(2, 3)
    assert block_sparse.broadcast_to_dim(x, 4).shape == (1, 1, 2, 3)
    assert block_sparse.broadcast_to_dim(x, 2) is x
    assert block_sparse.broadcast_to_dim(x, 1) is x


# score_mods.


def causal(score, b, h, q, k):
    return score if q >= k else None


def rel_bias(score, b, h, q, k):
    return score + (q - k)


def rel_causal(score, b, h, q, k):
    return score + (q - k) if q >= k else None


def alibi(score, b, h, q, k):
    return score + (k - q) * 2 ** (-8 * (h + 1) / 2)


SCORE_MODS = {
    "identity": (IDENTITY, lambda score, b, h, q, k: score),
    "causal": (block_sparse._causal, causal),
    "rel_bias": (block_sparse._rel_bias, rel_bias),
    "rel_causal": (block_sparse._rel_causal, rel_causal),
    "alibi": (block_sparse._generate_alibi_bias(2), alibi),
    "causal over alibi": (
        block_sparse._compose(block_sparse._causal, block_sparse._generate_alibi_bias(2)),
        lambda score, *at: causal(alibi(score, *at), *at),
    ),
}


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(name):
    mod, score_of = SCORE_MODS[name]
    for h, q, k in itertools.product(range(2), range(3), range(3)):
        want = score_of(1.25, 0, h, q, k)
        got = mod(torch.tensor(1.25), *map(torch.tensor, (0, h, q, k)))
        torch.testing.assert_close(got, torch.tensor(-math.inf if want is None else want))


def test_compose_applies_the_last_first():
    def add(score, b, h, q, k):
        return score + q

    def times(score, b, h, q, k):
        return score * k

    at = [torch.tensor(n) for n in (7, 0, 0, 2, 3)]
    assert block_sparse._compose(add, times)(*at) == 7 * 3 + 2
    assert block_sparse._compose(times, add)(*at) == (7 + 2) * 3
    assert block_sparse._compose(add, times, add)(*at) == (7 + 2) * 3 + 2
    assert block_sparse._compose(add)(*at) == 9


# Attention.


@pytest.mark.parametrize("name", SCORE_MODS)
def test_flex_attention_by_cell(name):
    """Also where lengths end within a block, and where a query attends to nothing."""
    mod, score_of = SCORE_MODS[name]
    given_states = states(1, 2, 2, 7, 11)
    blocks = random_blocks(2, 2, 1, 4, 3)
    blocks[0, 0, 1] = False
    mask = block_sparse._create_block_sparse_mask(spread(blocks, 2, 4), 4, 2)
    got = block_sparse._flex_attention(*given_states, mod, mask)
    torch.testing.assert_close(got, attention_by_cell(*given_states, score_of, blocks, 2, 4))
    assert not got[0, :, 2:4].any()
    got = block_sparse._flex_attention(*given_states, mod)
    all_blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(got, attention_by_cell(*given_states, score_of, all_blocks, 7, 11))


@settings(max_examples=6)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 2, *[st.integers(1, 6)] * 4),
    shared=st.tuples(st.booleans(), st.booleans()),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
@example(sizes=(2, 3, 1, 1, 1, 1), shared=(True, True), density=0.0, seed=0)
def test_flex_attention_with_a_mask(sizes, shared, density, seed):
    batch_size, heads, q_blocks, kv_blocks, q_size, kv_size = sizes
    batch = [1 if one else size for one, size in zip(shared, (batch_size, heads), strict=True)]
    blocks = random_blocks(seed, *batch, q_blocks, kv_blocks, density=density)
    dense = spread(blocks, q_size, kv_size)
    given_states = states(seed, batch_size, heads, q_blocks * q_size, kv_blocks * kv_size)
    mask = block_sparse._create_block_sparse_mask(dense, kv_size, q_size)
    got = block_sparse._flex_attention(*given_states, block_sparse_mask=mask)
    torch.testing.assert_close(got, dense_attention(*given_states, dense))


def test_only_the_counted_indices_count():
    """After them anything may follow, as in masks that were not made here."""
    given_states = states(3, 1, 1, 4, 6)
    mask = block_sparse._BlockSparseMask(
        torch.tensor([[[1, 2]]], dtype=torch.int32),
        torch.tensor([[[[1, 1, 99], [2, 0, -5]]]], dtype=torch.int32),
        torch.tensor([[[1, 1, 1]]], dtype=torch.int32),
        torch.tensor([[[[1, 7], [0, 7], [1, 7]]]], dtype=torch.int32),
        KV_BLOCK_SIZE=2,
        Q_BLOCK_SIZE=2,
    )
    blocks = torch.tensor([[[[False, True, False], [True, False, True]]]])
    got = block_sparse._flex_attention(*given_states, block_sparse_mask=mask)
    torch.testing.assert_close(got, dense_attention(*given_states, spread(blocks, 2, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    given_states = states(4, 1, 2, 4, 4, dtype)
    dense = spread(random_blocks(5, 1, 2, 2, 2), 2, 2)
    mask = block_sparse._create_block_sparse_mask(dense, 2, 2)
    got = block_sparse._flex_attention(*given_states, IDENTITY, mask)
    want = dense_attention(*(tensor.double() for tensor in given_states), dense)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want.to(dtype), rtol=2 * epsilon, atol=2 * epsilon)


@pytest.mark.parametrize(("q_length", "kv_length"), [(0, 4), (4, 0)])
def test_empty(q_length, kv_length):
    given_states = states(0, 2, 1, q_length, kv_length)
    dense = torch.ones(q_length, kv_length, dtype=torch.bool)
    for mask in (None, block_sparse._create_block_sparse_mask(dense, 2, 2)):
        got = block_sparse._flex_attention(*given_states, IDENTITY, mask)
        assert torch.equal(got, torch.zeros(2, 1, q_length, 5, dtype=torch.float64))


def test_the_empty_mask_masks_nothing():
    given_states = states(6, 2, 2, 5, 7)
    mask = block_sparse._create_empty_block_sparse_mask(*given_states)
    got = block_sparse._flex_attention(*given_states, IDENTITY, mask)
    torch.testing.assert_close(got, scaled_dot_product_attention(*given_states))


def test_gradients_on_a_cpu():
    """Torch's flex attention has none there and raises."""
    query, key, value = states(7, 1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        block_sparse._flex_attention(query.requires_grad_(), key, value)


def skip_without_avx2():
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("hardware: inductor's flex attention on CPUs needs AVX2")


def attend(query, key, value, dense):
    """The mask is made in the graph."""
    mask = block_sparse._create_block_sparse_mask(dense, 16, 16)
    return block_sparse._flex_attention(query, key, value, block_sparse._causal, mask)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend):
    """Backends without block sparsity mask elements, too."""
    if backend == "inductor":
        skip_without_avx2()
    length = 64
    given_states = states(8, 2, 2, length, length, torch.float32)
    cells = random_blocks(9, 2, 1, length, length, density=0.004)
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    blocks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    for b, q, k in itertools.product(range(2), range(length), range(length)):
        blocks[b, 0, q // 16, k // 16] |= cells[b, 0, q, k]
    assert blocks.any() and not blocks.all()
    want = dense_attention(*given_states, spread(blocks, 16, 16).tril())
    torch.testing.assert_close(compiled(*given_states, cells), want)


def test_compiled_with_a_given_mask():
    """At any length, and with other block sizes than before."""
    compiled = torch.compile(
        block_sparse._flex_attention, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for length, size in ((6, 2), (10, 2), (9, 3)):
        given_states = states(length, 1, 2, length, length)
        dense = spread(random_blocks(length, 1, 1, length // size, length // size), size, size)
        mask = block_sparse._create_block_sparse_mask(dense, size, size)
        got = compiled(*given_states, IDENTITY, mask)
        torch.testing.assert_close(got, dense_attention(*given_states, dense))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("q_length", "kv_size", "densities"),
    [
        pytest.param(1, 64, (0.0, 0.5), id="one query"),
        pytest.param(128, 640, (1.0, 0.0), id="one block"),
    ],
)
def test_compiled_for_few_blocks(q_length, kv_size, densities):
    """One query has a kernel of its own on CPUs."""
    skip_without_avx2()
    given_states = states(10, 1, 2, q_length, 640, torch.float32)
    compiled = torch.compile(block_sparse._flex_attention, fullgraph=True)
    for density in densities:
        blocks = random_blocks(11, 1, 2, 1, 640 // kv_size, density=density)
        dense = spread(blocks, q_length, kv_size)
        mask = block_sparse._create_block_sparse_mask(dense, kv_size, q_length)
        got = compiled(*given_states, IDENTITY, mask)
        torch.testing.assert_close(got, dense_attention(*given_states, dense))


# Errors.


@pytest.mark.parametrize("name", ["_convert_mask_to_block_mask", "_create_block_sparse_mask"])
def test_errors_of_masks(name):
    convert = getattr(block_sparse, name)
    mask = torch.ones(6, 8, dtype=torch.bool)
    with pytest.raises(TypeError, match=f"{name}: expected mask to be boolean, but got torch.int8"):
        convert(mask.to(torch.int8), 2, 2)
    with pytest.raises(ValueError, match=r"at most 4-D .* but got 5-D \[1, 1, 1, 6, 8\]"):
        convert(mask[None, None, None], 2, 2)
    with pytest.raises(
        ValueError, match=f"{name}: expected mask to hold a multiple of Q_BLOCK_SIZE 4 of queries, "
    ):
        convert(mask, 4, 4)
    with pytest.raises(ValueError, match="multiple of KV_BLOCK_SIZE 3 of keys, but got 8"):
        convert(mask, 3, 3)
    with pytest.raises(ValueError, match=f"{name}: expected Q_BLOCK_SIZE to be positive, .* 0"):
        convert(mask, 2, 0)


def test_errors_of_block_masks():
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected block_mask to be 4-D .* but got 2-D \[2, 2\]"):
        block_sparse._convert_block_mask_to_mask(blocks[0, 0])
    with pytest.raises(ValueError, match="expected KV_BLOCK_SIZE to be positive, but got -1"):
        block_sparse._convert_block_mask_to_mask(blocks, -1)


def test_errors_of_score_mods():
    with pytest.raises(TypeError, match="_compose: expected at least one score_mod, but got none"):
        block_sparse._compose()
    with pytest.raises(ValueError, match="expected num_heads to be positive, but got 0"):
        block_sparse._generate_alibi_bias(0)


def test_errors_of_flex_attention():
    query, key, value = states(0, 2, 3, 4, 6)
    flex_attention = block_sparse._flex_attention
    for name in ("query", "key", "value"):
        given_states = {"query": query, "key": key, "value": value}
        given_states[name] = given_states[name][0]
        with pytest.raises(ValueError, match=f"expected {name} to be 4-D .* but got 3-D"):
            flex_attention(**given_states)
    with pytest.raises(TypeError, match="to be a _BlockSparseMask, but got Tensor"):
        flex_attention(query, key, value, IDENTITY, torch.ones(4, 6, dtype=torch.bool))
    for shape in ((1, 1, 4, 4), (1, 1, 6, 6), (3, 1, 4, 6), (1, 2, 4, 6)):
        mask = block_sparse._create_block_sparse_mask(torch.ones(shape, dtype=torch.bool), 2, 2)
        with pytest.raises(
            ValueError,
            match=r"expected kv_indices of block_sparse_mask to be \[2 or 1, 3 or 1, 2, 3\] for "
            r"4 queries and 6 keys, but got \[",
        ):
            flex_attention(query, key, value, IDENTITY, mask)
    mask.Q_BLOCK_SIZE = 0
    with pytest.raises(ValueError, match="_flex_attention: expected Q_BLOCK_SIZE to be positive"):
        flex_attention(query, key, value, IDENTITY, mask)
