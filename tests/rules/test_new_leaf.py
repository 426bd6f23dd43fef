"""A new leaf is a struct and its lines in the list of leaves; then all levels agree about it."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scratch_copy import ScratchCopy, listed, replace

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent / "include"
STRUCT = """
struct EvenKeys {
  static constexpr bool kIsBand = IS_BAND;

  ATTN_MASK_INLINE bool attends(const Query&, const Key& key) const {
    return key.position % 2 == 0;
  }
  ATTN_MASK_INLINE LeafRow row(const Query&) const { return still_row(kEverywhere, false); }
  ATTN_MASK_INLINE uint64_t word(const Query&, const Key& first, int64_t) const {
    return first.position % 2 == 0 ? 0x5555555555555555U : 0xAAAAAAAAAAAAAAAAU;
  }
  bool has_table() const { return HAS_TABLE; }
  void move(int64_t, int64_t) {}
};

"""
PROGRAM = """
#include <cstdio>
#include <initializer_list>

#include "attention/flash.h"
#include "attention/plan.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "emulated_grid.h"
#include "format/boolean.h"
#include "rule/levels/spans.h"

using namespace attn_mask;

// What torch decides elsewhere.
const CpuKernels& attn_mask::cpu_kernels() { return isa_default::kKernels; }
void attn_mask::parallel_for(int64_t items, int64_t,
                             const std::function<void(int64_t, int64_t)>& f) {
  f(0, items);
}

int main() {
  uint8_t on_cpu[2][6];
  uint8_t on_cuda[2][6];
  MaskParams params{};
  narrow(params.rule, EvenKeys{});
  narrow(params.rule, SlidingWindow{0, 2});
  params.batch_size = params.heads = 1;
  params.q_length = 2;
  params.kv_length = 6;
  params.format = kBoolean;
  params.out_strides[2] = 6;
  params.out_strides[3] = 1;
  params.out = on_cpu;
  isa_default::kKernels.write_tiles(params, {6, 1}, 0, 2);
  params.out = on_cuda;
  test::emulate_write_mask<uint8_t>(params);
  for (int q = 0; q < 2; ++q) {
    const Query query = params.query(0, q);
    uint8_t elements[6];
    uint8_t answers[6];
    for (int k = 0; k < 6; ++k) {
      elements[k] = attends(params.rule, query, params.key(0, k));
    }
    isa_default::kKernels.evaluate(params, query, 1U << 2, {0, 6}, answers);
    for (const uint8_t* row : {elements, answers, on_cpu[q], on_cuda[q]}) {
      for (int k = 0; k < 6; ++k) {
        std::putchar('0' + row[k]);
      }
      std::putchar(' ');
    }
    const RowSpans spans = row_spans(params.rule, query, params.kv_positions, 6);
    const RowRun run = row_run(params.rule, query, params.q_positions, params.kv_positions, 6, 1);
    std::printf("%u %u ", spans.unresolved, run.unresolved);
  }
  // Attention: flash kernels can't say it, and tables are not read on the host.
  Problem window = params;
  window.q_length = window.kv_length = 2048;
  const auto plan = attention::make_plan_without_data(window, {1, 4, /*on_host=*/false});
  std::printf("%d %d ", attention::flash_band(window).has_value(),
              plan[0].segments[0].keys.end == window.kv_length);
}
"""


def flags():
    """The C++ flags of every build, also of those without -Werror."""
    text = (ROOT / "CMakeLists.txt").read_text()
    of_everybody = text[: text.index("if(ATTN_MASK_WERROR)")]
    (listed,) = re.findall(r"COMPILE_LANGUAGE:CXX>:([^>]+)>", of_everybody)
    return ["-std=c++20", "-DATTN_MASK_ISA=isa_default", *listed.split(";")]


def compile_with(compiler, csrc, *arguments):
    torch_headers = ["-isystem", TORCH, "-isystem", TORCH / "torch/csrc/api/include"]
    command = [compiler, *flags(), f"-I{csrc}", f"-I{ROOT}/tests/cpp", *torch_headers, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def switches_without(kind, compiler, csrc, *more_flags):
    """The files with a switch that has no case for a kind, and whether all sources compile."""
    sources = [path for path in csrc.rglob("*.cpp") if "Rule::Kind" in path.read_text()]
    assert len(sources) >= 6
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(
                lambda path: compile_with(compiler, csrc, "-fsyntax-only", *more_flags, path),
                sources,
            )
        )
    lines = [line for each in done for line in each.stderr.splitlines() if kind in line]
    files = {line.split(":")[0].removeprefix(f"{csrc}/") for line in lines if "error:" in line}
    return files, all(each.returncode == 0 for each in done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "is_band", "has_table"), [("g++", "true", "false"), ("clang++", "false", "true")]
)
def test_a_leaf_that_the_list_forgets_does_not_compile(compiler, is_band, has_table, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    leaves = csrc / "rule/leaf.h"
    replace(leaves, "    kPadding,\n", "    kPadding,\n    kEvenKeys,\n")
    replace(leaves, "  Leaf(All)", "  Leaf(EvenKeys) : kind(Kind::kEvenKeys) {}\n  Leaf(All)")
    struct = STRUCT.replace("IS_BAND", is_band).replace("HAS_TABLE", has_table)
    replace(leaves, "attn_mask {\n\n", f"attn_mask {{\n{struct}")
    assert switches_without("kEvenKeys", compiler, csrc) == ({"rule/leaf.h"}, False)

    nothing = "    case Leaf::Kind::kNothing:\n"
    replace(
        leaves,
        nothing,
        f"    case Leaf::Kind::kEvenKeys:\n      return f(EvenKeys{{}});\n{nothing}",
    )
    # Switches that have a default, too, would be reported now.
    assert switches_without("kEvenKeys", compiler, csrc, "-Werror=switch-enum")[0] == set()
    assert switches_without("kEvenKeys", compiler, csrc) == (set(), True)

    program = tmp_path / "main.cpp"
    program.write_text(PROGRAM)
    kernels = [path for path in csrc.glob("cpu/*.cpp") if "ATTN_MASK_ISA" in path.read_text()]
    rooms = [*csrc.glob("rule/**/*.cpp"), csrc / "attention/plan.cpp", csrc / "attention/flash.cpp"]
    sources = [program, *kernels, *rooms]
    done = compile_with(compiler, csrc, "-O1", *sources, "-o", tmp_path / "main")
    assert done.returncode == 0, done.stderr
    said = subprocess.check_output([tmp_path / "main"], text=True).split()
    # The first node is the leaf: its spans are left unresolved.
    of_rows = [*["101000"] * 4, "1", "1", *["001000"] * 4, "1", "1"]
    assert said == [*of_rows, "0", str(int(has_table == "true"))]


# A leaf, made by the walk of CONTRIBUTING.md: what stands in each file, and what it becomes.
LEAF = """#pragma once

