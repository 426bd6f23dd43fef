"""What users write by mistake: an error, where the mask would be wrong without a warning."""

import logging
import operator as python_operators
import warnings

import attn_mask
import numpy
import pytest
import torch
from attn_mask import masking_utils, rules
from attn_mask._core import log_once
from masks import MASK_DTYPES, assert_same_mask
from oracle_loader import Config
from rule_reference import grid

IDS = torch.tensor([0, 0, 1, 1, 1])
OTHER_IDS = torch.tensor([2, 2, 2, 0, 0])


def sdpa_mask(rule, batch_size=2, length=5, **kwargs):
    return masking_utils.sdpa_mask(
        batch_size, length, length, mask_function=rule, allow_is_causal_skip=False, **kwargs
    )


def block_mask(rule, batch_size=2, length=5):
    return attn_mask.create_block_mask(rule, batch_size, 1, length, length, "cpu", BLOCK_SIZE=1)


# Truth


@pytest.mark.parametrize(
    "use",
    [
        lambda rule: rule and rules.sliding_window(3),
        lambda rule: rule or rules.sliding_window(3),
        lambda rule: not rule,
        lambda rule: 1 if rule else 2,
        bool,
    ],
)
@pytest.mark.parametrize(
    "rule",
    [rules.causal(), rules.causal() & rules.documents(IDS), rules.union(), rules.function(len)],
)
def test_rules_are_neither_true_nor_false(rule, use):
    with pytest.raises(
        TypeError, match=r"expected rules to be joined by `&` and `\|`, not by `and`"
    ):
        use(rule)


