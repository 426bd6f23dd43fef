#pragma once

#include "rule/causal.h"
#include "rule/interval.h"
#include "rule/padding.h"
#include "rule/sliding_window.h"

namespace attn_mask {

/// Which keys a query attends to: leaves joined by `and`; without leaves, all of them. Plain data
/// of fixed size, handed to kernels by value, so that nothing has to be uploaded (a CUDA graph
/// being captured forbids it). It does not own the tensors that its leaves point into.
///
/// A new leaf is a struct with `attends` (one key) and, where it has one, `span` (the keys of one
/// query), a case in the two switches below and a make_rule.
struct Rule {
  enum class Kind : int32_t { kCausal, kSlidingWindow, kPadding };

  struct Leaf {
    Kind kind;
    union {
      Causal causal;
      SlidingWindow sliding_window;
      Padding padding;
    };
  };

  static constexpr int32_t kMaxLeaves = 4;

  Leaf leaves[kMaxLeaves];
  int32_t size;
};

/// What a row of a mask looks like before its unresolved leaves are asked.
struct RowSpan {
  Interval interval;    // the query attends to no key outside of it
  uint32_t unresolved;  // bit i: leaf i has yet to be asked about each key of the interval
};

/// The leaves named by `which`, a bit each: does the query attend to `key` under all of them?
ATTN_MASK_INLINE bool attends(const Rule& rule, const Query& query, int64_t key, uint32_t which) {
  bool answer = true;
  for (int32_t i = 0; i < rule.size; ++i) {
    const Rule::Leaf& leaf = rule.leaves[i];
    if (((which >> i) & 1U) == 0) {
      continue;
    }
    switch (leaf.kind) {
      case Rule::Kind::kCausal:
        answer = answer && leaf.causal.attends(query, key);
        break;
      case Rule::Kind::kSlidingWindow:
        answer = answer && leaf.sliding_window.attends(query, key);
        break;
      case Rule::Kind::kPadding:
        answer = answer && leaf.padding.attends(query, key);
        break;
    }
  }
  return answer;
}

/// Element level, the definition: does the query attend to `key`?
ATTN_MASK_INLINE bool attends(const Rule& rule, const Query& query, int64_t key) {
  return attends(rule, query, key, ~uint32_t{0});
}

/// Span level: the keys of `[0, kv_length)` that the query may attend to, in O(leaves).
ATTN_MASK_INLINE RowSpan row_span(const Rule& rule, const Query& query, int64_t kv_length) {
  RowSpan row{{0, kv_length}, 0};
  for (int32_t i = 0; i < rule.size; ++i) {
    const Rule::Leaf& leaf = rule.leaves[i];
    switch (leaf.kind) {
      case Rule::Kind::kCausal:
        row.interval = intersect(row.interval, leaf.causal.span(query, kv_length));
        break;
      case Rule::Kind::kSlidingWindow:
        row.interval = intersect(row.interval, leaf.sliding_window.span(query, kv_length));
        break;
      case Rule::Kind::kPadding:
        row.unresolved |= 1U << i;
        break;
    }
  }
  return row.interval.empty() ? RowSpan{{0, 0}, 0} : row;
}

/// The rule without leaves: every query attends to every key.
inline Rule make_rule() {
  Rule rule;
  rule.size = 0;
  return rule;
}

inline Rule make_rule(Causal causal) {
  Rule rule;
  rule.leaves[0].kind = Rule::Kind::kCausal;
  rule.leaves[0].causal = causal;
  rule.size = 1;
  return rule;
}

inline Rule make_rule(SlidingWindow sliding_window) {
  Rule rule;
  rule.leaves[0].kind = Rule::Kind::kSlidingWindow;
  rule.leaves[0].sliding_window = sliding_window;
  rule.size = 1;
  return rule;
}

inline Rule make_rule(const Padding& padding) {
  Rule rule;
  rule.leaves[0].kind = Rule::Kind::kPadding;
  rule.leaves[0].padding = padding;
  rule.size = 1;
  return rule;
}

/// A query attends to a key when it does under both. The two have at most kMaxLeaves leaves
/// together.
inline Rule operator&(Rule rule, const Rule& other) {
  for (int32_t i = 0; i < other.size; ++i) {
    rule.leaves[rule.size++] = other.leaves[i];
  }
  return rule;
}

}  // namespace attn_mask
