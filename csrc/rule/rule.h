#pragma once

#include "rule/leaf.h"
#include "rule/positions.h"

namespace attn_mask {

class KeyNumbers;

/// Which keys a query attends to: a tree of leaves under `and` and `or`, as nodes in postfix order.
/// Plain data of fixed size, handed to kernels by value, so that nothing has to be uploaded (a CUDA
/// graph being captured forbids it). It does not own the memory that its leaves point into.
struct Rule {
  using Kind = Leaf::Kind;

  /// A leaf may see other positions than those of the mask: each step adds to them or looks them
  /// up.
  struct Step {
    int64_t q_add;
    int64_t key_add;
    Table table;  // no data: add only
  };

  struct Node : Leaf {
    int16_t first;       // where the subtree begins that this node ends
    int16_t step_begin;  // the leaf's steps, outermost first
    int16_t step_end;
    bool conjunct;  // all that the rule allows, this leaf allows
  };

  static constexpr int32_t kMaxNodes = 24;
  static constexpr int32_t kMaxSteps = 8;

  Node nodes[kMaxNodes];
  Step steps[kMaxSteps];
  int32_t size;
  int32_t steps_size;
  const KeyNumbers* numbers;  // of the leaves (see numbers.h); host only, null: none
};

/// Whether the query attends to the key under a leaf.
ATTN_MASK_INLINE bool leaf_attends(const Rule& rule, const Rule::Node& leaf, const Query& query,
                                   const Key& key) {
  Query q = query;
  Key k = key;
  for (int32_t i = leaf.step_begin; i < leaf.step_end; ++i) {
    const Rule::Step& step = rule.steps[i];
    if (!step.table.exists()) {
      q.position += step.q_add;
      k.position += step.key_add;
    } else if (step.table.holds(q.position) && step.table.holds(k.position)) {
      q.position = step.table.position_at(query.batch, q.position);
      k.position = step.table.position_at(query.batch, k.position);
    } else {
      return false;
    }
  }
  return visit_leaf(leaf, [&](const auto& of) ATTN_MASK_INLINE_LAMBDA { return of.attends(q, k); });
}

/// Element level, the definition: does the query attend to the key, under the subtree that ends
/// with node `last`?
ATTN_MASK_INLINE bool attends(const Rule& rule, int32_t last, const Query& query, const Key& key) {
  uint32_t stack = 0;  // a bit for each value that waits for its `and` or `or`
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

/// Narrows a rule by one more leaf; one without nodes becomes it.
inline void narrow(Rule& rule, const Leaf& leaf) {
  Rule::Node& node = rule.nodes[rule.size];
  node = {leaf, static_cast<int16_t>(rule.size), /*step_begin=*/0, /*step_end=*/0,
          /*conjunct=*/true};
  if (rule.size++ > 0) {
    rule.nodes[rule.size++] = {Leaf(Rule::Kind::kAnd), 0, 0, 0, /*conjunct=*/true};
  }
}

}  // namespace attn_mask
