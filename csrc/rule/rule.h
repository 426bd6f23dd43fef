#pragma once

#include "rule/causal.h"
#include "rule/chunk.h"
#include "rule/interval.h"
#include "rule/padding.h"
#include "rule/positions.h"
#include "rule/query.h"
#include "rule/same_id.h"
#include "rule/sliding_window.h"

namespace attn_mask {

/// Which keys a query attends to: a tree of leaves under `and` and `or`, as nodes in postfix order.
/// Plain data of fixed size, handed to kernels by value, so that nothing has to be uploaded (a CUDA
/// graph being captured forbids it). It does not own the memory that its leaves point into.
///
/// A new leaf is a struct in a file of its own, a member of Node, a Kind, a make_rule, an opcode in
/// ops/rule_program.cpp, and a case in each switch over kinds: leaf_attends (its definition),
/// spans.cpp (`unresolved` where it has no spans), SpanFinder in cpu/kernels.cpp, asks_elements in
/// cpu/block_mask.cpp. No such switch has a default, and -Werror=switch is always on, so that
/// nothing compiles while a case is missing. Code that tests for a kind by `if` (row_hull, say)
/// must be right, if slower, for every other.
struct Rule {
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

  /// A leaf may see other positions than those of the mask: each step adds to them or looks them
  /// up.
  struct Step {
    int64_t q_add;
    int64_t key_add;
    Table table;  // no data: add only
  };

  struct Node {
    Kind kind;
    int32_t first;       // where the subtree begins that this node ends
    int32_t step_begin;  // the leaf's steps, outermost first
    int32_t step_end;
    bool conjunct;  // all that the rule allows, this leaf allows
    union {
      SlidingWindow sliding_window;
      Chunk chunk;
      SameId same_id;
      Padding padding;
    };
  };

  static constexpr int32_t kMaxNodes = 24;
  static constexpr int32_t kMaxSteps = 8;

