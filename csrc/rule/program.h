#pragma once

// A rule as operators take it: a program of numbers in prefix order, and the tensors that it names
// by index. Python has these numbers from here (attn_mask._C.OPCODES).

#include <cstdint>

namespace attn_mask {

/// Each line is a rule; `b` is the batch size, and 1 in its place repeats. Graphs that were
/// exported hold the numbers: they stay.
enum class Opcode : int64_t {
  kAll = 0,        // -                        every key
  kCausal = 1,     // -                        key <= q
  kWindow = 2,     // left, right (or absent)  q - left <= key <= q + right
  kChunk = 3,      // size, operand or absent  same chunk of `size` positions after the padding [b]
  kBlocks = 4,     // operand                  ids[b, q] == ids[b, key] >= 0
  kPadding = 5,    // operand                  mask[b, key] is not zero
  kDocuments = 6,  // operand                  ids[b, q] == ids[b, key]
  kBits = 7,       // operand                  bits[b, heads or 1, row, column], bool
  kAnd = 8,        // n, n rules
  kOr = 9,         // n, n rules
  kReindex = 10,   // operand, rule            the rule at positions p[b, q], p[b, key]
  kShift = 11,     // q_add, key_add, rule     the rule at positions q + q_add, key + key_add
  kNothing = 12,   // -                        no key
};

/// What Python calls them, by number.
inline constexpr const char* kOpcodeNames[] = {"ALL",     "CAUSAL",    "WINDOW", "CHUNK", "BLOCKS",
                                               "PADDING", "DOCUMENTS", "BITS",   "AND",   "OR",
                                               "REINDEX", "SHIFT",     "NOTHING"};

/// What stands for an open side of a window, and for chunks that have no padding before them.
inline constexpr int64_t kAbsent = -1;

/// How deep programs may be nested.
inline constexpr int32_t kMaxDepth = 256;

}  // namespace attn_mask
