// What all CUDA kernels of attention inside windows are made of: the rows (tokens) that a block
// works on, their way between global and shared memory, and a warp's products.
//
// A block has kWarps warps and 16 kWarps rows; a warp owns 16 rows. A window of up to that many
// tokens lies in a slot of its own, padded to 16 rows, and a block takes as many windows as it has
// slots; of a larger window a block takes kRows tokens, and streams the whole window past them.
// Head dimensions are padded with zeros, in the tile only.
#pragma once

#include "common/launch.cuh"
#include "common/pixel_tile.cuh"
#include "window_attention/params.h"

namespace sr_kernels {

// ------------------------------------------------------------------ rows

// How the windows of one head are dealt to blocks of `rows` rows.
struct RowPlan {
  int tokens, slot_rows;  // of a window; rows of a slot
  int slots, tiles;       // windows of a block; blocks of a window: one of the two is 1
  int64_t windows;        // of the batch

  SR_HOST_DEVICE RowPlan(const WindowGeometry& geometry, int64_t batch, int rows) {
    tokens = geometry.tokens();
    const bool whole = tokens <= rows;
    slot_rows = whole ? round_up(tokens, 16) : rows;
    slots = rows / slot_rows;
    tiles = whole ? 1 : (tokens - 1) / rows + 1;
    windows = batch * geometry.windows_h() * geometry.windows_w();
  }
  SR_HOST_DEVICE int64_t units() const {
    return slots > 1 ? (windows + slots - 1) / slots : windows * tiles;
  }
  SR_DEVICE int64_t first_window(int64_t unit) const {
    return slots > 1 ? unit * slots : unit / tiles;
  }
  SR_DEVICE int tile(int64_t unit) const { return slots > 1 ? 0 : static_cast<int>(unit % tiles); }
};

// Where a row's pixel is; n < 0: the row has none.
struct alignas(16) RowPlace {
  int n, h, w, unused;
};
// What scores of a row depend on: its region under the mask (0 without one, -1: no pixel) and its
// part of the bias index.
struct alignas(8) RowLabel {
  int region, position;
};

// Place and label of row `row` of the block that starts at window first_window, tile `tile`.
SR_DEVICE void find_row(const WindowAttentionParams& p, const RowPlan& plan, int64_t first_window,
                        int tile, int row, RowPlace* place, RowLabel* label) {
  const WindowGeometry& geometry = p.geometry;
  const int slot = row / plan.slot_rows;
  const int token = tile * plan.slot_rows + row % plan.slot_rows;
  const int64_t window = first_window + slot;
  *place = {-1, 0, 0, 0};
  *label = {-1, 0};
  if (slot >= plan.slots || token >= plan.tokens || window >= plan.windows) return;
  const int64_t b = window % geometry.windows_w(), line = window / geometry.windows_w();
  const int64_t a = line % geometry.windows_h();
  place->n = static_cast<int>(line / geometry.windows_h());
  place->h = static_cast<int>(geometry.source_row(a, token / geometry.window_w));
  place->w = static_cast<int>(geometry.source_column(b, token % geometry.window_w));
  label->region = p.mask ? geometry.region(a, b, token) : 0;
  label->position = geometry.bias_position(token);
}

template <typename E>
SR_DEVICE E* row_pointer(const FeatureMap& map, const RowPlace& place, int channel) {
  return static_cast<E*>(map.data) + place.n * map.stride_n + place.h * map.stride_h +
         place.w * map.stride_w + channel * map.stride_c;
}

// Rows of shared memory that hold one head's channels, a block's tokens. The lanes of a warp lie
// along what is contiguous in the map: tokens, or runs of channels where they are, which are copied
// asynchronously: finish_copies() before they are used.
template <typename E, int kRows, int kD>
struct RowTile {
  static constexpr int kThreads = 2 * kRows;
  static constexpr bool kTensorCores = sizeof(E) == 2;
  static constexpr int kLd = kD + 16 / static_cast<int>(sizeof(E));
  static constexpr int kBytes = kRows * kLd * static_cast<int>(sizeof(E));
  // Channels are padded to this: a step of the products.
  static constexpr int kPad = kTensorCores ? 16 : 32;