#include "rule/leaf/row.h"

namespace attn_mask {
STRUCT}  // namespace attn_mask
"""
STEPS = {
    "csrc/rule/leaf.h": [
        (
            '#include "rule/leaf/constant.h"\n',
            '#include "rule/leaf/constant.h"\n#include "rule/leaf/even_keys.h"\n',
        ),
        ("    kPadding,\n", "    kPadding,\n    kEvenKeys,\n"),
        ("  Leaf(All)", "  Leaf(EvenKeys) : kind(Kind::kEvenKeys) {}\n  Leaf(All)"),
        (
            "    case Leaf::Kind::kNothing:\n",
            "    case Leaf::Kind::kEvenKeys:\n      return f(EvenKeys{});\n"
            "    case Leaf::Kind::kNothing:\n",
        ),
    ],
    "csrc/rule/program.h": [
        ("  kNothing = 12, ", "  kEvenKeys = 13,\n  kNothing = 12, "),
        ('"NOTHING"}', '"NOTHING", "EVEN_KEYS"}'),
    ],
    "csrc/ops/core/rule_program.cpp": [
        (
            "      case Opcode::kNothing:\n",
            "      case Opcode::kEvenKeys:\n"
            "        emit_leaf(Rule::Kind::kEvenKeys, conjunct);\n        return;\n"
            "      case Opcode::kNothing:\n",
        ),
    ],
    "python/attn_mask/_core/mask_rules.py": [
        (
            '    "documents",\n    "function",\n',
            '    "documents",\n    "even_keys",\n    "function",\n',
        ),
        (
            'SHIFT = _C.OPCODES["SHIFT"]\n',
            'SHIFT = _C.OPCODES["SHIFT"]\nEVEN_KEYS = _C.OPCODES["EVEN_KEYS"]\n',
        ),
        (
            "def nothing() -> MaskFunction:\n",
            "@dataclass(frozen=True, eq=False, repr=False)\n"
            "class EvenKeys(MaskFunction):\n"
            '    factory = "even_keys"\n\n'
            "    def evaluate(self, batch_idx, head_idx, q_idx, kv_idx):\n"
            "        return kv_idx % 2 == 0\n\n"
            "    def encode_into(self, program, place):\n"
            "        program.code += (EVEN_KEYS,)\n\n\n"
            "def even_keys() -> MaskFunction:\n    return EvenKeys()\n\n\n"
            "def nothing() -> MaskFunction:\n",
        ),
    ],
    "python/attn_mask/_graph/aten.py": [
        (
            "        if opcode == mask_rules.NOTHING:\n",
            "        if opcode == mask_rules.EVEN_KEYS:\n"
            "            return mask_rules.even_keys()\n"
            "        if opcode == mask_rules.NOTHING:\n",
        ),
    ],
    "csrc/attn_mask/rules.h": [
        (
            "ATTN_MASK_API MaskRule nothing();\n",
            "ATTN_MASK_API MaskRule nothing();\nATTN_MASK_API MaskRule even_keys();\n",
        ),
    ],
    "csrc/attn_mask/rules.cpp": [
        (
            "MaskRule nothing() {\n",
            "MaskRule even_keys() { return leaf(Opcode::kEvenKeys); }\n\nMaskRule nothing() {\n",
        ),
    ],
}
IN_PYTHON = """
import copy, pickle
import torch
import attn_mask
from attn_mask import causal, documents
from attn_mask.rules import even_keys
from torch.nn.attention import flex_attention

