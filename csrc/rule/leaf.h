#pragma once

#include "macros.h"
#include "rule/leaf/causal.h"
#include "rule/leaf/chunk.h"
#include "rule/leaf/constant.h"
#include "rule/leaf/padding.h"
#include "rule/leaf/same_id.h"
#include "rule/leaf/sliding_window.h"

namespace attn_mask {

/// The list of leaves. One of them, or (as the kind of a rule's node) what joins two rules.
///
/// A new leaf is a struct in leaf/ and, here, a constructor, a Kind, a member and a case in
/// visit_leaf; nothing compiles while the case is missing, as -Werror=switch is always on. The
/// struct has
///
///     bool attends(query, key)   whether the query attends to the key: the leaf's definition
///     LeafRow row(query)         which keys it may attend to; where that is not known,
///                                `still_row(kEverywhere, false)`
///     uint64_t word(query, first, count)   which of `count` consecutive keys (and columns) from
///                                `first` on it attends to; bits beyond them may be anything
///     bool kIsBand               row() is the same for all queries, at as many positions before
///                                and after them, or at the same positions, and reads no data
///     bool has_table()           whether attends() reads memory; host only, as the next
///     void move(rows, columns)   the mask begins so many rows and columns further on: for what is
///                                looked up by these, not by positions
///
/// The positions of query and key are those that the leaf sees. An `if (kind == ...)` may only make
/// something faster: every other kind must reach a path that is right.
struct Leaf {
  enum class Kind : int32_t {
    kAll,
    kNothing,
    kCausal,
    kSlidingWindow,
    kChunk,
    kSameId,
    kPadding,
    kAnd,
    kOr,
  };

  Kind kind;
  union {
    SlidingWindow sliding_window;
    Chunk chunk;
    SameId same_id;
    Padding padding;
  };

  Leaf() = default;
  explicit Leaf(Kind of) : kind(of) {}
  Leaf(All) : kind(Kind::kAll) {}
  Leaf(Nothing) : kind(Kind::kNothing) {}
  Leaf(Causal) : kind(Kind::kCausal) {}
  Leaf(SlidingWindow leaf) : kind(Kind::kSlidingWindow), sliding_window(leaf) {}
  Leaf(const Chunk& leaf) : kind(Kind::kChunk), chunk(leaf) {}
  Leaf(const SameId& leaf) : kind(Kind::kSameId), same_id(leaf) {}
  Leaf(const Padding& leaf) : kind(Kind::kPadding), padding(leaf) {}
};

/// Calls `f` with the leaf and returns what it does. A node that joins others decides nothing
/// itself.
ATTN_MASK_ANY_EXECUTION_SPACE
template <typename OfLeaf, typename F>
ATTN_MASK_INLINE auto visit_leaf(OfLeaf& leaf, const F& f) {
  switch (leaf.kind) {
    case Leaf::Kind::kAll:
      return f(All{});
    case Leaf::Kind::kCausal:
      return f(Causal{});
    case Leaf::Kind::kSlidingWindow:
      return f(leaf.sliding_window);
    case Leaf::Kind::kChunk:
      return f(leaf.chunk);
    case Leaf::Kind::kSameId:
      return f(leaf.same_id);
    case Leaf::Kind::kPadding:
      return f(leaf.padding);
    case Leaf::Kind::kNothing:
    case Leaf::Kind::kAnd:
    case Leaf::Kind::kOr:
      break;
  }
  return f(Nothing{});
}

}  // namespace attn_mask
