"""attn_mask.for_transformers(...) gives what the file of that release gives.

Every distinct file that was released (releases.json, found by scripts/find_releases.py) is taken
from its wheel, cached, and run beside ours.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import attn_mask
import oracle_loader
import pytest
import torch
from attn_mask import for_transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    COMPLEX_DTYPES,
    MASK_DTYPES,
    OUT_DTYPES,
    assert_same_mask,
    lowest,
    visibility,
)
from packaging.version import InvalidVersion, Version
from parity import (
    FLOAT,
    FUNCTIONS,
    METHODS,
    STATIC_METHODS,
    Parity,
    default_dtype,
    embeds,
    needed_default,
    outcome,
    padding_masks,
    parameters,
)
from torch._subclasses import FakeTensor, FakeTensorMode

EAGER, SDPA, PADDING, PADDING_SDPA, CREATE = FUNCTIONS

FILES = json.loads((Path(__file__).parents[1] / "support" / "releases.json").read_text())
EVERY_RELEASE = [version for file in FILES for version in file["versions"]]


def first_release(versions):
    """A pre-release only where there is nothing else."""
    return min(versions, key=lambda version: (Version(version).is_prerelease, Version(version)))


DISTINCT = {first_release(file["versions"]): file["sha256"] for file in FILES if file["sha256"]}

# Where behaviour changed, by the documents about transformers' history.
CHANGES = ("4.35", "4.36", "4.37", "4.39", "4.40", "4.41", "4.42", "4.45", "4.46", "5.0")


UNMASKS_BY_INDEX = ("4.36.0", "4.37.0")


def at_least(version, other):
    return Version(Version(version).base_version) >= Version(other)


def expected_version(version):
    """What a version should map to."""
    return str(Version([c for c in CHANGES if at_least(version, c)][-1] + ".0"))


# One file for each behaviour.
FIRST_OF_EACH = list(
    {expected_version(version): version for version in reversed(DISTINCT)}.values()
)


# Versions


def test_every_distinct_file_is_mapped_to_one_behaviour():
    assert len(DISTINCT) >= 17
    for file in FILES:
        found = {id(for_transformers(version)) for version in file["versions"]}
        assert len(found) == 1, file["versions"]


@pytest.mark.parametrize("version", EVERY_RELEASE)
def test_releases(version):
    assert for_transformers(version).version == expected_version(version)


def test_both_sides_of_each_change():
    for before, after in (
        ("4.35.2", "4.36.0"),
        ("4.36.2", "4.37.0"),
        ("4.38.2", "4.39.0"),
        ("4.39.3", "4.40.0"),
        ("4.40.2", "4.41.0"),
        ("4.41.2", "4.42.0"),
        ("4.44.2", "4.45.0"),
        ("4.45.2", "4.46.0"),
        ("4.57.6", "5.0.0"),
    ):
        assert for_transformers(after).version == after
        assert for_transformers(before) is not for_transformers(after)
    assert for_transformers("4.37.0") is for_transformers("4.38.2")
    assert for_transformers("4.42.0") is for_transformers("4.44.2")
    assert for_transformers("4.46.0") is for_transformers("4.57.6")
    assert for_transformers("5.0.0") is for_transformers("5.23.0") is for_transformers("99.1")


@pytest.mark.parametrize(
    ("version", "behaves_as"),
    [
        ("4.39.0.dev0", "4.39.0"),
        ("4.39.0rc1", "4.39.0"),
        ("4.39.0-rc.1", "4.39.0"),
        ("4.38.3.dev0", "4.37.0"),
        ("4.35.0.dev0", "4.35.0"),
        ("5.0.0rc0", "5.0.0"),
        ("5.0.0.dev0", "5.0.0"),
        ("v4.40.1", "4.40.0"),
        (" 4.40.1\n", "4.40.0"),
        ("4.39", "4.39.0"),
        ("5", "5.0.0"),
        ("4.38.2.post1", "4.37.0"),
        ("4.38.2+local.1", "4.37.0"),
        ("4.46.0", "4.46.0"),  # yanked
    ],
)
def test_other_versions(version, behaves_as):
    assert for_transformers(version).version == behaves_as


@st.composite
def version_strings(draw):
    """By the grammar, and now and then not quite."""
    separator = st.sampled_from(["", ".", "-", "_", "..", " "])
    number = st.sampled_from(["", "0", "1", "12"])
    parts = [
        draw(st.sampled_from(["", "", "", "v", "V", "0!", "1!", "v0!", " ", "x"])),
        draw(st.sampled_from(["4", "5", "04", "3", "6"])),
        draw(st.sampled_from(["", ".35", ".38", ".39", ".40", ".045", ".57", ".0", ".34", "."])),
        draw(st.sampled_from(["", ".0", ".2", ".0.0.1", ".x"])),
    ]
    for names in (["a", "b", "c", "rc", "alpha", "beta", "pre", "preview"], ["post", "r", "rev"]):
        if draw(st.booleans()):
            parts += [draw(separator), draw(st.sampled_from(names)), draw(separator), draw(number)]
    if draw(st.integers(0, 4)) == 0:
        parts += ["-", draw(number)]
    if draw(st.booleans()):
        parts += [draw(separator), draw(st.sampled_from(["dev", "DEV"])), draw(number)]
    if draw(st.integers(0, 3)) == 0:
        parts += ["+", draw(st.sampled_from(["local", "a.1", "a-b_2", "", "A..b", "g12ab"]))]
    return "".join(parts)


@settings(max_examples=400)
@given(st.one_of(version_strings(), st.text("45.839rcdev+-!v ", max_size=9)))
def test_versions_are_read_as_packaging_reads_them(version):
    try:
        parsed = Version(version)
    except InvalidVersion:
        parsed = None
    if parsed is None or parsed.epoch or not at_least(version, "4.35"):
        with pytest.raises(ValueError, match=r"expected version to be 4\.35\.0 or later"):
            for_transformers(version)
    else:
        assert for_transformers(version).version == expected_version(version)


def test_error_version_is_unknown():
    for version in ("4.34.1", "3.0", "0.1", "", "latest", "4.x", "4.35.0 or so", "1!4.38.2"):
        with pytest.raises(ValueError) as raised:
            for_transformers(version)
        assert str(raised.value) == (
            "for_transformers: expected version to be 4.35.0 or later (behaviour changed in "
            "4.36.0, 4.37.0, 4.39.0, 4.40.0, 4.41.0, 4.42.0, 4.45.0, 4.46.0, 5.0.0), but got "
            f"{version!r}"
        )


@pytest.mark.parametrize("version", [None, 4.38, 5, (4, 38, 2), Version("4.38.2"), b"4.38.2"])
def test_error_version_is_no_string(version):
    with pytest.raises(TypeError, match="for_transformers: expected version to be a str, but got"):
        for_transformers(version)


# The namespaces

OURS = [for_transformers(f"{change}.0") for change in CHANGES]
OURS_IDS = [release.version for release in OURS]


def test_the_present_is_the_module_itself():
    present = for_transformers("5.23.0").modeling_attn_mask_utils
    assert present is attn_mask.modeling_attn_mask_utils


@pytest.mark.parametrize("ours", OURS, ids=OURS_IDS)
def test_release_objects(ours):
    assert eval(repr(ours)) is ours
    assert copy.deepcopy(ours) is ours
    assert pickle.loads(pickle.dumps(ours)) is ours
    module = ours.modeling_attn_mask_utils
    assert module.__name__ in repr(module)
    assert set(module.__all__) <= set(dir(module))
    if ours.version != "5.0.0":
        assert f"as from {ours.version} on" in module.__doc__
        with pytest.raises(dataclasses.FrozenInstanceError):
            ours.version = "1"


@pytest.mark.parametrize("ours", OURS, ids=OURS_IDS)
def test_what_is_in_a_namespace_can_be_pickled(ours):
    module = ours.modeling_attn_mask_utils
    for name in module.__all__:
        assert pickle.loads(pickle.dumps(getattr(module, name))) is getattr(module, name)
    converter = pickle.loads(pickle.dumps(module.AttentionMaskConverter(True, 3)))
    assert type(converter) is module.AttentionMaskConverter
    assert vars(converter) == {"is_causal": True, "sliding_window": 3}


def test_pickles_are_read_in_another_process():
    sent = [
        (release.modeling_attn_mask_utils.AttentionMaskConverter(True, 3), release)
        for release in OURS
    ]
    code = (
        "import pickle, sys\n"
        "for converter, release in pickle.load(sys.stdin.buffer):\n"
        "    module = release.modeling_attn_mask_utils\n"
        "    assert type(converter) is module.AttentionMaskConverter, release\n"
        "    print(release.version)\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, input=pickle.dumps(sent), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().split() == OURS_IDS


def test_a_class_put_in_its_place_is_used():
    """As optimum and others do with transformers' module."""
    module = for_transformers("4.40.0").modeling_attn_mask_utils

    class Replaced(module.AttentionMaskConverter):
        def to_causal_4d(self, *args, **kwargs):
            return "replaced"

    original = module.AttentionMaskConverter
    try:
        module.AttentionMaskConverter = Replaced
        for name in (EAGER, SDPA):
            got = getattr(module, name)(None, (1, 2), embeds(1, 2), 1)
            assert got == "replaced"
        other = for_transformers("4.41.0").modeling_attn_mask_utils
        assert other.AttentionMaskConverter is not Replaced
    finally:
        module.AttentionMaskConverter = original


