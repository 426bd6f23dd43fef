#include "bits.h"
#include "cpu/isa.h"
#include "cpu/row_spans.h"
#include "cpu/row_values.h"
#include "cpu/store.h"
#include "cpu/translate.h"

namespace attn_mask::ATTN_MASK_ISA {
namespace {

/// The values of a padding leaf at the keys of one tile, the same for every query of its batch row.
template <typename Out>
struct PaddingTile {
  alignas(64) Out values[kTileBytes / sizeof(Out)];
  int64_t column = -1;  // the tile's, counted on through the batch
  int32_t node = -1;
};

/// One row of one tile.
template <typename Out>
struct TileRow {
  const MaskParams& params;
  const Query& query;
  int64_t column;  // the tile's, counted on through the batch
  Interval tile;
  Out* out;  // the whole row, [kv_length]
  Out attend;
  Out masked;
  RowValues& values;

  /// Leaf `node` over columns of its spans, which all lie within the mask that it was given.
  void translated(int32_t node, Interval columns, PaddingTile<Out>& cache) const {
    const Padding& padding = params.rule.nodes[node].padding;
    if (padding.q_stride != 0 || params.q_length == 1) {
      const int64_t shift = padding.by_column ? 0 : params.kv_positions.at(query.batch, 0);
      translate(padding, query, shift + columns.begin, columns.end - columns.begin, attend, masked,
                out + columns.begin);
      return;
    }
    copy(values_of(node, cache) + (columns.begin - tile.begin), columns.end - columns.begin,
         out + columns.begin);
  }

  /// The values of leaf `node`, the same for all queries, at the tile's columns.
  const Out* values_of(int32_t node, PaddingTile<Out>& cache) const {
    const Padding& padding = params.rule.nodes[node].padding;
    if (cache.column != column || cache.node != node) {
      const int64_t shift = padding.by_column ? 0 : params.kv_positions.at(query.batch, 0);
      const Interval within = intersect(
          tile, {-shift, (padding.by_column ? params.kv_length : padding.length) - shift});
      if (!within.empty()) {
        translate(padding, query, shift + within.begin, within.end - within.begin, attend, masked,
                  cache.values + (within.begin - tile.begin));
      }
      cache.column = column;
      cache.node = node;
    }
    return cache.values;
  }

  /// Columns for which the nodes in `unresolved` have to be evaluated.
  void write_unresolved(uint32_t unresolved, Interval columns, PaddingTile<Out>& cache) const {
    bool written = false;
    for (int32_t node = 0; node < params.rule.size; ++node) {
      if (((unresolved >> node) & 1U) == 0) {
        continue;
      }
      const Rule::Node& leaf = params.rule.nodes[node];
      if (!written && leaf.kind == Rule::Kind::kPadding && leaf.step_begin == leaf.step_end &&
          !params.kv_positions.listed) {
        translated(node, columns, cache);
      } else {
        for (int64_t begin = columns.begin; begin < columns.end; begin += kColumnsAtOnce) {
          const int64_t n =
              columns.end - begin < kColumnsAtOnce ? columns.end - begin : kColumnsAtOnce;
          const uint8_t* visible = values.of_subtree(params, query, node, {begin, begin + n});
          Out* const block = out + begin;
          if (written) {
            for (int64_t k = 0; k < n; ++k) {
              block[k] = visible[k] != 0 ? block[k] : masked;
            }
          } else {
            for (int64_t k = 0; k < n; ++k) {
              block[k] = visible[k] != 0 ? attend : masked;
            }
          }
        }
      }
      written = true;
    }
  }

  void add_bias(Interval columns) const {
    const Bias& bias = params.bias;
    const Out* in = static_cast<const Out*>(bias.data) + query.batch * bias.strides[0] +
                    query.head * bias.strides[1] + query.row * bias.strides[2];
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      if (out[k] == attend) {
        out[k] = in[k * bias.strides[3]];
      }
    }
  }
};

/// Writes tiles one after the other.
template <typename Out>
class TileWriter {
 public:
  explicit TileWriter(const MaskParams& params)
      : params_(params),
        attend_(static_cast<Out>(params.format.attend)),
        masked_(static_cast<Out>(params.format.masked)),
        unmasked_(static_cast<Out>(params.unmasking.value)),
        find_spans_(params),
        scattered_(params.out_strides[3] != 1),
        is_simple_(!scattered_ && params.q_length > 1 && find_spans_.is_simple() &&
                   params.bias.data == nullptr &&
                   (find_spans_.padding() == nullptr || find_spans_.padding()->q_stride == 0)) {}

