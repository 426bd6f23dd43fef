"""Packed rows, beside loops over single tokens, and what a model makes of them."""

import doctest
import logging
import math
import random
import tracemalloc
from itertools import pairwise

import attn_mask
import numpy
import pytest
import torch
from attn_mask.data import PackingCollator, pack, plan_rows
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

STRATEGIES = ("best_fit", "sequential")


def loops(sequences, rows, row_length, pad, labels=None):
    """What the rows are to hold, one token at a time."""
    fields = {name: [] for name in ("input_ids", "position_ids", "document_ids", "labels")}
    borders = [0]
    for row in rows:
        line = []
        for document, index in enumerate(row):
            for position, token in enumerate(sequences[index]):
                label = token if labels is None else labels[index][position]
                line.append((token, position, document, -100 if position == 0 else label))
            borders.append(borders[-1] + len(sequences[index]))
        missing = row_length - len(line)
        line += [(pad, position, -1, -100) for position in range(missing)]
        if missing:
            borders.append(borders[-1] + missing)
        for values, column in zip(fields.values(), zip(*line, strict=True), strict=True):
            values.append(list(column))
    return fields, borders


@st.composite
def problems(draw):
    row_length = draw(st.integers(1, 12))
    sequences = draw(st.lists(st.lists(st.integers(0, 99), max_size=row_length), max_size=12))
    return sequences, row_length, draw(st.sampled_from(STRATEGIES))


@given(
    problem=problems(), kind=st.sampled_from(["list", "tuple", "int64", "int32", "array", "mixed"])
)
def test_rows_hold_what_loops_say(problem, kind):
    sequences, row_length, strategy = problem
    given_as = {
        "list": list,
        "tuple": tuple,
        "int64": torch.tensor,
        "int32": lambda tokens: torch.tensor(tokens, dtype=torch.int32),
        "array": lambda tokens: torch.tensor(tokens, dtype=torch.int64).numpy(),
        "mixed": lambda tokens: (
            tokens if len(tokens) % 2 else torch.tensor(tokens, dtype=torch.int64)
        ),
    }[kind]
    if kind == "int64":  # torch.tensor([]) has no integers
        sequences = [tokens for tokens in sequences if tokens]
    packed = pack(
        [given_as(tokens) for tokens in sequences], row_length, pad_token_id=7, strategy=strategy
    )
    rows = plan_rows([len(tokens) for tokens in sequences], row_length, strategy=strategy)
    wanted, borders = loops(sequences, rows, row_length, 7)
    for name, values in wanted.items():
        tensor = getattr(packed, name)
        assert tensor.dtype == torch.int64
        assert tensor.shape == (len(rows), row_length)
        assert tensor.tolist() == values, name
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == borders
    longest = max((b - a for a, b in pairwise(borders)), default=0)
    assert type(packed.max_seqlen) is int
    assert packed.max_seqlen == longest


@given(problem=problems())
def test_each_sequence_is_in_one_row(problem):
    sequences, row_length, strategy = problem
    lengths = [len(tokens) for tokens in sequences]
    rows = plan_rows(lengths, row_length, strategy=strategy)
    placed = [index for row in rows for index in row]
    assert sorted(placed) == [index for index, length in enumerate(lengths) if length]
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < tokens <= row_length for tokens in filled)
    if strategy == "sequential":
        assert placed == sorted(placed)
        for row, following in zip(filled, rows[1:], strict=False):
            assert row + lengths[following[0]] > row_length
    else:
        # No two rows would fit into one, and each row has its longest first.
        assert all(a + b > row_length for a, b in pairwise(filled))
        assert all(
            [lengths[i] for i in row] == sorted((lengths[i] for i in row), reverse=True)
            for row in rows
        )