# The files


@functools.cache
def fetch(version):
    """The folder of a release's files, or why there is none."""
    try:
        return Path(oracle_loader.fetch(version)), None
    except (OSError, subprocess.CalledProcessError):
        # pip has printed why.
        return None, f"transformers {version} is not cached, and pip can't fetch it"


@pytest.fixture(scope="session")
def fetched():
    """Fetches what is missing, a few at a time: most of it is waiting."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(DISTINCT, pool.map(fetch, DISTINCT), strict=True))


@functools.cache
def load(version):
    return oracle_loader.load_attn(version)


@pytest.fixture(scope="session")
def upstream_of(fetched):
    """Loads the file of a release; skips where there is neither network nor cache."""

    def upstream(version):
        folder, problem = fetched[version]
        if folder is None:
            pytest.skip(problem)
        source = (folder / "modeling_attn_mask_utils.py").read_bytes()
        assert hashlib.sha256(source).hexdigest() == DISTINCT[version], (
            f"{folder} does not hold what transformers {version} was released with: remove it"
        )
        return load(version)

    return upstream


class Release(Parity):
    def __init__(self, version, upstream):
        super().__init__(upstream, for_transformers(version).modeling_attn_mask_utils)
        self.version = version

    def since(self, version):
        return at_least(self.version, version)

    def has(self, name):
        owner = self.upstream if name in FUNCTIONS else self.upstream.AttentionMaskConverter
        return hasattr(owner, name)

    def same(self, name, *args, **kwargs):
        """The comparison, where the release has such a function."""
        if self.has(name):
            return self(name, *args, **kwargs)
        return None

    def to_4d(self, mask, q_length, dtype, kv_length=None, **kwargs):
        """By names: 4.35 has another order."""
        return self("to_4d", mask, q_length, dtype=dtype, key_value_length=kv_length, **kwargs)


@pytest.fixture(scope="session", params=DISTINCT)
def release(request, upstream_of):
    return Release(request.param, upstream_of(request.param))


# Names and signatures


def test_names(release):
    for name in FUNCTIONS:
        assert hasattr(release.ours, name) == hasattr(release.upstream, name), name
    ours, theirs = release.ours.AttentionMaskConverter, release.upstream.AttentionMaskConverter
    by_pickling = "__slotnames__"
    for name in {*vars(ours), *vars(theirs)} - {by_pickling}:
        assert hasattr(ours, name) == hasattr(theirs, name), name
        assert type(vars(ours).get(name)) is type(vars(theirs).get(name)), name
    defined = {
        name
        for name, value in vars(release.upstream).items()
        if getattr(value, "__module__", None) == release.upstream.__name__
    }
    assert defined == set(release.ours.__all__)


def test_signatures(release):
    for name in (*FUNCTIONS, *METHODS, *STATIC_METHODS):
        if not release.has(name):
            continue
        owners = (
            (module if name in FUNCTIONS else module.AttentionMaskConverter)
            for module in (release.ours, release.upstream)
        )
        ours, theirs = (getattr(owner, name) for owner in owners)
        assert parameters(ours) == parameters(theirs), name


def test_converter(release):
    converters = [m.AttentionMaskConverter for m in (release.ours, release.upstream)]
    assert len({dataclasses.is_dataclass(converter) for converter in converters}) == 1
    assert len({converter.__hash__ is None for converter in converters}) == 1
    release.call(lambda m: m.AttentionMaskConverter(True, 3) == m.AttentionMaskConverter(True, 3))
    release.call(lambda m: m.AttentionMaskConverter(True, 3) == m.AttentionMaskConverter(True))
    if release.since("4.36"):
        release.call(lambda m: repr(m.AttentionMaskConverter(False, 3)))
        release.call(lambda m: [f.name for f in dataclasses.fields(m.AttentionMaskConverter)])
    else:
        assert repr(release.ours.AttentionMaskConverter(True)).startswith(
            f"<{release.ours.__name__}.AttentionMaskConverter object at "
        )


# Results, drawn at random. Every call is made on both.

WINDOWS = st.one_of(st.none(), st.integers(1, 4), st.integers(1, 40), st.just(2**62))


@st.composite
def paddings(draw, batch_size, kv_length):
    """Ones and left padding often, anything at all as well."""
    kind = draw(st.sampled_from(("ones", "left", "left", "any", "any")))
    if kind == "any":
        return draw(padding_masks(batch_size, kv_length))
    dtype = draw(st.sampled_from(MASK_DTYPES))
    ends = [draw(st.integers(0, kv_length)) if kind == "left" else 0 for _ in range(batch_size)]
    ends = torch.tensor(ends, dtype=torch.int64).reshape(batch_size, 1)
    return (torch.arange(kv_length).expand(batch_size, kv_length) >= ends).to(dtype)


@st.composite
def calls(draw, four_dimensional=False):
    batch_size = draw(st.integers(0, 3))
    q_length = draw(st.one_of(st.integers(0, 6), st.integers(0, 40)))
    past = draw(st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 40)))
    window = draw(WINDOWS)
    dtype = draw(st.sampled_from(OUT_DTYPES))
    kv_length = q_length + past
    if four_dimensional:
        shape = [batch_size, 1, q_length, kv_length]
        if draw(st.integers(0, 4)) == 0:
            shape[draw(st.integers(0, 3))] += draw(st.integers(1, 2))
        rows = draw(padding_masks(shape[0] * shape[1] * shape[2], shape[3]))
        mask = rows.reshape(shape)
    else:
        # Now and then of another length, or of length 1.
        off = draw(st.sampled_from((0,) * 12 + (-1, 1, 1 - kv_length)))
        mask = draw(paddings(batch_size, max(kv_length + off, 0)))
    return mask, batch_size, q_length, past, window, dtype


def check_padded(release, call):
    mask, batch_size, q_length, past, window, dtype = call
    default, kv_length = needed_default(dtype), q_length + past
    shape, queries = (batch_size, q_length), embeds(batch_size, q_length, dtype)
    release.to_4d(mask, q_length, dtype, kv_length, converter=(True, window), default=default)
    for name in (EAGER, SDPA):
        release.same(name, mask, shape, queries, past, window, default=default)


def check_causal(release, call):
    _, batch_size, q_length, past, window, dtype = call
    shape, queries = (batch_size, q_length), embeds(batch_size, q_length, dtype)
    same = functools.partial(release.same, default=needed_default(dtype))
    same("to_causal_4d", *shape, q_length + past, dtype, converter=(True, window))
    same("_make_causal_mask", shape, dtype, "cpu", past, window)
    same(CREATE, shape, dtype, "cpu", past, window)
    for name in (EAGER, SDPA):
        same(name, None, shape, queries, past, window)


def check_padding(release, call):
    mask, _, q_length, _, _, dtype = call
    release.to_4d(mask, q_length, dtype, converter=(False,))
    for name in ("_expand_mask", PADDING, PADDING_SDPA):
        release.same(name, mask, dtype)
        release.same(name, mask, dtype, q_length)


def check_ignore(release, call):
    mask, batch_size, q_length, past, window, _ = call
    queries = embeds(batch_size, q_length)
    mask_4d = mask[:, None, None].expand(len(mask), 1, q_length, mask.shape[1])
    for some in (None, mask, mask_4d):
        release("_ignore_causal_mask_sdpa", some, queries, past, window)
        if release.since("4.41"):
            release("_ignore_causal_mask_sdpa", some, queries, past, window, True)


def check_4d(release, call):
    mask, batch_size, q_length, past, window, dtype = call
    shape, queries = (batch_size, q_length), embeds(batch_size, q_length, dtype)
    before = mask.clone()
    if mask.dtype != torch.bool or not release.since("4.37"):
        release(EAGER, mask, shape, queries, past, window)
    is_valid = mask.shape == (batch_size, 1, q_length, q_length + past)
    if not is_valid or not at_4_40(release.version):
        got = release.same(SDPA, mask, shape, queries, past, window)
        if release.since("4.41") and got is not None:
            assert got is mask
    if release.since("4.41"):
        # Additive, as these releases take it.
        additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask != 1, lowest(dtype))
        release(SDPA, additive, shape, queries, past, window)
    assert_same_mask(mask, before)


def at_4_40(version):
    return at_least(version, "4.40") and not at_least(version, "4.41")


def check_unmask(release, call):
    """In place, on whatever is handed over."""
    mask, batch_size, q_length, _, _, dtype = call
    kv_length = mask.shape[1]
    generator = torch.Generator().manual_seed(q_length)
    for shape in (
        (batch_size, 1, q_length, kv_length),
        (batch_size, 3, q_length, kv_length),
        (batch_size, q_length, kv_length),
        (batch_size, q_length),
    ):
        start = torch.randint(-2, 2, shape, generator=generator).to(dtype)
        for value in (0.0, True, -3.5):
            expanded = {id(m): start.clone() for m in (release.upstream, release.ours)}

            def unmask(m, expanded=expanded, value=value):
                mine = expanded[id(m)]
                got = m.AttentionMaskConverter._unmask_unattended(mine, mask, value)
                assert got is mine
                return got

            if release.call(unmask) is None:
                continue  # an error, which may have come after a part was written
            ours, theirs = expanded[id(release.ours)], expanded[id(release.upstream)]
            assert_same_mask(ours, theirs)


# What to check with which calls, in which releases.
CHECKS = (
    (check_padded, calls(), lambda version: True),
    (check_causal, calls(), lambda version: True),
    (check_padding, calls(), lambda version: True),
    (check_ignore, calls(), lambda version: at_least(version, "4.40")),
    (check_4d, calls(four_dimensional=True), lambda version: True),
    (check_unmask, calls(), lambda version: version in UNMASKS_BY_INDEX),
)

every_check = pytest.mark.parametrize(
    ("release", "check", "strategy"),
    [
        pytest.param(version, check, strategy, id=f"{version}-{check.__name__}")
        for version, (check, strategy, is_in) in itertools.product(DISTINCT, CHECKS)
        if is_in(version)
    ],
    indirect=["release"],
)


def run_check(release, check, strategy, max_examples):
    @settings(max_examples=max_examples)
    @given(strategy)
    def run(call):
        check(release, call)

    run()


@pytest.mark.usefixtures("one_thread")
@every_check
def test_same(release, check, strategy):
    run_check(release, check, strategy, 40 if release.version in FIRST_OF_EACH else 15)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@every_check
def test_same_at_length(release, check, strategy):
    run_check(release, check, strategy, 1000)


# Results, case by case


@pytest.mark.parametrize("release", [v for v in DISTINCT if at_least(v, "4.39")], indirect=True)
def test_unmasking_by_value(release):
    for dtype in OUT_DTYPES:
        low = lowest(dtype)
        rows = torch.tensor(list(itertools.product([low, 0.0, -0.0, 3.0], repeat=3)), dtype=dtype)
        for mask in (rows, rows[:, None, None], rows == 0):
            release("_unmask_unattended", mask, low)
    unmask = release.ours.AttentionMaskConverter._unmask_unattended
    unmasked = unmask(torch.full((1, 2), -5.0), -5.0)
    assert (unmasked == 0).all() and unmasked.signbit().all()


@pytest.mark.parametrize("rank", [0, 1, 3, 4, 5])
def test_masks_of_other_ranks(release, rank):
    for value, (q_length, past) in itertools.product((0.0, 1.0), ((3, 0), (1, 2), (2, 1))):
        mask = torch.full([2] * rank, value)
        for name in (EAGER, SDPA):
            if rank < 4 or not at_4_40(release.version):
                release.same(name, mask, (2, q_length), embeds(2, q_length), past)
    for name in (PADDING, PADDING_SDPA):
        release.same(name, mask, FLOAT)
    release.to_4d(mask, 2, FLOAT, 2)
    release.to_4d(mask, 2, FLOAT, converter=(False,))


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_masks_of_another_length_than_the_keys(release, window):
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    for q_length, mask_length, kv_length in itertools.product(range(4), range(5), range(5)):
        release.to_4d(mask[:, :mask_length], q_length, FLOAT, kv_length, converter=(True, window))


@pytest.mark.parametrize("window", [0, -1, -3, 1, 100, 2**62])
def test_windows_of_the_bare_causal_mask(release, window):
    for past in (-2, -1, 0, 1, 4):
        release("_make_causal_mask", (2, 3), FLOAT, "cpu", past, window)
        release.same("_ignore_causal_mask_sdpa", None, embeds(2, 3), past, window)


def test_input_shapes(release):
    shapes = ((2, 3), [2, 3], torch.Size([2, 3]), (2, 7, 3), (3,), ())
    masks = (None, torch.ones(2, 3), torch.zeros(2, 3))
    for shape, mask in itertools.product(shapes, masks):
        for name in (EAGER, SDPA):
            release.same(name, mask, shape, embeds(2, 3), 0)
        release(CREATE, shape, FLOAT, "cpu", 1)


def test_skipping_looks_at_shapes_of_its_own(release):
    """The shape that is passed before 4.40, that of the embeddings since."""
    for q_length, embedded in itertools.product((1, 2, 3), repeat=2):
        for mask in (None, torch.ones(2, 3)):
            release.same(SDPA, mask, (2, q_length), embeds(2, embedded), 3 - q_length)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None, "meta"])
def test_devices(release, device):
    release("_make_causal_mask", (2, 3), FLOAT, device)
    release(CREATE, (2, 3), FLOAT, device, 1, 2)
    release("to_causal_4d", 2, 3, 4, FLOAT, device)


def test_meta_masks(release):
    mask, queries = torch.ones(2, 4, device="meta"), embeds(2, 3).to("meta")
    for window in (None, 1, 2):
        release.to_4d(mask, 3, FLOAT, 4, converter=(True, window))
        release(EAGER, mask, (2, 3), queries, 1, window)
        release.same(SDPA, None, (2, 3), queries, 1, window)
    release(PADDING, mask, torch.float16, 3)
    # Whether these are all ones can't be known.
    release.same(PADDING_SDPA, mask, torch.float16)
    release.same(SDPA, mask, (2, 4), queries, 0)


def test_sizes_as_tensors(release):
    """A static cache gives its length as a tensor without dimensions."""
    three, past = torch.tensor(3), torch.tensor(1)
    for window in (None, 1, 2):
        release("to_causal_4d", 2, three, three + past, FLOAT, converter=(True, window))
        release.to_4d(torch.ones(2, 4), three, FLOAT, three + past, converter=(True, window))
        for mask in (None, torch.ones(2, 4), torch.zeros(2, 4)):
            for name in (EAGER, SDPA):
                release.same(name, mask, (2, 3), embeds(2, 3), past, window)


def test_errors(release):
    """Those with a text of upstream's own; which lines these are, Parity finds out."""
    mask = torch.ones(1, 3)
    for window in (0, -1):
        release.call(lambda m, window=window: m.AttentionMaskConverter(True, window))
        release(CREATE, (1, 2), FLOAT, "cpu", 0, window)
    release("to_causal_4d", 1, 2, 2, FLOAT, converter=(False,))
    release.to_4d(mask, 3, FLOAT)
    release.to_4d(mask, 1, FLOAT, converter=(True, 2))
    release.to_4d(mask, 3, FLOAT, 3, converter=(False, 2))
    for shape in ((2, 1, 3, 3), (2, 3, 3, 4), (1, 1, 3, 4)):
        for window in (None, 2):
            wrong = torch.zeros(shape)
            release(EAGER, wrong, (2, 3), embeds(2, 3), 1, window)
            release.same(SDPA, wrong, (2, 3), embeds(2, 3), 1, window)
            release.same("_ignore_causal_mask_sdpa", wrong, embeds(2, 3), 1, window)
    if not at_4_40(release.version):
        release.same(SDPA, torch.ones(2, 1, 3, 4), (2, 3), embeds(2, 3), 1, 2)
    if release.since("4.39"):
        release("_unmask_unattended", torch.ones(2, 3, dtype=torch.bool), 0.0)