  Node nodes[kMaxNodes];
  Step steps[kMaxSteps];
  int32_t size;
  int32_t steps_size;
};

/// Does the leaf allow the query to attend to the key?
ATTN_MASK_INLINE bool leaf_attends(const Rule& rule, const Rule::Node& leaf, const Query& query,
                                   const Key& key) {
  int64_t q = query.position;
  int64_t k = key.position;
  for (int32_t i = leaf.step_begin; i < leaf.step_end; ++i) {
    const Rule::Step& step = rule.steps[i];
    if (!step.table.exists()) {
      q += step.q_add;
      k += step.key_add;
    } else if (step.table.holds(q) && step.table.holds(k)) {
      q = step.table.position_at(query.batch, q);
      k = step.table.position_at(query.batch, k);
    } else {
      return false;
    }
  }
  switch (leaf.kind) {
    case Rule::Kind::kAll:
      return true;
    case Rule::Kind::kCausal:
      return Causal{}.span(q).contains(k);
    case Rule::Kind::kSlidingWindow:
      return leaf.sliding_window.span(q).contains(k);
    case Rule::Kind::kChunk:
      return leaf.chunk.span(query.batch, q).contains(k);
    case Rule::Kind::kSameId:
      return leaf.same_id.attends(query.batch, q, k);
    case Rule::Kind::kPadding:
      return leaf.padding.attends(query, leaf.padding.by_column ? key.column : k);
    case Rule::Kind::kNothing:
    case Rule::Kind::kAnd:
    case Rule::Kind::kOr:
      break;
  }
  return false;
}

/// Element level, the definition: does the query attend to the key, under the subtree that ends
/// with node `last`?
ATTN_MASK_INLINE bool attends(const Rule& rule, int32_t last, const Query& query, const Key& key) {
  uint32_t stack = 0;  // a bit for each answer that waits for its `and` or `or`
  for (int32_t i = rule.nodes[last].first; i <= last; ++i) {
    const Rule::Node& node = rule.nodes[i];
    if (node.kind == Rule::Kind::kAnd || node.kind == Rule::Kind::kOr) {
      const uint32_t both = stack & (stack >> 1) & 1U;
      const uint32_t either = (stack | (stack >> 1)) & 1U;
      stack = (stack >> 2 << 1) | (node.kind == Rule::Kind::kAnd ? both : either);
    } else {
      stack = stack << 1 | (leaf_attends(rule, node, query, key) ? 1U : 0U);
    }
  }
  return (stack & 1U) != 0;
}

ATTN_MASK_INLINE bool attends(const Rule& rule, const Query& query, const Key& key) {
  return attends(rule, rule.size - 1, query, key);
}

/// What is known of a row without asking about each key.
struct RowHull {
  Interval positions;  // the query attends to no key outside of it
  bool exact;          // and to every key within
};

/// The hull that causality, windows, chunks, and ids with bounds give, in O(nodes).
ATTN_MASK_INLINE RowHull row_hull(const Rule& rule, const Query& query) {
  RowHull row{{-kOpen, kOpen}, true};
  for (int32_t i = 0; i < rule.size; ++i) {
    const Rule::Node& node = rule.nodes[i];
    if (node.kind == Rule::Kind::kAnd) {
      continue;
    }
    const bool plain = node.conjunct && node.step_begin == node.step_end;
    if (plain && node.kind == Rule::Kind::kCausal) {
      row.positions = intersect(row.positions, Causal{}.span(query.position));
    } else if (plain && node.kind == Rule::Kind::kSlidingWindow) {
      row.positions = intersect(row.positions, node.sliding_window.span(query.position));
    } else if (plain && node.kind == Rule::Kind::kChunk) {
      row.positions = intersect(row.positions, node.chunk.span(query.batch, query.position));
    } else if (plain && node.kind == Rule::Kind::kSameId && node.same_id.has_span(query.batch)) {
      row.positions = intersect(row.positions, node.same_id.span(query.batch, query.position));
    } else if (!(plain && node.kind == Rule::Kind::kAll)) {
      row.exact = false;
    }
  }
  return row;
}

namespace detail {

inline Rule leaf(Rule::Kind kind) {
  Rule rule{};
  rule.nodes[0].kind = kind;
  rule.nodes[0].conjunct = true;
  rule.size = 1;
  return rule;
}

}  // namespace detail

/// The rule under which every query attends to every key.
inline Rule make_rule() { return detail::leaf(Rule::Kind::kAll); }

inline Rule make_rule(Causal) { return detail::leaf(Rule::Kind::kCausal); }

inline Rule make_rule(SlidingWindow sliding_window) {
  Rule rule = detail::leaf(Rule::Kind::kSlidingWindow);
  rule.nodes[0].sliding_window = sliding_window;
  return rule;
}

inline Rule make_rule(const Chunk& chunk) {
  Rule rule = detail::leaf(Rule::Kind::kChunk);
  rule.nodes[0].chunk = chunk;
  return rule;
}

inline Rule make_rule(const SameId& same_id) {
  Rule rule = detail::leaf(Rule::Kind::kSameId);
  rule.nodes[0].same_id = same_id;
  return rule;
}

inline Rule make_rule(const Padding& padding) {
  Rule rule = detail::leaf(Rule::Kind::kPadding);
  rule.nodes[0].padding = padding;
  return rule;
}

/// The rule under which no query attends to any key.
inline Rule make_nothing() { return detail::leaf(Rule::Kind::kNothing); }

/// Writes `from` over `to` but for the nodes and steps that it has no use for: most of a rule is
/// room, and to copy it takes as long as to write a small mask.
inline void copy_used(const Rule& from, Rule& to) {
  for (int32_t i = 0; i < from.size; ++i) {
    to.nodes[i] = from.nodes[i];
  }
  for (int32_t i = 0; i < from.steps_size; ++i) {
    to.steps[i] = from.steps[i];
  }
  to.size = from.size;
  to.steps_size = from.steps_size;
}

/// Whether two rules fit into one.
inline bool fit_together(const Rule& a, const Rule& b) {
  return a.size + b.size + 1 <= Rule::kMaxNodes && a.steps_size + b.steps_size <= Rule::kMaxSteps;
}

/// `a` and `b`, or `a` or `b`; they must fit together.
inline Rule join(Rule a, const Rule& b, Rule::Kind kind) {
  const int32_t nodes_before = a.size;
  const int32_t steps_before = a.steps_size;
  for (int32_t i = 0; i < b.size; ++i) {
    Rule::Node node = b.nodes[i];
    node.first += nodes_before;
    node.step_begin += steps_before;
    node.step_end += steps_before;
    a.nodes[a.size++] = node;
  }
  for (int32_t i = 0; i < b.steps_size; ++i) {
    a.steps[a.steps_size++] = b.steps[i];
  }
  if (kind == Rule::Kind::kOr) {
    for (int32_t i = 0; i < a.size; ++i) {
      a.nodes[i].conjunct = false;
    }
  }
  Rule::Node& node = a.nodes[a.size++];
  node = Rule::Node{};
  node.kind = kind;
  node.first = 0;
  node.conjunct = kind == Rule::Kind::kAnd;
  return a;
}

inline Rule operator&(const Rule& a, const Rule& b) { return join(a, b, Rule::Kind::kAnd); }
inline Rule operator|(const Rule& a, const Rule& b) { return join(a, b, Rule::Kind::kOr); }

}  // namespace attn_mask
