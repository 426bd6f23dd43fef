// Compiled once per instruction set, with ATTN_MASK_ISA naming the namespace. It includes no header
// whose inline functions might be emitted here and then be shared with code for older processors.

#include "cpu/kernels.h"

#include <cstddef>

#include "bits.h"
#include "rule/hull.h"
#include "rule/spans.h"

namespace attn_mask::ATTN_MASK_ISA {
namespace {

/// Intervals begin anywhere in a row, and a vector store across two cache lines costs as much as
/// two: all stores but the first and the last are aligned. `line_at(i)` gives the line of elements
/// from element i on, and must do so for the last line of the n elements, too.
template <typename T, typename LineAt>
void store_lines(T* out, int64_t n, LineAt line_at) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto store = [&](T* to, int64_t i) { __builtin_memcpy(to, line_at(i), 64); };
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T));
  const int64_t head = kLine - past_line;
  T* aligned = static_cast<T*>(__builtin_assume_aligned(out + head, 64));
  const int64_t lines = (n - head) / kLine;
  store(out, 0);
  for (int64_t i = 0; i < lines; ++i) {
    store(aligned + i * kLine, head + i * kLine);
  }
  store(out + n - kLine, n - kLine);
}

template <typename T>
void fill(T* out, int64_t n, T value) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (n < kLine) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = value;
    }
    return;
  }
  alignas(64) T line[kLine];
  for (T& element : line) {
    element = value;
  }
  store_lines(out, n, [&](int64_t) { return line; });
}

/// For rows as short as ours memcpy takes twice as long.
template <typename T>
void copy(const T* in, int64_t n, T* out) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (n < kLine) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = in[i];
    }
    return;
  }
  store_lines(out, n, [&](int64_t i) { return in + i; });
}

template <typename In, typename Out>
void translate(const In* in, int64_t stride, int64_t n, KeyTest visible, Out attend, Out masked,
               Out* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = visible(in[i]) ? attend : masked;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = visible(in[i * stride]) ? attend : masked;
    }
  }
}

/// Writes what the padding says of `n` keys from `first` on to `out`.
template <typename Out>
void translate(const Padding& padding, const Query& query, int64_t first, int64_t n, Out attend,
               Out masked, Out* out) {
  const int64_t offset = padding.row_offset(query) + first * padding.key_stride;
  with_bits(padding.element_size, [&](auto bits) {
    translate(static_cast<const decltype(bits)*>(padding.mask) + offset, padding.key_stride, n,
              padding.visible, attend, masked, out);
  });
}

/// Row level: what the nodes of a rule say of some columns of one row, a byte for each. Loops over
/// one leaf at a time vectorise; asking the whole tree about each key takes tens of times as long.
class RowAnswers {
 public:
  static constexpr int64_t kBlock = kAnswers;

  /// Of the subtree that ends with node `last`; at most kBlock columns. Valid until the next call.
  const uint8_t* operator()(const Question& question, const Query& query, int32_t last,
                            Interval columns) {
    const int64_t n = columns.end - columns.begin;
    int32_t waiting = 0;
    for (int32_t i = question.rule.nodes[last].first; i <= last; ++i) {
      const Rule::Kind kind = question.rule.nodes[i].kind;
      if (kind != Rule::Kind::kAnd && kind != Rule::Kind::kOr) {
        leaf(question, query, i, columns, stack_[waiting++]);
        continue;
      }
      const uint8_t* right = stack_[--waiting];
      uint8_t* left = stack_[waiting - 1];
      if (kind == Rule::Kind::kAnd) {
        for (int64_t k = 0; k < n; ++k) {
          left[k] &= right[k];
        }
      } else {
        for (int64_t k = 0; k < n; ++k) {
          left[k] |= right[k];
        }
      }
    }
    return stack_[0];
  }