TEXTS = {
    "4.36.0": "Attention using SDPA can not be traced with torch.jit.trace when no attention_mask",
    "4.37.0": "Incorrect 4D attention_mask shape: (2, 1, 3, 3); expected: (2, 1, 3, 4).",
    "4.39.0": "AttentionMaskConverter._unmask_unattended expects a float `expanded_mask`, got a",
    "4.40.0": "Incorrect 4D attention_mask shape: (2, 1, 3, 3); expected: (2, 1, 3, 4).",
    "4.41.0": "Custom 4D attention mask should be passed in inverted form with max==0`",
}


@pytest.mark.parametrize("version", TEXTS)
def test_texts_of_errors(version):
    module = for_transformers(version).modeling_attn_mask_utils
    calls = {
        "4.36.0": lambda: jit_trace(
            lambda queries: getattr(module, SDPA)(None, (2, 3), queries, 0), embeds(2, 3)
        ),
        "4.37.0": lambda: getattr(module, SDPA)(torch.ones(2, 1, 3, 3), (2, 3), embeds(2, 3), 1),
        "4.39.0": lambda: module.AttentionMaskConverter._unmask_unattended(
            torch.ones(2, 3, dtype=torch.bool), 0.0
        ),
        "4.40.0": lambda: module.AttentionMaskConverter._ignore_causal_mask_sdpa(
            torch.ones(2, 1, 3, 3), embeds(2, 3), 1
        ),
        "4.41.0": lambda: getattr(module, SDPA)(torch.ones(2, 1, 3, 4), (2, 3), embeds(2, 3), 1),
    }
    with pytest.raises(ValueError) as raised:
        calls[version]()
    assert str(raised.value).startswith(TEXTS[version])


