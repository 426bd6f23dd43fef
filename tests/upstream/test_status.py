"""What status(), explain_model() and DEBUG lines say before, under and after install()."""

import copy
import functools
import logging
import sys
import types

import attn_mask
import pytest
import torch

transformers = pytest.importorskip("transformers")

from models import RELEASE, make  # noqa: E402
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
    from attn_mask._core.log_once import warn_once

    with caplog.at_level(logging.WARNING, logger="attn_mask"):
        warn_once("of this test", "%s has %d legs", "A cat", 4)
        warn_once("of this test", "%s has %d legs", "A dog", 4)
    assert caplog.messages == ["A cat has 4 legs"]
    assert attn_mask.status().warnings[-1] == "A cat has 4 legs"


def test_debug_lines_name_each_replacement_once(nothing_installed, caplog):
    with caplog.at_level(logging.DEBUG, logger="attn_mask"):
        for _ in range(2):
            with attn_mask.installed():
                replaced = attn_mask.status().replaced
    debug = [record for record in caplog.records if record.levelno == logging.DEBUG]
    texts = [record.getMessage() for record in debug]
    assert len(set(texts)) == len(texts)
    named = [text for text in texts if text.startswith("attn_mask.install replaces ")]
    assert named == [f"attn_mask.install replaces {name}" for name in replaced]
    assert not set(texts) & set(attn_mask.status().warnings)


def test_no_debug_lines_unless_asked_for(nothing_installed, caplog):
    with caplog.at_level(logging.INFO, logger="attn_mask"), attn_mask.installed():
        attn_mask.masking_utils.eager_mask(1, 4, 4, 0, 0, lambda b, h, q, kv: kv == q)
    assert [record for record in caplog.records if record.levelno == logging.DEBUG] == []


since_5_4 = pytest.mark.applies(RELEASE >= (5, 4))


def makers(model):
    """Without install(), then with it: (layer type, how many, attention, maker) for each line."""
    told = []
    for block in (attn_mask.installed(), None):
        if block is None:
            explained = attn_mask.explain_model(model)
            assert str(explained).startswith(f"{type(model).__name__}, attn_mask.install: not ")
        else:
            with block:
                explained = attn_mask.explain_model(model)
            release = f"installed, transformers {transformers.__version__}"
            assert str(explained).splitlines()[0].endswith(f"attn_mask.install: {release}")
        assert repr(explained) == str(explained)
        lines = str(explained).splitlines()[1:]
        assert lines == [f"  {layers}" for layers in explained.layers]
        told.append([(x.layer_type, x.layers, x.attention, x.maker) for x in explained.layers])
    return told


LAYERS = {
    "Llama": [("full_attention", 2)],
    "Mistral": [("sliding_attention", 2)],
    "Gemma 3 text": [("sliding_attention", 1), ("full_attention", 1)],
    "Llama 4 text": [("chunked_attention", 1), ("full_attention", 1)],
}


@since_5_4
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", LAYERS)
def test_explain_model(nothing_installed, name, implementation):
    model = make(name, implementation)
    on, off = makers(model)
    assert on == [(*layers, implementation, "attn_mask") for layers in LAYERS[name]]
    assert off == [(*layers, implementation, "transformers") for layers in LAYERS[name]]
    text = str(attn_mask.explain_model(model))
    assert "install() is off" in text
    assert ("a BlockMask" in text) == (implementation == "flex_attention")


@since_5_4
def test_layers_without_attention_and_attention_without_masks(nothing_installed):
    model = copy.deepcopy(make("Llama", "sdpa"))
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert [line[3] for line in makers(model)[0]] == ["none", "attn_mask"]
    # Nothing of flash attention runs.
    for implementation in ("flash_attention_2", "of_nobody"):
        model.config._attn_implementation_internal = implementation
        on, off = makers(model)
        assert (
            on
            == off
            == [
                ("linear_attention", 1, implementation, "none"),
                ("full_attention", 1, implementation, "none"),
            ]
        )


@since_5_4
def test_nested_configs(nothing_installed):
    text = make("Llama", "sdpa")
    model = torch.nn.Module()
    model.text = text
    vision = types.SimpleNamespace(model_type="a", num_hidden_layers=3, _attn_implementation="sdpa")
    model.config = types.SimpleNamespace(
        model_type="both", text_config=text.config, vision_config=vision
    )
    with attn_mask.installed():
        explained = attn_mask.explain_model(model)
    of_text, of_vision = explained.layers
    assert (of_text.config, of_text.layers, of_text.maker) == ("text_config", 2, "attn_mask")
    assert (of_vision.config, of_vision.layers) == ("vision_config", 3)
    assert of_vision.maker == "another" and "the model's own code" in of_vision.why
    assert "\n  text_config: full_attention x 2, sdpa: attn_mask, " in str(explained)


@since_5_4
def test_what_others_put_there(nothing_installed, monkeypatch):
    def of_another(*args, **kwargs):
        return None

    model = make("Gemma 3 text", "sdpa")
    with monkeypatch.context() as patch:
        mapping = theirs.AttentionMaskInterface._global_mapping
        patch.setitem(mapping, "sdpa", of_another)
        with attn_mask.installed():
            explained = attn_mask.explain_model(model)
        assert {layers.maker for layers in explained.layers} == {"another"}
        assert "of_another is registered for 'sdpa'" in str(explained)
    with monkeypatch.context() as patch:
        before = theirs.sliding_window_causal_mask_function
        patch.setattr(theirs, "sliding_window_causal_mask_function", functools.partial(before))
        with attn_mask.installed():
            sliding, full = attn_mask.explain_model(model).layers
        assert "sliding_window_causal_mask_function" in sliding.why
        assert "is not transformers' own" in sliding.why
        assert "mask_function" not in full.why


@pytest.mark.parametrize("is_ours", [False, True])
def test_models_of_the_legacy_functions(nothing_installed, monkeypatch, is_ours):
    name = "_prepare_4d_causal_attention_mask"

    def of_transformers():
        return None

    of_transformers.__module__ = "transformers.modeling_attn_mask_utils"
    ours = getattr(attn_mask.modeling_attn_mask_utils, name)
    file = types.ModuleType("a_model_of_this_test")
    setattr(file, name, ours if is_ours else of_transformers)
    monkeypatch.setitem(sys.modules, file.__name__, file)
    model = type("AModel", (torch.nn.Module,), {"__module__": file.__name__})()
    model.config = types.SimpleNamespace(model_type="a", sliding_window=4)
    (layers,) = attn_mask.explain_model(model).layers
    assert layers.maker == ("attn_mask" if is_ours else "transformers")
    assert "by transformers.modeling_attn_mask_utils" in layers.why
    assert str(layers).startswith("sliding_attention, eager: ")
    model.config.use_sliding_window = False
    assert attn_mask.explain_model(model).layers[0].layer_type == "full_attention"


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (None, "no module, NoneType"),
        ("gpt2", "no module, str"),
        (types.SimpleNamespace(config=None), "no module, SimpleNamespace"),
        (torch.nn.Linear(1, 1), "one without such a config, Linear"),
    ],
)
def test_explain_model_wants_a_model(model, what):
    with pytest.raises(TypeError, match=f"^explain_model: expected model .*, but got {what}$"):
        attn_mask.explain_model(model)
