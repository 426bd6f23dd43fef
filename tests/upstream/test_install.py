"""attn_mask.install(): what it replaces, when, and what it puts back."""

import ast
import asyncio
import functools
import gc
import importlib.util
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from pathlib import Path

import attn_mask
import pytest
import torch
from attn_mask import masking_utils, rules
from attn_mask._core import log_once, operators, process, skipping
from attn_mask._transformers import install as install_module
from attn_mask._transformers import source
from attn_mask._transformers import writers as upstream_masks
from masks import assert_same_mask
from oracle_loader import Config, FakeCache
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip(
    "transformers", reason="transformers, under which masks are put, is not installed"
)
RELEASE = Version(transformers.__version__).release
HAS_MASKING_UTILS = RELEASE >= (4, 53)
upstream = importlib.import_module("transformers.masking_utils") if HAS_MASKING_UTILS else None

LEGACY = "transformers.modeling_attn_mask_utils"
# So that no test is the first to import it.
HAS_LEGACY = importlib.util.find_spec(LEGACY) is not None
if HAS_LEGACY:
    importlib.import_module(LEGACY)

pytestmark = pytest.mark.usefixtures("one_thread", "as_it_was")
needs_masking_utils = pytest.mark.applies(HAS_MASKING_UTILS)


def those_here(names):
    """The names of transformers.masking_utils that the installed release has."""
    return [
        pytest.param(name, marks=pytest.mark.applies(hasattr(upstream, name))) for name in names
    ]


@pytest.fixture
def legacy_module(request, monkeypatch):
    """The release's legacy module; put there where the release no longer has it."""
    if not HAS_LEGACY:
        module = request.getfixturevalue("upstream")
        monkeypatch.setitem(sys.modules, LEGACY, module)
        monkeypatch.setattr(package(), "modeling_attn_mask_utils", module, raising=False)
    return sys.modules[LEGACY]


@pytest.fixture
def as_it_was():
    """A test that leaves something installed fails, and does not affect the next one."""
    before = state()
    yield
    after = state()
    attn_mask.uninstall()
    attn_mask.skip_policy("upstream")
    assert_same_objects(after, before)


def package():
    """transformers makes it anew while it loads the first model."""
    return sys.modules["transformers"]


def state():
    """The objects that install() may replace."""
    found = {"legacy module": sys.modules.get(LEGACY)}
    found["legacy attribute"] = vars(package()).get("modeling_attn_mask_utils")
    if HAS_MASKING_UTILS:
        # Not what Python notes of warnings that are ignored.
        found |= {k: v for k, v in vars(upstream).items() if k != "__warningregistry__"}
        mapping = upstream.AttentionMaskInterface._global_mapping
        found |= {f"mapping {key}": function for key, function in mapping.items()}
    return found


def assert_same_objects(got, want):
    __tracebackhide__ = True
    assert got.keys() == want.keys()
    assert [name for name in want if got[name] is not want[name]] == []


def run_python(code, *arguments):
    """A process of its own, for what can't be undone in this one."""
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, *arguments, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def embeds(batch_size=2, q_length=5, dtype=torch.float32):
    return torch.zeros(batch_size, q_length, 4, dtype=dtype)


def create(name="create_causal_mask", implementation="sdpa", mask=None, cache=None, **kwargs):
    """A create function's result, called as the release's models call it."""
    inputs = kwargs.pop("embeds", None)
    inputs = embeds() if inputs is None else inputs
    settings = {"sliding_window": 3, "attention_chunk_size": 3}
    given = {
        "config": Config(implementation, **settings),
        "input_embeds" if RELEASE < (5, 2) else "inputs_embeds": inputs,
        "attention_mask": mask,
    }
    if "bidirectional" not in name:
        given["past_key_values" if RELEASE < (5, 24) else "cache"] = cache
        if RELEASE < (5, 9):
            seen = 0 if cache is None else cache.seen
            given["cache_position"] = torch.arange(seen, seen + inputs.shape[1])
    return getattr(upstream, name)(**given, **kwargs)


def is_ours(function):
    return function.__module__ == "attn_mask._transformers.writers"


# What is replaced


def test_install_and_uninstall_restore_the_very_objects():
    before = state()
    attn_mask.install()
    during = state()
    changed = {name for name in during if during[name] is not before.get(name)}
    assert "legacy module" in changed
    if HAS_MASKING_UTILS:
        assert {"causal_mask_function", "and_masks", "sdpa_mask", "eager_mask"} <= changed
        assert {"mapping sdpa", "mapping eager"} <= changed
        creates = {name for name in changed if "create" in name} - {"create_block_mask"}
        assert creates == {name for name in upstream_masks.NAMES if hasattr(upstream, name)}
        assert "create_causal_mask" in creates
        for name in creates:  # which call the release's
            assert during[name].__wrapped__ is before[name]
    attn_mask.uninstall()
    assert_same_objects(state(), before)


def test_install_twice_is_install_once():
    before = state()
    attn_mask.install()
    during = state()
    attn_mask.install()
    assert_same_objects(state(), during)
    attn_mask.uninstall()
    assert_same_objects(state(), before)
    attn_mask.uninstall()
    assert_same_objects(state(), before)


def test_installed_is_a_block():
    before = state()
    with attn_mask.installed():
        during = state()
        with attn_mask.installed():
            assert_same_objects(state(), during)
        assert_same_objects(state(), during)
    assert_same_objects(state(), before)
    assert during["legacy module"] is not before["legacy module"]


def test_installed_ends_with_an_error():
    before = state()
    with pytest.raises(KeyError), attn_mask.installed():
        raise KeyError
    assert_same_objects(state(), before)


def test_install_outlasts_a_block():
    before = state()
    with attn_mask.installed():
        attn_mask.install()
    during = state()
    assert during["legacy module"] is not before["legacy module"]
    attn_mask.uninstall()
    assert_same_objects(state(), before)


def test_uninstall_waits_for_a_block():
    before = state()
    attn_mask.install()
    with attn_mask.installed():
        during = state()
        attn_mask.uninstall()
        assert_same_objects(state(), during)
    assert_same_objects(state(), before)


def test_threads():
    before = state()
    begin = threading.Barrier(8)
    errors = []

    def work():
        begin.wait()
        for _ in range(20):
            with attn_mask.installed():
                if sys.modules[LEGACY].__name__.split(".")[0] != "attn_mask":
                    errors.append("not installed in a block")
            attn_mask.install()
            attn_mask.uninstall()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_same_objects(state(), before)