def test_what_the_history_says():
    """Worked by hand: window, sum, unmasking, and the sign of unmasked zeros."""
    by_version = {
        version: for_transformers(version).modeling_attn_mask_utils
        for version in ("4.35.0", "4.36.0", "4.38.2", "4.39.0")
    }
    rows = {
        version: visibility(module.AttentionMaskConverter(True, 3).to_causal_4d(1, 6, 6, FLOAT))
        for version, module in by_version.items()
    }
    assert rows["4.38.2"][0][5] == "---000"
    assert rows["4.39.0"][0][5] == "--0000"
    low, inf = lowest(FLOAT), float("inf")
    padding = torch.tensor([[0, 0, 1]])
    added = by_version["4.35.0"].AttentionMaskConverter(True).to_4d(padding, 3, 3, FLOAT)
    assert added.tolist() == [[[[low, -inf, low], [low, low, low], [low, low, 0.0]]]]
    unmasked = getattr(by_version["4.38.2"], SDPA)(padding, (1, 3), embeds(1, 3), 0)
    assert visibility(unmasked) == [["000", "000", "--0"]]
    assert not unmasked.signbit()[0, 0, 0].any()
    closed = getattr(by_version["4.39.0"], SDPA)(padding, (1, 3), embeds(1, 3), 0)
    assert visibility(closed) == [["---", "---", "--0"]]
    with pytest.raises(IndexError, match="a row for each key before the first attended one"):
        getattr(by_version["4.36.0"], SDPA)(torch.tensor([[0, 0, 0, 1]]), (1, 2), embeds(1, 2), 2)