def test_nobody_needs_the_truth_of_a_rule():
    """Flex attention, pytree, dynamo and torch's create_block_mask take rules as they are."""
    from torch.nn.attention import flex_attention

    rule = rules.causal() & rules.documents(IDS)
    theirs = flex_attention.create_block_mask(rule, 1, 1, 5, 5, device="cpu", BLOCK_SIZE=1)
    assert torch.equal(theirs.to_dense(), block_mask(rule, 1).to_dense())
    leaves, spec = torch.utils._pytree.tree_flatten({"mask": rule})
    assert torch.utils._pytree.tree_unflatten(leaves, spec) == {"mask": rule}
    query = torch.randn(1, 1, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled: logged once in a process
        out = flex_attention.flex_attention(query, query, query, block_mask=block_mask(rule, 1))
    want = torch.nn.functional.scaled_dot_product_attention(query, query, query, sdpa_mask(rule, 1))
    torch.testing.assert_close(out, want)

    @torch.compile(backend="eager", fullgraph=True)
    def evaluate(rule, indices):
        return rule(*indices)

    torch._dynamo.reset()
    assert_same_mask(evaluate(rule, grid(1, 5, 5)), rule(*grid(1, 5, 5)))


# Factories that were not called


@pytest.mark.parametrize("combine", [python_operators.and_, python_operators.or_])
@pytest.mark.parametrize(
    "factory", [rules.causal, rules.sliding_window, rules.documents, masking_utils.chunked_overlay]
)
def test_factories_are_to_be_called(factory, combine):
    name = factory.__name__
    for pair in ((factory, rules.sliding_window(3)), (rules.sliding_window(3), factory)):
        with pytest.raises(
            TypeError, match=rf"to be a mask function, but got {name}, .*: call {name}"
        ):
            combine(*pair)
    for use in (rules.function, lambda f: rules.shift(f, 1, 1), sdpa_mask, block_mask):
        with pytest.raises(TypeError, match=rf": call {name}\(\)$"):
            use(factory)


# Windows without a key


@pytest.mark.parametrize("size", [0, -1, -(2**70), 0.5, -1.5])
def test_windows_have_a_size(size):
    with pytest.raises(ValueError, match="sliding_window: expected size to be positive, but got"):
        rules.sliding_window(size)


@pytest.mark.parametrize(
    "sides", [(-1, -1), (0, -1), (3, -4), (-2, 1), (-(2**40), 2), (0.5, -0.5), (-0.3, 0.4)]
)
def test_windows_hold_a_key(sides):
    with pytest.raises(ValueError, match=r"window: expected left and right to leave a key visible"):
        rules.window(*sides)


def test_windows_that_hold_one_key():
    for left, right in ((3, -3), (-2, 2), (0, 0)):
        got = sdpa_mask(rules.window(left, right), 1)
        assert_same_mask(got, torch.ones(5, 5).triu(right).tril(right).bool()[None, None])


def test_sides_that_are_too_far_away():
    for sides in ((-(2**59), None), (None, -(2**59)), (-(2**80), 2**90)):
        with pytest.raises(
            ValueError, match=r"window: expected (left|right) to be more than -2\^59"
        ):
            rules.window(*sides)


def test_windows_of_transformers_may_be_empty():
    for size in (0, -3):
        assert not sdpa_mask(masking_utils.sliding_window_causal_mask_function(size)).any()
        assert not sdpa_mask(masking_utils.sliding_window_bidirectional_overlay(size - 1)).any()


@pytest.mark.parametrize("size", [-1, -7])
def test_chunks_have_a_size(size):
    with pytest.raises(ValueError, match=f"chunked: expected size to be positive, but got {size}"):
        rules.chunked(size)


# Shifts


@pytest.mark.parametrize("distance", [2**59, -(2**59), 2**62, -(10**30)])
def test_shifts_are_not_cut(distance):
    for offsets, name in (((distance, 0), "q_offset"), ((0, distance), "kv_offset")):
        with pytest.raises(
            ValueError, match=rf"shift: expected {name} to be within 2\^59 of 0, bu"
        ):
            rules.shift(rules.causal(), *offsets)


@pytest.mark.parametrize("distance", [2**59 - 1, 2 - 2**59, -(2**58) - 1])
def test_shifts_up_to_the_limit(distance):
    causal = torch.ones(5, 5).tril().bool()[None, None]
    assert_same_mask(sdpa_mask(rules.shift(rules.causal(), distance, distance), 1), causal)
    moved = rules.shift(rules.causal(), distance, distance - 1)
    assert_same_mask(sdpa_mask(moved, 1), torch.ones(5, 5).tril(1).bool()[None, None])


# Tables


LEAVES = {
    "documents": (rules.documents, "ids"),
    "blockwise": (rules.blockwise, "ids"),
    "reindex": (lambda table: rules.reindex(rules.causal(), table), "positions"),
    "padding": (rules.padding, "mask"),
}
every_table = pytest.mark.parametrize("name", LEAVES)


@every_table
def test_one_row_stands_for_all(name):
    make, _ = LEAVES[name]
    for table in (IDS, IDS[None]):
        want = make(torch.stack([IDS, IDS, IDS]))
        rule = make(table)
        indices = grid(3, 5, 5)
        called = rule(*indices).expand(3, 1, 5, 5)
        assert_same_mask(called, want(*indices).expand(3, 1, 5, 5))
        assert_same_mask(sdpa_mask(rule, 3), called)
        assert_same_mask(sdpa_mask(rule, 3), sdpa_mask(want, 3))
        assert_same_mask(sdpa_mask(rule, 3, use_vmap=True), sdpa_mask(want, 3))
        assert_same_mask(
            masking_utils.eager_mask(3, 5, 5, mask_function=rule),
            masking_utils.eager_mask(3, 5, 5, mask_function=want),
        )
        assert torch.equal(block_mask(rule, 3).to_dense(), block_mask(want, 3).to_dense())
        program, operands = rule.encode()
        assert_same_mask(
            torch.ops.attn_mask.boolean(program, operands, 3, 5, 5),
            torch.ops.attn_mask.boolean(*want.encode(), 3, 5, 5),
        )


@every_table
@pytest.mark.parametrize("rows", [0, 2, 4])
def test_other_numbers_of_rows(name, rows):
    make, argument = LEAVES[name]
    rule = make(torch.zeros(rows, 5, dtype=torch.bool if name == "padding" else torch.int64))
    text = (
        rf"^{name}: expected {argument} to have 1 or 3 rows, for a batch of 3, but got \[{rows}, 5"
    )
    query = torch.zeros(3, 1, 5, 4)
    for use in (
        lambda: sdpa_mask(rule, 3),
        lambda: masking_utils.eager_mask(3, 5, 5, mask_function=rule),
        lambda: block_mask(rule, 3),
        lambda: attn_mask.sdpa_arguments(query, query, rule),
        # Everything is visible; that is not a reason to let it pass.
        lambda: attn_mask.sdpa_arguments(query, query, rule | rules.bidirectional()),
    ):
        with pytest.raises(ValueError, match=text):
            use()


@every_table
@pytest.mark.parametrize("shape", [(), (1, 1, 5)])
def test_other_ranks(name, shape):
    make, argument = LEAVES[name]
    text = (
        rf"^{name}: expected {argument} to be 1-D \[length\] or 2-D \[batch_size, length\], but got"
    )
    with pytest.raises(ValueError, match=text):
        make(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.uint16])
