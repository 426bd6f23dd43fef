// Attention by a rule: what is checked, and which kernels run. Tiles are run by attention/tiles.h.

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "attention/flash_call.h"
#include "attention/tiles.h"
#include "ops/core/checks.h"
#include "ops/core/dtypes.h"
#include "ops/core/operators.h"
#include "ops/core/rule_problem.h"
#include "ops/core/write_mask.h"

namespace attn_mask::ops {
namespace {

constexpr int64_t kMostLength = int64_t{1} << 31;

constexpr auto kQueryShape = "[batch_size, heads, q_length, head size]";
constexpr auto kKeyShape = "[batch_size, heads, kv_length, head size]";

void check_like_query(const char* op, const char* argument, const at::Tensor& tensor,
                      const at::Tensor& query, const char* shape) {
  check_strided(op, argument, tensor);
  check_rank(op, argument, tensor, 4, shape);
  check_same_device(op, argument, tensor, "query", query);
  TORCH_CHECK_TYPE(tensor.scalar_type() == query.scalar_type(), op, ": expected ", argument,
                   " to be of the dtype of query, which is ", query.scalar_type(), ", but got ",
                   tensor.scalar_type());
  ATTN_MASK_CHECK_SYM_VALUE(tensor.sym_size(0).sym_eq(query.sym_size(0)), op, ": expected ",
                            argument, " to have the batch size of query, which is ",
                            query.sym_size(0), ", but got ", describe_sizes(tensor));
}

/// The plan of longer ones would take minutes, before a kernel takes days.
void check_lengths(const char* op, const c10::SymInt& q_length, const c10::SymInt& kv_length) {
  for (const c10::SymInt* const length : {&q_length, &kv_length}) {
    TORCH_CHECK_VALUE(length->maybe_as_int().value_or(0) < kMostLength, op,
                      ": expected fewer than 2^31 queries and keys, but got ", q_length, " and ",
                      kv_length);
  }
}

/// Kernels would read beyond tensors that do not fit.
void check_inputs(const char* op, const at::Tensor& query, const at::Tensor& key,
                  const at::Tensor& value, bool enable_gqa) {
  check_strided(op, "query", query);
  check_rank(op, "query", query, 4, kQueryShape);
  TORCH_CHECK_TYPE(is_additive_dtype(query.scalar_type()), op,
                   ": expected query to be float16, bfloat16, float32 or float64, but got ",
                   query.scalar_type());
  check_like_query(op, "key", key, query, kKeyShape);
  check_like_query(op, "value", value, query, kKeyShape);
  ATTN_MASK_CHECK_SYM_VALUE(key.sym_size(3).sym_eq(query.sym_size(3)), op,
                            ": expected key to have the head size of query, which is ",
                            query.sym_size(3), ", but got ", describe_sizes(key));
  for (const int64_t dim : {1, 2}) {
    ATTN_MASK_CHECK_SYM_VALUE(value.sym_size(dim).sym_eq(key.sym_size(dim)), op,
                              ": expected value to have as many heads and keys as key, which is ",
                              describe_sizes(key), ", but got ", describe_sizes(value));
  }
  check_lengths(op, query.sym_size(2), key.sym_size(2));
  const c10::SymInt& heads = query.sym_size(1);
  const c10::SymInt& key_heads = key.sym_size(1);
  if (!enable_gqa) {
    ATTN_MASK_CHECK_SYM_VALUE(key_heads.sym_eq(heads), op,
                              ": expected key to have the heads of query, which are ", heads,
                              " (or fewer, with enable_gqa), but got ", describe_sizes(key));
    return;
  }
  const auto known = key_heads.maybe_as_int();
  ATTN_MASK_CHECK_SYM_VALUE(
      (known == 0 ? heads : heads % key_heads).sym_eq(0), op,
      ": expected key to have heads whose number divides that of query, which is ", heads,
      ", but got ", describe_sizes(key));
}

/// The result, or its gradient.
void check_like_out(const char* op, const char* argument, const at::Tensor& tensor,
                    const at::Tensor& query, const at::Tensor& value) {
  check_like_query(op, argument, tensor, query, "[batch_size, heads, q_length, value size]");
  for (const int64_t dim : {1, 2, 3}) {
    ATTN_MASK_CHECK_SYM_VALUE(
        tensor.sym_size(dim).sym_eq(dim == 3 ? value.sym_size(3) : query.sym_size(dim)), op,
        ": expected ", argument, " to be [", query.sym_size(0), ", ", query.sym_size(1), ", ",
        query.sym_size(2), ", ", value.sym_size(3), "], but got ", describe_sizes(tensor));
  }
}

/// The log-sum-exp, or its gradient.
void check_lse(const char* op, const char* argument, const at::Tensor& lse,
               const at::Tensor& query) {
  check_strided(op, argument, lse);
  check_rank(op, argument, lse, 3, "[batch_size, heads, q_length]");
  check_same_device(op, argument, lse, "query", query);
  TORCH_CHECK_TYPE(lse.scalar_type() == lse_dtype(query.scalar_type()), op, ": expected ", argument,
                   " to be ", lse_dtype(query.scalar_type()), ", but got ", lse.scalar_type());
  for (const int64_t dim : {0, 1, 2}) {
    ATTN_MASK_CHECK_SYM_VALUE(lse.sym_size(dim).sym_eq(query.sym_size(dim)), op, ": expected ",
                              argument, " to be [", query.sym_size(0), ", ", query.sym_size(1),
                              ", ", query.sym_size(2), "], but got ", describe_sizes(lse));
  }
}

/// The rule of an attention, and how long its tensors are.
template <typename Given>
RuleArguments rule_arguments(const Given& given) {
  const at::Tensor& query = given.template get<"query">();
  RuleArguments arguments(given, query.sym_size(0), query.sym_size(2),
                          given.template get<"key">().sym_size(2));
  arguments.device = query.device();
  return arguments;
}

// Of attention, beside writing an element of a mask: some 64 channels of some heads.
constexpr int64_t kWorkOfElement = 128;

/// The problem of an attention, checked; its sizes are set where there is data.
struct Planned {
  RuleArguments arguments;
  at::Device device;
  Problem problem{};
  Decoded decoded;