def test_example_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "upstream.md").read_text()
    # Every other part is code.
    (example,) = (code for code in page.split("```")[1::2] if "for_transformers(" in code)
    names = {}
    exec(example.removeprefix("python"), names)
    assert visibility(names["mask"])[0][3:] == ["-000--", "--000-", "---000"]


@pytest.mark.cuda
def test_on_cuda(release):
    """Rows without a key are unmasked: there since 4.39, everywhere before."""
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], device="cuda")
    for q_length, window, dtype in itertools.product((1, 2, 4), (None, 1, 2), OUT_DTYPES):
        queries, default = embeds(3, q_length, dtype).cuda(), needed_default(dtype)
        for mask in (padding, padding[1:2], None):
            for name in (EAGER, SDPA):
                release.same(
                    name, mask, (3, q_length), queries, 4 - q_length, window, default=default
                )
        release(PADDING, padding, dtype, q_length, default=default)


# Differences from upstream, each of them meant


def results(module, dtype):
    """One call of everything that gives a mask."""
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    queries = embeds(2, 3, dtype)
    converter = module.AttentionMaskConverter
    for window in (None, 1, 2):
        yield converter(True, window).to_causal_4d(2, 3, 4, dtype=dtype)
        yield converter(True, window).to_4d(padding, 3, dtype=dtype, key_value_length=3)
        yield converter._make_causal_mask((2, 3), dtype, "cpu", 0, window)
        for name in {EAGER, SDPA} & set(module.__all__):
            yield getattr(module, name)(padding, (2, 3), queries, 0, window)
        yield getattr(module, CREATE)((2, 3), dtype, "cpu", 1, window)
    for name in {PADDING, PADDING_SDPA} & set(module.__all__):
        yield getattr(module, name)(padding, dtype)