def test_ids_are_integers(dtype):
    """Torch compares other dtypes, too, a hundred times as slowly."""
    table = IDS.to(dtype)
    for name in ("documents", "blockwise", "reindex"):
        make, argument = LEAVES[name]
        text = f"^{name}: expected {argument} to be uint8 or a signed integer, but got {dtype}"
        with pytest.raises(TypeError, match=text):
            make(table)
    with pytest.raises(
        TypeError, match=r"^chunked: expected left_padding to be uint8 or a signed in"
    ):
        rules.chunked(3, table)


def test_complex_padding():
    with pytest.raises(
        TypeError, match=r"^padding: expected mask to be of a boolean, integer or re"
    ):
        rules.padding(IDS.to(torch.complex64))


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_padding_shows_what_is_not_zero(dtype):
    """Whatever it is joined with: 2 & True is 0, where the numbers themselves are joined."""
    mask = torch.tensor([2, 2, 0, 1, 4]).to(dtype)
    is_shown = (mask.float() != 0).expand(1, 1, 5, 5)  # float8_e8m0fnu has no zero
    is_causal = torch.ones(5, 5, dtype=torch.bool).tril()
    padding, causal = rules.padding(mask), rules.causal()
    by_call = rules.function(lambda b, h, q, k: k <= q)
    for rule, want in (
        (padding, is_shown),
        (padding & causal, is_shown & is_causal),
        (padding & by_call, is_shown & is_causal),
        (by_call & (padding | causal), (is_shown | is_causal) & is_causal),
        (padding | by_call, is_shown | is_causal),
    ):
        assert_same_mask(sdpa_mask(rule, 1), want)
        assert_same_mask(rule(*grid(1, 5, 5)).expand_as(want), want)
        block_mask = attn_mask.create_block_mask(rule, 1, 1, 5, 5, device="cpu", BLOCK_SIZE=1)
        assert_same_mask(block_mask.to_dense().bool(), want)


@every_table
def test_positions_before_a_table(name):
    """They would be counted from its end."""
    make, argument = LEAVES[name]
    rule = make(IDS)
    text = f"^{name}: expected {argument} for positions from 0 on, but the (queries|keys) of"
    for use in (
        lambda: attn_mask.boolean(rule, 1, 2, 3, q_offset=-1, kv_offset=-1),
        lambda: attn_mask.boolean(rules.shift(rule, -2, -2) & rules.causal(), 1, 2, 3),
        lambda: attn_mask.create_block_mask(rule, 1, 1, 2, 3, "cpu", q_offset=-1, kv_offset=-1),
    ):
        with pytest.raises(ValueError, match=text):
            use()
    assert attn_mask.boolean(rules.shift(rule, 1, 1), 1, 2, 3, q_offset=-1, kv_offset=-1).any()


