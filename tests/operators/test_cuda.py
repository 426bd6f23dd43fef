"""What only a GPU can show: nothing waits for it, graphs capture everything, launches are few."""

import attn_mask
import pytest
import torch
from masks import assert_same_mask
from sample_calls import (
    BLOCK_SAMPLES,
    CALL_IDS,
    CALLS,
    HOST_DECISIONS,
    as_on_cuda,
    map_tensors,
    nothing_waits,
    operator,
)

pytestmark = pytest.mark.cuda

MASKS = [
    pytest.param(*call, id=id_)
    for id_, call in zip(CALL_IDS, CALLS, strict=True)
    if call[0] not in HOST_DECISIONS
]
MASKS += [
    pytest.param(name, *call, id=f"{name}-{i}")
    for name in ("block_mask", "_block_states")
    for i, call in enumerate(BLOCK_SAMPLES[name])
]
every_mask = pytest.mark.parametrize(("name", "args", "kwargs"), MASKS)


def on_cuda(name, args, kwargs):
    """The call on the GPU, as a function, and its result on the CPU."""

    def to_cuda(arguments):
        return map_tensors(lambda tensor: tensor.to("cuda"), arguments)

    want = operator(name)(*args, **as_on_cuda(name, kwargs))
    args, kwargs = to_cuda(args), to_cuda(kwargs)
    arguments = {a.name for a in operator(name).default._schema.arguments}
    if "device" in arguments:
        kwargs = {**kwargs, "device": torch.device("cuda")}
    return (lambda: operator(name)(*args, **kwargs)), want


def tensors(result):
    """None for no mask; block masks are several."""
    return result if isinstance(result, list) else [result]


def assert_same(got, want):
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert_same_mask(None if one is None else one.cpu(), other)


@every_mask
def test_nothing_waits_for_the_device(name, args, kwargs):
    call, want = on_cuda(name, args, kwargs)
    with nothing_waits():
        got = call()
    assert_same(got, want)


# What is empty, or a constant that is there already, takes no kernel.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@every_mask
def test_graph_capture(name, args, kwargs):
    call, want = on_cuda(name, args, kwargs)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for tensor in tensors(got):
        if tensor is not None:  # it may be a stride-0 expand, which can't be filled as it is
            memory = torch.empty(0, dtype=torch.uint8, device="cuda")
            memory.set_(tensor.untyped_storage()).zero_()
    graph.replay()
    assert_same(got, want)


def kernels_of(call):
    """Names of the kernels that run; copies and fills of memory are none."""
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    events = (event for event in profile.events() if event.device_type.name == "CUDA")
    return [event.name for event in events if not event.name.startswith(("Memset", "Memcpy"))]


@pytest.mark.parametrize("unmasks", [False, True])
def test_launches_of_a_padded_mask(unmasks):
    """One prepares the padding, one writes."""
    mask = torch.randint(0, 2, (4, 300), device="cuda")
    kernels = kernels_of(
        lambda: operator("to_4d")(
            mask, 300, dtype=torch.float16, key_value_length=300, unmask_unattended=unmasks
        )
    )
    assert 1 <= len(kernels) <= 2, kernels


def test_launches_without_padding():
    kernels = kernels_of(
        lambda: operator("to_causal_4d")(2, 300, 300, dtype=torch.float16, device="cuda")
    )
    assert len(kernels) == 1, kernels


def test_rows_are_unmasked_as_by_the_function_for_it():
    mask = torch.randint(0, 2, (4, 301), generator=torch.Generator().manual_seed(0))
    mask[0] = 0
    mask[1, :200] = 0
    for window in (None, 7):
        options = {"key_value_length": 301, "sliding_window": window, "dtype": torch.bfloat16}
        want = operator("to_4d")(mask, 100, **options)
        want = operator("_unmask_unattended")(want, torch.finfo(torch.bfloat16).min)
        got = operator("to_4d")(mask.cuda(), 100, **options, unmask_unattended=True)
        assert_same(got, want)
        embeds = torch.zeros(4, 100, 1, dtype=torch.bfloat16, device="cuda")
        got = operator("_prepare_4d_causal_attention_mask_for_sdpa")(
            mask.cuda(), (4, 100), embeds, 201, window
        )
        assert_same(got, want)


def on_both(create):
    """What `create(device)` gives on the GPU, and on the CPU."""
    return create("cuda"), create("cpu")


# One run, runs of any length, such as come back, and one of negative ids between others.
IDS = {
    "one": lambda i: 0 * i,
    "runs": lambda i: i // 777 + i // 12345,
    "repeated": lambda i: i // 3000 % 7,
    "negative": lambda i: torch.where(i // 9000 == 2, -1, i // 9000),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("as_blocks", [False, True])
def test_tables_of_which_blocks_of_threads_have_parts(name, as_blocks):
    ids = IDS[name](torch.arange(70001))[None]
    padding = torch.arange(70001)[None] % 1000 > 10

    def create(device):
        same = attn_mask.rules.blockwise if as_blocks else attn_mask.rules.documents
        rule = same(ids.to(device)) & attn_mask.rules.padding(padding.to(device))
        return attn_mask.boolean(rule, 1, 40, 70001, q_offset=34980, device=device)

    assert_same(*on_both(create))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("window", [None, 70])
def test_block_masks_of_long_lines(compact, window):
    """Of more blocks than the kernel of lists has at a time."""
    length = 5003
    ids = (torch.arange(length) // 600)[None]
    padding = torch.arange(length)[None] > 1000

    def create(device):
        rule = attn_mask.rules.causal() & attn_mask.rules.padding(padding.to(device))
        rule &= attn_mask.rules.documents(ids.to(device))
        if window is not None:
            rule &= attn_mask.rules.sliding_window(window)
        made = attn_mask.create_block_mask(
            rule, 1, 1, length, length, device=device, compact=compact, BLOCK_SIZE=4
        )
        return [
            getattr(made, f"{full}{direction}_{what}")
            for full in ("", "full_")
            for direction in ("kv", "q")
            for what in ("num_blocks", "indices")
        ]

    assert_same(*on_both(create))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_models_give_the_same_under_install(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=99,
        sliding_window=5,
        pad_token_id=0,
        attn_implementation=implementation,
    )
    model = transformers.MistralForCausalLM(config).eval().to("cuda", torch.bfloat16)
    tokens = torch.randint(1, 99, (2, 12), device="cuda")
    padding = torch.ones_like(tokens)
    padding[1, :4] = 0

    def results():
        with torch.no_grad():
            logits = model(tokens, attention_mask=padding).logits
            written = model.generate(
                tokens, attention_mask=padding, max_new_tokens=6, do_sample=False
            )
        return logits, written

    want = results()
    attn_mask.install()
    try:
        got = results()
    finally:
        attn_mask.uninstall()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