def brute_force(lengths, row_length):
    """Best fit by a look at every row."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = [row_length - sum(lengths[i] for i in row) for row in rows]
        fits = [at for at, left in enumerate(room) if left >= lengths[index]]
        if fits:
            rows[min(fits, key=room.__getitem__)].append(index)
        else:
            rows.append([index])
    return rows


@given(lengths=st.lists(st.integers(1, 20), max_size=30))
def test_best_fit_takes_the_fullest_row_that_has_room(lengths):
    def filled(rows):  # of rows with the same room either may be taken
        return sorted(sum(lengths[index] for index in row) for row in rows)

    assert filled(plan_rows(lengths, 20)) == filled(brute_force(lengths, 20))


def test_little_is_wasted():
    draw = random.Random(0)
    lengths = [min(4096, max(1, int(draw.lognormvariate(6, 1)))) for _ in range(100_000)]
    rows = plan_rows(lengths, 4096)
    assert sum(lengths) >= 0.98 * len(rows) * 4096
    assert len(rows) <= math.ceil(1.02 * sum(lengths) / 4096)


def test_no_more_memory_than_the_rows():
    sequences = [torch.arange(length) for length in (4000, 3000, 2000, 7000) * 4]
    tracemalloc.start()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        packed = pack(sequences, 16384)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    peak = held = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    outputs = sum(tensor.nbytes for tensor in packed if isinstance(tensor, torch.Tensor))
    assert packed.input_ids.shape == (4, 16384)
    assert outputs <= peak <= outputs + 2**20 - python


def test_labels_of_ones_own():
    sequences, labels = [[1, 2, 3], [4, 5]], [[-100, -100, 3], [4, 5]]
    packed = pack(sequences, 6, labels=labels, pad_token_id=9)
    wanted, _ = loops(sequences, [[0, 1]], 6, 9, labels)
    assert packed.labels.tolist() == wanted["labels"]
    assert packed.input_ids.tolist() == wanted["input_ids"]


def test_no_sequences():
    packed = pack([], 4)
    assert [tuple(tensor.shape) for tensor in packed[:4]] == [(0, 4)] * 4
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.max_seqlen == 0


def test_empty_sequences_are_counted_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "attn_mask"):
        packed = pack([[1], [], torch.tensor([2]), []], 4)
    assert packed.input_ids.tolist() == [[1, 2, 0, 0]]
    assert [record.getMessage() for record in caplog.records] == [
        "pack: left out 2 empty sequences"
    ]


def test_result_is_on_the_device():
    packed = pack([[1, 2], [3]], 4, device="meta")
    assert {tensor.device.type for tensor in packed[:5]} == {"meta"}


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda tokens: torch.tensor(tokens).numpy()])
def test_another_default_device(kind):
    sequences = [kind([5, 6, 7]), [8, 9], kind([1])]
    wanted = pack(sequences, 4)
    with torch.device("meta"):
        packed = pack(sequences, 4)
        assert pack([], 4).input_ids.device.type == "cpu"
    for got, want in zip(packed[:5], wanted[:5], strict=True):
        assert torch.equal(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("on", ["lists", "cpu", "cuda"])
def test_result_is_on_a_gpu(on):
    sequences = [[5, 6, 7], [8, 9], [1]]
    wanted = pack(sequences, 4)
    if on != "lists":
        sequences = [torch.tensor(tokens, device=on) for tokens in sequences]
    packed = pack(sequences, 4, device=None if on == "cuda" else "cuda")
    for got, want in zip(packed[:5], wanted[:5], strict=True):
        assert got.device.type == "cuda"
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"sequences": [[1], [1, 2, 3, 4, 5]]},
            ValueError,
            r"pack: expected sequences to have at most row_length \(4\) tokens, "
            "but sequence 1 has 5",
        ),
        ({"row_length": 0}, ValueError, "pack: expected row_length to be at least 1, but got 0"),
        ({"row_length": 2.5}, TypeError, "pack: expected row_length to be an int, but got float"),
        (
            {"strategy": "first"},
            ValueError,
            "pack: expected strategy to be 'best_fit' or 'sequential', but got 'first'",
        ),
        ({"pad_token_id": None}, TypeError, "pack: expected pad_token_id to be an int"),
        ({"sequences": "text"}, TypeError, "pack: expected sequences to be lists or tensors"),
        ({"sequences": 5}, TypeError, "pack: expected sequences to be lists or tensors"),
        (
            {"sequences": {"input_ids": [1]}},
            TypeError,
            "lists or tensors of token ids, but got dict",
        ),
        ({"sequences": ["text"]}, TypeError, r"expected sequences\[0\] to be a list or a tensor"),
        ({"sequences": [[1], 5]}, TypeError, r"expected sequences\[1\] .*, but got int"),
        (
            {"sequences": [torch.ones(1, 2, dtype=torch.int64)]},
            ValueError,
            r"expected sequences\[0\] to be 1-D, but got 2-D \[1, 2\]",
        ),
        (
            {"sequences": [torch.ones(2)]},
            TypeError,
            r"expected sequences\[0\] to be of an integer dtype, but got torch.float32",
        ),
        ({"sequences": [[1.5]]}, TypeError, "expected sequences to hold integers of 64 bits, but"),
        (
            {"sequences": [[2**70]]},
            TypeError,
            "expected sequences to hold integers of 64 bits, but",
        ),
        ({"sequences": [[[1]]]}, TypeError, "expected sequences to hold integers of 64 bits, but"),
        (
            {
                "sequences": [
                    torch.ones(1, dtype=torch.int64),
                    torch.ones(1, dtype=int, device="meta"),
                ]
            },
            ValueError,
            "pack: expected sequences to be on one device, but got cpu, meta",
        ),
        (
            {"labels": [[1, 2], [3, 4]]},
            ValueError,
            r"expected labels to be as long as the sequences \(2, 1\), but got 2, 2",
        ),
    ],
)
def test_bad_input(change, error, text):
    arguments = {"sequences": [[1, 2], [3]], "row_length": 4, **change}
    with pytest.raises(error, match=text):
        pack(**arguments)


def test_more_tokens_than_cu_seqlens_counts():
    with pytest.raises(ValueError, match=r"fewer than 2\^31 tokens.*got 2 rows of 1500000000"):
        pack([range(1_400_000_000), range(1_400_000_000)], 1_500_000_000)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.tensor(5), "Tensor"),
        (torch.tensor([5]), "Tensor"),
        (torch.tensor(5, device="meta"), "Tensor"),
        (True, "bool"),
        (numpy.True_, "bool"),
        (numpy.array([5]), "ndarray"),
        (5.0, "float"),
        (None, "NoneType"),
        ("5", "str"),
    ],
)
def test_integers_are_no_tensors(value, kind):
    """Which would be changed in place, and plan another row each."""
    before = value.clone() if isinstance(value, torch.Tensor) else None
    text = f"to be an int, but got {kind}$"
    calls = {
        "plan_rows: expected row_length": lambda: plan_rows([3, 2], value),
        "pack: expected row_length": lambda: pack([[1, 2], [3]], value),
        "pack: expected pad_token_id": lambda: pack([[1, 2], [3]], 5, pad_token_id=value),
        "PackingCollator: expected row_length": lambda: PackingCollator(value),
        "PackingCollator: expected pad_token_id": lambda: PackingCollator(5, pad_token_id=value),
        r"plan_rows: expected lengths\[1\]": lambda: plan_rows([3, value], 5),
    }
    for expected, call in calls.items():
        with pytest.raises(TypeError, match=f"^{expected} {text}"):
            call()
    if before is not None and not before.is_meta:
        assert torch.equal(value, before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_integers_of_numpy_are_those_of_python(strategy):
    """int8 would overflow: rows of 127 hold more than any of the lengths."""
    lengths = [100, 27, 90, 30, 7, 127]
    want = plan_rows(lengths, 127, strategy=strategy)
    for numbers in (
        numpy.array(lengths, dtype=numpy.int8),
        [numpy.int8(length) for length in lengths],
        torch.tensor(lengths, dtype=torch.int8),
    ):
        assert plan_rows(numbers, numpy.int8(127), strategy=strategy) == want
    collate = PackingCollator(numpy.int64(4), pad_token_id=numpy.int8(9))
    assert type(collate.row_length) is int and type(collate.pad_token_id) is int
    assert collate([[1, 2, 3]])["input_ids"].tolist() == [[1, 2, 3, 9]]


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        (None, TypeError, "to be a list of ints or a 1-D tensor, but got NoneType"),
        ("ab", TypeError, "to be a list of ints or a 1-D tensor, but got str"),
        ({3: 2}, TypeError, "to be a list of ints or a 1-D tensor, but got dict"),
        (torch.ones(2, 3, dtype=int), ValueError, r"to be 1-D, but got 2-D \[2, 3\]"),
        (torch.tensor(3), ValueError, r"to be 1-D, but got 0-D \[\]"),
        (numpy.ones((2, 3), dtype=int), ValueError, r"to be 1-D, but got 2-D \[2, 3\]"),
        (torch.ones(2), TypeError, "to be of an integer dtype, but got torch.float32"),
        (torch.ones(2, dtype=int, device="meta"), ValueError, "to have values, but got a meta"),
        (torch.ones(2, dtype=int).to_sparse(), TypeError, "to be a strided tensor, but got layout"),
    ],
)
def test_lengths_that_are_none(lengths, error, text):
    with pytest.raises(error, match=f"^plan_rows: expected lengths {text}"):
        plan_rows(lengths, 5)


def test_a_device_that_torch_does_not_know():
    with pytest.raises(ValueError, match=r"^pack: expected device to name a device"):
        pack([[1]], 4, device="gpu")


def test_lengths_below_0():
    with pytest.raises(
        ValueError, match="plan_rows: expected lengths to be at least 0, but got -1 at 1"
    ):
        plan_rows([3, -1], 4)


def test_collator_of_a_loader():
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [1, 2, 3, 4]}]
    collate = PackingCollator(
        6, pad_token_id=3, return_document_ids=True, return_flash_attn_kwargs=True
    )
    (batch,) = DataLoader(features, batch_size=3, collate_fn=collate)
    packed = pack([feature["input_ids"] for feature in features], 6, pad_token_id=3)
    assert set(batch) == {
        *("input_ids", "position_ids", "labels", "document_ids", "max_length_q", "max_length_k"),
        *("cu_seq_lens_q", "cu_seq_lens_k"),
    }
    for name in ("input_ids", "position_ids", "labels", "document_ids"):
        assert torch.equal(batch[name], getattr(packed, name))
    assert torch.equal(batch["cu_seq_lens_q"], packed.cu_seqlens)
    assert batch["max_length_k"] == packed.max_seqlen
    assert set(PackingCollator(6)(features)) == {"input_ids", "position_ids", "labels"}
    plain = PackingCollator(6)([feature["input_ids"] for feature in features])
    assert torch.equal(plain["labels"], batch["labels"])


def test_collator_names_what_transformers_names():
    """Without padding and in one row, it is transformers' own collator."""
    features = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    ours = PackingCollator(5, strategy="sequential", return_flash_attn_kwargs=True)(features)
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        got = ours[name]
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(value)), name


