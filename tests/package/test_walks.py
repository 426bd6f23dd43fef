"""The walks to a format and to an operator are all that each needs: both are made in one copy."""

import pytest
from scratch_copy import ScratchCopy, listed

# `hidden`: True where a key is masked. `_block_attends`: whether a block has a visible key.
NEW = {
    "csrc/format/hidden.h": """#pragma once

#include "format/dense.h"

namespace attn_mask {

inline constexpr DenseFormat kHidden = {1, 0, 1};

}  // namespace attn_mask
""",
    "csrc/ops/block_attends.cpp": """#include <ATen/ops/ne.h>

#include "ops/core/call.h"
#include "ops/core/operators.h"

namespace attn_mask::ops {

at::Tensor BlockAttends::run(const Given& given) {
  return at::ne(call_with<BlockStates>(BlockStates::Given::of(given)), 0);
}

}  // namespace attn_mask::ops
""",
}
TABLE = "csrc/ops/core/operators.h"
IN_ATEN = "python/attn_mask/_graph/aten.py"
SAMPLES = "tests/support/sample_calls.py"
FORMAT = {
    TABLE: [
        (
            "struct Boolean : ",
            'struct Hidden : Operator<"hidden(", kRule, kSizes, "*, ", kOffsets, kPositions,\n'
            '                         "Device? device=None, bool unmask_unattended=False, "\n'
            '                         "SymInt stride_multiple=1) -> Tensor"> {\n'
            "  static Run run;\n};\n\nstruct Boolean : ",
        ),
        ("Boolean, Additive, BlockMask,", "Boolean, Hidden, Additive, BlockMask,"),
    ],
    "csrc/ops/rule_mask.cpp": [
        (
            '#include "format/boolean.h"\n',
            '#include "format/boolean.h"\n#include "format/hidden.h"\n',
        ),
        (
            "at::Tensor Additive::run(",
            "at::Tensor Hidden::run(const Output& output, const Given& given) {\n"
            "  return rule_mask(output, RuleArguments(given), std::nullopt,\n"
            '                   given.get<"unmask_unattended">(), at::kBool, kHidden);\n}\n\n'
            "at::Tensor Additive::run(",
        ),
    ],
    IN_ATEN: [
        (
            "@_operator\ndef additive(",
            "@_operator\n"
            "def hidden(\n"
            "    *, batch_size: Any, unmask_unattended: bool, stride_multiple: Any, **where: Any\n"
            ") -> torch.Tensor:\n"
            "    attends = _attends(batch_size=batch_size, **where)\n"
            "    if unmask_unattended:\n"
            "        attends = attends | ~attends.any(-1, keepdim=True)\n"
            "    return _padded(~attends, stride_multiple).expand(batch_size, -1, -1, -1)\n\n\n"
            "@_operator\ndef additive(",
        ),
    ],
    "python/attn_mask/_core/write.py": [
        (
            "    out: torch.Tensor | None = None\n\n    def of_rows(",
            "    out: torch.Tensor | None = None\n    is_hidden: bool = False\n\n    def of_rows(",
        ),
        (
            "            mask = ops.boolean(code,",
            "            write = ops.hidden if self.is_hidden else ops.boolean\n"
            "            mask = write(code,",
        ),
    ],
    "python/attn_mask/_core/dense.py": [
        ('__all__ = ["additive", "boolean"]', '__all__ = ["additive", "boolean", "hidden"]'),
        (
            "    _, bias, unmasks, _, out = mask_format",
            "    _, bias, unmasks, _, out, _ = mask_format",
        ),
        (
            "@timed\ndef additive(",
            "@timed\n"
            "def hidden(rule: Any, batch_size: int, q_length: int, kv_length: int)"
            " -> torch.Tensor:\n"
            "    sizes, none = (batch_size, q_length, kv_length), (None, None)\n"
            "    mask_format = MaskFormat(is_hidden=True)\n"
            '    return _mask("hidden", rule, sizes, 1, (0, 0), none, None, mask_format)\n\n\n'
            "@timed\ndef additive(",
        ),
    ],
    "python/attn_mask/__init__.py": [
        (
            "from attn_mask.masks import boolean as boolean\n",
            "from attn_mask.masks import boolean as boolean\n"
            "from attn_mask.masks import hidden as hidden\n",
        ),
    ],
    "tests/support/rule_reference.py": [
        (
            "def additive(*args, dtype, bias=None, **kwargs):\n",
            "def hidden(*args, **kwargs):\n    return ~boolean(*args, **kwargs)\n\n\n"
            "def additive(*args, dtype, bias=None, **kwargs):\n",
        ),
    ],
    SAMPLES: [
        (
            '    "boolean": [\n',
            '    "hidden": [\n        ((*causal().encode(), 2, 4, 4), {}),\n'
            '        ((*(causal() & padding(PADDING)).encode(), 3, 2, 5), {"q_offset": 3}),\n'
            '    ],\n    "boolean": [\n',
        ),
        (
            '    "boolean": (_RULE, {"q_offset": 2}),\n',
            '    "hidden": (_RULE, {"q_offset": 2}),\n    "boolean": (_RULE, {"q_offset": 2}),\n',
        ),
    ],
}
OPERATOR = {
    TABLE: [
        (
            "struct BlockStates : ",
            'struct BlockAttends : Operator<"_block_attends(", kRule, kBlocks, "*, ", kOffsets,\n'
            '                               kPositions, "Device? device=None) -> Tensor"> {\n'
            "  static Run run;\n};\n\nstruct BlockStates : ",
        ),
        (
            "         BlockStates, BlockMaskWidths,",
            "         BlockStates, BlockAttends, BlockMaskWidths,",
        ),
    ],
    "CMakeLists.txt": [
        (
            "  csrc/ops/block_lists.cpp\n",
            "  csrc/ops/block_attends.cpp\n  csrc/ops/block_lists.cpp\n",
        ),
    ],
    IN_ATEN: [
        (
            "@_operator\ndef _block_states(\n",
            "@_operator\ndef _block_attends(**where: Any) -> torch.Tensor:\n"
            "    return _block_states(**where) != _EMPTY\n\n\n"
            "@_operator\ndef _block_states(\n",
        ),
    ],
    SAMPLES: [
        (
            '    "_block_states": [\n',
            '    "_block_attends": [\n'
            "        ((*causal().encode(), 2, 2, 40, 50, 16, 16), {}),\n"
            '    ],\n    "_block_states": [\n',
        ),
    ],
}
IN_PYTHON = """
import attn_mask, torch
from attn_mask import causal, documents, sliding_window

ids = torch.arange(70) // 9
for rule in (causal(), causal() & sliding_window(5), causal() & documents(ids)):
    visible = attn_mask.boolean(rule, 2, 70, 70)
    assert torch.equal(attn_mask.hidden(rule, 2, 70, 70), ~visible)
    code, operands = rule.encode()
    got = torch.ops.attn_mask._block_attends(code, operands, 1, 1, 70, 70, 10, 7)
    want = visible[0].view(1, 1, 7, 10, 10, 7).any(5).any(3)
    assert torch.equal(got, want)
print("ok")
"""


@pytest.mark.slow
def test_walks_are_all_that_a_format_and_an_operator_need(tmp_path):
    """The tests of all operators pass for both in a copy with the files of the walks changed."""
    of_boolean, of_hidden = "csrc/format/boolean.h", "csrc/format/hidden.h"
    assert {*FORMAT, of_hidden} == listed("Adding a format") - {of_boolean} | {of_hidden}
    of_states, of_new = "csrc/ops/block_lists.cpp", "csrc/ops/block_attends.cpp"
    assert {*OPERATOR, of_new} == listed("Adding an operator") - {of_states} | {of_new}
    both = {name: [*FORMAT.get(name, []), *OPERATOR.get(name, [])] for name in FORMAT | OPERATOR}
    copy = ScratchCopy(tmp_path, both, NEW)
    copy.build()
    assert copy.run("-c", IN_PYTHON).strip() == "ok"
    tests = [f"tests/operators/{name}.py" for name in ("test_operators", "test_reference")]
    chosen = "(hidden or block_attends) and not slow"
    ran = copy.run("-m", "pytest", "-q", *tests, "-k", chosen, "-p", "no:cacheprovider")
    assert " passed" in ran, ran[-2000:]
