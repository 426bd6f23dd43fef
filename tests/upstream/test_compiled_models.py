"""Whole models compiled, with our masks: one graph for all lengths, eager code's numbers."""

import itertools

import attn_mask
import pytest
import torch
from models import FAST, RELEASE, make, padding, tokens

transformers = pytest.importorskip("transformers", reason="its models are compiled")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.applies(RELEASE >= (5, 14)),  # models before did not compile as a whole
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def combinations(fast, names):
    """Of names and implementations; those that are not fast are left to `make test-all`."""
    return [
        pytest.param(*pair, id=" ".join(pair), marks=() if pair in fast else pytest.mark.slow)
        for pair in itertools.product(names, ("sdpa", "eager"))
    ]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with attn_mask.installed(), torch.no_grad():
        yield
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the graphs that it compiles."""

    def __init__(self, backend="aot_eager"):
        self.compile = torch._dynamo.lookup_backend(backend)
        self.graphs = []

    def __call__(self, graph, examples):
        self.graphs.append(graph)
        return self.compile(graph, examples)

    def masks(self):
        """The operators of ours, graph by graph."""
        return [
            [
                str(node.target).removeprefix("attn_mask.")
                for node in graph.graph.nodes
                if str(node.target).startswith("attn_mask.")
            ]
            for graph in self.graphs
            if len(graph.graph.nodes) > 0  # dynamo empties those that it begins anew
        ]


def given(name, length, batch_size, side="left"):
    arguments = {
        "input_ids": tokens(batch_size, length),
        "attention_mask": padding(side, batch_size, length),
    }
    if FAST[name].inputs == "decoder":
        arguments["use_cache"] = False
    elif FAST[name].inputs == "encoder and decoder":
        arguments["decoder_input_ids"] = tokens(batch_size, length + 1)
    return arguments


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "implementation"),
    combinations(
        {("Llama", "sdpa"), ("Mistral", "eager"), ("BERT", "sdpa")},
        ("Llama", "Mistral", "BERT", "T5"),
    ),
)
def test_forward(name, implementation):
    """No graph break, and after the first call no other graph, whatever sizes come."""
    model = make(name, implementation)
    backend = Graphs()
    compiled = torch.compile(
        lambda **arguments: model(**arguments)[0], backend=backend, fullgraph=True, dynamic=True
    )
    compiled(**given(name, 9, 2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, batch_size in ((11, 2), (20, 3)):
            arguments = given(name, length, batch_size)
            assert_close(compiled(**arguments), model(**arguments)[0])
    (masks,) = backend.masks()
    # T5 has masks of its encoder, of its decoder, and of both; sdpa needs none for causality.
    count = 1 if name != "T5" else 2 if implementation == "sdpa" else 3
    assert masks == ["boolean" if implementation == "sdpa" else "additive"] * count


@pytest.mark.parametrize(
    ("name", "implementation"),
    combinations({("Llama", "eager"), ("Mistral", "sdpa")}, ("Llama", "Mistral")),
)
def test_static_cache(name, implementation):
    """Decoding, where a tensor holds the number of tokens seen."""
    model = make(name, implementation)

    def step(ids, mask, cache):
        return model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits

    def decode(step, length):
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        mask = padding("left", 2, length)
        logits = model(
            input_ids=tokens(2, length), attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits[:, -1:]
        steps = []
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            logits = step(logits.argmax(-1), mask, cache)
            steps.append(logits)
        return torch.stack(steps)

    backend = Graphs()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    assert_close(decode(compiled, 9), decode(step, 9))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(decode(compiled, 12), decode(step, 12))
    (masks,) = backend.masks()
    assert masks == ["boolean" if implementation == "sdpa" else "additive"]


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_shapes_choose_as_in_eager_code(name):
    """Under "shapes" compiled code has a mask where eager code has one, else neither."""
    model = make(name, "sdpa")
    for declared, has_mask in (({}, True), ({"padding": "none"}, False)):
        # A window that is shorter than the prompt needs a mask, whatever is declared.
        has_mask = has_mask or name == "Mistral"
        with attn_mask.skip_policy("shapes", **declared):
            torch._dynamo.reset()
            backend = Graphs()
            compiled = torch.compile(lambda **a: model(**a)[0], backend=backend, fullgraph=True)
            arguments = given(name, 9, 2, "ones")
            assert_close(compiled(**arguments), model(**arguments)[0])
            assert backend.masks() == [["boolean"] if has_mask else []]


@pytest.mark.slow
def test_inductor():
    model = make("Mistral", "sdpa")
    compiled = torch.compile(lambda **a: model(**a)[0], fullgraph=True, dynamic=True)
    for length in (9, 11):
        arguments = given("Mistral", length, 2)
        assert_close(compiled(**arguments), model(**arguments)[0])
