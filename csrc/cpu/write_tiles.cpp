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

template <typename Out>
void write_tiles(const MaskParams& params, const Tiling& tiling, int64_t begin, int64_t end) {
  const Out attend = static_cast<Out>(params.format.attend);
  const Out masked = static_cast<Out>(params.format.masked);
  const Out unmasked = static_cast<Out>(params.unmasking.value);
  const RowSpanFinder find_spans(params);
  PaddingTile<Out> cache;
  RowValues values;
  // Where keys are not neighbours in memory, a tile's row is written beside it and then stored.
  const bool scattered = params.out_strides[3] != 1;
  alignas(64) Out scratch[kTileBytes / sizeof(Out)];
  const bool is_simple = !scattered && params.q_length > 1 && find_spans.is_simple() &&
                         params.bias.data == nullptr &&
                         (find_spans.padding() == nullptr || find_spans.padding()->q_stride == 0);
  for (int64_t tile = begin; tile < end;) {
    // Divisions take longer than short rows do: none for each row.
    const int64_t column = tile / params.q_length;
    const int64_t plane = column / tiling.per_row;  // of a batch row and a head
    const int64_t first = column % tiling.per_row * tiling.keys;
    const int64_t last =
        first + tiling.keys < params.kv_length ? first + tiling.keys : params.kv_length;
    Query query = params.query(plane, tile % params.q_length);
    if (is_simple) {
      // The most frequent rules: nothing to find out for each row but where its hull ends.
      const TileRow<Out> any_row{params,  query,  column, {first, last},
                                 nullptr, attend, masked, values};
      const Interval known = find_spans.known(query.batch, {first, last});
      const int32_t padding = find_spans.padding_node();
      const Out* const shown = padding < 0 ? nullptr : any_row.values_of(padding, cache);
      Out* out = static_cast<Out*>(params.out) + params.out_offset(query);
      for (; query.row < params.q_length && tile < end;
           ++query.row, ++tile, out += params.out_strides[2]) {
        query.position = params.q_positions.at(query.batch, query.row);
        if (params.unmasks(plane * params.q_length + query.row)) {
          fill(out + first, last - first, unmasked);
          continue;
        }
        Interval keys = find_spans.hull(query, known);
        keys = keys.empty() ? Interval{last, last} : keys;
        fill(out + first, keys.begin - first, masked);
        if (shown == nullptr) {
          fill(out + keys.begin, keys.end - keys.begin, attend);
        } else {
          copy(shown + (keys.begin - first), keys.end - keys.begin, out + keys.begin);
        }
        fill(out + keys.end, last - keys.end, masked);
      }
      continue;
    }
    for (; query.row < params.q_length && tile < end; ++query.row, ++tile) {
      query.position = params.q_positions.at(query.batch, query.row);
      const RowSpans spans = find_spans(query);
      Out* const stored = static_cast<Out*>(params.out) + params.out_offset(query);
      Out* const out = scattered ? scratch - first : stored;
      const TileRow<Out> tile_row{params, query,  column, {first, last},
                                  out,    attend, masked, values};
      // From left to right: the other order takes twice as long, since hardware prefetches
      // forwards.
      int64_t written = first;
      if (params.unmasks(plane * params.q_length + query.row)) {
        fill(out + first, last - first, unmasked);
        if (params.bias.data != nullptr) {
          tile_row.add_bias({first, last});
        }
        written = last;
      }
      for (int32_t i = 0; written < last && i < spans.spans.size; ++i) {
        const Interval columns = intersect(spans.spans.at[i], {first, last});
        if (columns.empty()) {
          continue;
        }
        fill(out + written, columns.begin - written, masked);
        if (spans.unresolved == 0) {
          fill(out + columns.begin, columns.end - columns.begin, attend);
        } else {
          tile_row.write_unresolved(spans.unresolved, columns, cache);
        }
        if (params.bias.data != nullptr) {
          tile_row.add_bias(columns);
        }
        written = columns.end;
      }
      fill(out + written, last - written, masked);
      if (scattered) {
        for (int64_t k = first; k < last; ++k) {
          stored[k * params.out_strides[3]] = out[k];
        }
      }
    }
  }
}

}  // namespace

void write_tiles(const MaskParams& params, const Tiling& tiling, int64_t begin, int64_t end) {
  with_bits(params.format.element_size,
            [&](auto bits) { write_tiles<decltype(bits)>(params, tiling, begin, end); });
}

}  // namespace attn_mask::ATTN_MASK_ISA
