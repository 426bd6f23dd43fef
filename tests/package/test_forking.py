"""A forked process goes on, whatever lock another thread of its parent held."""

import ast
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import attn_mask
import pytest
import torch
from attn_mask._core import forking, observing

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

SOURCES = Path(attn_mask.__file__).parent


def test_all_locks_are_safe():
    """None is made elsewhere."""
    made = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("Lock", "RLock", "Condition", "Semaphore", "Event", "Barrier")
    ]
    assert len(made) == 1 and made[0].startswith("forking.py:")


def use_all():
    """Takes each lock of the package."""
    ids = torch.tensor([[0, 1]])
    with (
        attn_mask.installed(),
        attn_mask.packed(document_ids=ids),
        attn_mask.aten_only(),
        attn_mask.skip_policy("never"),
        observing.observed(lambda call: None),
    ):
        assert attn_mask.is_installed()
        attn_mask.for_transformers("4.38.2")


def in_child(function):
    """The exit status of a forked process; None where it hangs."""
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def wait_for(monkeypatch, name, seconds):
    monkeypatch.setitem(forking._locks, name, forking._locks[name]._replace(seconds=seconds))


NAMES = ["scopes", "filling", "install"]


def test_the_names_are_all():
    assert sorted(forking._locks) == sorted(NAMES)


@pytest.mark.parametrize("is_soon_free", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_lock_that_another_thread_holds(name, is_soon_free, monkeypatch):
    """A fork waits for it, but not for good."""
    wait_for(monkeypatch, name, 30.0 if is_soon_free else 0.2)
    lock = forking._locks[name].lock
    is_held, is_over = threading.Event(), threading.Event()
    freed = []

    def hold():
        with lock:
            is_held.set()
            is_over.wait(0.3 if is_soon_free else 60)
            freed.append(None)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()

    def child():
        assert bool(freed) == is_soon_free
        use_all()

    status = in_child(child)
    is_over.set()
    thread.join()
    assert status == 0
    use_all()  # the parent's locks are free, too


def test_a_fork_within_a_lock():
    """As where what install() imports forks."""
    for each in forking._locks.values():
        with each.lock:
            assert in_child(use_all) == 0


INSTALLING = """
import os, sys, threading, time
import torch
import attn_mask

torch.set_num_threads(1)
thread = threading.Thread(target=attn_mask.install)
thread.start()
time.sleep(float(sys.argv[1]))
child = os.fork()
if not child:
    attn_mask.install()
    from transformers import LlamaConfig, masking_utils

    embeds = torch.zeros(1, 4, 8)
    config = LlamaConfig(attn_implementation="sdpa")
    with attn_mask.packed(document_ids=torch.tensor([[0, 0, 1, 1]])):
        mask = masking_utils.create_causal_mask(config, embeds, None, None)
    assert mask.sum() == 6, mask
    os._exit(0)
for _ in range(1200):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(child, 9)
    print("hangs")
thread.join()
print(status)
"""


@pytest.mark.parametrize("seconds", ["0.05", "0.5", "1.5"])
def test_a_fork_while_another_thread_installs(seconds):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INSTALLING, seconds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_half_an_install_is_made_whole(monkeypatch):
    """Where the fork could not wait: the child has all that install() replaces, or nothing."""
    from attn_mask._transformers import install
    from transformers import masking_utils

    wait_for(monkeypatch, "install", 0.2)
    is_halfway, is_over = threading.Event(), threading.Event()
    make = install._Installation.make

    def half(self):
        install._make(self._changes[::2])
        is_halfway.set()
        is_over.wait(60)
        make(self)

    monkeypatch.setattr(install._Installation, "make", half)
    thread = threading.Thread(target=attn_mask.install)
    thread.start()
    assert is_halfway.wait(60)
    monkeypatch.setattr(install._Installation, "make", make)

    def child():
        replaced = attn_mask.status().replaced
        for name in replaced:
            module, _, attribute = name.rpartition(".")
            if module == "transformers.masking_utils":
                found = getattr(masking_utils, attribute)
                assert found.__module__.startswith("attn_mask."), name
        assert replaced
        attn_mask.uninstall()
        assert masking_utils.sdpa_mask.__module__ == "transformers.masking_utils"

    status = in_child(child)
    is_over.set()
    thread.join()
    attn_mask.uninstall()
    assert status == 0