N = 300
index = torch.arange(N)
ids = index // 70
CASES = [
    (even_keys(), (index % 2 == 0).expand(N, N)),
    (causal() & even_keys(), (index % 2 == 0) & (index <= index[:, None])),
    (documents(ids) & even_keys(), (index % 2 == 0) & (ids == ids[:, None])),
    (causal() | even_keys(), (index % 2 == 0) | (index <= index[:, None])),
]
for rule, visible in CASES:
    rules = [rule, pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)]
    for each in rules:
        assert repr(each) == repr(rule)
        assert torch.equal(each(0, 0, index[:, None], index).expand(N, N), visible)
        assert torch.equal(attn_mask.boolean(each, 1, N, N)[0, 0], visible)
    assert rule.is_native
    assert torch.equal(attn_mask.additive(rule, 1, N, N)[0, 0] == 0, visible)
    with attn_mask.aten_only():
        assert torch.equal(attn_mask.boolean(rule, 1, N, N)[0, 0], visible)
    ours = attn_mask.create_block_mask(rule, 1, 1, N, N, "cpu")
    torchs = flex_attention.create_block_mask(lambda b, h, q, k: visible[q, k], 1, 1, N, N, "cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name
    compiled = torch.compile(
        lambda: attn_mask.boolean(rule, 1, N, N), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled()[0, 0], visible)
    q, k, v = (torch.randn(1, 2, N, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    got = attn_mask.scaled_dot_product_attention(q, k, v, rule)
    scores = (q @ k.mT / 8**0.5).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
    torch.testing.assert_close(got, weights @ v)
    paths = {segment.path for segment in attn_mask.attention_plan(rule, 1, N, N)}
    assert paths == {"mask"}
print("ok")
"""
IN_CPP = """
#include <ATen/ATen.h>

#include <cstdio>

#include "attn_mask/rules.h"

int main() {
  using namespace attn_mask;
  const at::Tensor mask = boolean(causal() & even_keys(), 1, 3, 4);
  for (int64_t i = 0; i < mask.numel(); ++i) {
    std::putchar('0' + mask.flatten()[i].item<bool>());
  }
}
"""


@pytest.mark.slow
def test_the_walk_is_all_that_a_leaf_needs(tmp_path):
    """The library of a copy to which the walk's files were changed, and no other."""
    leaf = "csrc/rule/leaf/even_keys.h"
    walk = listed("Adding a leaf")
    assert {*STEPS, leaf} == walk - {"csrc/rule/leaf/same_id.h"} | {leaf}
    struct = STRUCT.replace("IS_BAND", "false").replace("HAS_TABLE", "false")
    copy = ScratchCopy(tmp_path, STEPS, {leaf: LEAF.replace("STRUCT", struct)})
    copy.build()
    assert copy.run("-c", IN_PYTHON).strip() == "ok"
    program = tmp_path / "main.cpp"
    program.write_text(IN_CPP)
    libraries = TORCH.parent / "lib"
    links = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    of_ours = copy.top / "python" / "attn_mask" / "lib"
    links += [f"-L{of_ours}", "-lattn_mask", f"-Wl,-rpath,{of_ours}", "-Wl,--no-as-needed"]
    done = compile_with("g++", copy.top / "csrc", program, *links, "-o", tmp_path / "program")
    assert done.returncode == 0, done.stderr[-3000:]
    assert subprocess.check_output([tmp_path / "program"], text=True) == "100010001010"