def test_functions_of_transformers_take_any_dtype():
    """As its closures do; with a row for each row of the batch, or more."""
    for table in (IDS.float()[None], IDS.bool()[None], IDS[None].expand(4, -1)):
        rule = masking_utils.packed_sequence_mask_function(table)
        assert_same_mask(sdpa_mask(rule, 1), rule(*grid(1, 5, 5)))
    for make, text in (
        (
            masking_utils.packed_sequence_mask_function,
            "packed_sequence_mask_function: expected pac",
        ),
        (
            masking_utils.blockwise_overlay,
            "blockwise_overlay: expected block_sequence_ids to have 2",
        ),
        (
            masking_utils.padding_mask_function,
            "padding_mask_function: expected padding_mask to have",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{text}"):
            sdpa_mask(make(IDS[None]), 2)


def test_left_padding_of_chunks():
    one = rules.chunked(2, torch.tensor([1]))
    assert_same_mask(sdpa_mask(one, 3), sdpa_mask(rules.chunked(2, torch.tensor([1, 1, 1])), 3))
    assert_same_mask(sdpa_mask(one, 3), one(*grid(3, 5, 5)).expand(3, 1, 5, 5))
    with pytest.raises(
        ValueError, match=r"chunked: expected left_padding to be 1-D \[batch_size\]"
    ):
        rules.chunked(2, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunked: expected left_padding to have 1 or 3 rows"):
        sdpa_mask(rules.chunked(2, torch.tensor([1, 0])), 3)


# Tensors that are none, or hold nothing at strides

NESTED = [torch.nested.nested_tensor([[1, 1], [1]], layout=torch.jagged), IDS[None].to_sparse()]


@pytest.mark.parametrize("tensor", NESTED, ids=["nested", "sparse"])
def test_tensors_without_strides(tensor):
    query = torch.zeros(2, 1, 5, 4)
    legacy = attn_mask.modeling_attn_mask_utils
    config = Config("sdpa")
    for use, name in (
        (rules.documents, "documents: expected ids"),
        (rules.blockwise, "blockwise: expected ids"),
        (rules.padding, "padding: expected mask"),
        (lambda t: rules.reindex(rules.causal(), t), "reindex: expected positions"),
        (lambda t: rules.chunked(2, t), "chunked: expected left_padding"),
        (
            lambda t: sdpa_mask(rules.causal(), attention_mask=t),
            "sdpa_mask: expected attention_mask",
        ),
        (lambda t: attn_mask.sdpa_arguments(query, query, attention_mask=t), "sdpa_arguments: exp"),
        (lambda t: attn_mask.sdpa_arguments(t, query), "sdpa_arguments: expected query"),
        (
            lambda t: legacy._prepare_4d_attention_mask(t, torch.float32),
            "_expand_mask: expected mas",
        ),
        (
            lambda t: legacy._prepare_4d_attention_mask_for_sdpa(t, torch.float32),
            "_prepare_4d_attention_mask_for_sdpa: expected mask",
        ),
        (
            lambda t: legacy._prepare_4d_causal_attention_mask(t, (2, 5), query[:, 0], 0),
            "to_4d: expected attention_mask_2d",
        ),
        (
            lambda t: legacy._prepare_4d_causal_attention_mask_for_sdpa(t, (2, 5), query[:, 0], 0),
            "_ignore_causal_mask_sdpa: expected attention_mask",
        ),
        (
            lambda t: legacy.AttentionMaskConverter._unmask_unattended(t, 1.0),
            "_unmask_unattended: expected expanded_mask",
        ),
        (
            lambda t: masking_utils.create_causal_mask(config, query[:, 0], t, None),
            "create_causal_mask: expected attention_mask",
        ),
        (
            lambda t: masking_utils.create_causal_mask(config, t, None, None),
            "create_causal_mask: expected inputs_embeds",
        ),
    ):
        with pytest.raises(TypeError, match=f"^{name}.* to be a strided tensor, but got"):
            use(tensor)


def test_what_is_no_tensor():
    for use, name in (
        (rules.documents, "documents: expected ids"),
        (rules.padding, "padding: expected mask"),
        (
            lambda t: attn_mask.sdpa_arguments(t, torch.zeros(1, 1, 1, 1)),
            "sdpa_arguments: expected q",
        ),
    ):
        with pytest.raises(TypeError, match=f"^{name}.* to be a tensor, but got list"):
            use([[0, 1]])
    for value in (5, None, "mask", IDS):
        with pytest.raises(
            TypeError, match=r"^block_mask_to: expected block_mask to be a BlockMask"
        ):
            attn_mask.block_mask_to(value, "cpu")


# sdpa_arguments


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_padding_of_another_batch(rows):
    """Whatever it holds: whether a mask is needed must not decide whether there is an error."""
    query = torch.zeros(3, 1, 5, 4)
    for padding in (torch.ones(rows, 5), torch.tensor([[0, 1, 1, 1, 1]]).expand(rows, 5)):
        for rule in (rules.causal(), rules.bidirectional(), rules.documents(IDS)):
            with pytest.raises(
                ValueError,
                match=rf"sdpa_arguments: expected attention_mask to have 3 rows.*\[{rows}, 5",
            ):
                attn_mask.sdpa_arguments(query, query, rule, padding)
    with pytest.raises(
        ValueError, match="expected key to have the batch size of query, which is 3"
    ):
        attn_mask.sdpa_arguments(query, torch.zeros(2, 1, 5, 4))


# Sizes, offsets and flags


@pytest.mark.parametrize("value", [1.5, "1", None, True, [1]])
@pytest.mark.parametrize(
    "argument", ["batch_size", "q_length", "kv_length", "q_offset", "kv_offset"]
)
@pytest.mark.parametrize("rule", [rules.causal(), rules.documents(IDS), lambda b, h, q, k: q >= k])
def test_sizes_and_offsets_are_integers(rule, argument, value):
    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, argument: value}
    text = f": expected {argument} to be an int, but got {type(value).__name__}$"
    for name in ("boolean", "additive"):
        with pytest.raises(TypeError, match=f"^{name}{text}"):
            getattr(attn_mask, name)(rule, **arguments)
    if argument == "kv_offset" or (argument == "q_offset" and value is not None):
        query = torch.zeros(1, 1, 4, 8)
        with pytest.raises(TypeError, match=f"^sdpa_arguments{text}"):
            attn_mask.sdpa_arguments(query, query, rule, **{argument: value})


@pytest.mark.parametrize("rule", [rules.causal(), lambda b, h, q, k: q >= k])
def test_sizes_are_no_tensors(rule):
    """They would be read, and a plan of them would share their memory."""
    size = torch.tensor(4)
    text = "to be an int, but got Tensor$"
    for at, argument in enumerate(("batch_size", "q_length", "kv_length")):
        sizes = [1, 4, 4]
        sizes[at] = size
        for function in (attn_mask.boolean, attn_mask.additive, attn_mask.attention_plan):
            with pytest.raises(
                TypeError, match=f"^{function.__name__}: expected {argument} {text}"
            ):
                function(rule, *sizes)
    with pytest.raises(TypeError, match=f"^attention_plan: expected heads {text}"):
        attn_mask.attention_plan(rule, 1, 4, 4, heads=size)


@pytest.mark.parametrize("rule", [rules.causal(), lambda b, h, q, k: q >= k])
def test_sizes_of_numpy_are_those_of_python(rule):
    """int8 would overflow: the positions of queries and keys go to 200."""
    size = numpy.int8(100)
    want = attn_mask.boolean(rule, 1, 100, 100, q_offset=100, kv_offset=90)
    got = attn_mask.boolean(rule, size, size, size, q_offset=size, kv_offset=numpy.int8(90))[:1]
    assert_same_mask(got, want)
    query = torch.ones(1, 1, 100, 8)
    at = {"q_offset": size, "kv_offset": numpy.int8(90)}
    ints = {"q_offset": 100, "kv_offset": 90}
    assert_same_mask(
        attn_mask.sdpa_arguments(query, query, rule, **at)[0],
        attn_mask.sdpa_arguments(query, query, rule, **ints)[0],
    )
    key = torch.randn(1, 1, 100, 8)
    assert torch.equal(
        attn_mask.scaled_dot_product_attention(query, key, key, rule, **at),
        attn_mask.scaled_dot_product_attention(query, key, key, rule, **ints),
    )


@pytest.mark.parametrize("value", [True, numpy.True_, torch.tensor(2), numpy.array([2])])
def test_sizes_of_rules_are_integers(value):
    text = f"to be an int, but got {type(value).__name__}$"
    for expected, make in {
        "sliding_window: expected size": lambda: rules.sliding_window(value),
        "window: expected left": lambda: rules.window(value, 0),
        "window: expected right": lambda: rules.window(0, value),
        "chunked: expected size": lambda: rules.chunked(value),
        "documents: expected max_length": lambda: rules.documents(
            IDS, max_documents=2, max_length=value
        ),
    }.items():
        with pytest.raises(TypeError, match=f"^{expected} {text}"):
            make()


@pytest.mark.parametrize("argument", ["q_offset", "kv_offset", "q_length"])
def test_integers_that_are_too_large(argument):
    arguments = {"batch_size": 1, "q_length": 4, "kv_length": 4, argument: 2**70}
    with pytest.raises(ValueError, match=rf"^boolean: expected {argument} to be within 2\^63 of 0"):
        attn_mask.boolean(rules.causal(), **arguments)


def test_flags_are_bools():
    query = torch.zeros(1, 1, 4, 8)
    text = "expected unmask_unattended to be a bool, but got str"
    with pytest.raises(TypeError, match=f"^boolean: {text}"):
        attn_mask.boolean(rules.causal(), 1, 4, 4, unmask_unattended="no")
    with pytest.raises(TypeError, match=f"^sdpa_arguments: {text}"):
        attn_mask.sdpa_arguments(query, query, unmask_unattended="no")
    with pytest.raises(
        TypeError, match=r"^create_block_mask: expected separate_full_blocks to be a bool, but"
    ):
        attn_mask.create_block_mask(rules.causal(), 1, 1, 4, 4, "cpu", separate_full_blocks="no")


def test_a_masked_value_needs_a_dtype():
    """Whether a mask is made or not: the value would be ignored."""
    query = torch.zeros(1, 1, 5, 8)
    for rule in (rules.causal(), rules.documents(IDS)):
        with pytest.raises(
            ValueError, match=r"^sdpa_arguments: expected a dtype beside masked_value.* got -1\.0"
        ):
            attn_mask.sdpa_arguments(query, query, rule, masked_value=-1.0)


@pytest.mark.parametrize("compact", [(), (1,), (1, 2, 3)])
def test_compact_is_one_number_or_two(compact):
    with pytest.raises(
        ValueError,
        match=f"^create_block_mask: expected compact to be a number or two, but got {len(compact)}",
    ):
        attn_mask.create_block_mask(rules.causal(), 1, 1, 4, 4, "cpu", compact=compact)


def test_block_masks_go_to_a_device():
    with pytest.raises(
        TypeError,
        match=r"block_mask_to: expected device to be a torch\.device or a str, but got NoneType",
    ):
        attn_mask.block_mask_to(block_mask(rules.causal()), None)


# Mask functions of users'


def returns_true(b, h, q, k):
    return True


def returns_a_list(b, h, q, k):
    return [q >= k]


def takes_two(q, k):
    return q >= k


def branches(b, h, q, k):
    if q >= k:
        return q >= 0
    return q < 0


def joins_by_and(b, h, q, k):
    return q >= k and q - k < 3


def takes_a_number(b, h, q, k):
    return k <= q.item()


def takes_an_int(b, h, q, k):
    return k <= int(q)


def looks_up_in_a_list(b, h, q, k):
    return k <= [0, 0, 2, 2, 4][q]


def looks_up_in_an_array(b, h, q, k):
    return torch.from_numpy(numpy.ones(5, dtype=bool)[k.numpy()]) & (k <= q)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        *(
            (function, "not to take indices out of their tensors")
            for function in (takes_a_number, takes_an_int, looks_up_in_a_list)
        ),
        (returns_true, "to return a bool tensor, but got bool"),
        (returns_a_list, "to return a bool tensor, but got list"),
        (
            takes_two,
            r"to take the four arguments \(batch_idx, head_idx, q_idx, kv_idx\), but it can't",
        ),
        (branches, "not to branch on tensors: use `&`, `|`"),
        (joins_by_and, "not to branch on tensors: use `&`, `|`"),
    ],
)
def test_mask_functions_of_users(function, text):
    query = torch.zeros(2, 1, 5, 4)
    for use in (
        block_mask,
        sdpa_mask,
        lambda f: sdpa_mask(f, use_vmap=True),
        lambda f: sdpa_mask(rules.causal() & f),
        lambda f: block_mask(rules.shift(f, 1, 1) | rules.causal()),
        lambda f: attn_mask.sdpa_arguments(query, query, f),
    ):
        with pytest.raises(
            TypeError, match=f"^{function.__name__}: expected the mask function {text}"
        ):
            use(function)


