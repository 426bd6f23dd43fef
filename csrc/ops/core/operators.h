#pragma once

// The operators: what each is called with, and the function that runs for CPU, CUDA and Meta alike
// (which kernel writes the result is looked up by device once shapes and dtypes have been checked).
// Everything else is derived from this page: registration (registration.cpp), typed calls (call.h),
// the functions of attn_mask._C, rules for fake tensors, graphs and vmap, and what the tests call.
//
// To add one: a struct here, its name in `Operators` below, and `run` in a file of its own. A
// schema is written in parts where operators share some of it.
//
// Those that end with `stride_multiple` write a mask into a new tensor, whose rows begin a multiple
// of so many elements apart, and have a second form, into a tensor of the caller's:
// `NAME.out(..., ScalarType? dtype=None, ..., Tensor(a!) out) -> ()`. Where the first gives no mask
// since none is needed, `.out` writes the mask with the same meaning.

#include "ops/core/schema.h"

namespace attn_mask::ops {

/// Any rule (rule/program.h documents its encoding `rule`), and where its queries and keys are.
inline constexpr Text kRule{"SymInt[] rule, Tensor[] operands, "};
inline constexpr Text kSizes{"SymInt batch_size, SymInt q_length, SymInt kv_length, "};
inline constexpr Text kBlocks{
    "SymInt batch_size, SymInt heads, SymInt q_length, SymInt kv_length, SymInt q_block_size, "
    "SymInt kv_block_size, "};
inline constexpr Text kOffsets{"SymInt q_offset=0, SymInt kv_offset=0, "};
inline constexpr Text kPositions{"Tensor? q_positions=None, Tensor? kv_positions=None, "};

struct ToCausal4d
    : Operator<
          "to_causal_4d(SymInt batch_size, SymInt query_length, SymInt key_value_length, *, "
          "ScalarType dtype, Device? device=None, SymInt? sliding_window=None, "
          "SymInt stride_multiple=1) -> Tensor?"> {
  static Run run;
};

/// With `unmask_unattended`, rows without a key are unmasked, as by the operator of that name.
struct To4d : Operator<
                  "to_4d(Tensor attention_mask_2d, SymInt query_length, *, "
                  "ScalarType dtype, SymInt? key_value_length=None, bool is_causal=True, "
                  "SymInt? sliding_window=None, bool unmask_unattended=False, "
                  "SymInt stride_multiple=1) -> Tensor"> {
  static Run run;
};

struct MakeCausalMask
    : Operator<
          "_make_causal_mask(SymInt[] input_ids_shape, SymInt past_key_values_length=0, "
          "SymInt? sliding_window=None, *, ScalarType dtype, Device? device=None, "
          "SymInt stride_multiple=1) -> Tensor"> {
  static Run run;
};

struct ExpandMask : Operator<
                        "_expand_mask(Tensor mask, SymInt? tgt_len=None, *, "
                        "ScalarType dtype, SymInt stride_multiple=1) -> Tensor"> {
  static Run run;
};

/// Differentiable, for masks that are learned.
struct UnmaskUnattended : Operator<
                              "_unmask_unattended(Tensor expanded_mask, Scalar min_dtype, *, "
                              "SymInt stride_multiple=1) -> Tensor"> {
  static constexpr bool kMayWriteInPlace = true;  // a row is read before it is written
  static Run run;
  static Autograd autograd;
};

struct Prepare4dCausalAttentionMask
    : Operator<
          "_prepare_4d_causal_attention_mask(Tensor? attention_mask, SymInt[] input_shape, "
          "Tensor inputs_embeds, SymInt past_key_values_length, SymInt? sliding_window=None, "
          "*, SymInt stride_multiple=1) -> Tensor?"> {
  static Run run;
};

/// `unmask_unattended` (see to_4d): else as the mask's device needs it (sdpa_decision.h).
struct Prepare4dCausalAttentionMaskForSdpa
    : Operator<
          "_prepare_4d_causal_attention_mask_for_sdpa(Tensor? attention_mask, "
          "SymInt[] input_shape, Tensor inputs_embeds, SymInt past_key_values_length, "
          "SymInt? sliding_window=None, *, bool allow_skip=True, "
          "bool? unmask_unattended=None, SymInt stride_multiple=1) -> Tensor?"> {
  static Run run;
};

struct Prepare4dAttentionMask
    : Operator<
          "_prepare_4d_attention_mask(Tensor mask, SymInt? tgt_len=None, *, "
          "ScalarType dtype, SymInt stride_multiple=1) -> Tensor"> {
  static Run run;
};

struct Prepare4dAttentionMaskForSdpa
    : Operator<
          "_prepare_4d_attention_mask_for_sdpa(Tensor mask, SymInt? tgt_len=None, *, "
          "ScalarType dtype, bool allow_skip=True, SymInt stride_multiple=1) -> Tensor?"> {
  static Run run;
};

struct Create4dCausalAttentionMask
    : Operator<
          "_create_4d_causal_attention_mask(SymInt[] input_shape, "
          "SymInt past_key_values_length=0, SymInt? sliding_window=None, *, "
          "ScalarType dtype, Device? device=None, SymInt stride_multiple=1) -> Tensor?"> {
  static Run run;
};

/// A rule as a boolean mask. With `unmask_unattended`, rows in which no key is visible become true
/// throughout.
struct Boolean : Operator<"boolean(", kRule, kSizes, "*, ", kOffsets, kPositions,
                          "Device? device=None, bool unmask_unattended=False, "
                          "SymInt stride_multiple=1) -> Tensor"> {
  static Run run;
};

/// A rule as an additive mask, on top of a bias where one is given, for which it is differentiable.
/// Masked elements hold `masked_value`: a number up to 0 that the dtype holds, or -inf; else its
/// lowest finite number. With `unmask_unattended`, rows in which no key is visible become +0.0, or
/// the bias, throughout.
struct Additive
    : Operator<"additive(", kRule, kSizes, "*, ScalarType dtype, ", kOffsets, kPositions,
               "Tensor? bias=None, Device? device=None, bool unmask_unattended=False, "
               "Scalar? masked_value=None, SymInt stride_multiple=1) -> Tensor"> {
  static Run run;
  static Autograd autograd;
};

/// A rule as flex attention's BlockMask: kv_num_blocks, kv_indices, full_kv_num_blocks,
/// full_kv_indices, q_num_blocks, q_indices, full_q_num_blocks, full_q_indices, all int32; without
/// `separate_full_blocks` not those of full blocks. num_blocks are [batch_size, heads, lines],
/// indices [batch_size, heads, lines, total]. With a width an index is compact storage, 1-D: the
/// first `width` numbers of each line, and as many zeros after the last as make it a whole one, so
/// that lines that overlap are a view of it. A width must be enough for the longest line; on CUDA
/// the kernel stops where it is not.
struct BlockMask : Operator<"block_mask(", kRule, kBlocks, "*, ", kOffsets, kPositions,
                            "Device? device=None, bool separate_full_blocks=True, "
                            "SymInt? kv_width=None, SymInt? q_width=None) -> Tensor[]"> {
  static Run run;
};

/// What each block holds (BlockState), uint8 [batch_size or 1, heads or 1, q_blocks, kv_blocks]:
/// for masks that are put together from parts.
struct BlockStates : Operator<"_block_states(", kRule, kBlocks, "*, ", kOffsets, kPositions,
                              "Device? device=None) -> Tensor"> {
  static Run run;
};

/// Widths for compact storage (kv, q): what windows and chunks declare, else as many as the longest
/// lines need, for which the host waits for the device.
struct BlockMaskWidths
    : Operator<"_block_mask_widths(", kRule, kBlocks, "*, ", kOffsets, kPositions,
               "Device? device=None, bool separate_full_blocks=True) -> int[]"> {
  static Run run;
};

/// How attention is calculated, and upper bounds on the number (over the batch) and the length of
/// documents. With both, no host sync is needed.
inline constexpr Text kAttention{
    "float? scale=None, bool enable_gqa=False, SymInt? max_documents=None, "
    "SymInt? max_length=None"};

/// Attention by a rule: (out, log-sum-exp of the scores), [b, h, q, value width] and [b, h, q],
/// float32 or, of float64, float64; nothing of size q x kv is made. The first has the strides of
/// the query where their widths agree; else, and in the second, queries lie outside of heads in
/// memory, as in gradients. Rows without a key are 0 and -inf. Both can be differentiated once.
struct ScaledDotProductAttention : Operator<"scaled_dot_product_attention(", kRule,
                                            "Tensor query, Tensor key, Tensor value, *, ", kOffsets,
                                            kPositions, kAttention, ") -> (Tensor, Tensor)"> {
  static Run run;
  static Autograd autograd;
};

/// The gradients of query, key and value; not differentiable itself. `grad_lse`: the gradient of
/// the log-sum-exp, like `lse`; absent for 0.
struct ScaledDotProductAttentionBackward
    : Operator<"scaled_dot_product_attention_backward(", kRule,
               "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
               "*, ",
               kOffsets, kPositions, kAttention,
               ", Tensor? grad_lse=None) -> (Tensor, Tensor, Tensor)"> {
  static Run run;
  static Autograd autograd;
};

/// What a GPU's flash kernel must know of documents: how many there are in all batch rows, and how
/// long the longest is; nothing for rules that it does not take. The host waits for the device.
struct FindDocumentLimits : Operator<"_document_limits(", kRule, kSizes, "*, ", kOffsets,
                                     "Device? device=None) -> int[]"> {
  static Run run;
};

/// How attention by a rule is cut into tiles (attention/plan.h), as numbers: for each segment what
/// is visible, whether that is by data, the batch rows [begin, end), the queries and the keys of
/// the first tile, how many tiles there are, by how much each lies further on, and whether they
/// grow.
struct AttentionPlan
    : Operator<"_attention_plan(", kRule,
               "SymInt batch_size, SymInt heads, SymInt q_length, SymInt kv_length, *, "
               "ScalarType dtype, ",
               kOffsets, kPositions, "Device? device=None) -> int[]"> {
  static Run run;
};

/// Whether attention can do without the mask; with one to read, the host waits for its device.
struct IgnoreCausalMaskSdpa
    : Operator<
          "_ignore_causal_mask_sdpa(Tensor? attention_mask, Tensor inputs_embeds, "
          "SymInt past_key_values_length, SymInt? sliding_window=None, "
          "bool is_training=False) -> bool"> {
  static Run run;
};

/// Whether no element of the mask is zero; the host waits for its device, too.
struct IsAllVisible : Operator<"_is_all_visible(Tensor mask) -> bool"> {
  static Run run;
};

template <typename... Listed>
struct List {
  /// Calls `visit.template operator()<Operator>()` for each.
  template <typename Visit>
  static void for_each(Visit visit) {
    (visit.template operator()<Listed>(), ...);
  }
};

using Operators =
    List<ToCausal4d, To4d, MakeCausalMask, ExpandMask, UnmaskUnattended,
         Prepare4dCausalAttentionMask, Prepare4dCausalAttentionMaskForSdpa, Prepare4dAttentionMask,
         Prepare4dAttentionMaskForSdpa, Create4dCausalAttentionMask, Boolean, Additive, BlockMask,
         BlockStates, BlockMaskWidths, ScaledDotProductAttention, ScaledDotProductAttentionBackward,
         FindDocumentLimits, AttentionPlan, IgnoreCausalMaskSdpa, IsAllVisible>;

}  // namespace attn_mask::ops
