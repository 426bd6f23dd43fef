"""A new leaf is a struct and its lines in the list of leaves; then all levels agree about it."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

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
#include "rule/spans.h"

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


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


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
    rooms = [*(csrc / "rule").glob("*.cpp"), *(csrc / "attention").glob("*.cpp")]
    sources = [program, *kernels, *rooms]
    done = compile_with(compiler, csrc, "-O1", *sources, "-o", tmp_path / "main")
    assert done.returncode == 0, done.stderr
    said = subprocess.check_output([tmp_path / "main"], text=True).split()
    # The first node is the leaf: its spans are left unresolved.
    of_rows = [*["101000"] * 4, "1", "1", *["001000"] * 4, "1", "1"]
    assert said == [*of_rows, "0", str(int(has_table == "true"))]