@pytest.mark.parametrize("ours", OURS, ids=OURS_IDS)
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_difference_the_default_dtype_does_not_matter(ours, dtype):
    """Upstream fails for float64 where it is not the default."""
    module = ours.modeling_attn_mask_utils
    want = list(results(module, dtype))
    assert want and {mask.dtype for mask in want} == {dtype}
    for default in OUT_DTYPES:
        with default_dtype(default):
            got = list(results(module, dtype))
        for ours_now, ours_before in zip(got, want, strict=True):
            assert_same_mask(ours_now, ours_before)


@pytest.mark.parametrize("ours", OURS, ids=OURS_IDS)
def test_difference_a_default_device_does_not_matter(ours):
    module = ours.modeling_attn_mask_utils
    padding, queries = torch.tensor([[0, 1, 1]]), embeds(1, 3)
    calls = [
        lambda: module.AttentionMaskConverter(True, 1).to_4d(
            padding, 3, dtype=FLOAT, key_value_length=3
        ),
        lambda: module.AttentionMaskConverter(True).to_causal_4d(1, 3, 3, FLOAT),
        lambda: getattr(module, CREATE)((1, 3), FLOAT, "cpu", 0, 1),
    ]
    calls += [
        lambda name=name: getattr(module, name)(padding, (1, 3), queries, 0)
        for name in {EAGER, SDPA} & set(module.__all__)
    ]
    calls += [
        lambda name=name: getattr(module, name)(padding, FLOAT)
        for name in {PADDING, PADDING_SDPA} & set(module.__all__)
    ]
    for call in calls:
        want = call()
        with torch.device("meta"):
            got = call()
        assert_same_mask(got, want)


