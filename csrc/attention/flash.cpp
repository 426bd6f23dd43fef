#include "attention/flash.h"

#include <limits>

#include "rule/levels/hull.h"

namespace attn_mask::attention {

std::optional<FlashBand> flash_band(const Problem& problem) {
  if (problem.q_positions.numbers.data != nullptr || problem.kv_positions.numbers.data != nullptr) {
    return std::nullopt;
  }
  const Hull hull(problem.rule);
  if (hull.chunk >= 0 || hull.known.begin != kEverywhere.begin ||
      hull.known.end != kEverywhere.end) {
    return std::nullopt;
  }
  FlashBand band{-1, -1, nullptr};
  for (int32_t i = 0; i < problem.rule.size; ++i) {
    const Rule::Node& node = problem.rule.nodes[i];
    const bool is_documents = node.kind == Rule::Kind::kSameId && node.conjunct &&
                              node.step_begin == node.step_end && !node.same_id.negative_is_none &&
                              band.documents == nullptr;
    if (is_documents) {
      band.documents = &node.same_id;
    } else if (node.kind != Rule::Kind::kAnd && !hull.says_all_of(problem.rule, i)) {
      return std::nullopt;
    }
  }
  const int64_t ahead = problem.q_positions.offset - problem.kv_positions.offset -
                        (problem.kv_length - problem.q_length);
  if (hull.before < kFar) {
    band.left = hull.before - ahead;
  }
  if (hull.after < kFar) {
    band.right = hull.after + ahead;
  }
  const auto is_beyond = [&](int64_t size, int64_t distance) {
    return size < kFar && (distance < 0 || distance > std::numeric_limits<int32_t>::max());
  };
  if (is_beyond(hull.before, band.left) || is_beyond(hull.after, band.right)) {
    return std::nullopt;
  }
  if (band.documents == nullptr) {
    return band;
  }
  // Documents are packed rows of their own: the tokens of queries and keys are the same.
  const int64_t first = problem.q_positions.offset;
  const bool is_self = problem.q_length == problem.kv_length && ahead == 0 && first >= 0 &&
                       first + problem.q_length <= band.documents->ids.length &&
                       problem.batch_size <= std::numeric_limits<int32_t>::max() / problem.q_length;
  return is_self ? std::optional(band) : std::nullopt;
}

}  // namespace attn_mask::attention
