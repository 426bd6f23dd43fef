"""attn_mask.skip_policy: whose policy holds where, and what is left when blocks have ended."""

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import attn_mask
import pytest
import torch
from attn_mask import masking_utils
from attn_mask._core import skipping

ONES = torch.ones(1, 3, dtype=torch.bool)


@pytest.fixture(autouse=True)
def as_it_was():
    before = skipping.current().name
    yield
    assert (skipping.current().name, skipping._policies.open, skipping._policies.traced) == (
        before,
        (),
        (),
    )
    attn_mask.skip_policy("upstream")


def policy():
    """The policy's name, by what a mask comes to: of all ones, with and without a declaration."""
    if masking_utils.sdpa_mask(1, 3, 3) is not None:
        return "never"
    return "upstream" if masking_utils.sdpa_mask(1, 3, 3, attention_mask=ONES) is None else "shapes"


def test_blocks_in_threads_that_overlap():
    """The first to begin is the first to end: each has left its own block."""
    order = [threading.Event() for _ in range(3)]
    seen = {}

    def first():
        with attn_mask.skip_policy("never"):
            order[0].set()
            order[1].wait(60)
            seen["first"] = policy()
        seen["after the first"] = policy()
        order[2].set()

    def second():
        order[0].wait(60)
        with attn_mask.skip_policy("shapes"):
            order[1].set()
            order[2].wait(60)
            seen["second"] = policy()
        seen["after the second"] = policy()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {
        "first": "never",
        "after the first": "upstream",
        "second": "shapes",
        "after the second": "upstream",
    }
    assert policy() == "upstream"


def test_blocks_in_tasks_that_overlap():
    async def run(name, begin, end):
        for _ in range(begin):
            await asyncio.sleep(0)
        with attn_mask.skip_policy(name):
            for _ in range(end):
                await asyncio.sleep(0)
                assert policy() == name
        assert policy() == "upstream"

    async def main():
        names = itertools.cycle(["never", "shapes", "upstream"])
        await asyncio.gather(*(run(next(names), i % 4, 7 - i) for i in range(6)))

    asyncio.run(main())
    assert policy() == "upstream"


def test_many_threads():
    def run(name):
        for _ in range(50):
            with attn_mask.skip_policy(name):
                assert policy() == name
                with attn_mask.skip_policy("upstream"):
                    assert policy() == "upstream"
                assert policy() == name

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, ["never", "shapes", "upstream"] * 8))
    assert policy() == "upstream"


def test_a_block_wins_over_plain_calls():
    with attn_mask.skip_policy("never"):
        attn_mask.skip_policy("shapes")
        assert policy() == "never"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(policy()))
        thread.start()
        thread.join()
        assert seen == ["shapes"]  # a new thread starts with the process's
    assert policy() == "shapes"
    attn_mask.skip_policy("upstream")


@pytest.mark.parametrize("entered", list(itertools.permutations("abc")))
@pytest.mark.parametrize("left", list(itertools.permutations("abc")))
def test_objects_made_entered_and_left_in_any_order(entered, left):
    attn_mask.skip_policy("shapes")
    made = {name: attn_mask.skip_policy("never") for name in "abc"}
    assert policy() == "never"
    for name in entered:
        made[name].__enter__()
        assert policy() == "never"
    for name in left:
        assert policy() == "never"
        made[name].__exit__(None, None, None)
    assert policy() == "shapes"
    attn_mask.skip_policy("upstream")


def test_an_object_that_was_made_later_stays():
    first = attn_mask.skip_policy("never")
    second = attn_mask.skip_policy("shapes")
    with first:
        assert policy() == "never"
    assert policy() == "shapes"
    with second:
        assert policy() == "shapes"
    assert policy() == "upstream"


def test_objects_may_be_entered_again_and_nested():
    made = attn_mask.skip_policy("never")
    assert policy() == "never"
    for _ in range(2):
        with made:
            with made, attn_mask.skip_policy("shapes"), made:
                assert policy() == "never"
            assert policy() == "never"
        assert policy() == "upstream"


def test_blocks_end_with_an_exception():
    with pytest.raises(ZeroDivisionError), attn_mask.skip_policy("never"):
        1 / 0  # noqa: B018
    assert policy() == "upstream"


def test_generators():
    """A block within one lasts as long as it does, wherever it is run from."""

    def masks():
        with attn_mask.skip_policy("never"):
            yield policy()
            yield policy()

    generator = masks()
    assert next(generator) == "never"
    with attn_mask.skip_policy("shapes"):
        assert next(generator) == "never" or policy() == "shapes"
        assert list(generator) == []
        assert policy() == "shapes"
    assert policy() == "upstream"


def test_generators_that_end_elsewhere():
    def masks():
        with attn_mask.skip_policy("never"):
            yield

    generator = masks()
    next(generator)
    with attn_mask.skip_policy("shapes"):
        thread = threading.Thread(target=generator.close)
        thread.start()
        thread.join()
        assert policy() == "shapes"
    assert policy() == "upstream"