def test_collator_takes_labels():
    features = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    assert PackingCollator(5)(features)["labels"].tolist() == [[-100, -100, 7, -100, 9]]


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (
            [{"tokens": [1]}],
            r"PackingCollator: expected features\[0\] to have 'input_ids', but got \['tokens'\]",
        ),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}],
            "expected all features to have 'labels' or none, but 1 of 2 have them",
        ),
        (
            [{"input_ids": [1] * 9}],
            "PackingCollator: .* row_length .8. tokens, but sequence 0 has 9",
        ),
    ],
)
def test_features_that_do_not_fit(features, text):
    with pytest.raises(ValueError, match=text):
        PackingCollator(8)(features)


def test_what_are_no_features():
    for features, kind in ((None, "NoneType"), (torch.tensor(1), r"a tensor \[\]"), ("ab", "str")):
        with pytest.raises(
            TypeError,
            match=f"^PackingCollator: expected features to be lists or tensors .* got {kind}$",
        ):
            PackingCollator(8)(features)


def test_arguments_of_the_collator():
    with pytest.raises(ValueError, match="PackingCollator: expected row_length to be at least 1"):
        PackingCollator(0)
    with pytest.raises(
        TypeError, match="PackingCollator: expected return_document_ids to be a bool"
    ):
        PackingCollator(8, return_document_ids=1)


def test_loss_of_packed_rows_is_that_of_single_sequences():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    sequences = [torch.randint(1, 50, (length,)) for length in (7, 3, 6, 9)]
    packed = pack(sequences, 14)
    mask = attn_mask.boolean(
        attn_mask.causal() & attn_mask.documents(packed.document_ids),
        *(len(packed.input_ids), 14, 14),
        unmask_unattended=True,
    )
    got = model(
        packed.input_ids,
        attention_mask=mask,
        position_ids=packed.position_ids,
        labels=packed.labels,
        use_cache=False,
    ).loss
    losses = [
        (model(tokens[None], labels=tokens[None]).loss, len(tokens) - 1) for tokens in sequences
    ]
    wanted = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_examples_of_docstrings():
    failed, attempted = doctest.testmod(attn_mask.data, extraglobs={"attn_mask": attn_mask})
    assert attempted >= 8
    assert failed == 0