@needs_masking_utils
def test_masks_while_another_thread_installs():
    """Whatever mix of the two a call sees, its mask is the same."""
    want = create("create_sliding_window_causal_mask", mask=torch.ones(2, 5))
    end = threading.Event()

    def work():
        while not end.is_set():
            with attn_mask.installed():
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(200):
            assert_same_mask(
                create("create_sliding_window_causal_mask", mask=torch.ones(2, 5)), want
            )
    finally:
        end.set()
        thread.join()


@needs_masking_utils
def test_what_others_replaced_since_is_left_to_them():
    def theirs():
        pass

    before = upstream.and_masks
    attn_mask.install()
    upstream.and_masks = theirs
    try:
        attn_mask.uninstall()
        assert upstream.and_masks is theirs
    finally:
        upstream.and_masks = before


@needs_masking_utils
def test_modules_imported_before_and_since():
    """Files of transformers' that hold mask functions by name get ours, and back."""
    early, late = (types.ModuleType(f"transformers.models.{name}") for name in ("early", "late"))
    original = upstream.and_masks
    early.and_masks = early.another_name = original
    sys.modules[early.__name__] = early
    try:
        with attn_mask.installed():
            assert early.and_masks is masking_utils.and_masks
            assert early.another_name is original
            late.and_masks = upstream.and_masks
            sys.modules[late.__name__] = late
        assert early.and_masks is late.and_masks is original
    finally:
        for module in (early, late):
            sys.modules.pop(module.__name__, None)


# The user's own registrations


@pytest.fixture
def registration():
    """Registers a function and forgets it."""
    mapping = upstream.AttentionMaskInterface._global_mapping
    before = dict(mapping)

    def register(key, function):
        upstream.AttentionMaskInterface.register(key, function)

    yield register
    mapping.clear()
    mapping.update(before)


