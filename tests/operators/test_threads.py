"""Masks built by many threads at once, and with any number of threads inside one operator."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attn_mask.rules import causal, padding
from masks import OUT_DTYPES, assert_same_mask, lowest
from sample_calls import CALL_IDS, CALLS, operator

THREADS = 16
ROUNDS = 4


def larger_calls():
    """Large enough for an operator to divide its rows among threads; no two results are alike."""
    generator = torch.Generator().manual_seed(0)
    calls = []
    for seed, dtype in enumerate(OUT_DTYPES):
        q_length, kv_length = 300 + 17 * seed, 700 + 31 * seed
        mask = torch.randint(0, 3, (3, kv_length), generator=generator).clamp(max=1)
        options = {"dtype": dtype, "key_value_length": kv_length}
        closed = torch.full((2, 1, q_length, kv_length), lowest(dtype), dtype=dtype)
        closed[:, :, ::3, 5] = 0.0
        calls += [
            ("to_4d", (mask, q_length), options),
            ("to_4d", (mask.t().contiguous().t(), q_length), {**options, "sliding_window": 90}),
            ("to_causal_4d", (3, q_length, kv_length), {"dtype": dtype}),
            ("_expand_mask", (mask, q_length), {"dtype": dtype}),
            ("_unmask_unattended", (closed, lowest(dtype)), {}),
        ]
    return calls


def run(call):
    name, args, kwargs = call
    return operator(name)(*args, **kwargs)


def assert_same_results(got, want):
    for one, other in zip(got, want, strict=True):
        if isinstance(other, bool):
            assert one is other
        else:
            assert_same_mask(one, other)


def test_threads_do_not_disturb_each_other():
    calls = larger_calls() + list(CALLS)
    want = [run(call) for call in calls]
    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(run, calls * ROUNDS))
    assert_same_results(got, want * ROUNDS)


@pytest.mark.usefixtures("keep_num_threads")
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_number_of_threads_does_not_matter(threads):
    calls = larger_calls()
    torch.set_num_threads(1)
    want = [run(call) for call in calls]
    torch.set_num_threads(threads)
    assert_same_results([run(call) for call in calls], want)


@pytest.mark.usefixtures("keep_num_threads")
@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS, ids=CALL_IDS)
def test_small_calls_with_one_thread(name, args, kwargs):
    want = operator(name)(*args, **kwargs)
    torch.set_num_threads(1)
    assert_same_results([operator(name)(*args, **kwargs)], [want])


def time_of_each_thread():
    """Nanoseconds that each thread of this process has been running."""
    tasks = Path("/proc/self/task")
    files = [task / "schedstat" for task in tasks.iterdir()] if tasks.exists() else []
    if not files or not files[0].exists():
        pytest.skip(
            "hardware: how long threads have run is read from /proc, which does not say it here"
        )
    return {file.parent.name: int(file.read_text().split()[0]) for file in files}


LENGTH = 4096
LARGE = torch.ones(4, LENGTH, dtype=torch.int64)
CLOSED = torch.zeros(4, 1, LENGTH, LENGTH).fill_(torch.finfo(torch.float32).min)

PARALLEL = {
    "to_4d": lambda: operator("to_4d")(LARGE, LENGTH, dtype=torch.float32, key_value_length=LENGTH),
    "boolean": lambda: operator("boolean")(
        *(causal() & padding(LARGE)).encode(), 4, LENGTH, LENGTH
    ),
    "_unmask_unattended": lambda: operator("_unmask_unattended")(
        CLOSED, torch.finfo(torch.float32).min
    ),
    "_is_all_visible": lambda: operator("_is_all_visible")(CLOSED),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_threads_share_the_work(name, keep_num_threads):
    """Compiled without OpenMP, parallel regions would run on one thread without a warning."""

    def spent_by(threads):
        """Nanoseconds of each thread, the longest first."""
        torch.set_num_threads(threads)
        PARALLEL[name]()
        before = time_of_each_thread()
        for _ in range(3):
            PARALLEL[name]()
        after = time_of_each_thread()
        return sorted((after[thread] - before.get(thread, 0) for thread in after), reverse=True)

    # The least of some: what the system does for a process (huge pages, say) counts as its time.
    alone = min(spent_by(1)[0] for _ in range(3))
    shared = spent_by(2)
    # Each has half of it. One may also wait actively for another that gets no processor, so that
    # the second's time is compared with what there is to do.
    assert shared[1] > 0.2 * alone, f"nanoseconds of each thread: {shared}, of one: {alone}"
