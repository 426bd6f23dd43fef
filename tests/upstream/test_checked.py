"""attn_mask.checked around models of transformers."""

import attn_mask
import pytest
import torch
from models import MODELS, RELEASE, inputs, make
from transformers import modeling_utils

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.applies(RELEASE >= (4, 53)),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
AttentionInterface = getattr(modeling_utils, "AttentionInterface", None)


def run(implementation, **changes):
    model = make("Llama", implementation)
    with attn_mask.checked() as findings, torch.no_grad():
        result = model(**inputs(MODELS["Llama"], "right") | changes)[0]
    return result, [finding.kind for finding in findings]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("own", [False, True], ids=["upstream", "installed"])
def test_masks_of_models_are_taken(implementation, own):
    if own:
        with attn_mask.installed():
            result, found = run(implementation)
    else:
        result, found = run(implementation)
    assert found == []
    model = make("Llama", implementation)
    with torch.no_grad():
        want = model(**inputs(MODELS["Llama"], "right"))[0]
    torch.testing.assert_close(result, want, rtol=0, atol=0)


def test_masks_of_users_are_checked():
    """A mask [b, 1, q, kv] goes to attention as it is."""
    lower = torch.ones(2, 1, 9, 9).tril()
    assert run("sdpa", attention_mask=lower)[1] == ["numbers"]
    assert run("sdpa", attention_mask=lower.bool())[1] == []


@pytest.mark.applies(hasattr(AttentionInterface, "get_interface"))
def test_eager_attention_adds_booleans():
    lower = torch.ones(2, 1, 9, 9).tril()
    look_up = AttentionInterface.get_interface
    assert run("eager", attention_mask=lower.bool())[1] == ["dtype"]
    assert run("eager", attention_mask=lower)[1] == ["numbers"]
    empty = torch.zeros(2, 1, 9, 9)
    empty[0, 0, 2] = -torch.inf
    result, found = run("eager", attention_mask=empty)
    assert found == ["rows"] and result.isnan().any()
    assert AttentionInterface.get_interface is look_up