 private:
  static void leaf(const Question& question, const Query& query, int32_t index, Interval columns,
                   uint8_t* out) {
    const Rule::Node& node = question.rule.nodes[index];
    const RowSpans row = leaf_spans(question.rule, index, query, question.kv_positions, columns);
    const bool plain = node.step_begin == node.step_end && !question.kv_positions.listed;
    const int64_t shift = plain ? question.kv_positions.at(query.batch, 0) : 0;
    int64_t written = columns.begin;
    for (int32_t i = 0; i < row.spans.size; ++i) {
      const Interval span = row.spans.at[i];
      uint8_t* const first = out + (span.begin - columns.begin);
      const int64_t n = span.end - span.begin;
      fill<uint8_t>(out + (written - columns.begin), span.begin - written, 0);
      written = span.end;
      if (row.unresolved == 0) {
        fill<uint8_t>(first, n, 1);
      } else if (plain && node.kind == Rule::Kind::kPadding) {
        const int64_t key = span.begin + (node.padding.by_column ? 0 : shift);
        translate<uint8_t>(node.padding, query, key, n, 1, 0, first);
      } else if (plain && node.kind == Rule::Kind::kSameId) {
        same_id(node.same_id.ids, query, span.begin + shift, n, first);
      } else {
        for (int64_t k = 0; k < n; ++k) {
          first[k] =
              leaf_attends(question.rule, node, query, question.key(query.batch, span.begin + k));
        }
      }
    }
    fill<uint8_t>(out + (written - columns.begin), columns.end - written, 0);
  }

  /// Which of `n` keys from `key` on bear the query's id; the table holds all of them, and it.
  static void same_id(const Table& ids, const Query& query, int64_t key, int64_t n, uint8_t* out) {
    const int64_t of_batch = query.batch * ids.batch_stride;
    ids.numbers.visit([&](const auto* numbers) {
      const auto id = numbers[of_batch + query.position * ids.stride];
      const auto* of_key = numbers + of_batch + key * ids.stride;
      if (ids.stride == 1) {
        for (int64_t k = 0; k < n; ++k) {
          out[k] = of_key[k] == id;
        }
      } else {
        for (int64_t k = 0; k < n; ++k) {
          out[k] = of_key[k * ids.stride] == id;
        }
      }
    });
  }

  // At most every other node of a rule waits for the next.
  alignas(64) uint8_t stack_[Rule::kMaxNodes / 2 + 1][kBlock];
};

/// What a padding leaf says of the keys of one tile, the same for every query of its batch row.
template <typename Out>
struct PaddingTile {
  alignas(64) Out values[kTileBytes / sizeof(Out)];
  int64_t column = -1;  // the tile's, counted on through the batch
  int32_t node = -1;
};

/// One row of one tile.
template <typename Out>
struct TileRow {
  const MaskTask& task;
  const Query& query;
  int64_t column;  // the tile's, counted on through the batch
  Interval tile;
  Out* out;  // the whole row, [kv_length]
  Out attend;
  Out masked;
  RowAnswers& answers;

  /// Leaf `node` over columns of its spans, which all lie within the mask that it was given.
  void translated(int32_t node, Interval columns, PaddingTile<Out>& cache) const {
    const Padding& padding = task.rule.nodes[node].padding;
    if (padding.q_stride != 0 || task.q_length == 1) {
      const int64_t shift = padding.by_column ? 0 : task.kv_positions.at(query.batch, 0);
      translate(padding, query, shift + columns.begin, columns.end - columns.begin, attend, masked,
                out + columns.begin);
      return;
    }
    copy(values_of(node, cache) + (columns.begin - tile.begin), columns.end - columns.begin,
         out + columns.begin);
  }

  /// What leaf `node`, which says the same for all queries, says of the tile's columns.
  const Out* values_of(int32_t node, PaddingTile<Out>& cache) const {
    const Padding& padding = task.rule.nodes[node].padding;
    if (cache.column != column || cache.node != node) {
      const int64_t shift = padding.by_column ? 0 : task.kv_positions.at(query.batch, 0);
      const Interval within =
          intersect(tile, {-shift, (padding.by_column ? task.kv_length : padding.length) - shift});
      if (!within.empty()) {
        translate(padding, query, shift + within.begin, within.end - within.begin, attend, masked,
                  cache.values + (within.begin - tile.begin));
      }
      cache.column = column;
      cache.node = node;
    }
    return cache.values;
  }