def test_mask_functions_that_make_arrays():
    """Of indices that broadcast, one can be made; of those of torch.vmap, none."""
    assert torch.equal(sdpa_mask(looks_up_in_an_array), sdpa_mask(rules.causal()))
    with pytest.raises(TypeError, match=r"^looks_up_in_an_array: .* not to take indices out of"):
        block_mask(looks_up_in_an_array)


def test_other_errors_of_mask_functions_are_theirs():
    class Mine(Exception):
        pass

    def fails(b, h, q, k):
        raise Mine

    def fails_by_type(b, h, q, k):
        return q + "a"

    with pytest.raises(Mine):
        sdpa_mask(fails)
    with pytest.raises(TypeError, match=r"unsupported operand|can't|must be"):
        sdpa_mask(fails_by_type)
    with pytest.raises(RuntimeError, match="mine"):
        sdpa_mask(lambda b, h, q, k: (_ for _ in ()).throw(RuntimeError("mine")))


def test_trees_called_with_ints():
    causal, window = rules.causal(), rules.sliding_window(3)
    for rule, at, answer in (
        (causal & window, (5, 4), True),
        (causal & window, (5, 2), False),
        (causal | window, (2, 5), True),
        (rules.shift(causal, 3, 0) & window, (1, 4), True),
        (rules.union(), (0, 0), False),
        (rules.intersection(), (0, 0), True),
        (rules.function(lambda b, h, q, k: q == k) | causal, (1, 1), True),
    ):
        assert rule(0, 0, *at) is answer
    assert (rules.documents(IDS) & causal)(0, 0, 4, 2).item() is True
    assert (rules.documents(IDS) & causal)(0, 0, 4, 1).item() is False