  void write(const Tiling& tiling, int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end;) {
      // Divisions take longer than short rows do: none for each row.
      const int64_t column = tile / params_.q_length;
      const int64_t plane = column / tiling.per_row;  // of a batch row and a head
      const int64_t first = column % tiling.per_row * tiling.keys;
      const int64_t last =
          first + tiling.keys < params_.kv_length ? first + tiling.keys : params_.kv_length;
      const Query query = params_.query(plane, tile % params_.q_length);
      const int64_t left = params_.q_length - query.row;
      const int64_t rows = left < end - tile ? left : end - tile;
      if (is_simple_) {
        write_simple(column, plane, {first, last}, query, rows);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          write_row(column, plane, {first, last}, query, i);
        }
      }
      tile += rows;
    }
  }

 private:
  /// The most frequent rules: nothing to find out for each row but where its hull ends.
  void write_simple(int64_t column, int64_t plane, Interval tile, Query query, int64_t rows) {
    const auto [first, last] = tile;
    const TileRow<Out> any_row{params_, query, column, tile, nullptr, attend_, masked_, values_};
    const Interval known = find_spans_.known(query.batch, tile);
    const int32_t padding = find_spans_.padding_node();
    const Out* const shown = padding < 0 ? nullptr : any_row.values_of(padding, cache_);
    Out* out = static_cast<Out*>(params_.out) + params_.out_offset(query);
    for (const int64_t end = query.row + rows; query.row < end;
         ++query.row, out += params_.out_strides[2]) {
      query.position = params_.q_positions.at(query.batch, query.row);
      if (params_.unmasks(plane * params_.q_length + query.row)) {
        fill(out + first, last - first, unmasked_);
        continue;
      }
      Interval keys = find_spans_.hull(query, known);
      keys = keys.empty() ? Interval{last, last} : keys;
      fill(out + first, keys.begin - first, masked_);
      if (shown == nullptr) {
        fill(out + keys.begin, keys.end - keys.begin, attend_);
      } else {
        copy(shown + (keys.begin - first), keys.end - keys.begin, out + keys.begin);
      }
      fill(out + keys.end, last - keys.end, masked_);
    }
  }

  /// The row `further` down from `query`'s.
  void write_row(int64_t column, int64_t plane, Interval tile, Query query, int64_t further) {
    const auto [first, last] = tile;
    query.row += further;
    query.position = params_.q_positions.at(query.batch, query.row);
    const RowSpans spans = find_spans_(query);
    Out* const stored = static_cast<Out*>(params_.out) + params_.out_offset(query);
    Out* const out = scattered_ ? scratch_ - first : stored;
    const TileRow<Out> tile_row{params_, query, column, tile, out, attend_, masked_, values_};
    // From left to right: the other order takes twice as long, since hardware prefetches forwards.
    int64_t written = first;
    if (params_.unmasks(plane * params_.q_length + query.row)) {
      fill(out + first, last - first, unmasked_);
      if (params_.bias.data != nullptr) {
        tile_row.add_bias(tile);
      }
      written = last;
    }
    for (int32_t i = 0; written < last && i < spans.spans.size; ++i) {
      const Interval columns = intersect(spans.spans.at[i], tile);
      if (columns.empty()) {
        continue;
      }
      fill(out + written, columns.begin - written, masked_);
      if (spans.unresolved == 0) {
        fill(out + columns.begin, columns.end - columns.begin, attend_);
      } else {
        tile_row.write_unresolved(spans.unresolved, columns, cache_);
      }
      if (params_.bias.data != nullptr) {
        tile_row.add_bias(columns);
      }
      written = columns.end;
    }
    fill(out + written, last - written, masked_);
    if (scattered_) {
      for (int64_t k = first; k < last; ++k) {
        stored[k * params_.out_strides[3]] = out[k];
      }
    }
  }

  const MaskParams& params_;
  const Out attend_;
  const Out masked_;
  const Out unmasked_;
  const RowSpanFinder find_spans_;
  // Where keys are not neighbours in memory, a tile's row is written beside it and then stored.
  const bool scattered_;
  const bool is_simple_;
  PaddingTile<Out> cache_;
  RowValues values_;
  alignas(64) Out scratch_[kTileBytes / sizeof(Out)];
};

}  // namespace

void write_tiles(const MaskParams& params, const Tiling& tiling, int64_t begin, int64_t end) {
  with_bits(params.format.element_size,
            [&](auto bits) { TileWriter<decltype(bits)>(params).write(tiling, begin, end); });
}

}  // namespace attn_mask::ATTN_MASK_ISA
