"""attn_mask.status(): what it says before, under and after install()."""

import logging

import attn_mask
import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as theirs  # noqa: E402


@pytest.fixture
def nothing_installed():
    attn_mask.uninstall()
    yield
    attn_mask.uninstall()


def test_not_installed(nothing_installed):
    status = attn_mask.status()
    assert str(status).startswith("attn_mask.install: not installed\n")
    assert (status.installed, status.transformers, status.replaced, status.stays) == (
        False,
        None,
        (),
        (),
    )
    assert repr(status) == str(status)


def test_installed(nothing_installed):
    attn_mask.install()
    status = attn_mask.status()
    first = str(status).splitlines()[0]
    assert first == f"attn_mask.install: installed, transformers {transformers.__version__}"
    assert status.installed
    for name in status.replaced:
        module, _, attribute = name.rpartition(".")
        if module == "transformers.masking_utils":
            assert getattr(theirs, attribute).__module__.startswith("attn_mask."), name
        assert f"\n  {name}\n" in str(status)
    assert "transformers.masking_utils.sdpa_mask" in status.replaced
    assert "ALL_MASK_ATTENTION_FUNCTIONS['sdpa']" in status.replaced
    attn_mask.uninstall()
    assert not attn_mask.status().installed


def test_what_stays_and_why(nothing_installed, monkeypatch):
    def eager_mask(*args, **kwargs):
        return None

    monkeypatch.setattr(theirs, "eager_mask", eager_mask)
    with attn_mask.installed():
        status = attn_mask.status()
    assert "transformers.masking_utils.eager_mask" not in status.replaced
    (why,) = (text for text in status.stays if "masking_utils.eager_mask" in text)
    assert "is not transformers' own, but" in why
    assert f"attn_mask.install: {why}" in status.warnings
    assert f"\n  {why}\n" in str(status)


def counted(function):
    before, after = attn_mask.status(), function() or attn_mask.status()
    kinds = before.calls.keys() | after.calls.keys()
    calls = {kind: after.calls.get(kind, 0) - before.calls.get(kind, 0) for kind in kinds}
    return {kind: n for kind, n in calls.items() if n}, after.fallbacks - before.fallbacks


def make_mask(interface, mask_function=None, **kwargs):
    mask = theirs.ALL_MASK_ATTENTION_FUNCTIONS[interface]
    mask_function = mask_function or theirs.causal_mask_function
    mask(batch_size=1, q_length=4, kv_length=4, mask_function=mask_function, **kwargs)


@pytest.mark.applies(tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 4))
def test_calls_are_counted(nothing_installed):
    with attn_mask.installed():
        assert counted(lambda: make_mask("eager")) == ({"eager_mask": 1}, 0)
        assert counted(lambda: make_mask("sdpa", allow_is_causal_skip=False)) == (
            {"sdpa_mask": 1},
            0,
        )
        assert counted(lambda: make_mask("sdpa", allow_is_causal_skip=True)) == (
            {"masks skipped": 1},
            0,
        )
        calls, fallbacks = counted(
            lambda: make_mask("eager", lambda b, h, q, kv: kv >= q, dtype=torch.float32)
        )
        assert calls == {"eager_mask": 1}
        assert fallbacks > 0


def test_block_masks_are_counted():
    rule = attn_mask.causal()
    calls, fallbacks = counted(
        lambda: attn_mask.create_block_mask(rule, 1, 1, 256, 256, "cpu") and None
    )
    assert (calls, fallbacks) == ({"create_block_mask": 1}, 0)


def test_warnings_are_those_of_the_logger(caplog):
    from attn_mask._named_once import name_once

    with caplog.at_level(logging.WARNING, logger="attn_mask"):
        name_once("of this test", "%s has %d legs", "A cat", 4)
        name_once("of this test", "%s has %d legs", "A dog", 4)
    assert caplog.messages == ["A cat has 4 legs"]
    assert attn_mask.status().warnings[-1] == "A cat has 4 legs"
