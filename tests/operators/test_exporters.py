"""torch.onnx.export by both exporters; onnxruntime runs the result at other sizes, too."""

import logging

import attn_mask
import pytest
import torch
from attn_mask import rules
from masks import assert_same_mask
from test_compile import inputs
from test_decompositions import OF_RULES, RELEASES, Layer, helpers_of

onnx = pytest.importorskip("onnx", reason="onnx, which torch exports to, is not installed")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime, which runs what was exported, is not installed"
)
pytest.importorskip("onnxscript", reason="onnxscript, which torch exports with, is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::torch.jit.TracerWarning",
)
exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])

# Batch size, queries, keys: as exported, then others.
SIZES = ((2, 5, 8), (3, 9, 12), (1, 7, 10), (4, 2, 5))


def export(module, args, axes, path, dynamo):
    """Exports a module whose arguments have these names of dimensions; gives a session."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names = list(axes)
    if dynamo:
        torch.onnx.export(
            module,
            args,
            path,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=names,
            verbose=False,
        )
    else:
        torch.onnx.export(module, args, path, dynamo=False, dynamic_axes=axes, input_names=names)
    model = onnx.load(path)
    domains = {node.domain for node in model.graph.node} | {
        opset.domain for opset in model.opset_import
    }
    assert not any("attn_mask" in domain for domain in domains)
    return onnxruntime.InferenceSession(path)


def run(session, args):
    """The outputs of a session, which drops arguments that nothing depends on."""
    given = {name: tensor.numpy() for name, tensor in args.items()}
    taken = {argument.name: given[argument.name] for argument in session.get_inputs()}
    return [torch.from_numpy(output) for output in session.run(None, taken)]


def check(functions, path, dynamo):
    layer = Layer(list(functions.values()))
    axes = {"mask": {0: "batch_size", 1: "keys"}, "queries": {0: "batch_size", 1: "q_length"}}
    session = export(layer, inputs(*SIZES[0]), axes, str(path), dynamo)
    for sizes in SIZES:
        mask, queries = inputs(*sizes)
        mask[-1, 2] = 0
        outputs = run(session, {"mask": mask, "queries": queries})
        for name, got in zip(functions, outputs, strict=True):
            assert_same_mask(got, functions[name](mask, queries)), name


@exporters
@pytest.mark.parametrize("release", [RELEASES[-1], *(
    pytest.param(release, marks=pytest.mark.slow) for release in RELEASES[:-1]
)])  # fmt: skip
def test_helpers(tmp_path, release, dynamo):
    functions = helpers_of(release)
    if dynamo and release in ("4.39.0", "4.40.0"):
        # In these it looks at the mask while tracing, which torch.export can't record.
        del functions["sdpa both ways"]
    check(functions, tmp_path / "helpers.onnx", dynamo)


@exporters
def test_rules(tmp_path, dynamo):
    without = {"create_block_mask", "additive, out"}  # TorchScript has no copy into a tensor
    functions = {name: call for name, call in OF_RULES.items() if name not in without}
    check(functions, tmp_path / "rules.onnx", dynamo)


def test_operators(tmp_path):
    """The newer exporter takes apart operators that a module calls itself, too."""
    ops = torch.ops.attn_mask
    check(
        {
            "boolean": lambda mask, queries: ops.boolean(
                [rules.AND, 2, rules.CAUSAL, rules.PADDING, 0],
                [mask],
                mask.shape[0],
                queries.shape[1],
                mask.shape[1],
            ),
            "to_4d": lambda mask, queries: ops.to_4d(
                mask, queries.shape[1], dtype=torch.float32, key_value_length=mask.shape[1]
            ),
        },
        tmp_path / "operators.onnx",
        dynamo=True,
    )


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, decoder_input_ids=None):
        given = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, **given)
        return result[0]


@pytest.mark.slow
@exporters
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "BERT", "T5"])
def test_models(tmp_path, name, implementation, dynamo):
    import models

    def given(batch_size, length):
        mask = torch.ones(batch_size, length, dtype=torch.long)
        mask[0, :2] = 0
        made = {"input_ids": models.tokens(batch_size, length), "attention_mask": mask}
        if name == "T5":
            made["decoder_input_ids"] = models.tokens(batch_size, length + 1)
        return made

    module = Logits(models.make(name, implementation)).eval()
    module.model.config.use_cache = False
    axes = {argument: {0: "batch_size", 1: "length"} for argument in given(2, 6)}
    if "decoder_input_ids" in axes:
        axes["decoder_input_ids"] = {0: "batch_size", 1: "decoder_length"}
    with attn_mask.installed(), torch.no_grad():
        session = export(
            module, tuple(given(2, 6).values()), axes, str(tmp_path / "model.onnx"), dynamo
        )
    for sizes in ((2, 6), (3, 9), (1, 7), (4, 12)):
        arguments = given(*sizes)
        with torch.no_grad():
            want = module(**arguments)
        (got, *_) = run(session, arguments)
        attended = arguments["attention_mask"].bool() if name != "T5" else slice(None)
        torch.testing.assert_close(got[attended], want[attended], atol=1e-5, rtol=1e-4)
