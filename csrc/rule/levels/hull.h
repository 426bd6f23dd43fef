#pragma once

#include <type_traits>

#include "rule/rule.h"

namespace attn_mask {

/// What is known of all rows from arithmetic alone: which keys are left by the leaves that hold for
/// the whole rule and see the mask's own positions.
struct Hull {
  int64_t before = kOpen;        // from so many positions before the query's
  int64_t after = kOpen;         // to so many after it,
  Interval known = kEverywhere;  // and among these,
  int32_t chunk = -1;            // and in the chunk of this node, if there is one
  uint32_t unresolved = 0;       // bit i: node i has yet to be evaluated for each key that is left
  bool is_all = true;            // nothing else decides

  ATTN_MASK_INLINE explicit Hull(const Rule& rule) {
    for (int32_t i = 0; i < rule.size; ++i) {
      const Rule::Node& node = rule.nodes[i];
      if (node.kind == Rule::Kind::kAnd) {
        continue;
      }
      if (!node.conjunct || node.step_begin != node.step_end) {
        is_all = false;
        continue;
      }
      if (node.kind == Rule::Kind::kChunk) {
        is_all = is_all && chunk < 0;
        chunk = chunk < 0 || node.chunk.size < rule.nodes[chunk].chunk.size ? i : chunk;
        continue;
      }
      visit_leaf(node, [&](const auto& leaf) ATTN_MASK_INLINE_LAMBDA { add(leaf, i); });
    }
  }

  /// Whether nothing is left of a node where it is known which keys the hull of a row has.
  bool says_all_of(const Rule& rule, int32_t index) const {
    const Rule::Node& node = rule.nodes[index];
    return node.conjunct && node.step_begin == node.step_end && ((unresolved >> index) & 1U) == 0 &&
           (node.kind == Rule::Kind::kChunk ? chunk == index
                                            : visit_leaf(node, [](const auto& leaf) {
                                                return std::decay_t<decltype(leaf)>::kIsBand;
                                              }));
  }

  /// The positions of the keys that a query may attend to, if they are known.
  ATTN_MASK_INLINE Interval near(const Rule& rule, const Query& query) const {
    return chunk < 0 ? band(query) : intersect(band(query), rule.nodes[chunk].chunk.keys(query));
  }

  /// The same without chunks.
  ATTN_MASK_INLINE Interval band(const Query& query) const {
    return {query.position - before, query.position + after + 1};
  }

  /// The positions of the keys that a query may attend to.
  ATTN_MASK_INLINE Interval keys(const Rule& rule, const Query& query) const {
    return intersect(near(rule, query), known);
  }

 private:
  template <typename Of>
  ATTN_MASK_INLINE void add(const Of& leaf, int32_t node) {
    if constexpr (Of::kIsBand) {
      const LeafRow row = leaf.row(Query{});  // of a query at position 0
      if (row.begin_slope != 0) {
        before = before < -row.keys.begin ? before : -row.keys.begin;
      } else {
        known.begin = known.begin > row.keys.begin ? known.begin : row.keys.begin;
      }
      if (row.end_slope != 0) {
        after = after < row.keys.end - 1 ? after : row.keys.end - 1;
      } else {
        known.end = known.end < row.keys.end ? known.end : row.keys.end;
      }
      unresolved |= row.exact ? 0 : uint32_t{1} << node;
    } else {
      is_all = false;
    }
  }
};

}  // namespace attn_mask