  /// `given` has the device.
  Planned(const char* op, RuleArguments given, const c10::SymInt& heads)
      : arguments(std::move(given)),
        device(device_of(op, arguments)),
        decoded(decode_problem(op, arguments, device, problem)) {
    TORCH_CHECK_VALUE(is_same_device(*arguments.device, device), op,
                      ": expected the operands to be on ", *arguments.device, ", but got ", device);
    check_heads(op, decoded, heads);
  }

  /// Plans the queries, all at once or, where the rule is too large for that, some at a time.
  void for_each_part(const char* op, int64_t heads, int64_t element_size,
                     const std::function<void(const PlannedRows&)>& f) {
    const bool on_host = device.is_cpu();
    const attention::Work work{heads, element_size, on_host};
    if (!on_host) {
      const auto plan = [&](const Problem& rows) {
        return attention::make_plan_without_data(rows, work);
      };
      if (!decoded.has_parts) {
        f({problem, plan(problem), 0});
        return;
      }
      evaluate_in_parts(op, arguments.program, problem, device, height_of_parts(problem),
                        [&](int64_t first, const Problem& rows) { f({rows, plan(rows), first}); });
      return;
    }
    if (!decoded.has_parts) {
      const PreparedRuns prepared(problem, kWorkOfElement);
      f({problem, attention::make_plan(problem, decoded.depends_on_batch, work), 0});
      return;
    }
    evaluate_in_parts(
        op, arguments.program, problem, at::kCPU, height_of_parts(problem),
        [&](int64_t first, const Problem& rows) {
          Problem part = rows;
          const PreparedRuns prepared(part, kWorkOfElement);
          f({part, attention::make_plan(part, /*depends_on_batch=*/true, work), first});
        });
  }
};

/// The call of a flash kernel that stands for all tiles, on devices that have one.
std::optional<FlashRule> flash_call(const AttentionInputs& inputs, const Planned& planned,
                                    const std::optional<DocumentLimits>& limits) {
  if (!inputs.query.is_cuda() || planned.decoded.has_parts || !has_flash(inputs)) {
    return std::nullopt;
  }
  const std::optional<FlashRule> rule =
      flash_rule(planned.problem, planned.arguments.program.operands);
  return rule && rule->ids && !limits ? std::nullopt : rule;
}

template <typename Given>
std::optional<DocumentLimits> limits_of(const char* op, const Given& given) {
  const OptionalSymInt& max_documents = given.template get<"max_documents">();
  const OptionalSymInt& max_length = given.template get<"max_length">();
  for (const auto& [argument, number] :
       {std::pair("max_documents", &max_documents), {"max_length", &max_length}}) {
    TORCH_CHECK_VALUE(!*number || !(*number)->maybe_as_int() || **number > 0, op, ": expected ",
                      argument, " to be positive, but got ", **number);
  }
  TORCH_CHECK_VALUE(max_documents.has_value() == max_length.has_value(), op,
                    ": expected max_documents and max_length, or neither of them");
  if (!max_documents || !max_documents->maybe_as_int() || !max_length->maybe_as_int()) {
    return std::nullopt;
  }
  return DocumentLimits{max_documents->expect_int(), max_length->expect_int()};
}

at::Tensor without_gaps(const at::Tensor& tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

/// As the results' layout is declared, whatever kernel made them.
at::Tensor by_length(const at::Tensor& tensor) {
  return tensor.transpose(1, 2).contiguous().transpose(1, 2);
}

/// The same scores by a scale above 0: kernels mask before they scale, and -inf times another is no
/// -inf. `sign`: what the query was multiplied by, and its gradient must be.
struct Scaled {
  at::Tensor query;
  std::optional<double> scale;
  std::optional<double> sign;
};

Scaled scaled(const at::Tensor& query, std::optional<double> scale) {
  if (!scale || !(*scale <= 0)) {
    return {query, scale, std::nullopt};
  }
  const double sign = *scale < 0 ? -1 : 0;
  return {query.mul(sign), *scale < 0 ? -*scale : 1, sign};
}

/// Lets kernels, which know of no gradient `grad_lse` of the log-sum-exp, add it to the gradient of
/// each score: by channels that hold numbers in values, that gradient divided by these in
/// `grad_out`, and 0 in all else.
void widen(AttentionInputs& inputs, Attended& attended, at::Tensor& grad_out,
           const at::Tensor& grad_lse) {
  constexpr int64_t kChannels = 8;  // what kernels of GPUs want widths to be a multiple of
  // What one leaves is for the next: 16 bits hold neither the range nor all digits.
  constexpr std::array kNumbers{0x1p15, 1.0, 0x1p-14};
  const int64_t first = inputs.value.size(3);
  const double width = static_cast<double>(std::max<int64_t>(inputs.query.size(3), 1));
  inputs.scale = inputs.scale.value_or(1.0 / std::sqrt(width));
  for (at::Tensor* const tensor :
       {&inputs.query, &inputs.key, &inputs.value, &attended.out, &grad_out}) {
    *tensor = at::constant_pad_nd(*tensor, {0, kChannels});
  }
  const double infinity = std::numeric_limits<double>::infinity();
  at::Tensor rest = grad_lse.masked_fill(attended.lse.eq(-infinity), 0);
  for (size_t i = 0; i < kNumbers.size(); ++i) {
    const int64_t channel = first + static_cast<int64_t>(i);
    inputs.value.select(3, channel).fill_(kNumbers[i]);
    const at::Tensor part = grad_out.select(3, channel).copy_(rest.div(kNumbers[i]));
    rest = rest.sub(part.to(rest.scalar_type()).mul(kNumbers[i]));
  }
}

bool has_no_scores(const at::Tensor& query, const at::Tensor& key) {
  return query.size(0) == 0 || query.size(1) == 0 || query.size(2) == 0 || key.size(2) == 0;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> ScaledDotProductAttention::run(const Given& given) {
  const at::Tensor& query = given.get<"query">();
  const at::Tensor& key = given.get<"key">();
  const at::Tensor& value = given.get<"value">();
  check_inputs(kName, query, key, value, given.get<"enable_gqa">());
  Planned planned(kName, rule_arguments(given), query.sym_size(1));
  const std::optional<DocumentLimits> limits = limits_of(kName, given);
  const auto empty_result = [&] {
    return std::tuple(
        empty_out(query, value),
        empty_by_length(query, query.sym_size(2), 1, lse_dtype(query.scalar_type())).squeeze(3));
  };
  if (query.is_meta()) {
    return empty_result();
  }
  if (has_no_scores(query, key)) {
    auto [out, lse] = empty_result();
    return {out.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
  }
  const c10::OptionalDeviceGuard guard(query.device());
  const Scaled by_scale = scaled(query, given.get<"scale">());
  const AttentionInputs inputs{without_gaps(by_scale.query), without_gaps(key), without_gaps(value),
                               by_scale.scale};
  if (const auto of_flash = flash_call(inputs, planned, limits)) {
    const Attended attended = attend_by_flash(inputs, *of_flash, limits);
    return {empty_out(query, value).copy_(attended.out), attended.lse};
  }
  const Attended attended = attend_in_tiles(inputs, [&](const auto& f) {
    planned.for_each_part(kName, query.size(1), query.element_size(), f);
  });
  // A query that had to be copied has other strides than its copy.
  return {inputs.query.is_same(query) ? attended.out : empty_out(query, value).copy_(attended.out),
          attended.lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ScaledDotProductAttentionBackward::run(
    const Given& given) {
  const at::Tensor& query = given.get<"query">();
  const at::Tensor& key = given.get<"key">();
  const at::Tensor& value = given.get<"value">();
  check_inputs(kName, query, key, value, given.get<"enable_gqa">());
  Attended attended{given.get<"out">(), given.get<"lse">()};
  at::Tensor of_out = given.get<"grad_out">();
  const std::optional<at::Tensor>& of_lse = given.get<"grad_lse">();
  check_like_out(kName, "grad_out", of_out, query, value);
  check_like_out(kName, "out", attended.out, query, value);
  check_lse(kName, "lse", attended.lse, query);
  if (of_lse) {
    check_lse(kName, "grad_lse", *of_lse, query);
  }
  Planned planned(kName, rule_arguments(given), query.sym_size(1));
  const std::optional<DocumentLimits> limits = limits_of(kName, given);
  if (query.is_meta() || has_no_scores(query, key)) {
    const auto zeros = [](const at::Tensor& like) {
      const at::Tensor empty = empty_by_length(like, like.sym_size(2), like.sym_size(3));
      return like.is_meta() ? empty : empty.zero_();
    };
    return {zeros(query), zeros(key), zeros(value)};
  }
  const c10::OptionalDeviceGuard guard(query.device());
  const Scaled by_scale = scaled(query, given.get<"scale">());
  AttentionInputs inputs{by_scale.query, key, value, by_scale.scale};
  if (of_lse) {
    widen(inputs, attended, of_out, *of_lse);
  }
  for (at::Tensor* const tensor :
       {&inputs.query, &inputs.key, &inputs.value, &attended.out, &of_out}) {
    *tensor = without_gaps(*tensor);
  }
  const auto of_flash = flash_call(inputs, planned, limits);
  AttentionGradients gradients =
      of_flash ? attend_by_flash_backward(inputs, *of_flash, limits, attended, of_out)
               : attend_in_tiles_backward(inputs, attended, of_out, [&](const auto& f) {
                   planned.for_each_part(kName, query.size(1), query.element_size(), f);
                 });
  if (by_scale.sign) {
    gradients.query = gradients.query.mul(*by_scale.sign);
  }
  const auto result = [](const at::Tensor& gradient, const at::Tensor& of) {
    return by_length(gradient.narrow(3, 0, of.size(3)));
  };
  return {result(gradients.query, query), result(gradients.key, key),
          result(gradients.value, value)};
}

std::vector<int64_t> AttentionPlan::run(const Given& given) {
  constexpr auto kPublicName = "attention_plan";
  const c10::SymInt& heads = given.get<"heads">();
  const at::ScalarType dtype = given.get<"dtype">();
  check_size(kPublicName, "heads", heads);
  check_lengths(kPublicName, given.get<"q_length">(), given.get<"kv_length">());
  TORCH_CHECK_TYPE(is_additive_dtype(dtype), kPublicName,
                   ": expected dtype to be float16, bfloat16, float32 or float64, but got ", dtype);
  RuleArguments arguments(given);
  arguments.device = arguments.device.value_or(at::kCPU);
  arguments.device = device_of(kPublicName, arguments);
  Planned planned(kPublicName, std::move(arguments), heads);
  std::vector<int64_t> numbers;
  if (planned.problem.empty()) {
    return numbers;
  }
  planned.for_each_part(
      kPublicName, heads.expect_int(), static_cast<int64_t>(c10::elementSize(dtype)),
      [&](const PlannedRows& part) {
        for (const attention::BatchPlan& group : part.plan) {
          for (const attention::Segment& segment : group.segments) {
            numbers.insert(numbers.end(),
                           {static_cast<int64_t>(segment.visible), segment.by_data ? 1 : 0,
                            group.batch.begin, group.batch.end, part.first_row + segment.rows.begin,
                            part.first_row + segment.rows.end, segment.keys.begin, segment.keys.end,
                            segment.repeats, segment.step, segment.grows ? 1 : 0});
          }
        }
      });
  return numbers;
}

}  // namespace attn_mask::ops
