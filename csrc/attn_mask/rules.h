#pragma once

/// Rules: which keys a query attends to, whatever form the mask takes. Leaves are joined by `&` and
/// `|`, and the whole is written at once, as an additive or a boolean mask or a BlockMask:
///
///     using namespace attn_mask;
///     const MaskRule rule = causal() & sliding_window(4096) & padding(mask);
///     at::Tensor bias = additive(rule, batch_size, q_length, kv_length, {.dtype = at::kBFloat16});
///
/// They mirror `attn_mask.rules` of the Python package. Sizes: b batch_size, q q_length, kv
/// kv_length; n is the length of a table. Positions from offsets must be in it; those from tensors
/// should be: what lies outside attends to nothing. Ids and positions are uint8 or signed integers.
/// A batch size of 1 in a tensor stands for all rows, and so does [n] in place of [b, n].
///
/// Errors: functions that make rules throw c10::TypeError for tensors that are undefined or of a
/// wrong dtype or layout, and c10::ValueError for ranks and sizes; whether tables are long enough,
/// and fit the batch size and device, is seen by `additive`, `boolean`, `block_mask` and
/// `scaled_dot_product_attention`.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "attn_mask/export.h"

namespace attn_mask {

/// Which keys each query attends to. An immutable value, cheap to copy, that any number of threads
/// may use at once. It shares its tensors, so that it may outlive all their other owners, and masks
/// show the elements that they have when it is evaluated.
class ATTN_MASK_API MaskRule {
 public:
  // Copies only: a move would leave a rule that is none.
  MaskRule(const MaskRule&) = default;
  MaskRule& operator=(const MaskRule&) = default;
  ~MaskRule() = default;

  /// The same rule with its tensors on `device`.
  MaskRule to(at::Device device) const;

  struct Encoded;

 private:
  explicit MaskRule(std::shared_ptr<const Encoded> encoded);