@needs_masking_utils
def test_a_registration_before_is_kept_and_named_once(registration, caplog):
    def mine(**kwargs):
        return "mine"

    registration("sdpa", mine)
    with caplog.at_level(logging.WARNING, logger="attn_mask"):
        for _ in range(2):
            with attn_mask.installed():
                assert create() == "mine"
                assert is_ours(upstream.ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    assert upstream.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is mine
    (record,) = caplog.records
    assert "'sdpa' keeps the mask function that is registered for it" in record.getMessage()
    assert "mine" in record.getMessage()


@needs_masking_utils
def test_a_local_registration_before_is_kept_and_named(caplog):
    def mine(**kwargs):
        return "mine"

    functions = upstream.ALL_MASK_ATTENTION_FUNCTIONS
    functions["eager"] = mine
    try:
        with caplog.at_level(logging.WARNING, logger="attn_mask"), attn_mask.installed():
            assert create(implementation="eager") == "mine"
        assert "'eager' keeps" in caplog.records[0].getMessage()
    finally:
        del functions["eager"]


@needs_masking_utils
def test_a_registration_since_wins(registration):
    def mine(**kwargs):
        return "mine"

    attn_mask.install()
    registration("sdpa", mine)
    attn_mask.install()
    assert create() == "mine"
    attn_mask.uninstall()
    assert create() == "mine"


@needs_masking_utils
def test_upstream_functions_under_other_names(registration):
    registration("before", upstream.sdpa_mask)
    stock = upstream.sdpa_mask
    attn_mask.install()
    assert is_ours(upstream.ALL_MASK_ATTENTION_FUNCTIONS["before"])
    registration("since", upstream.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    attn_mask.uninstall()
    assert upstream.ALL_MASK_ATTENTION_FUNCTIONS["before"] is stock
    assert upstream.ALL_MASK_ATTENTION_FUNCTIONS["since"] is stock


# Transformers' own functions, recognised by their source


@pytest.fixture
def warned(caplog, monkeypatch):
    """Texts that were logged, as if nothing had been logged before."""
    monkeypatch.setattr(log_once, "_named", set())
    caplog.set_level(logging.WARNING, logger="attn_mask")

    def texts():
        """But for those about mask functions that are called."""
        found = [r.getMessage() for r in caplog.records if r.name == "attn_mask"]
        return [text for text in found if "calls a mask function" not in text]

    return texts


def masks_of(name, implementation, mask):
    """Of a prefill and, with a cache, of a decode step."""
    found = [create(name, implementation, mask=mask)]
    if "bidirectional" not in name:
        cache, inputs = FakeCache(seen=4), embeds(q_length=1)
        found.append(create(name, implementation, mask=mask, cache=cache, embeds=inputs))
    return found


def assert_masks_of_the_release():
    """Whatever others put into transformers has the same effect with install()."""
    padded = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    for name in (name for name in CREATE if hasattr(upstream, name)):
        for implementation in ("eager", "sdpa"):
            for mask in (None, padded, torch.ones(2, 5)):
                attn_mask.uninstall()
                want = masks_of(name, implementation, mask)
                attn_mask.install()
                for got, expected in zip(masks_of(name, implementation, mask), want, strict=True):
                    assert_same_mask(got, expected)
    attn_mask.uninstall()


@needs_masking_utils
def test_all_of_the_installed_release_is_known(warned):
    found = source.hashes(source.Module(upstream).source)
    assert {"causal_mask_function", "and_masks", "eager_mask", "decisions"} <= found.keys()
    assert [
        name for name, digest in found.items() if f"{name} {digest}" not in source.known()
    ] == []
    with attn_mask.installed():
        for name in source.FACTORIES:
            if hasattr(upstream, name):
                held = getattr(upstream, name)
                assert (
                    isinstance(held, rules.MaskFunction)
                    or held.__module__.split(".")[0] == "attn_mask"
                ), name
        is_fast = upstream_masks.state.release.decisions is skipping.OWN_DECISIONS
        assert is_fast == (RELEASE >= (5, 20))
    assert warned() == []


@needs_masking_utils
def test_a_patched_mask_function_stays(monkeypatch, warned):
    def causal_and_one_more(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx <= q_idx + 1

    stock = create(mask=torch.tensor([[0, 0, 1, 1, 1]] * 2))
    monkeypatch.setattr(upstream, "causal_mask_function", causal_and_one_more)
    assert not torch.equal(create(mask=torch.tensor([[0, 0, 1, 1, 1]] * 2)), stock)
    assert_masks_of_the_release()
    (said,) = warned()
    assert "transformers.masking_utils.causal_mask_function is not transformers' own, but" in said
    assert "causal_and_one_more: it stays, as does what calls it" in said


@needs_masking_utils
def test_a_patch_in_both_places_stays(monkeypatch, registration, warned):
    """eager_mask calls sdpa_mask in transformers, and so it does here."""
    before = upstream.sdpa_mask

    def reversed_mask(*args, **kwargs):
        mask = before(*args, **kwargs)
        return None if mask is None else mask.flip(-1)

    monkeypatch.setattr(upstream, "sdpa_mask", reversed_mask)
    registration("sdpa", reversed_mask)
    assert_masks_of_the_release()
    (said,) = warned()
    assert "'sdpa' keeps the mask function that is registered for it" in said


@needs_masking_utils
def test_a_wrapper_is_not_transformers_own(monkeypatch, registration, warned):
    """functools.wraps makes it look like the function within."""
    before = upstream.sdpa_mask
    calls = []

    @functools.wraps(before)
    def counted(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    monkeypatch.setattr(upstream, "sdpa_mask", counted)
    registration("sdpa", counted)
    with attn_mask.installed():
        create()
        assert upstream.sdpa_mask is counted
    assert len(calls) == 1


@needs_masking_utils
def test_a_wrapper_around_ours_stays_at_a_second_install(monkeypatch, registration):
    monkeypatch.setattr(upstream, "sdpa_mask", upstream.sdpa_mask)  # put back at the end
    attn_mask.install()
    ours = upstream.sdpa_mask

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    upstream.sdpa_mask = wrapper
    registration("sdpa", wrapper)
    for _ in range(2):
        attn_mask.uninstall()
        attn_mask.install()
        assert upstream.sdpa_mask is wrapper
        assert upstream.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is wrapper
    attn_mask.uninstall()


HELPERS = [
    "prepare_padding_mask",
    "_ignore_causal_mask_sdpa",
    "_ignore_bidirectional_mask_sdpa",
    "_can_skip_bidirectional_mask_xpu",
    "fast_all",
    "and_masks",
    "padding_mask_function",
    "_non_vmap_expansion_sdpa",
    "is_tracing",
]


@needs_masking_utils
@pytest.mark.parametrize("name", those_here(HELPERS))
def test_patched_helpers_are_called(monkeypatch, warned, name):
    """A patch of what the release's sdpa_mask calls: it is no longer recognised."""
    before = getattr(upstream, name)
    calls = []

    def patched(*args, **kwargs):
        calls.append(args)
        return before(*args, **kwargs)

    monkeypatch.setattr(upstream, name, patched)
    with attn_mask.installed():
        create(mask=torch.ones(2, 5))
        if hasattr(upstream, "create_bidirectional_mask"):
            create("create_bidirectional_mask", mask=torch.ones(2, 5))
        create(mask=torch.tensor([[0, 0, 1, 1, 1]] * 2))
        decisions = upstream_masks.state.release.decisions
    if name not in ("_can_skip_bidirectional_mask_xpu", "_non_vmap_expansion_sdpa"):
        assert calls
    if name not in ("and_masks", "padding_mask_function", "_non_vmap_expansion_sdpa"):
        assert decisions is not skipping.OWN_DECISIONS
    assert f"transformers.masking_utils.{name} is not transformers' own" in warned()[0]
    monkeypatch.undo()
    with attn_mask.installed():
        decisions = upstream_masks.state.release.decisions
    assert (decisions is skipping.OWN_DECISIONS) == (RELEASE >= (5, 20))


PATCHES = {
    "prepare_padding_mask": lambda mask, *_, **__: None if mask is None else mask.fliplr(),
    "_ignore_causal_mask_sdpa": lambda *args, **kwargs: False,
    "_ignore_bidirectional_mask_sdpa": lambda *args, **kwargs: False,
    "find_packed_sequence_indices": lambda position_ids: position_ids // 2,
}


@needs_masking_utils
@pytest.mark.parametrize("name", those_here(PATCHES))
def test_patched_helpers_have_their_effect(monkeypatch, name):
    monkeypatch.setattr(upstream, name, PATCHES[name])
    assert_masks_of_the_release()
    if RELEASE >= (4, 53, 1):
        positions = torch.arange(5)[None]
        want = create(position_ids=positions)
        with attn_mask.installed():
            assert_same_mask(create(position_ids=positions), want)


@pytest.mark.applies(hasattr(upstream, "create_block_mask"))
def test_a_patched_create_block_mask_stays(monkeypatch, warned):
    def mine(*args, **kwargs):
        return "mine"

    monkeypatch.setattr(upstream, "create_block_mask", mine)
    with attn_mask.installed():
        assert create(implementation="flex_attention") == "mine"
    assert "transformers.masking_utils.create_block_mask is not" in warned()[0]


@needs_masking_utils
def test_unknown_functions_are_called(monkeypatch, warned):
    monkeypatch.setattr(install_module, "known", dict)
    assert_masks_of_the_release()
    with attn_mask.installed():
        assert upstream.causal_mask_function is not rules.causal()
        assert is_ours(upstream.sdpa_mask)
        decisions = upstream_masks.state.release.decisions
        assert decisions is not skipping.OWN_DECISIONS
    (said,) = warned()
    assert "and_masks, " in said and "_ignore_causal_mask_sdpa, " in said
    assert f"of transformers {transformers.__version__} are not those of a release that is" in said


@needs_masking_utils
def test_without_source(monkeypatch, warned):
    loader = upstream.__spec__.loader
    monkeypatch.setattr(loader, "get_source", lambda name: None, raising=False)
    assert_masks_of_the_release()
    with attn_mask.installed():
        assert is_ours(upstream.sdpa_mask)
        decisions = upstream_masks.state.release.decisions
        assert decisions is not skipping.OWN_DECISIONS
    (said,) = warned()
    assert "the source of transformers.masking_utils can't be read" in said


@needs_masking_utils
def test_a_patch_without_source_stays(monkeypatch, registration):
    loader = upstream.__spec__.loader
    monkeypatch.setattr(loader, "get_source", lambda name: None, raising=False)
    before = upstream.sdpa_mask
    wrapper = functools.wraps(before)(lambda *args, **kwargs: before(*args, **kwargs))
    registration("sdpa", wrapper)
    with attn_mask.installed():
        assert upstream.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is wrapper
    monkeypatch.setattr(upstream, "prepare_padding_mask", lambda mask, *args, **kwargs: None)
    assert_masks_of_the_release()


def test_a_patched_legacy_module_stays(legacy_module, monkeypatch, warned):
    module = legacy_module

    def mine(*args):
        return "mine"

    before = module._prepare_4d_attention_mask
    monkeypatch.setattr(module, "_prepare_4d_attention_mask", mine)
    with attn_mask.installed():
        assert sys.modules[LEGACY] is module
        assert module._prepare_4d_attention_mask is mine
    assert f"{LEGACY} stays as it is, for it holds" in warned()[0]
    monkeypatch.setattr(module, "_prepare_4d_attention_mask", before)
    monkeypatch.setattr(module.AttentionMaskConverter, "to_4d", mine)
    with attn_mask.installed():
        assert sys.modules[LEGACY] is module


def hash_of(code):
    return source.Source(textwrap.dedent(code)).hash(["f"])


CODE = """
    def helper(x):
        return x + 1

    def unused(x):
        return x

    LIMIT = 3

    def f(x, y=2):
        def inner(z):
            return helper(z) > LIMIT
        return inner(x)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def f(x, y=2):", "def f(x: int, y: int = 2) -> bool:"),
        ("def f(x, y=2):", 'def f(x, y=2):\n        """What it does."""'),
        ("return helper(z) > LIMIT", "return (helper(z)\n            > LIMIT)  # a comment"),
        ("        return x\n", "        return x * 2\n"),  # of what it does not call
    ],
)
def test_hashes_that_stay(old, new):
    assert old in CODE
    assert hash_of(CODE.replace(old, new)) == hash_of(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return x + 1", "return x + 2"),
        ("LIMIT = 3", "LIMIT = 4"),
        ("y=2", "y=3"),
        ("helper(z) > LIMIT", "helper(z) >= LIMIT"),
        ("return inner(x)", "return not inner(x)"),
        ("    def f(", "    @helper\n    def f("),
    ],
)
def test_hashes_that_change(old, new):
    assert old in CODE
    assert hash_of(CODE.replace(old, new)) != hash_of(CODE)


def test_hashes_do_not_depend_on_empty_fields(monkeypatch):
    """Each version of Python has some of its own."""
    want = hash_of(CODE)
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "of_later"))
    monkeypatch.setattr(ast.FunctionDef, "of_later", [], raising=False)
    monkeypatch.setattr(ast.arg, "_fields", ast.arg._fields[:1])
    assert hash_of(CODE) == want


@pytest.fixture
def decorated_module(tmp_path, monkeypatch):
    """A module whose function is decorated, by a function of another one."""
    (tmp_path / "decorators.py").write_text(
        textwrap.dedent(
            """
            import functools

            def decorate(name):
                def wrapper(function):
                    @functools.wraps(function)
                    def wrapped(*args):
                        return function(*args)
                    return wrapped
                return wrapper
            """
        )
    )
    (tmp_path / "decorated.py").write_text(
        textwrap.dedent(
            """
            from decorators import decorate

            @decorate("old")
            def f(x):
                return x

            def g(x):
                return x + 1
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("decorated")
    del sys.modules["decorated"], sys.modules["decorators"]


def test_decorators_of_the_source_are_known(decorated_module):
    module = source.Module(decorated_module)
    function = decorated_module.f
    assert module.own(function) == "f"
    assert module.own(function.__wrapped__) == "f"
    assert module.own(functools.wraps(function)(lambda x: function(x))) is None
    # Another decorator in its place.
    by = lambda f: functools.wraps(f)(lambda x: f(x))  # noqa: E731
    assert module.own(by(function.__wrapped__)) is None


def test_another_function_at_the_same_place_is_no_own_one(decorated_module):
    """As when a file is changed and executed anew, in whole or in part."""
    module = source.Module(decorated_module)
    path = decorated_module.__file__
    (line,) = [node.lineno for node in module.source.functions("g")]
    for body, expected in (("return x + 1", "g"), ("return x + 2", None), ("return 1 + x", None)):
        code = "\n" * (line - 1) + f"def g(x):\n    {body}\n"
        exec(compile(code, path, "exec"), vars(decorated_module))
        assert module.own(decorated_module.g) == expected


@pytest.mark.applies(hasattr(upstream, "_preprocess_mask_arguments"))
def test_a_patch_of_what_prepares_arguments_is_named(monkeypatch, warned):
    before = upstream._preprocess_mask_arguments

    @functools.wraps(before)
    def patched(*args, **kwargs):
        return before(*args, **kwargs)

    monkeypatch.setattr(upstream, "_preprocess_mask_arguments", patched)
    assert_masks_of_the_release()
    (said,) = warned()
    # By the wrapper's own name.
    assert "_preprocess_mask_arguments is not transformers' own, but" in said
    assert "<locals>.patched: it stays" in said


# Whole, or not at all


class Interrupted(BaseException):
    pass


def interrupted_at(line, call):
    """Calls, and raises where the call comes to the nth line of its own; whether it did."""
    files = {module.__file__ for module in (install_module, process, source, upstream_masks)}
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def lines_to_interrupt(call):
    """Each of the first lines, then some of the many."""
    line = 1
    while interrupted_at(line, call):
        yield line
        line += 1 + line // 20


def test_an_interrupted_install_changes_nothing():
    attn_mask.install()  # what is cached is
    during = state()
    attn_mask.uninstall()
    before = state()
    count = 0
    for _ in lines_to_interrupt(attn_mask.install):
        count += 1
        if attn_mask.is_installed():  # it was done by then
            assert_same_objects(state(), during)
            attn_mask.uninstall()
        assert_same_objects(state(), before)
    assert count > 50
    assert attn_mask.is_installed()
    attn_mask.uninstall()
    assert_same_objects(state(), before)


def test_an_interrupted_uninstall_is_done_or_not():
    before = state()
    attn_mask.install()
    during = state()
    count = 0
    for line in range(1, 2000, 7):
        attn_mask.install()
        if not interrupted_at(line, attn_mask.uninstall):
            break
        count += 1
        assert_same_objects(state(), during if attn_mask.is_installed() else before)
    assert count > 5
    attn_mask.uninstall()
    assert_same_objects(state(), before)


def test_an_interrupted_block_leaves_none():
    before = state()

    for line in range(1, 400, 3):
        interrupted_at(line, attn_mask.installed().__enter__)
        attn_mask.install()
        attn_mask.uninstall()
        if attn_mask.is_installed():
            break
        assert_same_objects(state(), before)
    install_module._state.blocks = ()
    attn_mask.uninstall()


class Unreadable(types.ModuleType):
    @property
    def __dict__(self):
        raise RuntimeError("not to be read")


class Pretender:
    @property
    def __class__(self):
        raise RuntimeError("not to be read")


def test_modules_that_can_not_be_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.unreadable", Unreadable("unreadable"))
    monkeypatch.setitem(sys.modules, "transformers.pretender", Pretender())
    empty = types.ModuleType.__new__(types.ModuleType)
    monkeypatch.setitem(sys.modules, "transformers.empty", empty)
    monkeypatch.setitem(sys.modules, "transformers.none", None)
    monkeypatch.setitem(sys.modules, 5, types.ModuleType("five"))
    before = state()
    with attn_mask.installed():
        assert attn_mask.is_installed()
    assert_same_objects(state(), before)


@needs_masking_utils
@pytest.mark.parametrize(
    "name",
    [
        "sdpa_mask",
        "eager_mask",
        "prepare_padding_mask",
        "_ignore_causal_mask_sdpa",
        "AttentionMaskInterface",
        "ALL_MASK_ATTENTION_FUNCTIONS",
    ],
)
def test_names_that_transformers_lacks(monkeypatch, name):
    before = state()
    monkeypatch.delattr(upstream, name)
    with pytest.raises(NotImplementedError, match=f"install: expected .* to have {name}"):
        attn_mask.install()
    monkeypatch.undo()
    assert_same_objects(state(), before)
    assert not attn_mask.is_installed()


def test_a_release_without_the_module():
    said = run_python(
        fake_transformers("5.99.0")
        + """
        try:
            attn_mask.install()
        except NotImplementedError as error:
            print(error)
        print(attn_mask.is_installed())
        """
    )
    first, second = said.splitlines()
    assert "install: expected transformers 5.99.0 to have masking_utils" in first
    assert second == "False"


@needs_masking_utils
@pytest.mark.parametrize(
    "name", those_here(["_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"])
)
def test_a_release_that_decides_otherwise(monkeypatch, name):
    """Its own function takes other arguments."""
    before = state()
    text = Path(upstream.__file__).read_text()
    changed = text.replace(
        f"def {name}(", f"def {name}(padding_mask, other, another): ...\ndef _unused("
    )
    loader = upstream.__spec__.loader
    monkeypatch.setattr(loader, "get_source", lambda name: changed, raising=False)
    with pytest.raises(
        NotImplementedError, match=f"install: expected transformers' {name} to take"
    ):
        attn_mask.install()
    monkeypatch.undo()
    assert_same_objects(state(), before)


RELOADS = {
    "reload": "importlib.reload(sys.modules['attn_mask._transformers.install'])",
    "reload of all": """
for name in [name for name in sys.modules if name.split(".")[0] == "attn_mask"]:
    if name != "attn_mask._C" and not name.startswith("attn_mask._transformers.releases."):
        importlib.reload(sys.modules[name])
""",
    "purge": """
for name in [name for name in sys.modules if name.split(".")[0] == "attn_mask"]:
    del sys.modules[name]
""",
}


@pytest.mark.applies(RELEASE >= (5, 4))  # sdpa_mask takes other arguments before
@pytest.mark.parametrize("again", RELOADS)
def test_state_outlasts_modules(again):
    said = run_python(
        f"""
        import gc, importlib, sys
        import attn_mask, torch
        from transformers import masking_utils
        names = ("sdpa_mask", "and_masks", "causal_mask_function", "create_causal_mask")
        before = [getattr(masking_utils, name) for name in names]
        attn_mask.install(masked_value=-2.0, aten_only=True)
        block = attn_mask.installed(masked_value=-3.0, aten_only=True)
        block.__enter__()
        exec({RELOADS[again]!r})
        gc.collect()
        import attn_mask
        print(attn_mask.is_installed())
        attn_mask.install()
        from attn_mask._core.operators import is_aten_only
        print(attn_mask._transformers.writers.state.options, is_aten_only())
        print(masking_utils.sdpa_mask is sys.modules["attn_mask._transformers.writers"].sdpa_mask)
        with attn_mask.skip_policy("never"):
            print(masking_utils.sdpa_mask(1, 3, 3) is None)
        print(masking_utils.sdpa_mask(1, 2, 3, allow_is_causal_skip=False).shape)
        print(attn_mask.masking_utils.sdpa_mask(1, 2, 3, allow_is_causal_skip=False).shape)
        mapped = torch.vmap(torch.ops.attn_mask.to_4d.default, (0, None))
        print(mapped(torch.ones(2, 1, 3), 3, key_value_length=3, dtype=torch.float32).shape)
        attn_mask.uninstall()
        print(attn_mask.is_installed())
        block.__exit__(None, None, None)
        print(attn_mask.is_installed())
        print(all(getattr(masking_utils, n) is b for n, b in zip(names, before)))
        print(masking_utils.AttentionMaskInterface._global_mapping["sdpa"] is before[0])
        """
    )
    shape = "torch.Size([1, 1, 2, 3])"
    assert said.splitlines() == [
        "True",
        "Options(masked_value=-3.0, unmask_unattended=False, aten_only=True, "
        "packing='upstream') True",
        *("True", "False", shape, shape, "torch.Size([2, 1, 1, 3, 3])"),
        *("True", "False", "True", "True"),
    ]


@needs_masking_utils
def test_installed_functions_can_be_pickled():
    with attn_mask.installed():
        changed = {name: getattr(upstream, name) for name in dir(upstream) if name in state()}
        mapping = dict(upstream.AttentionMaskInterface._global_mapping)
        changed |= {f"mapping {key}": value for key, value in mapping.items()}
        changed = {
            name: held
            for name, held in changed.items()
            if "attn_mask" in (getattr(held, "__module__", None) or type(held).__module__)
        }
        assert len(changed) > 10
        for name, held in changed.items():
            again = pickle.loads(pickle.dumps(held))
            if isinstance(held, rules.MaskFunction):
                assert again == held, name
            else:
                assert again is held, name


@needs_masking_utils
def test_functions_of_others_are_not_kept_alive(warned, monkeypatch, registration):
    def mine(**kwargs):
        return "mine"

    registration("sdpa", mine)
    with attn_mask.installed():
        pass
    assert len(warned()) == 1
    is_gone = weakref.ref(mine)
    del upstream.AttentionMaskInterface._global_mapping["sdpa"]
    del mine
    gc.collect()
    assert is_gone() is None


# is_installed, and decorators


def test_is_installed():
    assert attn_mask.is_installed() is False
    with attn_mask.installed():
        assert attn_mask.is_installed() is True
    attn_mask.install()
    assert attn_mask.is_installed() is True
    attn_mask.uninstall()
    assert attn_mask.is_installed() is False


def test_the_truth_of_a_block():
    with pytest.raises(
        TypeError, match=r"installed: expected `with attn_mask.installed\(\):`, but"
    ):
        if attn_mask.installed():
            pass
    with pytest.raises(TypeError, match=r": attn_mask.is_installed\(\) returns whether"):
        bool(attn_mask.installed())


def test_a_block_around_each_call():
    seen = []

    @attn_mask.installed()
    def work(depth, /, *, more=0):
        """What it does."""
        seen.append((depth, more, attn_mask.is_installed()))
        if depth:
            work(depth - 1, more=more)
        return depth

    assert work.__doc__ == "What it does."
    assert not attn_mask.is_installed()
    assert work(2, more=5) == 2
    assert seen == [(2, 5, True), (1, 5, True), (0, 5, True)]
    assert not attn_mask.is_installed()
    with pytest.raises(TypeError):
        work()
    assert not attn_mask.is_installed()


def test_a_block_around_what_is_awaited():
    @attn_mask.installed()
    async def work():
        await asyncio.sleep(0)
        return attn_mask.is_installed()

    async def main():
        coroutine = work()
        assert not attn_mask.is_installed()
        return await coroutine

    assert asyncio.run(main()) is True
    assert not attn_mask.is_installed()


def generator():
    yield


async def async_generator():
    yield


@pytest.mark.parametrize("function", [5, dict, generator, async_generator])
def test_what_can_not_be_decorated(function):
    text = "installed: expected to decorate a function that is no generator, but got"
    with pytest.raises(TypeError, match=text):
        attn_mask.installed()(function)


def test_a_block_can_be_entered_again():
    block = attn_mask.installed()
    with block:
        with block:
            pass
        assert attn_mask.is_installed()
    assert not attn_mask.is_installed()
    with block:
        assert attn_mask.is_installed()
    assert not attn_mask.is_installed()


# Options

PADDED = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])


def options():
    return upstream_masks.state.options


def eager(**given):
    return create(implementation="eager", mask=PADDED, **given)


@needs_masking_utils
@pytest.mark.parametrize("value", [-1e4, -100, -torch.inf, torch.finfo(torch.float32).min / 2])
def test_masked_value(value):
    stock = eager()
    with attn_mask.installed(masked_value=value):
        assert_same_mask(eager(), torch.where(stock == 0, 0.0, float(value)))
        assert create(mask=PADDED).dtype == torch.bool
        assert create(mask=torch.ones(2, 5)) is None
    assert_same_mask(eager(), stock)


@needs_masking_utils
def test_masked_value_that_a_dtype_can_not_hold():
    with attn_mask.installed(masked_value=-1e30):
        assert eager().min() == torch.tensor(-1e30)
        with pytest.raises(
            ValueError, match="expected masked_value to be a number that Half holds"
        ):
            eager(embeds=embeds(dtype=torch.float16))


@needs_masking_utils
def test_unmask_unattended():
    additive, boolean = eager(), create(mask=PADDED)
    assert (additive[0, 0, :2] < 0).all() and not boolean[0, 0, :2].any()
    additive[0, 0, :2] = 0.0
    boolean[0, 0, :2] = True
    with attn_mask.installed(unmask_unattended=True):
        assert_same_mask(eager(), additive)
        assert_same_mask(create(mask=PADDED), boolean)


@needs_masking_utils
def test_aten_only():
    class Ours(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith(("attn_mask.boolean", "attn_mask.additive")):
                names.append(str(function))
            return function(*args, **(kwargs or {}))

    want = [eager(), create(mask=PADDED)]
    for aten_only in (False, True, False):
        names = []
        with attn_mask.installed(aten_only=aten_only), Ours():
            got = [eager(), create(mask=PADDED)]
        for mask, expected in zip(got, want, strict=True):
            assert_same_mask(mask, expected)
        assert bool(names) != aten_only


def test_a_second_install_changes_the_options():
    attn_mask.install(masked_value=-5)
    assert options() == (-5.0, False, False, "upstream")
    attn_mask.install(unmask_unattended=True)
    assert options() == (None, True, False, "upstream")
    attn_mask.uninstall()
    assert options() == (None, False, False, "upstream")


def test_nested_blocks_restore_the_options():
    attn_mask.install(masked_value=-1)
    with attn_mask.installed(masked_value=-2):
        assert options().masked_value == -2
        with attn_mask.installed(unmask_unattended=True):
            assert options() == (None, True, False, "upstream")
            attn_mask.install(masked_value=-3)
            assert options() == (None, True, False, "upstream")
        assert options().masked_value == -2
    assert options().masked_value == -3
    attn_mask.uninstall()


def test_options_of_blocks_that_overlap():
    first, second = (attn_mask.installed(masked_value=value) for value in (-1, -2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert options().masked_value == -2
    second.__exit__(None, None, None)
    assert options().masked_value is None
    assert not attn_mask.is_installed()


def test_options_of_a_decorator():
    @attn_mask.installed(masked_value=-7)
    def work():
        return options().masked_value

    assert work() == -7
    assert options().masked_value is None


@needs_masking_utils
def test_an_install_that_fails_leaves_the_options(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(upstream, "eager_mask")
        with pytest.raises(NotImplementedError):
            attn_mask.install(masked_value=-4, aten_only=True)
    assert options() == (None, False, False, "upstream")
    assert not operators.is_aten_only()


@needs_masking_utils
def test_options_in_compiled_code():
    def step(inputs, mask):
        return create(implementation="eager", embeds=inputs, mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for value in (None, -3.0, -4.0, None):
        with attn_mask.installed(masked_value=value):
            assert_same_mask(compiled(embeds(), PADDED), step(embeds(), PADDED))
    torch._dynamo.reset()


@pytest.mark.parametrize("function", ["install", "installed"])
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"masked_value": 1}, ValueError, "masked_value to be at most 0, but got 1$"),
        ({"masked_value": torch.nan}, ValueError, "masked_value to be at most 0, but got nan"),
        ({"masked_value": torch.inf}, ValueError, "masked_value to be at most 0, but got inf"),
        ({"masked_value": "-inf"}, TypeError, "masked_value to be a number or None, but got str"),
        ({"masked_value": True}, TypeError, "masked_value to be a number or None, but got bool"),
        ({"unmask_unattended": 1}, TypeError, "unmask_unattended to be a bool, but got int"),
        ({"aten_only": None}, TypeError, "aten_only to be a bool, but got NoneType"),
    ],
)
def test_bad_options(function, given, error, text):
    with pytest.raises(error, match=f"^{function}: expected {text}"):
        getattr(attn_mask, function)(**given)
    assert not attn_mask.is_installed()


@pytest.mark.parametrize("function", ["install", "installed"])
def test_options_are_given_by_name(function):
    with pytest.raises(TypeError, match="positional"):
        getattr(attn_mask, function)(-1.0)


# Environments


def test_without_transformers():
    said = run_python(
        """
        import sys
        sys.modules["transformers"] = None
        import attn_mask
        for _ in range(2):
            try:
                attn_mask.install()
            except ImportError as error:
                print(error)
        attn_mask.uninstall()
        """
    )
    expected = "expected transformers (4.35.0 or later) to be installed, but there is none"
    assert said.splitlines() == [f"attn_mask.install: {expected}"] * 2


def test_importing_attn_mask_leaves_transformers_alone():
    assert run_python("import sys, attn_mask; print('transformers' in sys.modules)") == "False"


def fake_transformers(version, **masking):
    """Code that puts a transformers of some version into a process."""
    return f"""
        import sys, types
        package = types.ModuleType("transformers")
        package.__version__, package.__path__ = {version!r}, []
        sys.modules["transformers"] = package
        import attn_mask
    """


def test_a_release_before_masking_utils():
    """Only the legacy module is replaced there; here, the package has nothing else."""
    said = run_python(
        fake_transformers("4.38.2")
        + """
        with attn_mask.installed():
            from transformers.modeling_attn_mask_utils import AttentionMaskConverter
            print(AttentionMaskConverter.__module__)
        print("transformers.modeling_attn_mask_utils" in sys.modules)
        print(hasattr(package, "modeling_attn_mask_utils"))
        """
    )
    assert said.splitlines() == [
        "attn_mask._transformers.releases.transformers_4_37_0",
        "False",
        "False",
    ]


def test_a_release_before_both():
    said = run_python(
        fake_transformers("4.34.1")
        + """
        try:
            attn_mask.install()
        except ImportError as error:
            print(error)
        """
    )
    assert said == (
        "attn_mask.install: expected transformers 4.35.0 or later, but 4.34.1 is installed"
    )


@needs_masking_utils
def test_before_models_are_imported():
    """Those of tests/upstream/test_models.py are imported before."""
    said = run_python(
        """
        import attn_mask, torch
        attn_mask.install()
        from torch.utils._python_dispatch import TorchDispatchMode
        from transformers.models.llama import LlamaConfig, LlamaForCausalLM

        class Show(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if str(function).startswith("attn_mask.additive"):
                    print(function)
                return function(*args, **(kwargs or {}))

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8}
        config = LlamaConfig(**sizes, **heads)
        model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
        with Show():
            model(torch.ones(1, 3, dtype=torch.long))
        """
    )
    assert said == "attn_mask.additive.default"


# The legacy module


def old_model(namespace):
    """Model code as it was written before 5.0, in a module of its own."""
    code = '''
    import torch
    from torch import nn
    from transformers.modeling_attn_mask_utils import (
        AttentionMaskConverter,
        _prepare_4d_causal_attention_mask,
        _prepare_4d_causal_attention_mask_for_sdpa,
    )

    class OldModel(nn.Module):
        """One layer of attention over embeddings."""

        def __init__(self, implementation, sliding_window=None):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(16, 8)
            self.project = nn.Linear(8, 24)
            self.implementation = implementation
            self.sliding_window = sliding_window

        def forward(self, input_ids, attention_mask=None):
            embeds = self.embed(input_ids)
            prepare = (
                _prepare_4d_causal_attention_mask_for_sdpa
                if self.implementation == "sdpa"
                else _prepare_4d_causal_attention_mask
            )
            mask = prepare(attention_mask, input_ids.shape, embeds, 0, self.sliding_window)
            if mask is not None and self.implementation == "sdpa":
                smallest = torch.finfo(embeds.dtype).min
                mask = AttentionMaskConverter._unmask_unattended(mask, smallest)
            query, key, value = self.project(embeds)[:, None].chunk(3, -1)
            attend = nn.functional.scaled_dot_product_attention
            return mask, attend(query, key, value, mask, is_causal=mask is None)
    '''
    module = types.ModuleType(namespace)
    exec(textwrap.dedent(code), module.__dict__)
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sliding_window", [None, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_old_model_code(legacy_module, implementation, sliding_window):
    """Imported before, the third-party file gets ours, too; imported since, it keeps them."""
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.arange(10).view(2, 5)
    early = old_model("early")
    sys.modules["early"] = early
    stock = early.AttentionMaskConverter

    def run(module):
        model = module.OldModel(implementation, sliding_window)
        return [model(ids, mask) for mask in (None, attention_mask, torch.ones_like(ids))]

    try:
        want = run(early)
        with attn_mask.installed():
            late = old_model("late")
            ours = attn_mask.for_transformers(transformers.__version__).modeling_attn_mask_utils
            for module in (early, late):
                assert module.AttentionMaskConverter is ours.AttentionMaskConverter
            got = [run(early), run(late)]
        assert early.AttentionMaskConverter is stock
        got.append(run(late))
    finally:
        del sys.modules["early"]
    for side in got:
        for (mask, result), (expected, expected_result) in zip(side, want, strict=True):
            assert_same_mask(mask, expected)
            assert torch.equal(result, expected_result)


def test_legacy_module_that_the_release_no_longer_has(monkeypatch):
    """The import finds ours, and nothing once it is uninstalled."""
    monkeypatch.delitem(sys.modules, LEGACY, raising=False)
    monkeypatch.delitem(vars(package()), "modeling_attn_mask_utils", raising=False)
    monkeypatch.setattr(package(), "__path__", [])
    with attn_mask.installed():
        module = importlib.import_module(LEGACY)
        assert module.__name__.startswith("attn_mask.")
        assert package().modeling_attn_mask_utils is module
    with pytest.raises(ImportError):
        importlib.import_module(LEGACY)


def test_package_that_is_made_anew(monkeypatch):
    """It does not keep what it looks up while ours are installed."""
    again = types.ModuleType("transformers")
    vars(again).update(vars(package()))
    vars(again).pop("modeling_attn_mask_utils", None)
    before = sys.modules.get(LEGACY)
    with attn_mask.installed():
        monkeypatch.setitem(sys.modules, "transformers", again)
        again.modeling_attn_mask_utils = sys.modules[LEGACY]
    assert vars(again).get("modeling_attn_mask_utils") is before
    monkeypatch.undo()


# What the interfaces do


CREATE = [
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_bidirectional_mask",
    "create_bidirectional_sliding_window_mask",
]


@needs_masking_utils
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", those_here(CREATE))
def test_masks_are_those_of_the_release(name, implementation):
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    odd = lambda b, h, q, k: (k % 2 == 0) & (q >= 0)  # noqa: E731
    calls = [
        {},
        {"embeds": embeds(dtype=torch.bfloat16)},
        {"mask": left[:, :5]},
        {"mask": torch.ones(2, 5)},
        {"mask": left[:, :5], "and_mask_function": odd},
        {"or_mask_function": odd},
        {"mask": torch.zeros(2, 1, 5, 5)},
    ]
    if "bidirectional" not in name:
        for mask in (None, left, torch.ones(2, 7)):
            for q_length in (1, 2):
                seen = 7 - q_length
                for cache in ({"seen": seen}, {"seen": seen, "compileable": True}):
                    inputs = {"mask": mask, "embeds": embeds(q_length=q_length)}
                    calls.append({**inputs, "cache": FakeCache(**cache)})
        if RELEASE >= (4, 53, 1):
            packed = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
            calls += [{"position_ids": packed}, {"position_ids": packed[1:]}]
    for call in calls:
        want = create(name, implementation, **call)
        with attn_mask.installed():
            got = create(name, implementation, **call)
        assert_same_mask(got, want)


@pytest.mark.applies((4, 53) <= RELEASE < (5, 4))
def test_positions_that_do_not_follow_each_other():
    given = {"batch_size": 1, "cache_position": torch.tensor([4, 1, 6]), "kv_length": 7}
    for name in ("sdpa_mask", "eager_mask"):
        want = getattr(upstream, name)(**given)
        with attn_mask.installed():
            assert_same_mask(getattr(upstream, name)(**given), want)


@needs_masking_utils
def test_mask_functions_are_rules():
    with attn_mask.installed():
        rule = upstream.sliding_window_causal_mask_function(3)
        assert isinstance(rule, rules.MaskFunction)
        assert upstream.causal_mask_function == rules.causal()
        assert rule.encode() == (rules.sliding_window(3) & rules.causal()).encode()


@pytest.mark.applies(hasattr(upstream, "flex_attention_mask"))
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
def test_block_masks_are_made_without_compiling(monkeypatch):
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[0, :30] = False
    given = {"implementation": "flex_attention", "embeds": embeds(2, 200)}
    calls = [given, {**given, "mask": padding}]
    with torch.compiler.set_stance("force_eager"):
        want = [create(**call) for call in calls]

    def compile(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", compile)
    with attn_mask.installed():
        got = [create(**call) for call in calls]
    for ours, theirs in zip(got, want, strict=True):
        assert isinstance(ours.mask_mod, rules.MaskFunction)
        for name in ("kv_num_blocks", "kv_indices", "full_kv_indices", "full_q_indices"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


# skip_policy


@needs_masking_utils
def test_policies_in_eager_code():
    ones = torch.ones(2, 5)
    full = upstream.create_causal_mask
    assert full is not None
    plane = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    with attn_mask.installed():
        assert create(mask=ones) is None
        assert create() is None
        with attn_mask.skip_policy("never"):
            assert_same_mask(create(mask=ones), plane)
            assert_same_mask(create(), plane)
        with attn_mask.skip_policy("shapes"):
            assert_same_mask(create(mask=ones), plane)
            assert create() is None
        with attn_mask.skip_policy("shapes", padding="none"):
            assert create(mask=ones) is None
            assert create() is None
            window = create("create_sliding_window_causal_mask", mask=ones)
            assert window.shape == (2, 1, 5, 5)
        assert create(mask=ones) is None


@needs_masking_utils
def test_shapes_agree_with_upstream_where_nothing_is_padded():
    for q_length, seen in ((5, 0), (1, 4), (1, 0), (2, 3)):
        for name in CREATE[:3]:
            mask = torch.ones(2, q_length + seen)
            inputs = {"mask": mask, "embeds": embeds(q_length=q_length)}
            want = create(name, cache=FakeCache(seen=seen), **inputs)
            with attn_mask.installed(), attn_mask.skip_policy("shapes", padding="none"):
                got = create(name, cache=FakeCache(seen=seen), **inputs)
            assert_same_mask(got, want)


@needs_masking_utils
@pytest.mark.parametrize("policy", [("never",), ("shapes",), ("shapes", "none")])
def test_policies_compiled_choose_as_in_eager_code(policy):
    def step(inputs, mask):
        masks = [create(mask=given, embeds=inputs) for given in (None, mask)]
        return [inputs.new_zeros(()) if given is None else given for given in masks]

    inputs, mask = embeds(), torch.ones(2, 5)
    with attn_mask.installed(), attn_mask.skip_policy(*policy):
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="eager", fullgraph=True)
        for got, want in zip(compiled(inputs, mask), step(inputs, mask), strict=True):
            assert_same_mask(got, want)
    torch._dynamo.reset()


@pytest.mark.applies(RELEASE >= (5, 9))  # before, positions are given beside the embeddings
def test_shapes_look_at_no_values():
    """On the meta device there are none."""
    positions = torch.arange(5, device="meta").expand(2, -1)
    inputs, mask = embeds().to("meta"), torch.ones(2, 5, device="meta")

    def calls():
        yield create(mask=mask, embeds=inputs)
        yield create(position_ids=positions, embeds=inputs)

    with attn_mask.installed():
        with attn_mask.skip_policy("shapes"):
            assert all(result.is_meta for result in calls())
        with attn_mask.skip_policy("shapes", padding="none", packing="none"):
            assert all(result is None for result in calls())


def test_policy_holds_for_masking_utils():
    call = lambda: masking_utils.sdpa_mask(1, 3, 3, attention_mask=torch.ones(1, 3).bool())  # noqa: E731
    assert call() is None
    with attn_mask.skip_policy("shapes"):
        assert call() is not None
    with attn_mask.skip_policy("shapes", padding="none"):
        assert call() is None
        short = torch.ones(1, 2, dtype=torch.bool)
        assert masking_utils.sdpa_mask(1, 3, 3, attention_mask=short) is not None
    with attn_mask.skip_policy("never"):
        given = {"batch_size": 1, "q_length": 3, "kv_length": 3}
        assert masking_utils.sdpa_mask(**given) is not None
        open_to_all = {**given, "mask_function": rules.bidirectional()}
        assert masking_utils.eager_mask(**open_to_all, allow_is_bidirectional_skip=True).eq(0).all()


def test_policy_without_a_block():
    attn_mask.skip_policy("never")
    try:
        assert masking_utils.sdpa_mask(1, 3, 3) is not None
        with attn_mask.skip_policy("shapes"), attn_mask.skip_policy("upstream"):
            assert masking_utils.sdpa_mask(1, 3, 3) is None
        assert masking_utils.sdpa_mask(1, 3, 3) is not None
    finally:
        attn_mask.skip_policy("upstream")
    assert masking_utils.sdpa_mask(1, 3, 3) is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("sometimes",), "expected policy to be one of 'upstream', 'shapes', 'never', but got"),
        (("shapes", "left"), "expected padding to be 'none' or None, but got 'left'"),
        (("never", "none"), "expected no padding beside 'never', which ignores declarations"),
    ],
)
def test_policy_errors(arguments, text):
    with pytest.raises(ValueError, match=f"skip_policy: {text}"):
        attn_mask.skip_policy(*arguments)


@needs_masking_utils
def test_numbers_in_a_padding_mask_are_named_once(monkeypatch, caplog):
    """Document numbers, for example: the release makes booleans of them."""
    monkeypatch.setattr(log_once, "_named", set())
    numbers = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 2]])
    want = create(mask=numbers.bool())
    with attn_mask.installed(), caplog.at_level(logging.WARNING, "attn_mask"):
        assert_same_mask(create(mask=numbers.bool()), want)
        assert caplog.records == []
        for _ in range(2):
            assert_same_mask(create(mask=numbers), want)
    assert ["document_ids" in record.getMessage() for record in caplog.records] == [True]
