#include "attention/tiles.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "attention/aten_kernels.h"
#include "ops/core/dtypes.h"
#include "ops/core/write_mask.h"

namespace attn_mask {
namespace {

using attention::Segment;
using attention::Visible;

// Tiles that run together give results (and, backward, gradients of keys) that are copied to where
// they belong: so many bytes at most.
constexpr int64_t kTogetherBytes = int64_t{16} << 20;

int64_t size_of(Interval interval) { return interval.end - interval.begin; }

/// Tiles that one call takes: alike, of some batch rows, or of one batch row and some in a row.
struct Call {
  Interval batch;
  Interval rows;  // of the first tile
  Interval keys;
  int64_t tiles;
  int64_t step;
};

/// A view of a tile, or of several: they take the place of the batch.
at::Tensor view(const at::Tensor& tensor, const Call& call, Interval lines) {
  if (call.tiles == 1) {
    at::Tensor part = tensor;
    if (size_of(call.batch) != tensor.size(0)) {
      part = part.narrow(0, call.batch.begin, size_of(call.batch));
    }
    if (size_of(lines) != tensor.size(2)) {
      part = part.narrow(2, lines.begin, size_of(lines));
    }
    return part;
  }
  std::vector<int64_t> sizes = tensor.sizes().vec();
  std::vector<int64_t> strides = tensor.strides().vec();
  const int64_t offset =
      tensor.storage_offset() + call.batch.begin * strides[0] + lines.begin * strides[2];
  sizes[0] = call.tiles;
  sizes[2] = size_of(lines);
  strides[0] = call.step * strides[2];
  return tensor.as_strided(sizes, strides, offset);
}

/// The mask of a tile, and which rows of it have no key; kept for the tiles that look alike.
class TileMask {
 public:
  explicit TileMask(const AttentionInputs& inputs)
      : options_(inputs.query.options()), dtype_(inputs.query.scalar_type()) {}

  void write(const Problem& problem, const Segment& segment, Interval batch, Interval rows,
             Interval keys) {
    const int64_t masks = segment.by_data ? size_of(batch) : 1;
    if (!options_.device().is_cpu()) {
      write_on_device(problem, masks, rows, keys);
      return;
    }
    const std::vector<int64_t> sizes{masks, problem.heads, size_of(rows), size_of(keys)};
    const int64_t elements = sizes[0] * sizes[1] * sizes[2] * sizes[3];
    if (!buffer_.defined() || buffer_.numel() < elements) {
      buffer_ = at::Tensor();  // before a larger one is made
      buffer_ = at::empty({elements}, options_);
    }
    mask_ = buffer_.narrow(0, 0, elements).view(sizes);
    const at::Tensor has_key = at::empty({sizes[0], sizes[1], sizes[2]}, options_.dtype(at::kBool));
    const double infinity = std::numeric_limits<double>::infinity();
    const bool all = attention::write_tile(
        problem, {batch.begin, batch.begin + masks}, rows, keys,
        static_cast<int32_t>(mask_.element_size()), additive_format(dtype_, -infinity).masked,
        mask_.mutable_data_ptr(), static_cast<uint8_t*>(has_key.mutable_data_ptr()));
    without_key_ = all ? at::Tensor() : has_key.logical_not();
  }

  /// Of the tile that was written, or of its last keys.
  at::Tensor last(int64_t keys) const { return mask_.narrow(3, mask_.size(3) - keys, keys); }

  /// [b or 1, h or 1, rows]; undefined: each row has a key.
  const at::Tensor& without_key() const { return without_key_; }

 private:
  /// By the kernels of dense masks. Their rows are aligned, as those of attention need it.
  void write_on_device(const Problem& problem, int64_t masks, Interval rows, Interval keys) {
    constexpr int64_t kAligned = 16;
    const int64_t width = size_of(keys);
    const int64_t stride = (width + kAligned - 1) / kAligned * kAligned;
    const at::Tensor whole = at::empty({masks, problem.heads, size_of(rows), stride}, options_);
    mask_ = whole.narrow(3, 0, width);
    MaskParams params{};
    static_cast<Problem&>(params) = problem.part(rows.begin, rows.end);
    params.kv_positions.offset += keys.begin;
    for (int32_t i = 0; i < params.rule.size; ++i) {
      visit_leaf(params.rule.nodes[i], [&](auto&& leaf) { leaf.move(rows.begin, keys.begin); });
    }
    const double infinity = std::numeric_limits<double>::infinity();
    set_output(params, mask_, additive_format(dtype_, -infinity));
    prepare_and_run(params, options_.device());
    without_key_ = mask_.eq(-infinity).all(-1);
  }