  /// Columns about which the nodes in `unresolved` have to be asked.
  void asked(uint32_t unresolved, Interval columns, PaddingTile<Out>& cache) const {
    bool written = false;
    for (int32_t node = 0; node < task.rule.size; ++node) {
      if (((unresolved >> node) & 1U) == 0) {
        continue;
      }
      const Rule::Node& leaf = task.rule.nodes[node];
      if (!written && leaf.kind == Rule::Kind::kPadding && leaf.step_begin == leaf.step_end &&
          !task.kv_positions.listed) {
        translated(node, columns, cache);
      } else {
        for (int64_t begin = columns.begin; begin < columns.end; begin += RowAnswers::kBlock) {
          const int64_t n =
              columns.end - begin < RowAnswers::kBlock ? columns.end - begin : RowAnswers::kBlock;
          const uint8_t* answer = answers(task, query, node, {begin, begin + n});
          Out* const block = out + begin;
          if (written) {
            for (int64_t k = 0; k < n; ++k) {
              block[k] = answer[k] != 0 ? block[k] : masked;
            }
          } else {
            for (int64_t k = 0; k < n; ++k) {
              block[k] = answer[k] != 0 ? attend : masked;
            }
          }
        }
      }
      written = true;
    }
  }

  void add_bias(Interval columns) const {
    const Bias& bias = task.bias;
    const Out* in = static_cast<const Out*>(bias.data) + query.batch * bias.strides[0] +
                    query.head * bias.strides[1] + query.row * bias.strides[2];
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      if (out[k] == attend) {
        out[k] = in[k * bias.strides[3]];
      }
    }
  }
};

/// Finds the spans of rows; most rules need no more than their hull, which is cheaper.
class SpanFinder {
 public:
  explicit SpanFinder(const Question& task)
      : task_(task), hull_(task.rule), hull_is_all_(hull_.is_all && !task.kv_positions.listed) {}

  RowSpans operator()(const Query& query) const {
    if (!hull_is_all_) {
      return row_spans(task_.rule, query, task_.kv_positions, task_.kv_length);
    }
    const Interval columns = hull(query);
    RowSpans row{};
    if (!columns.empty()) {
      row.spans.at[row.spans.size++] = columns;
      row.unresolved = hull_.unresolved;
    }
    return row;
  }

  /// Whether rows are their hull, and within it what one padding leaf or none says.
  bool is_simple() const { return hull_is_all_ && (hull_.unresolved == 0 || padding() != nullptr); }

  /// The only leaf that has yet to be evaluated within hulls, if it is padding.
  int32_t padding_node() const {
    const uint32_t nodes = hull_.unresolved;
    const int32_t node = nodes == 0 ? -1 : __builtin_ctz(nodes);
    const bool is_only = node >= 0 && (nodes & (nodes - 1)) == 0;
    return is_only && task_.rule.nodes[node].kind == Rule::Kind::kPadding ? node : -1;
  }
  const Padding* padding() const {
    return padding_node() < 0 ? nullptr : &task_.rule.nodes[padding_node()].padding;
  }

  /// The columns of a row's hull.
  Interval hull(const Query& query) const {
    const int64_t shift = task_.kv_positions.at(query.batch, 0);
    const Interval keys = hull_.keys(task_.rule, query);
    return intersect({keys.begin - shift, keys.end - shift}, {0, task_.kv_length});
  }

 private:
  const Question& task_;
  Hull hull_;
  bool hull_is_all_;
};