def test_blocks_of_asynchronous_generators_that_end_elsewhere():
    async def masks():
        with attn_mask.skip_policy("never"):
            yield

    async def run():
        generator = masks()
        await generator.__anext__()
        assert policy() == "never"
        await asyncio.create_task(generator.aclose())
        return policy()

    assert asyncio.run(run()) == "upstream"


def test_an_object_in_two_threads():
    """Each leaves its own block, in whatever order."""
    made = attn_mask.skip_policy("never")
    is_entered, is_left = threading.Event(), threading.Event()
    seen = []

    def other():
        with made:
            is_entered.set()
            is_left.wait(10)
            seen.append(policy())

    thread = threading.Thread(target=other)
    with made:
        thread.start()
        is_entered.wait(10)
        assert policy() == "never"
    assert policy() == "upstream"
    is_left.set()
    thread.join()
    assert seen == ["never"]


def test_calls_leave_nothing_behind():
    def call(n):
        for _ in range(n):
            attn_mask.skip_policy("never")
            attn_mask.skip_policy("upstream")
            with attn_mask.skip_policy("shapes"):
                pass

    call(100)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    call(5000)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000


# Compiled


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True, **options)


def mask_or_not(x):
    """1 with a mask, 0 without."""
    mask = masking_utils.sdpa_mask(1, 3, 3)
    return x + (0 if mask is None else 1)


# Under "upstream", torch 2.11 compiles a mask.


def test_blocks_around_compiled_code():
    attn_mask.skip_policy("shapes")
    zero = torch.zeros(())
    step = compiled(mask_or_not)
    for _ in range(2):
        assert step(zero) == 0
        with attn_mask.skip_policy("never"):
            assert step(zero) == 1
            with attn_mask.skip_policy("shapes"):
                assert step(zero) == 0
            assert step(zero) == 1
        assert step(zero) == 0
        attn_mask.skip_policy("never")
        assert step(zero) == 1
        attn_mask.skip_policy("shapes")
    attn_mask.skip_policy("upstream")
    torch._dynamo.reset()


def test_blocks_within_compiled_code():
    def step(x):
        with attn_mask.skip_policy("never"):
            inside = mask_or_not(x)
            with attn_mask.skip_policy("shapes"):
                nested = mask_or_not(x)
            again = mask_or_not(x)
        return inside, nested, again, mask_or_not(x)

    attn_mask.skip_policy("shapes")
    zero = torch.zeros(())
    run = compiled(step)
    for _ in range(3):
        assert [result.item() for result in run(zero)] == [1, 0, 1, 0]
        assert policy() == "shapes"
        with attn_mask.skip_policy("never"):
            assert [result.item() for result in run(zero)] == [1, 0, 1, 1]
            assert policy() == "never"
    attn_mask.skip_policy("upstream")
    torch._dynamo.reset()


@pytest.mark.parametrize("is_a_first", [True, False])
@pytest.mark.parametrize("before", ["shapes", "never"])
def test_objects_made_and_entered_within_compiled_code(before, is_a_first):
    """Each withdraws its own call, and no other."""

    def step(x):
        a, b = attn_mask.skip_policy("never"), attn_mask.skip_policy("shapes")
        first, second = (a, b) if is_a_first else (b, a)
        with first:
            within_first = mask_or_not(x)
        between = mask_or_not(x)
        with second:
            within_second = mask_or_not(x)
        return within_first, between, within_second, mask_or_not(x)

    attn_mask.skip_policy(before)
    expected = [1, 0, 0] if is_a_first else [0, 1, 1]
    results = compiled(step)(torch.zeros(()))
    assert [result.item() for result in results] == [*expected, before == "never"]
    assert policy() == before
    attn_mask.skip_policy("upstream")
    torch._dynamo.reset()


def test_plain_calls_within_compiled_code():
    def step(x):
        attn_mask.skip_policy("never")
        return mask_or_not(x)

    assert compiled(step)(torch.zeros(())) == 1
    assert policy() == "never"
    with attn_mask.skip_policy("shapes"):
        assert policy() == "shapes"
    assert policy() == "never"
    attn_mask.skip_policy("upstream")
    torch._dynamo.reset()


def test_exported_code_within_a_block():
    class Step(torch.nn.Module):
        def forward(self, x):
            return masking_utils.sdpa_mask(1, 3, 3) & (x > 0)

    for strict in (False, True):
        torch._dynamo.reset()
        with attn_mask.skip_policy("never"):
            exported = torch.export.export(Step(), (torch.ones(3),), strict=strict)
        assert torch.equal(exported.module()(torch.ones(3)), torch.ones(1, 1, 3, 3).tril().bool())
        assert policy() == "upstream"
    torch._dynamo.reset()


def test_the_policy_outlasts_modules():
    """Of a package that is imported again after it was removed from sys.modules."""
    code = """
import sys
import attn_mask
attn_mask.skip_policy("never")
for name in [name for name in sys.modules if name.partition(".")[0] == "attn_mask"]:
    del sys.modules[name]
import attn_mask
assert attn_mask.masking_utils.sdpa_mask(1, 3, 3) is not None
attn_mask.skip_policy("upstream")
assert attn_mask.masking_utils.sdpa_mask(1, 3, 3) is None
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