  at::TensorOptions options_;
  at::ScalarType dtype_;
  at::Tensor buffer_;
  at::Tensor mask_;
  at::Tensor without_key_;
};

/// Calls `f(call, segment, mask or nothing)` for all that has keys, and `f_of_nothing(call)` for
/// tiles without.
class Runner {
 public:
  Runner(const AttentionInputs& inputs, int64_t bytes_per_tile_row, int64_t bytes_per_tile_key)
      : mask_(inputs), bytes_per_row_(bytes_per_tile_row), bytes_per_key_(bytes_per_tile_key) {}

  template <typename F>
  void run(const PlannedRows& part, const F& f) {
    for (const attention::BatchPlan& group : part.plan) {
      for (const Segment& segment : group.segments) {
        run(part, group.batch, segment, f);
      }
    }
  }

 private:
  template <typename F>
  void run(const PlannedRows& part, Interval batch, const Segment& segment, const F& f) {
    const auto shifted = [&](Interval rows) {
      return Interval{part.first_row + rows.begin, part.first_row + rows.end};
    };
    const bool masked = segment.visible == Visible::kSome;
    if (masked) {
      const int64_t shown = segment.grows ? segment.repeats - 1 : 0;
      mask_.write(part.problem, segment, batch, segment.rows_of(shown), segment.keys_of(shown));
    }
    const auto call = [&](Interval of_batch, int64_t first, int64_t tiles) {
      const Interval keys = segment.keys_of(first);
      const std::optional<at::Tensor> mask =
          masked ? std::optional(mask_.last(size_of(keys))) : std::nullopt;
      f(Call{of_batch, shifted(segment.rows_of(first)), keys, tiles, segment.step}, segment, mask,
        masked ? mask_.without_key() : at::Tensor());
    };
    if (segment.grows || segment.repeats == 1 || segment.repeats < size_of(batch)) {
      for (int64_t i = 0; i < segment.repeats; ++i) {
        call(batch, i, 1);
      }
      return;
    }
    const int64_t bytes =
        size_of(segment.rows) * bytes_per_row_ + size_of(segment.keys) * bytes_per_key_;
    const int64_t together = std::max<int64_t>(1, kTogetherBytes / std::max<int64_t>(1, bytes));
    for (int64_t row = batch.begin; row < batch.end; ++row) {
      for (int64_t i = 0; i < segment.repeats; i += together) {
        call({row, row + 1}, i, std::min(together, segment.repeats - i));
      }
    }
  }