template <typename Out>
void write_tiles(const MaskTask& task, const Tiling& tiling, int64_t begin, int64_t end) {
  const Out attend = static_cast<Out>(task.format.attend);
  const Out masked = static_cast<Out>(task.format.masked);
  const Out unmasked = static_cast<Out>(task.unmasking.value);
  const SpanFinder find_spans(task);
  PaddingTile<Out> cache;
  RowAnswers answers;
  // Where keys are not neighbours in memory, a tile's row is written beside it and then stored.
  const bool scattered = task.out_strides[3] != 1;
  alignas(64) Out scratch[kTileBytes / sizeof(Out)];
  const bool is_simple = !scattered && task.q_length > 1 && find_spans.is_simple() &&
                         task.bias.data == nullptr &&
                         (find_spans.padding() == nullptr || find_spans.padding()->q_stride == 0);
  for (int64_t tile = begin; tile < end;) {
    // Divisions take longer than short rows do: none for each row.
    const int64_t column = tile / task.q_length;
    const int64_t plane = column / tiling.per_row;  // of a batch row and a head
    const int64_t first = column % tiling.per_row * tiling.keys;
    const int64_t last =
        first + tiling.keys < task.kv_length ? first + tiling.keys : task.kv_length;
    Query query = task.query(plane, tile % task.q_length);
    if (is_simple) {
      // The most frequent rules: nothing to find out for each row but where its hull ends.
      const TileRow<Out> any_row{task,    query,  column, {first, last},
                                 nullptr, attend, masked, answers};
      const int32_t padding = find_spans.padding_node();
      const Out* const shown = padding < 0 ? nullptr : any_row.values_of(padding, cache);
      for (; query.row < task.q_length && tile < end; ++query.row, ++tile) {
        query.position = task.q_positions.at(query.batch, query.row);
        if (task.unmasks(plane * task.q_length + query.row)) {
          fill(static_cast<Out*>(task.out) + task.out_offset(query) + first, last - first,
               unmasked);
          continue;
        }
        Interval keys = intersect(find_spans.hull(query), {first, last});
        keys = keys.empty() ? Interval{last, last} : keys;
        Out* const out = static_cast<Out*>(task.out) + task.out_offset(query);
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
    for (; query.row < task.q_length && tile < end; ++query.row, ++tile) {
      query.position = task.q_positions.at(query.batch, query.row);
      const RowSpans spans = find_spans(query);
      Out* const stored = static_cast<Out*>(task.out) + task.out_offset(query);
      Out* const out = scattered ? scratch - first : stored;
      const TileRow<Out> tile_row{task, query, column, {first, last}, out, attend, masked, answers};
      // From left to right: the other order takes twice as long, since hardware prefetches
      // forwards.
      int64_t written = first;
      if (task.unmasks(plane * task.q_length + query.row)) {
        fill(out + first, last - first, unmasked);
        if (task.bias.data != nullptr) {
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
          tile_row.asked(spans.unresolved, columns, cache);
        }
        if (task.bias.data != nullptr) {
          tile_row.add_bias(columns);
        }
        written = columns.end;
      }
      fill(out + written, last - written, masked);
      if (scattered) {
        for (int64_t k = first; k < last; ++k) {
          stored[k * task.out_strides[3]] = out[k];
        }
      }
    }
  }
}

void write_tiles(const MaskTask& task, const Tiling& tiling, int64_t begin, int64_t end) {
  with_bits(task.format.element_size,
            [&](auto bits) { write_tiles<decltype(bits)>(task, tiling, begin, end); });
}

template <typename T>
bool all(const T* row, int64_t stride, int64_t n, KeyTest test) {
  // Blocks without a branch inside vectorise; between them a miss ends the search.
  constexpr int64_t kBlock = 512;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    T misses = 0;
    if (stride == 1) {
      for (int64_t i = begin; i < end; ++i) {
        misses |= static_cast<T>(!test(row[i]));
      }
    } else {
      for (int64_t i = begin; i < end; ++i) {
        misses |= static_cast<T>(!test(row[i * stride]));
      }
    }
    if (misses != 0) {
      return false;
    }
  }
  return true;
}

template <typename T>
void unmask_rows(const UnmaskTask& task, int64_t begin, int64_t end) {
  const int64_t n = task.in.length;
  const int64_t stride = task.in.stride;
  const T sign = static_cast<T>(task.sign);
  for (int64_t row = begin; row < end; ++row) {
    const T* in = static_cast<const T*>(task.in.data) + task.in.row_offset(row);
    T* out = static_cast<T*>(task.written) + task.out.row_offset(row);
    const int64_t out_stride = task.out.stride;
    if (all(in, stride, n, task.is_min)) {
      for (int64_t i = 0; i < n; ++i) {
        out[i * out_stride] = in[i * stride] & sign;
      }
    } else if (stride == 1 && out_stride == 1) {
      if (out != in) {
        __builtin_memcpy(out, in, static_cast<std::size_t>(n) * sizeof(T));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        out[i * out_stride] = in[i * stride];
      }
    }
  }
}

void unmask_rows(const UnmaskTask& task, int64_t begin, int64_t end) {
  with_bits(task.in.element_size,
            [&](auto bits) { unmask_rows<decltype(bits)>(task, begin, end); });
}

/// Writes what all of some nodes (bit i: node i) say of at most kAnswers columns of a row: 1 or 0.
void answer(const Question& question, const Query& query, uint32_t nodes, Interval columns,
            RowAnswers& answers, uint8_t* out) {
  const int64_t n = columns.end - columns.begin;
  fill<uint8_t>(out, n, 1);
  for (int32_t node = 0; node < question.rule.size; ++node) {
    if (((nodes >> node) & 1U) != 0) {
      const uint8_t* const of_node = answers(question, query, node, columns);
      for (int64_t k = 0; k < n; ++k) {
        out[k] &= of_node[k];
      }
    }
  }
}

/// The first of `columns` to which all of some nodes (bit i: node i) let the query attend; else the
/// end of `columns`.
int64_t first_visible(const Question& question, const Query& query, uint32_t nodes,
                      Interval columns, RowAnswers& answers) {
  // Most rows show a key soon.
  int64_t size = 64;
  for (int64_t begin = columns.begin; begin < columns.end; begin += size) {
    size = begin == columns.begin || size == kAnswers ? size : 2 * size;
    const int64_t n = size < columns.end - begin ? size : columns.end - begin;
    uint8_t visible[kAnswers];
    answer(question, query, nodes, {begin, begin + n}, answers, visible);
    const auto* const found =
        static_cast<const uint8_t*>(__builtin_memchr(visible, 1, static_cast<std::size_t>(n)));
    if (found != nullptr) {
      return begin + (found - visible);
    }
  }
  return columns.end;
}

/// What rows before told of the keys of a batch row, where one padding leaf says the same to all
/// queries: with it, each key is looked at about once.
struct KnownKeys {
  int64_t batch = -1;
  int64_t visible = -1;      // one that is
  Interval hidden = {0, 0};  // none of these is
};

void find_masked_rows(const Question& question, int64_t begin, int64_t end, uint8_t* rows) {
  const SpanFinder find_spans(question);
  const bool is_alike = find_spans.is_simple() && find_spans.padding() != nullptr &&
                        find_spans.padding()->is_of_keys();
  RowAnswers answers;
  KnownKeys known;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t plane = index / question.q_length;
    const Query query = question.query(plane, index - plane * question.q_length);
    const RowSpans spans = find_spans(query);
    bool visible = spans.spans.size > 0 && spans.unresolved == 0;
    if (!is_alike) {
      for (int32_t i = 0; !visible && i < spans.spans.size; ++i) {
        const Interval columns = spans.spans.at[i];
        visible = first_visible(question, query, spans.unresolved, columns, answers) < columns.end;
      }
    } else if (!visible && spans.spans.size > 0) {
      const Interval columns = spans.spans.at[0];
      if (known.batch != query.batch) {
        known = {query.batch, -1, {0, 0}};
      }
      visible = columns.contains(known.visible);
      if (!visible) {
        const bool goes_on =
            known.hidden.begin <= columns.begin && columns.begin < known.hidden.end;
        const Interval rest{goes_on ? known.hidden.end : columns.begin, columns.end};
        const int64_t key = first_visible(question, query, spans.unresolved, rest, answers);
        visible = key < columns.end;
        known.visible = visible ? key : known.visible;
        known.hidden = {goes_on ? known.hidden.begin : columns.begin,
                        key > rest.begin ? key : rest.begin};
      }
    }
    rows[index] = visible ? 0 : 1;
  }
}

bool all(const StridedRows& rows, const KeyTest& test, int64_t row, int64_t begin, int64_t end) {
  const int64_t offset = rows.row_offset(row) + begin * rows.stride;
  return with_bits(rows.element_size, [&](auto bits) {
    return all(static_cast<const decltype(bits)*>(rows.data) + offset, rows.stride, end - begin,
               test);
  });
}

void answer(const Question& question, const Query& query, uint32_t nodes, Interval columns,
            uint8_t* out) {
  RowAnswers answers;
  answer(question, query, nodes, columns, answers, out);
}

}  // namespace

const CpuKernels kKernels = {&write_tiles, &find_masked_rows, &unmask_rows, &all, &answer};

}  // namespace attn_mask::ATTN_MASK_ISA