  std::shared_ptr<const Encoded> encoded_;
};

/// A query attends to the keys that it attends to by both rules.
ATTN_MASK_API MaskRule operator&(const MaskRule& a, const MaskRule& b);

/// A query attends to the keys that it attends to by any of the two rules.
ATTN_MASK_API MaskRule operator|(const MaskRule& a, const MaskRule& b);

/// k is visible to q iff k <= q.
ATTN_MASK_API MaskRule causal();

/// A query attends to every key.
ATTN_MASK_API MaskRule bidirectional();

/// A query attends to no key.
ATTN_MASK_API MaskRule nothing();

/// A query attends to its own position, the `size - 1` (>= 0) before it, and all after it; with
/// `& causal()`: to `size` keys. (The window of the functions of attn_mask.h is one key wider, as
/// upstream's.)
ATTN_MASK_API MaskRule sliding_window(int64_t size);

/// A query at q attends to keys from q - left up to q + right; nothing is an open side. Throws
/// c10::ValueError where no key lies between the two.
ATTN_MASK_API MaskRule window(std::optional<int64_t> left, std::optional<int64_t> right);

/// A query attends to the keys in its chunk of `size` (> 0) positions. `left_padding`: integers
/// [b], where the first chunk of each batch row starts; absent for 0.
ATTN_MASK_API MaskRule chunked(int64_t size,
                               const std::optional<at::Tensor>& left_padding = std::nullopt);

/// A query attends to the keys with its own id; `ids`: integers [b, n], negative for no block.
ATTN_MASK_API MaskRule blockwise(const at::Tensor& ids);

/// A query attends to the keys with its own id; `ids`: integers [b, n].
ATTN_MASK_API MaskRule documents(const at::Tensor& ids);

/// A query attends to the keys that `mask` [b, n] shows: true, or not zero.
ATTN_MASK_API MaskRule padding(const at::Tensor& mask);

/// A query attends to the keys of the mask where a boolean tensor [b, heads or 1, q, kv] is true.
ATTN_MASK_API MaskRule bits(const at::Tensor& attends);

/// The rule, evaluated at positions[b, q] and positions[b, k]; integers [b, n].
ATTN_MASK_API MaskRule reindex(const MaskRule& rule, const at::Tensor& positions);

/// The rule, evaluated at q + q_offset and k + kv_offset, both within 2^59 of 0.
ATTN_MASK_API MaskRule shift(const MaskRule& rule, int64_t q_offset, int64_t kv_offset);

/// The options of `additive`, in this order: `{.dtype = at::kHalf, .q_offset = past}`.
struct AdditiveOptions {
  /// kHalf, kBFloat16, kFloat or kDouble.
  at::ScalarType dtype = at::kFloat;
  /// For rules without a tensor; absent: the CPU.
  std::optional<at::Device> device = std::nullopt;
  /// The position of the first query and of the first key.
  int64_t q_offset = 0;
  int64_t kv_offset = 0;
  /// Integers: one more offset ([] or [b, 1]), or the position of each ([q] or [b, q]; [kv] or
  /// [b, kv]). They are not read on the host.
  std::optional<at::Tensor> q_positions = std::nullopt;
  std::optional<at::Tensor> kv_positions = std::nullopt;
  /// [b or 1, heads or 1, q, kv] of `dtype`: what elements that are attended to hold in place of 0.
  /// Differentiable.
  std::optional<at::Tensor> bias = std::nullopt;
  /// Rows begin a multiple of so many elements apart (memory-efficient attention needs 8 or 16).
  int64_t stride_multiple = 1;
  /// Whether rows in which no key is visible hold 0 (or the bias) throughout, for attention that
  /// gives NaN for them.
  bool unmask_unattended = false;
  /// What masked elements hold: a number up to 0 that `dtype` holds, or -inf; absent: the lowest
  /// finite number.
  std::optional<double> masked_value = std::nullopt;
};

/// The options of `boolean`; see AdditiveOptions.
struct BooleanOptions {
  std::optional<at::Device> device = std::nullopt;
  int64_t q_offset = 0;
  int64_t kv_offset = 0;
  std::optional<at::Tensor> q_positions = std::nullopt;
  std::optional<at::Tensor> kv_positions = std::nullopt;
  int64_t stride_multiple = 1;
  bool unmask_unattended = false;
};

/// The mask [b, heads or 1, q, kv] of a rule: 0 where a query attends to a key, the lowest finite
/// number of the dtype elsewhere.
///
/// Throws c10::ValueError (sizes, shapes, devices that differ), c10::TypeError (dtypes, undefined
/// tensors), c10::NotImplementedError (devices; positions changed more than 8 times over a leaf).
ATTN_MASK_API at::Tensor additive(const MaskRule& rule, int64_t batch_size, int64_t q_length,
                                  int64_t kv_length, const AdditiveOptions& options = {});

/// The same as true and false. Where all batch rows are alike, the batch is a stride-0 expand.
ATTN_MASK_API at::Tensor boolean(const MaskRule& rule, int64_t batch_size, int64_t q_length,
                                 int64_t kv_length, const BooleanOptions& options = {});

/// The options of `block_mask`; see AdditiveOptions.
struct BlockMaskOptions {
  int64_t heads = 1;
  /// How many queries and keys a block holds.
  int64_t q_block_size = 128;
  int64_t kv_block_size = 128;
  std::optional<at::Device> device = std::nullopt;
  int64_t q_offset = 0;
  int64_t kv_offset = 0;
  std::optional<at::Tensor> q_positions = std::nullopt;
  std::optional<at::Tensor> kv_positions = std::nullopt;
};

/// Which blocks of a mask hold anything: the tensors of flex attention's BlockMask, int32. A block
/// is full where all its queries attend to all its keys, and else partial if any do.
///
/// For each row of blocks (kv_*) and each column (q_*): how many there are, [b, heads, rows], and
/// where, [b, heads, rows, all blocks of a row]: those first, ascending, then the others.
struct BlockMask {
  at::Tensor kv_num_blocks;
  at::Tensor kv_indices;
  at::Tensor full_kv_num_blocks;
  at::Tensor full_kv_indices;
  at::Tensor q_num_blocks;
  at::Tensor q_indices;
  at::Tensor full_q_num_blocks;
  at::Tensor full_q_indices;
  int64_t q_block_size;
  int64_t kv_block_size;
};

/// The BlockMask of a rule, without a mask of all its elements. Errors as of `additive`.
ATTN_MASK_API BlockMask block_mask(const MaskRule& rule, int64_t batch_size, int64_t q_length,
                                   int64_t kv_length, const BlockMaskOptions& options = {});

}  // namespace attn_mask