# How deep


def nested(depth):
    rule = rules.causal()
    for level in range(depth - 1):
        rule = rule & rules.bidirectional() if level % 2 else rule | rules.sliding_window(2)
    return rule


def test_rules_up_to_256_deep():
    rule = nested(256)
    q, k = torch.arange(5)[:, None], torch.arange(5)
    # Each level but those of all lets through what the window does.
    want = ((k <= q) | (k > q - 2))[None, None]
    assert_same_mask(sdpa_mask(rule, 1), want)
    assert torch.equal(block_mask(rule, 1).to_dense().bool(), want)
    assert rule == nested(256)
    assert rule != nested(255)
    assert hash(rule) == hash(nested(256))
    assert rule.to("cpu") is rule
    assert len(rule.encode()[0]) > 256
    assert repr(rule)


@pytest.mark.parametrize(
    ("deepen", "name"),
    [
        (lambda rule: rule & rules.causal(), "intersection"),
        (lambda rule: (rule & rules.causal()) | rules.causal(), "intersection|union"),
        (lambda rule: rules.shift(rule, 1, 1), "shift"),
        (lambda rule: rules.reindex(rule, IDS), "reindex"),
    ],
)
def test_rules_that_are_deeper(deepen, name):
    with pytest.raises(
        ValueError, match=f"^({name}): expected rules to be nested at most 256 deep"
    ):
        deepen(nested(256))