@pytest.mark.parametrize("ours", OURS[2:], ids=OURS_IDS[2:])
@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_difference_boolean_4d_masks_say_which_keys_are_seen(ours, dtype):
    seen = torch.tensor([[True, False, True], [False, False, True]])[None, None]
    got = getattr(ours.modeling_attn_mask_utils, EAGER)(seen, (1, 2), embeds(1, 2, dtype), 1)
    assert got.dtype == dtype
    assert visibility(got) == [["0-0", "--0"]]


@settings(max_examples=60)
@given(calls(four_dimensional=True))
def test_difference_sdpa_of_4_40_takes_4d_masks(upstream_of, call):
    """Upstream checks their shape and then fails. They are taken as by 4.39, before, whose check
    differs in a text alone."""
    mask, batch_size, q_length, past, window, dtype = call
    release = Parity(upstream_of("4.39.0"), for_transformers("4.40.0").modeling_attn_mask_utils)
    queries = embeds(batch_size, q_length, dtype)
    release(SDPA, mask, (batch_size, q_length), queries, past, window)


def test_difference_sdpa_of_4_40_takes_4d_masks_where_upstream_fails(upstream_of):
    mask = torch.ones(1, 1, 2, 3)
    with pytest.raises(ValueError, match="too many values to unpack"):
        getattr(upstream_of("4.40.0"), SDPA)(mask, (1, 2), embeds(1, 2), 1)


@pytest.mark.parametrize("ours", OURS, ids=OURS_IDS)
@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=str)
def test_difference_complex_masks_are_a_type_error(ours, dtype):
    module = ours.modeling_attn_mask_utils
    zeros = torch.zeros(1, 2, dtype=FLOAT).to(dtype)
    converter = module.AttentionMaskConverter
    calls = [
        lambda: converter(True).to_4d(zeros, 2, dtype=FLOAT, key_value_length=2),
        lambda: converter(True, 1).to_4d(zeros, 2, dtype=FLOAT, key_value_length=2),
        lambda: getattr(module, EAGER)(zeros, (1, 2), embeds(1, 2), 0),
        lambda: getattr(module, PADDING)(zeros, FLOAT),
    ]
    if hasattr(module, SDPA):
        calls.append(lambda: getattr(module, SDPA)(zeros, (1, 2), embeds(1, 2), 0))
        calls.append(lambda: getattr(module, PADDING_SDPA)(zeros, FLOAT))
    for call in calls:
        with pytest.raises(TypeError, match=r"(?i)complex"):
            call()


# While tracing

ONES = torch.ones(2, 3)
LEFT = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
TRACED = {
    "sdpa": lambda m, mask, queries: getattr(m, SDPA)(mask, (2, 3), queries, 0),
    "sdpa, window": lambda m, mask, queries: getattr(m, SDPA)(mask, (2, 3), queries, 0, 2),
    "sdpa, past": lambda m, mask, queries: getattr(m, SDPA)(mask, (2, 2), queries[:, :2], 1),
    "sdpa, one": lambda m, mask, queries: getattr(m, SDPA)(mask, (2, 1), queries[:, :1], 2),
    "sdpa, no mask": lambda m, mask, queries: getattr(m, SDPA)(None, (2, 3), queries, 0),
    "sdpa, no mask, past": lambda m, mask, queries: getattr(m, SDPA)(
        None, (2, 2), queries[:, :2], 1
    ),
    "sdpa, 4D": lambda m, mask, queries: getattr(m, SDPA)(
        (1 - mask)[:, None, None].expand(2, 1, 3, 3), (2, 3), queries, 0
    ),
    "eager": lambda m, mask, queries: getattr(m, EAGER)(mask, (2, 3), queries, 0),
    "eager, window": lambda m, mask, queries: getattr(m, EAGER)(mask, (2, 3), queries, 0, 1),
    "padding": lambda m, mask, queries: getattr(m, PADDING)(mask, FLOAT, 2),
    "padding, sdpa": lambda m, mask, queries: getattr(m, PADDING_SDPA)(mask, FLOAT),
    "padding, sdpa, other": lambda m, mask, queries: getattr(m, PADDING_SDPA)(mask, FLOAT, 2),
    "created": lambda m, mask, queries: getattr(m, CREATE)((2, 3), FLOAT, "cpu", 1, 1),
}


def cases_of(version):
    """Those that a release has."""
    return [
        case
        for case in TRACED
        if at_least(version, "4.36" if "sdpa" in case else "4.35")
        and not (case == "sdpa, 4D" and (at_4_40(version) or not at_least(version, "4.37")))
    ]


def each_case(versions=DISTINCT, cases=TRACED):
    """(release, case) for the cases that each release has."""
    return pytest.mark.parametrize(
        ("release", "case"),
        [(v, case) for v in versions for case in cases_of(v) if case in cases],
        indirect=["release"],
    )


def masked(function, module):
    """A function of tensors: a mask of None becomes a tensor."""

    def run(mask, queries):
        result = function(module, mask, queries)
        # It takes an input for jit to see where the number is from.
        return mask.sum() * 0 - 7 if result is None else result.clone()

    return run