  static SR_DEVICE void load(E* tile, const FeatureMap& map, int channel, int channels,
                             const RowPlace* places, int thread) {
    thread = opaque(thread);  // its addresses are made again for each tile, not kept in registers
    const int padded = round_up(channels, kPad);
    const E zero = from_float<E>(0.0f);
    if (map.stride_c != 1) {
      const int row = thread % kRows;
      const RowPlace place = load_shared<RowPlace>(places + row);
      const E* from = row_pointer<const E>(map, place, channel);
      const int count = place.n < 0 ? 0 : channels;
#pragma unroll 2
      for (int c = thread / kRows * 2; c < padded; c += 4) {
        Vector<E, 2> pair{{zero, zero}};
        if (c < count) pair.element[0] = load_global<E>(from + c * map.stride_c);
        if (c + 1 < count) pair.element[1] = load_global<E>(from + (c + 1) * map.stride_c);
        store_shared(tile + row * kLd + c, pair);
      }
      return;
    }
    with_access_width<E>(run_places<E>(map, true) | channel, [&](auto constant) {
      constexpr int kRun = constant, kPiece = kRun > 1 ? kRun : 4;
#pragma unroll 2
      for (int i = thread; i < kRows * (kD / kPiece); i += kThreads) {
        const int row = i / (kD / kPiece), c = i % (kD / kPiece) * kPiece;
        if (c >= padded) continue;
        const RowPlace place = load_shared<RowPlace>(places + row);
        const int count = place.n < 0 ? 0 : channels - c;
        E* to = tile + row * kLd + c;
        const E* from = static_cast<const E*>(map.data);
        if (count > 0) from = row_pointer<const E>(map, place, channel + c);
        if (kRun > 1 && (count >= kRun || count <= 0)) {
          copy_async<kPiece* static_cast<int>(sizeof(E))>(to, from, count > 0);
          continue;
        }
        Vector<E, kPiece> piece;
#pragma unroll
        for (int x = 0; x < kPiece; ++x)
          piece.element[x] = x < count ? load_global<E>(from + x) : zero;
        store_shared(to, piece);
      }
    });
  }

  // The way back: every row that has a pixel.
  static SR_DEVICE void store(const E* tile, const FeatureMap& map, int channel, int channels,
                              const RowPlace* places, int thread) {
    thread = opaque(thread);
    if (map.stride_c != 1) {
      const int row = thread % kRows;
      const RowPlace place = load_shared<RowPlace>(places + row);
      if (place.n < 0) return;
      E* to = row_pointer<E>(map, place, channel);
#pragma unroll 2
      for (int c = thread / kRows * 2; c < channels; c += 4) {
        const auto pair = load_shared<Vector<E, 2>>(tile + row * kLd + c);
        store_global<E>(to + c * map.stride_c, pair.element[0]);
        if (c + 1 < channels) store_global<E>(to + (c + 1) * map.stride_c, pair.element[1]);
      }
      return;
    }
    with_access_width<E>(run_places<E>(map, true) | channel, [&](auto constant) {
      constexpr int kRun = constant, kPiece = kRun > 1 ? kRun : 4;
      for (int i = thread; i < kRows * (kD / kPiece); i += kThreads) {
        const int row = i / (kD / kPiece), c = i % (kD / kPiece) * kPiece;
        const RowPlace place = load_shared<RowPlace>(places + row);
        if (c >= channels || place.n < 0) continue;
        E* to = row_pointer<E>(map, place, channel + c);
        const auto piece = load_shared<Vector<E, kPiece>>(tile + row * kLd + c);
        if (kRun > 1 && c + kRun <= channels) {
          store_global(to, piece);
        } else {
#pragma unroll
          for (int x = 0; x < kPiece; ++x)
            if (c + x < channels) store_global<E>(to + x, piece.element[x]);
        }
      }
    });
  }
};

// ------------------------------------------------------------------ a warp's products

// A warp's 16 rows of sums, kColumns columns. A lane holds kRowsOfLane x kColumnsOfLane of them,
// at(i, j) in row row(lane, i) and column column(lane, j); sixteen columns (a group) at a time are
// left out where there are fewer.
//
//   scores    += A (16 x d) B (columns x d)^T     A, B: rows of a tile
//   weighted  += S (16 x columns, scores) V (columns x kColumns), V: rows of a tile

template <typename E, int kColumns>
struct WarpScores {
  static constexpr int kRowsOfLane = 2, kColumnsOfLane = kColumns / 4, kLanesOfRow = 4;
  Accumulator sum[kColumns / 8];

  SR_DEVICE float& at(int i, int j) { return sum[j / 2].x[2 * i + j % 2]; }
  static SR_DEVICE int row(int lane, int i) { return lane / 4 + 8 * i; }
  static SR_DEVICE int column(int lane, int j) { return j / 2 * 8 + lane % 4 * 2 + j % 2; }
  static SR_DEVICE constexpr int group(int j) { return j / 4; }