  TileMask mask_;
  int64_t bytes_per_row_;
  int64_t bytes_per_key_;
};

int64_t line_bytes(const at::Tensor& tensor) {
  return tensor.size(1) * tensor.size(3) * tensor.element_size();
}

/// Adds what tiles gave to the lines that they are of; tiles may share lines.
void add_lines(const at::Tensor& to, const Call& call, Interval lines, const at::Tensor& part) {
  if (call.tiles == 1 || call.step >= size_of(lines)) {
    view(to, call, lines).add_(part);
    return;
  }
  for (int64_t i = 0; i < call.tiles; ++i) {
    const Interval of_one{lines.begin + i * call.step, lines.end + i * call.step};
    view(to, {call.batch, call.rows, call.keys, 1, 0}, of_one).add_(part.narrow(0, i, 1));
  }
}

/// Whether one call is all there is.
bool is_one_call(const AttentionInputs& inputs, const PlannedRows& part) {
  if (part.plan.size() != 1 || part.plan[0].segments.size() != 1) {
    return false;
  }
  const Segment& segment = part.plan[0].segments[0];
  return segment.repeats == 1 && segment.visible != Visible::kNothing &&
         size_of(segment.rows) == inputs.query.size(2);
}

}  // namespace

at::Tensor empty_by_length(const at::Tensor& like, c10::SymInt length, c10::SymInt width,
                           std::optional<at::ScalarType> dtype) {
  return at::empty_symint({like.sym_size(0), std::move(length), like.sym_size(1), std::move(width)},
                          like.options().dtype(dtype.value_or(like.scalar_type())))
      .transpose(1, 2);
}

at::Tensor empty_out(const at::Tensor& query, const at::Tensor& value) {
  return value.sym_size(3) == query.sym_size(3)
             ? at::empty_like(query)
             : empty_by_length(query, query.sym_size(2), value.sym_size(3));
}

at::ScalarType lse_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

Attended attend_in_tiles(const AttentionInputs& inputs, const ForEachPart& for_each_part) {
  const at::Tensor& query = inputs.query;
  const double infinity = std::numeric_limits<double>::infinity();
  Attended result;
  const auto make_result = [&] {
    if (!result.out.defined()) {
      result.out = empty_out(query, inputs.value);
      result.lse = empty_by_length(query, query.size(2), 1, lse_dtype(query.scalar_type()));
    }
  };
  Runner runner(inputs, query.size(1) * inputs.value.size(3) * query.element_size(), 0);
  for_each_part([&](const PlannedRows& part) {
    const bool is_all = is_one_call(inputs, part);
    runner.run(part, [&](const Call& call, const Segment& segment,
                         const std::optional<at::Tensor>& mask, const at::Tensor& without_key) {
      if (segment.visible == Visible::kNothing) {
        make_result();
        view(result.out, call, call.rows).zero_();
        view(result.lse, call, call.rows).fill_(-infinity);
        return;
      }
      auto [out, lse] = attend({view(query, call, call.rows), view(inputs.key, call, call.keys),
                                view(inputs.value, call, call.keys),
                                segment.visible == Visible::kTriangle, mask, inputs.scale});
      if (without_key.defined()) {
        if (!out.is_cpu()) {  // kernels of other devices may give NaN
          out = out.masked_fill(without_key.unsqueeze(3), 0);
        }
        lse = lse.masked_fill(without_key, -infinity);
      }
      if (is_all && size_of(call.keys) == inputs.key.size(2)) {
        result = {out, lse.unsqueeze(3)};
        return;
      }
      make_result();
      view(result.out, call, call.rows).copy_(out);
      view(result.lse, call, call.rows).copy_(lse.unsqueeze(3));
    });
  });
  result.lse = result.lse.squeeze(3);
  return result;
}

AttentionGradients attend_in_tiles_backward(const AttentionInputs& inputs, const Attended& attended,
                                            const at::Tensor& grad_out,
                                            const ForEachPart& for_each_part) {
  const at::Tensor& query = inputs.query;
  const at::ScalarType sums = lse_dtype(query.scalar_type());
  AttentionGradients result;
  const auto make_result = [&] {
    if (!result.query.defined()) {
      result.query = empty_by_length(query, query.size(2), query.size(3));
      result.key = empty_by_length(inputs.key, inputs.key.size(2), query.size(3), sums).zero_();
      result.value =
          empty_by_length(inputs.value, inputs.key.size(2), inputs.value.size(3), sums).zero_();
    }
  };
  // For rows without a key, whose scores are -inf, kernels expect the 0 that they gave.
  const at::Tensor lse = attended.lse.unsqueeze(3);
  const at::Tensor finite = lse.masked_fill(lse.eq(-std::numeric_limits<double>::infinity()), 0);
  Runner runner(inputs, line_bytes(query), line_bytes(inputs.key) + line_bytes(inputs.value));
  for_each_part([&](const PlannedRows& part) {
    const bool is_all = is_one_call(inputs, part);
    runner.run(part, [&](const Call& call, const Segment& segment,
                         const std::optional<at::Tensor>& mask, const at::Tensor& /*without*/) {
      if (segment.visible == Visible::kNothing) {
        make_result();
        view(result.query, call, call.rows).zero_();
        return;
      }
      auto [of_query, of_key, of_value] = attend_backward(
          {view(query, call, call.rows), view(inputs.key, call, call.keys),
           view(inputs.value, call, call.keys), segment.visible == Visible::kTriangle, mask,
           inputs.scale},
          view(attended.out, call, call.rows), view(finite, call, call.rows).squeeze(3),
          view(grad_out, call, call.rows));
      if (is_all && size_of(call.keys) == inputs.key.size(2)) {
        result = {of_query, of_key, of_value};
        return;
      }
      make_result();
      view(result.query, call, call.rows).copy_(of_query);
      add_lines(result.key, call, call.keys, of_key);
      add_lines(result.value, call, call.keys, of_value);
    });
  });
  result.key = result.key.to(query.scalar_type());
  result.value = result.value.to(query.scalar_type());
  return result;
}

}  // namespace attn_mask