def jit_trace(function, *examples):
    """It warns about itself, and about every value that is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, examples, check_trace=False)


UNMASKED = ("sdpa", "sdpa, window", "sdpa, past")


def check_jit_traced(release, case):
    """What is decided while tracing stays, whatever comes later."""
    for example, later in itertools.product((ONES, LEFT), repeat=2):

        def trace_and_run(module, example=example, later=later):
            function = masked(TRACED[case], module)
            return jit_trace(function, example, embeds(2, 3))(later, embeds(2, 3))

        if release.version == "4.36.0" and example is LEFT and later is ONES:
            # What 4.36 records of padding does not run without any; ours may.
            _, error = outcome(trace_and_run, release.upstream)
            if "TorchScript interpreter" in str(error):
                continue
        if release.version == "4.36.0" and example is ONES and later is LEFT and case in UNMASKED:
            # 4.36 records that no row is to be unmasked. Ours does what eager code does.
            want = masked(TRACED[case], release.upstream)(later, embeds(2, 3))
            assert_same_mask(trace_and_run(release.ours), want)
            continue
        release.call(trace_and_run)


@each_case(FIRST_OF_EACH)
def test_jit_traced(release, case):
    check_jit_traced(release, case)


@pytest.mark.slow
@each_case()
def test_jit_traced_at_length(release, case):
    check_jit_traced(release, case)


@pytest.mark.usefixtures("one_thread")
@each_case()
def test_as_if_compiling(release, case):
    """torch.compile is recognised by torch.compiler.is_compiling, which returns True here."""
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        for mask in (ONES, LEFT):
            release.call(lambda module, mask=mask: TRACED[case](module, mask, embeds(2, 3)))


@pytest.mark.parametrize("release", [v for v in DISTINCT if at_least(v, "4.40")], indirect=True)
def test_skip_decisions_as_if_compiling(release):
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        for mask, past, window in itertools.product((None, ONES, LEFT), (0, 1), (None, 2, 9)):
            name = "_ignore_causal_mask_sdpa"
            release(name, mask, embeds(2, 3), past, window)
            if release.since("4.41"):
                release(name, mask, embeds(2, 3), past, window, True)


def compiled(release, cases, fullgraph):
    for case, mask in itertools.product(cases, (ONES, LEFT)):

        def compile_and_run(module, case=case, mask=mask):
            torch._dynamo.reset()
            function = masked(TRACED[case], module)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = torch.compile(function, backend="eager", fullgraph=fullgraph)
                return run(mask, embeds(2, 3))

        want, expected = outcome(compile_and_run, release.upstream)
        got, error = outcome(compile_and_run, release.ours)
        if expected is None:
            assert error is None, f"{case}: upstream compiles, ours raises {error!r}"
            assert_same_mask(got, want)
        else:
            # Only what is an error without torch.compile, too.
            assert type(error) is type(expected), f"{case}: {error!r}, upstream {expected!r}"
            assert "can not be traced" in str(error) or "Custom 4D attention mask" in str(error)


@pytest.mark.parametrize("release", ["4.39.0", "4.46.0"], indirect=True)
def test_compiled(release):
    """4.39 was the first that works under torch.compile."""
    compiled(release, ("sdpa", "eager, window"), fullgraph=True)


@pytest.mark.slow
def test_compiled_at_length(release):
    # Before 4.39 values are read, from 5.2 on upstream warns: graphs break.
    fullgraph = release.since("4.39") and not release.since("5.2")
    looking = ("sdpa, 4D",) if not release.since("4.45") else ()
    early = ("padding, sdpa", "padding, sdpa, other") if not release.since("4.41") else ()
    breaking = (*looking, *early)
    cases = cases_of(release.version)
    compiled(release, [case for case in cases if case not in breaking], fullgraph)
    compiled(release, [case for case in cases if case in breaking], fullgraph=False)


@pytest.mark.parametrize("release", [v for v in DISTINCT if at_least(v, "4.36")], indirect=True)
def test_symbolically_traced(release):
    """With an fx.Proxy for the embeddings, recognised as tracing since 4.37."""
    decisions = []

    def deciding(module):
        def model(queries):
            if release.since("4.40"):
                ignore = module.AttentionMaskConverter._ignore_causal_mask_sdpa
                decided = ignore(None, queries, 0), ignore(ONES, queries, 0)
            else:
                sdpa = functools.partial(getattr(module, SDPA), None, (2, 3), queries, 0)
                result, error = outcome(lambda _: sdpa(), module)
                decided = result, type(error), str(error)
            decisions.append(decided)
            return queries

        return model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (release.ours, release.upstream):
            torch.fx.symbolic_trace(deciding(module))
    assert decisions[0] == decisions[1]


@each_case(
    [v for v in DISTINCT if not Version(v).is_prerelease],
    ("sdpa", "padding, sdpa", "eager", "sdpa, no mask", "padding"),
)
def test_fake_tensors(release, case):
    """They have no values: reading them fails, and is avoided since 5.0, which pre-releases
    count as."""
    with FakeTensorMode() as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask, queries = mode.from_tensor(ONES), mode.from_tensor(embeds(2, 3))
        want, expected = outcome(lambda m: TRACED[case](m, mask, queries), release.upstream)
        got, error = outcome(lambda m: TRACED[case](m, mask, queries), release.ours)
    assert type(error) is type(expected)
    if isinstance(want, FakeTensor):
        assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    else:
        assert got is want is None