  SR_DEVICE void add_product(const E* a, const E* b, int ld, int d, int columns, int lane) {
    for (int k = 0; k < d; k += 16) {
      FragmentA left;
      load_a_from_rows_m(left, a + k, ld, lane);
#pragma unroll
      for (int g = 0; g < kColumns / 16; ++g) {
        if (16 * g >= columns) break;
        FragmentB right[2];
        load_b_from_rows_n(right, b + 16 * g * ld + k, ld, lane);
        multiply_add<E>(sum[2 * g], left, right[0]);
        multiply_add<E>(sum[2 * g + 1], left, right[1]);
      }
    }
  }
};

template <int kColumns>
struct WarpScores<float, kColumns> {
  static constexpr int kRowsOfLane = 4, kColumnsOfLane = kColumns / 8, kLanesOfRow = 8;
  float sum[kRowsOfLane][kColumnsOfLane] = {};

  SR_DEVICE float& at(int i, int j) { return sum[i][j]; }
  static SR_DEVICE int row(int lane, int i) { return lane / 8 + 4 * i; }
  static SR_DEVICE int column(int lane, int j) { return lane % 8 + 8 * j; }
  static SR_DEVICE constexpr int group(int j) { return j / 2; }

  SR_DEVICE void add_product(const float* a, const float* b, int ld, int d, int columns, int lane) {
    a += lane / 8 * ld;
    b += lane % 8 * ld;
#pragma unroll 1
    for (int k = 0; k < d; k += 4) {
      Vector<float, 4> left[kRowsOfLane];
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i)
        left[i] = load_shared<Vector<float, 4>>(a + 4 * i * ld + k);
#pragma unroll
      for (int j = 0; j < kColumnsOfLane; ++j) {
        if (16 * group(j) >= columns) break;
        const auto right = load_shared<Vector<float, 4>>(b + 8 * j * ld + k);
#pragma unroll
        for (int i = 0; i < kRowsOfLane; ++i) {
          // Four products first: with logits of hundreds every addition to the sum costs digits.
          float part = left[i].element[0] * right.element[0];
#pragma unroll
          for (int x = 1; x < 4; ++x) part += left[i].element[x] * right.element[x];
          sum[i][j] += part;
        }
      }
    }
  }
};

// Scores of float32 go to their product through shared memory, 16 rows of kStageLd a warp; those of
// 16 bits stay in registers.
template <typename E, int kColumns>
struct ScoreStage {
  static constexpr int kLd = kColumns + 4, kBytes = 16 * kLd * 4;
  static SR_DEVICE void write(float* stage, WarpScores<E, kColumns>& scores, int columns,
                              int lane) {
    __syncwarp();  // what was there has been read
#pragma unroll
    for (int i = 0; i < scores.kRowsOfLane; ++i)
#pragma unroll
      for (int j = 0; j < scores.kColumnsOfLane; ++j)
        if (16 * scores.group(j) < columns)
          store_shared<float>(stage + scores.row(lane, i) * kLd + scores.column(lane, j),
                              scores.at(i, j));
    __syncwarp();
  }
};

template <typename E, int kD>
struct WarpWeighted {
  static constexpr int kRowsOfLane = 2, kColumnsOfLane = kD / 4;
  Accumulator sum[kD / 8];

  SR_DEVICE float& at(int i, int j) { return sum[j / 2].x[2 * i + j % 2]; }
  static SR_DEVICE int row(int lane, int i) { return lane / 4 + 8 * i; }
  static SR_DEVICE int column(int lane, int j) { return j / 2 * 8 + lane % 4 * 2 + j % 2; }

  template <int kColumns>
  SR_DEVICE void add_product(WarpScores<E, kColumns>& scores, float*, const E* v, int ld, int d,
                             int columns, int lane) {
#pragma unroll
    for (int g = 0; g < kColumns / 16; ++g) {
      if (16 * g >= columns) break;
      FragmentA left;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const Accumulator& from = scores.sum[2 * g + x / 2];
        left.x[x] = pack_pair<E>(from.x[x % 2 * 2], from.x[x % 2 * 2 + 1]);
      }
#pragma unroll
      for (int c = 0; c < kD / 16; ++c) {
        if (16 * c >= d) break;
        FragmentB right[2];
        load_b_from_rows_k(right, v + 16 * g * ld + 16 * c, ld, lane);
        multiply_add<E>(sum[2 * c], left, right[0]);
        multiply_add<E>(sum[2 * c + 1], left, right[1]);
      }
    }
  }
};

template <int kD>
struct WarpWeighted<float, kD> {
  static constexpr int kRowsOfLane = 4, kColumnsOfLane = kD / 8;
  float sum[kRowsOfLane][kColumnsOfLane] = {};

  SR_DEVICE float& at(int i, int j) { return sum[i][j]; }
  static SR_DEVICE int row(int lane, int i) { return lane / 8 + 4 * i; }
  static SR_DEVICE int column(int lane, int j) { return lane % 8 * 4 + j / 4 * 32 + j % 4; }

