"""What torch.export made, by AOTInductor, in other processes: with Python and without it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attn_mask import masking_utils, rules
from sample_calls import operator
from test_compile import CALLS, HALF, inputs
from test_contexts import run_python

PAST = 3
SIZES = ((2, 5, 5 + PAST), (3, 9, 9 + PAST), (4, 2, 2 + PAST))


def boolean(mask, queries):
    rule, operands = ((rules.causal() & rules.sliding_window(4)) | rules.padding(mask)).encode()
    return operator("boolean")(
        rule, operands, mask.shape[0], queries.shape[1], mask.shape[1], q_offset=PAST
    )


def additive(mask, queries):
    """Without an operand: what AOTInductor keeps of an empty list is None."""
    positions = mask.to(torch.int64).sum() * 0 + PAST
    return operator("additive")(
        *rules.causal().encode(),
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        dtype=torch.bfloat16,
        q_positions=positions,
    )


def sdpa_mask(mask, queries):
    return masking_utils.sdpa_mask(
        mask.shape[0],
        queries.shape[1],
        mask.shape[1],
        PAST,
        0,
        rules.causal() & rules.chunked(3),
        mask > 0,
    )


def out(mask, queries):
    written = torch.empty(mask.shape[0], 1, queries.shape[1], mask.shape[1], dtype=HALF)
    operator("to_4d")(mask, queries.shape[1], key_value_length=mask.shape[1], out=written)
    return written


# Operators whose result is optional.


def to_causal_4d(mask, queries):
    return operator("to_causal_4d")(
        mask.shape[0], queries.shape[1], mask.shape[1], dtype=HALF, sliding_window=3
    )


def create(mask, queries):
    return operator("_create_4d_causal_attention_mask")(queries.shape[:2], PAST, dtype=HALF)


def prepare(mask, queries):
    return operator("_prepare_4d_causal_attention_mask")(mask, queries.shape[:2], queries, PAST, 2)


def prepare_without_mask(mask, queries):
    return operator("_prepare_4d_causal_attention_mask")(None, queries.shape[:2], queries, PAST)


def mask_4d(mask, queries):
    return mask[:, None, None, :].expand(-1, 1, queries.shape[1], -1)


def prepare_4d(mask, queries):
    return operator("_prepare_4d_causal_attention_mask")(
        mask_4d(mask, queries).to(HALF), queries.shape[:2], queries.to(HALF), PAST
    )


def prepare_4d_of_booleans(mask, queries):
    return operator("_prepare_4d_causal_attention_mask")(
        mask_4d(mask, queries) > 0, queries.shape[:2], queries, PAST
    )


def prepare_for_sdpa(mask, queries):
    return operator("_prepare_4d_causal_attention_mask_for_sdpa")(
        mask, queries.shape[:2], queries, PAST, allow_skip=False
    )


def prepare_4d_for_sdpa(mask, queries):
    return operator("_prepare_4d_causal_attention_mask_for_sdpa")(
        mask_4d(mask, queries), queries.shape[:2], queries, PAST, allow_skip=False
    )


def prepare_both_ways_for_sdpa(mask, queries):
    return operator("_prepare_4d_attention_mask_for_sdpa")(
        mask, queries.shape[1], dtype=HALF, allow_skip=False
    )


EVERYTHING = {
    **{name: call for name, call in CALLS.items() if "square" not in name},
    **{
        call.__name__: call
        for call in (
            boolean,
            additive,
            sdpa_mask,
            out,
            to_causal_4d,
            create,
            prepare,
            prepare_without_mask,
            prepare_4d,
            prepare_4d_of_booleans,
            prepare_for_sdpa,
            prepare_4d_for_sdpa,
            prepare_both_ways_for_sdpa,
        )
    },
}


class Everything(torch.nn.Module):
    def forward(self, mask, queries):
        return [call(mask, queries) for call in EVERYTHING.values()]


def run_exported():
    """The program of tests/cpp for the torch that is running."""
    tag = f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__.split('+')[0]}"
    path = Path(__file__).parents[2] / "build" / tag / "tests" / "cpp" / "run_exported"
    if not path.exists():
        pytest.skip(f"{path} was not built")
    return path


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_aot_inductor(tmp_path, strict):
    """One package with dynamic sizes; a fresh Python and a program without Python load it."""
    batch_size = torch.export.Dim("batch_size", min=2, max=64)
    q_length = torch.export.Dim("q_length", min=2, max=4096)
    shapes = {"mask": {0: batch_size, 1: q_length + PAST}, "queries": {0: batch_size, 1: q_length}}
    program = torch.export.export(
        Everything(), inputs(*SIZES[0]), dynamic_shapes=shapes, strict=strict
    )
    calls = []
    for sizes in SIZES:
        mask, queries = inputs(*sizes)
        mask[-1, 2] = 0
        want = Everything()(mask, queries)
        got = program.module()(mask, queries)
        for name, one, other in zip(EVERYTHING, got, want, strict=True):
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name
        calls.append(([mask, queries], [result.contiguous() for result in want]))
    if strict:
        return
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "masks.pt2")
    )
    torch.save(calls, tmp_path / "calls")
    run_python(
        """
        import sys, torch, attn_mask, warnings
        warnings.simplefilter("ignore")
        model = torch._inductor.aoti_load_package(sys.argv[1])
        for inputs, want in torch.load(sys.argv[2]):
            got = model(*inputs)
            assert len(got) == len(want)
            for index, (one, other) in enumerate(zip(got, want)):
                assert one.dtype == other.dtype and torch.equal(one, other), index
        """,
        package,
        tmp_path / "calls",
    )
    tensors = tmp_path / "tensors"
    torch.save(tuple((tuple(given), tuple(want)) for given, want in calls), tensors)
    done = subprocess.run(
        [run_exported(), package, tensors], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(SIZES)} calls\n"