# Numbers in a padding mask

CONFIG = Config("sdpa")
NUMBERED = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 1, 2, 3]])


@pytest.fixture
def unnamed(monkeypatch):
    """As at the start of a process."""
    monkeypatch.setattr(log_once, "_named", set())


def named(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "attn_mask"]


def create(mask, q_length=5, **kwargs):
    embeds = torch.zeros(2, q_length, 4, device=mask.device)
    return masking_utils.create_causal_mask(CONFIG, embeds, mask, None, **kwargs)


def test_numbers_in_a_padding_mask_are_named_once(unnamed, caplog):
    with caplog.at_level(logging.WARNING, "attn_mask"):
        got = create(NUMBERED)
        create(NUMBERED)
        query = torch.zeros(2, 1, 5, 4)
        attn_mask.sdpa_arguments(query, query, attention_mask=NUMBERED)
    assert_same_mask(got, create(NUMBERED.bool()))
    [text] = named(caplog)
    assert "document_ids" in text


@pytest.mark.parametrize("mask", [NUMBERED.bool(), NUMBERED.clamp(max=1), NUMBERED.eq(1).float()])
def test_padding_masks_that_name_nothing(unnamed, caplog, mask):
    create(mask)
    assert not named(caplog)


@pytest.mark.parametrize("mask", [NUMBERED * 0.5, -NUMBERED])
def test_other_numbers_than_ids(unnamed, caplog, mask):
    create(mask)
    assert len(named(caplog)) == 1


def test_numbers_are_not_looked_at_in_decoding_nor_in_graphs(unnamed, caplog):
    create(NUMBERED, q_length=1)

    def step(mask):
        made = create(mask)
        assert made is not None
        return made

    torch._dynamo.reset()
    assert_same_mask(
        torch.compile(step, backend="eager", fullgraph=True)(NUMBERED), create(NUMBERED.bool())
    )
    with attn_mask.skip_policy("never"):
        create(NUMBERED.to("meta"))
        for mode in ("real", "symbolic"):
            torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode=mode)(NUMBERED)
    assert not named(caplog)
