"""One text for an error, wherever it comes up: eager, on the meta device, compiled, exported."""

import logging

import pytest
import torch
from attn_mask import masking_utils, rules
from attn_mask import modeling_attn_mask_utils as ours
from sample_calls import operator

HALF = torch.float16
Converter = ours.AttentionMaskConverter

# f(mask [2, 7] of ones, queries [2, 4, 8]); each is wrong in one way.
WRONG = {
    "rank": lambda mask, queries: operator("to_4d")(mask[None], 4, dtype=HALF, key_value_length=7),
    "dtype": lambda mask, queries: operator("to_4d")(
        mask, 4, dtype=torch.int32, key_value_length=7
    ),
    "length": lambda mask, queries: operator("to_4d")(mask, 4, dtype=HALF, key_value_length=9),
    "no length": lambda mask, queries: operator("to_4d")(mask, 4, dtype=HALF),
    "window": lambda mask, queries: operator("to_4d")(
        mask, 4, dtype=HALF, key_value_length=7, sliding_window=0
    ),
    "negative": lambda mask, queries: operator("_expand_mask")(mask, -3, dtype=HALF),
    "complex": lambda mask, queries: operator("_expand_mask")(
        mask.to(torch.complex64), 4, dtype=HALF
    ),
    "fewer keys": lambda mask, queries: operator("to_causal_4d")(
        2, 7, 4, dtype=HALF, device=mask.device
    ),
    "rule": lambda mask, queries: operator("boolean")([99], [mask], 2, 4, 7),
    "bits": lambda mask, queries: operator("boolean")([rules.BITS, 0], [mask], 2, 4, 7),
    "positions": lambda mask, queries: operator("boolean")(
        *rules.causal().encode(), 2, 4, 7, q_positions=mask[0].long()
    ),
    "bias": lambda mask, queries: operator("additive")(
        *rules.causal().encode(), 2, 4, 7, dtype=HALF, bias=mask[:, None, None]
    ),
    "out": lambda mask, queries: operator("_expand_mask")(mask, 3, out=queries),
    "4-D mask": lambda mask, queries: ours._prepare_4d_causal_attention_mask(
        mask[:, None, None], (2, 4), queries, 3
    ),
    "converter's window": lambda mask, queries: Converter(True, -1).to_4d(mask, 4, HALF, 7),
    "not causal": lambda mask, queries: Converter(False).to_causal_4d(2, 4, 7, HALF, mask.device),
    "padding": lambda mask, queries: masking_utils.sdpa_mask(
        2, 4, 7, 3, 0, rules.causal(), mask[0] > 0, device=mask.device
    ),
    "table": lambda mask, queries: masking_utils.sdpa_mask(
        2, 4, 7, 3, 0, rules.documents(mask[:, :3].long()), None, device=mask.device
    ),
}


def arguments(device="cpu"):
    return torch.ones(2, 7, device=device), torch.zeros(2, 4, 8, device=device)


class Model(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, mask, queries):
        result = self.call(mask, queries)
        return queries if result is None else result


def compiled(backend):
    return lambda call: torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(
        *arguments()
    )


def exported(strict):
    return lambda call: torch.export.export(Model(call), arguments(), strict=strict)


WAYS = {
    "meta": lambda call: call(*arguments("meta")),
    "compiled": compiled("eager"),
    "aot_eager": compiled("aot_eager"),
    "exported": exported(strict=False),
    "exported strictly": exported(strict=True),
}
# torch.compile puts its own around any error.
KEEP_THE_TYPE = ("meta", "exported")


@pytest.fixture(autouse=True)
def quiet():
    """torch logs what fails while it records a graph."""
    torch._dynamo.reset()
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRONG)
def test_texts_and_types(name, way):
    with pytest.raises((ValueError, TypeError)) as eager:
        WRONG[name](*arguments())
    with pytest.raises(Exception) as elsewhere:
        WAYS[way](WRONG[name])
    assert str(eager.value) in str(elsewhere.value)
    if way in KEEP_THE_TYPE:
        assert elsewhere.type is eager.type
