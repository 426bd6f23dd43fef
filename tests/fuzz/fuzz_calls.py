"""Calls every operator and the public Python API with random arguments, in processes of their own.

    fuzz_calls.py [--seconds S] [--cases N] [--seed N]     cases, each with a seed counted up from N
    fuzz_calls.py --case SEED                              one case here, with its traceback

The folder `cases` says what they are. A process that dies, hangs or takes too much memory is a
failure, too.
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

# The references of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

SECONDS_OF_CASE = 60
MEMORY_OF_CASE = 4 << 30


def failure_of(cases, seed):
    """None where the case passes, else what happened, and in which call."""
    called = "while it was made"
    try:
        function, args, kwargs = cases.make_case(seed)
        called = cases.describe_call(function, args, kwargs)
        function(*args, **kwargs)
    except Exception as error:
        if cases.is_expected(error):
            return None
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        text = str(error).split("\nException raised from")[0]
        at = " ".join(frames[-6:])
        return f"{type(error).__name__}: {text[:1500]}\n  at {at}\n  in {called[:2500]}"
    return None


def work(first, end, step):
    """Cases of the seeds from `first` to `end`, each announced before it begins."""
    import cases

    faulthandler.enable()
    warnings.simplefilter("ignore")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + MEMORY_OF_CASE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in range(first, end, step):
        print(json.dumps([seed, "begins"]), flush=True)
        failure = failure_of(cases, seed)
        if failure is not None:
            print(json.dumps([seed, failure]), flush=True)


class Worker:
    """A process that works through seeds, and the last one that it began."""

    def __init__(self, first, end, step):
        self.end, self.step = end, step
        self.seed = first
        self.begins(first)

    def begins(self, first):
        command = [sys.executable, __file__, "--worker", *map(str, (first, self.end, self.step))]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe would fill
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.stderr)
        self.heard, self.buffer = time.monotonic(), b""

    def lines(self):
        """What it printed; None at its end."""
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            return None
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def stop(self):
        """Its exit status, and the end of what it wrote to stderr."""
        self.process.kill()
        status = self.process.wait()
        self.stderr.seek(0)
        return status, self.stderr.read().decode(errors="replace")[-3000:]


def watch(first, seconds, cases, jobs):
    """The number of cases, and of those that failed."""
    deadline = time.monotonic() + seconds
    end = first + (cases or 1 << 40)
    workers = [Worker(first + at, end, jobs) for at in range(jobs)]
    begun = failed = 0

    def report(seed, text):
        nonlocal failed
        failed += 1
        print(f"\nfuzz_calls: failed with --case {seed}\n{text}", flush=True)

    def replace(worker, what, stderr):
        report(worker.seed, f"{what}\n{stderr}")
        worker.begins(worker.seed + worker.step)

    while workers and time.monotonic() < deadline:
        readable, _, _ = select.select([one.process.stdout for one in workers], [], [], 1)
        for worker in list(workers):
            if worker.process.stdout in readable:
                lines = worker.lines()
                if lines is None:  # it is done, or has died
                    worker.process.wait()
                    status, stderr = worker.stop()
                    if status == 0:
                        workers.remove(worker)
                    else:
                        replace(worker, f"exit status {status}", stderr)
                    continue
                for seed, text in lines:
                    worker.seed = seed
                    if text == "begins":
                        begun += 1
                    else:
                        report(seed, text)
            elif time.monotonic() - worker.heard > SECONDS_OF_CASE:
                replace(worker, f"no end within {SECONDS_OF_CASE} s", worker.stop()[1])
    for worker in workers:
        worker.stop()
    return begun, failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--cases", type=int, help="so many in place of so long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(*options.worker)
        return
    if options.case is not None:
        import cases

        function, args, kwargs = cases.make_case(options.case)
        print(cases.describe_call(function, args, kwargs), flush=True)
        print(function(*args, **kwargs))
        return
    seconds = options.seconds or (float("inf") if options.cases else 30)
    limit = f"{options.cases} cases" if options.cases else f"{seconds:g} s"
    print(f"fuzz_calls: from --seed {options.seed}, for {limit}", flush=True)
    start = time.monotonic()
    begun, failed = watch(options.seed, seconds, options.cases, options.jobs)
    took = time.monotonic() - start
    print(f"fuzz_calls: {begun} cases in {took:.1f} s, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