  template <int kColumns>
  SR_DEVICE void add_product(WarpScores<float, kColumns>& scores, float* stage, const float* v,
                             int ld, int d, int columns, int lane) {
    using Stage = ScoreStage<float, kColumns>;
    Stage::write(stage, scores, columns, lane);
    stage += lane / 8 * Stage::kLd;
    v += lane % 8 * 4;
#pragma unroll 1
    for (int k = 0; k < columns; k += 4) {
      Vector<float, 4> left[kRowsOfLane];
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i)
        left[i] = load_shared<Vector<float, 4>>(stage + 4 * i * Stage::kLd + k);
#pragma unroll
      for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int c = 0; c < kD / 32; ++c) {
          if (32 * c >= d) break;
          const auto right = load_shared<Vector<float, 4>>(v + (k + x) * ld + 32 * c);
#pragma unroll
          for (int i = 0; i < kRowsOfLane; ++i)
#pragma unroll
            for (int y = 0; y < 4; ++y) sum[i][4 * c + y] += left[i].element[x] * right.element[y];
        }
    }
  }
};

// The 16 rows of a warp into a tile, times a factor.
template <typename E, int kD>
SR_DEVICE void store_weighted(WarpWeighted<E, kD>& weighted, float factor, E* rows, int ld, int d,
                              int lane) {
  using Weighted = WarpWeighted<E, kD>;
#pragma unroll
  for (int i = 0; i < Weighted::kRowsOfLane; ++i)
#pragma unroll
    for (int j = 0; j < Weighted::kColumnsOfLane; j += 2) {
      const int column = weighted.column(lane, j);
      if (column < d)
        store_shared(rows + weighted.row(lane, i) * ld + column,
                     Vector<E, 2>{{from_float<E>(weighted.at(i, j) * factor),
                                   from_float<E>(weighted.at(i, j + 1) * factor)}});
    }
}

// Over the lanes that share a row.
template <int kLanes>
SR_DEVICE float row_sum(float x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
template <int kLanes>
SR_DEVICE float row_maximum(float x) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) x = larger(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// ------------------------------------------------------------------ scores

// The relative position bias of one head, in shared memory as float32 where it fits.
template <typename E>
struct BiasTable {
  const E* global;      // nullptr: no bias
  const float* shared;  // nullptr: not there
  int64_t stride;       // between the rows of `global`
  SR_DEVICE float operator[](int row) const {
    return shared != nullptr ? load_shared<float>(shared + row)
                             : to_float(load_global<E>(global + row * stride));
  }
};

// What turns products into scores.
template <typename E>
struct ScoreTerms {
  float scale;
  bool plain;  // nothing but the scale: every column has a pixel, and all see each other
  int bias_centre;
  BiasTable<E> bias;
};

// scores (of rows with these labels, against columns with those) from products, -inf where two do
// not see each other. The columns are the queries where `transposed`.
template <typename E, int kColumns>
SR_DEVICE void finish_scores(WarpScores<E, kColumns>& scores, const ScoreTerms<E>& terms,
                             bool transposed, const RowLabel* rows, const RowLabel* columns,
                             int count, int lane) {
  using Scores = WarpScores<E, kColumns>;
  if (terms.plain) {
#pragma unroll
    for (int i = 0; i < Scores::kRowsOfLane; ++i)
#pragma unroll
      for (int j = 0; j < Scores::kColumnsOfLane; ++j) scores.at(i, j) *= terms.scale;
    return;
  }
  RowLabel row[Scores::kRowsOfLane];
#pragma unroll
  for (int i = 0; i < Scores::kRowsOfLane; ++i)
    row[i] = load_shared<RowLabel>(rows + Scores::row(lane, i));
#pragma unroll
  for (int j = 0; j < Scores::kColumnsOfLane; ++j) {
    if (16 * Scores::group(j) >= count) break;
    const auto column = load_shared<RowLabel>(columns + Scores::column(lane, j));
#pragma unroll
    for (int i = 0; i < Scores::kRowsOfLane; ++i) {
      float& score = scores.at(i, j);
      const bool seen = column.region >= 0 && column.region == row[i].region;
      score *= terms.scale;
      if (terms.bias.global != nullptr && seen) {
        const int difference = row[i].position - column.position;
        score += terms.bias[terms.bias_centre + (transposed ? -difference : difference)];
      }
      score = seen ? score : kMinusInfinity;
    }
  }
}

SR_DEVICE float exp_of(float x) { return exp2_approximate(x * 1.44269504088896340736f); }

}  // namespace sr_kernels
