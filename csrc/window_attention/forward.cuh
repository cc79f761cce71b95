// Window attention on CUDA, forward and reuse.
//
//   out = softmax(scale q k^T + bias) v      inside each (shifted) window, per head
//                                                                       window_attention_kernel
//
// Tile: 128 or 64 queries a block (32 in float32 for more than 64 channels a head), a warp for each
// 16; several whole windows of up to 64 (128) tokens, or a piece of a larger one. Keys and values
// stream past them in tiles of as many rows, softmax and its normaliser with them (Milakov and
// Gimelshein, 2018), 64 keys at a time (32 in float32): no score leaves the registers, except that
// float32 ones pass through a warp's own shared memory to the second product. Roll, partition,
// groups, heads and Swin's mask are index arithmetic of the loads. Where the keys are the queries
// and the window is whole, they are loaded once. Channels_last rows are copied asynchronously, by
// 16 or 8 bytes where they are aligned. All groups run in one launch, those of the largest windows
// first, so that the long blocks do not come last.
//
// Products on tensor cores (16 bit, float32 sums) or by FFMA (float32, no TF32); scores, softmax
// and log-sum-exp in float32. Applying scores again computes exp(s - lse), without maxima and sums,
// in 16 bits; in float32, where that would lose digits (|lse| reaches 877 in trained networks), the
// softmax is made again.
//
// Floor, per pixel and head, e bytes an element, t tokens a window: e (2 d_qk + 2 d_v) bytes (d_qk
// less where the keys are the queries) + 4 for the log-sum-exp, 2 t (d_qk + d_v) FLOP, t
// exponentials. Where the keys are the queries the scores are symmetric, and half of their FLOP
// would do: here they are loaded once, but computed in full, since a warp has rows of its own. Here
// t is padded to 16 and the dimensions to 16 (32 in float32) in the products; a window of more
// tokens than rows is read once for every piece of it. Measured fraction: unmeasured, never run on
// a GPU.
#pragma once

#include "window_attention/window_tile.cuh"

namespace sr_kernels {

constexpr int kMaxGroups = 4;  // of one launch: the params stay below 4 KiB

struct WindowAttentionLaunch {
  int count;
  bool reuse;  // scores with the log-sum-exp of an earlier call
  WindowAttentionParams group[kMaxGroups];
  int64_t end[kMaxGroups];  // blocks of groups 0 to i
};

// How many warps a block has, for heads of up to kD channels.
template <typename E, int kD>
constexpr int kWindowWarps = sizeof(E) == 2 ? (kD <= 32 ? 8 : 4) : (kD <= 64 ? 4 : 2);

template <typename E, int kD>
struct WindowForwardTile {
  static constexpr int kRows = 16 * kWindowWarps<E, kD>, kThreads = 2 * kRows;
  static constexpr int kChunk = sizeof(E) == 2 ? 64 : 32;
  using Rows = RowTile<E, kRows, kD>;
  using Stage = ScoreStage<E, kChunk>;
  static constexpr int kStageBytes = sizeof(E) == 2 ? 0 : kThreads / 32 * Stage::kBytes;
  static constexpr int kPlacesAt = 3 * Rows::kBytes + kStageBytes;
  static constexpr int kLabelsAt = kPlacesAt + 2 * kRows * static_cast<int>(sizeof(RowPlace));
  static constexpr int kBiasAt = kLabelsAt + 2 * kRows * static_cast<int>(sizeof(RowLabel));
  static_assert(kBiasAt <= kMaxSharedBytes, "starts on every GPU");
  static constexpr int kMaxBias = (kMaxSharedBytes - kBiasAt) / 4;  // what fits in shared memory
};

// The group of a block, and the block's number in it.
SR_DEVICE int group_of_block(const int64_t* end, int64_t* block) {
  int g = 0;
  while (*block >= end[g]) ++g;
  if (g > 0) *block -= end[g - 1];
  return g;
}

// bias (of one head) into shared memory where it fits there; the caller sees to the barrier.
template <typename E>
SR_DEVICE ScoreTerms<E> load_terms(const WindowAttentionParams& p, int head, int bias_at,
                                   int max_bias, int thread, int threads) {
  const WindowGeometry& geometry = p.geometry;
  ScoreTerms<E> terms{static_cast<float>(p.scale), false, geometry.bias_centre(), {}};
  terms.plain = p.bias == nullptr && !p.mask && geometry.tokens() % 16 == 0;
  if (p.bias == nullptr) return terms;
  terms.bias.global = static_cast<const E*>(p.bias) + head;
  terms.bias.stride = p.num_heads;
  const int64_t rows = geometry.bias_rows();
  if (rows <= max_bias) {
    float* table = shared_array<float>(bias_at, static_cast<int>(rows));
    for (int i = thread; i < rows; i += threads)
      store_shared<float>(table + i,
                          to_float(load_global<E>(terms.bias.global + i * terms.bias.stride)));
    terms.bias.shared = table;
  }
  return terms;
}

// Place and label of a block's rows, by all threads; a barrier must follow.
template <int kRows>
SR_DEVICE void find_rows(const WindowAttentionParams& p, const RowPlan& plan, int64_t window,
                         int tile, RowPlace* places, RowLabel* labels, int thread) {
  if (thread >= kRows) return;
  RowPlace place;
  RowLabel label;
  find_row(p, plan, window, tile, thread, &place, &label);
  store_shared(places + thread, place);
  store_shared(labels + thread, label);
}

// How many columns a warp's rows have in tile `tile` of their window, padded to 16.
SR_DEVICE int columns_of(const RowPlan& plan, int slot, int tile) {
  const int rest = plan.tokens - tile * plan.slot_rows;
  return slot >= plan.slots ? 0 : round_up(rest < plan.slot_rows ? rest : plan.slot_rows, 16);
}

// Softmax of a warp's 16 rows over keys that come tile by tile, and the values that it weighs. With
// the log-sum-exp of an earlier call in `highest` (reuse) maxima and sums are not made.
template <typename E, int kD, int kChunk>
struct OnlineSoftmax {
  using Scores = WarpScores<E, kChunk>;
  static constexpr int kRowsOfLane = Scores::kRowsOfLane;
  WarpWeighted<E, kD> weighted;
  float highest[kRowsOfLane], sum[kRowsOfLane];

  SR_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      highest[i] = kMinusInfinity;
      sum[i] = 0.0f;
    }
  }

  // queries: the warp's rows; keys (so many, a multiple of 16) and values: rows of tiles.
  SR_DEVICE void add(const E* queries, const E* key_rows, const E* value_rows, int ld, float* stage,
                     int d_qk, int d_v, int keys, const ScoreTerms<E>& terms,
                     const RowLabel* labels, const RowLabel* key_labels, bool reuse, int lane) {
#pragma unroll 1
    for (int key = 0; key < keys; key += kChunk) {
      const int columns = keys - key < kChunk ? keys - key : kChunk;
      Scores scores;
      scores.add_product(queries, key_rows + key * ld, ld, d_qk, columns, lane);
      finish_scores(scores, terms, false, labels, key_labels + key, columns, lane);
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        float base = highest[i];
        if (!reuse) {
#pragma unroll
          for (int j = 0; j < Scores::kColumnsOfLane; ++j)
            if (16 * Scores::group(j) < columns) base = larger(base, scores.at(i, j));
          base = row_maximum<Scores::kLanesOfRow>(base);
          // A row that has seen no key yet is not to become NaN.
          const float factor = base == kMinusInfinity ? 1.0f : exp_of(highest[i] - base);
          highest[i] = base;
          if (base == kMinusInfinity) base = 0.0f;
          sum[i] *= factor;
#pragma unroll
          for (int c = 0; c < WarpWeighted<E, kD>::kColumnsOfLane; ++c) weighted.at(i, c) *= factor;
        }
        float part = 0.0f;
#pragma unroll
        for (int j = 0; j < Scores::kColumnsOfLane; ++j) {
          if (16 * Scores::group(j) >= columns) break;
          const float e = exp_of(scores.at(i, j) - base);
          scores.at(i, j) = e;
          part += e;
        }
        if (!reuse) sum[i] += part;
      }
      if constexpr (sizeof(E) == 4) {
        // Chunk by chunk: one long sum would cost the digits that stock's blocks keep.
        WarpWeighted<E, kD> part;
        part.add_product(scores, stage, value_rows + key * ld, ld, d_v, columns, lane);
#pragma unroll
        for (int i = 0; i < kRowsOfLane; ++i)
#pragma unroll
          for (int c = 0; c < WarpWeighted<E, kD>::kColumnsOfLane; ++c)
            weighted.at(i, c) += part.at(i, c);
      } else {
        weighted.add_product(scores, stage, value_rows + key * ld, ld, d_v, columns, lane);
      }
    }
  }

  // Divides by the sums; not in reuse.
  SR_DEVICE void finish() {
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      sum[i] = row_sum<Scores::kLanesOfRow>(sum[i]);
      const float factor = 1.0f / sum[i];
#pragma unroll
      for (int c = 0; c < WarpWeighted<E, kD>::kColumnsOfLane; ++c) weighted.at(i, c) *= factor;
    }
  }
};

template <typename E, int kD>
__global__ void __launch_bounds__(2 * 16 * kWindowWarps<E, kD>, 1)
    window_attention_kernel(const __grid_constant__ WindowAttentionLaunch launch) {
  using Tile = WindowForwardTile<E, kD>;
  using Rows = typename Tile::Rows;
  using Scores = WarpScores<E, Tile::kChunk>;
  constexpr int kRows = Tile::kRows, kLd = Rows::kLd, kRowsOfLane = Scores::kRowsOfLane;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t block = blockIdx.x;
  const WindowAttentionParams& p = launch.group[group_of_block(launch.end, &block)];
  const RowPlan plan(p.geometry, p.batch, kRows);
  const int head = static_cast<int>(block % p.num_heads);
  const int64_t unit = block / p.num_heads, window = plan.first_window(unit);
  const int own_tile = plan.tile(unit);
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);
  const bool shared_keys = p.k.data == nullptr;

  E* query_rows = shared_array<E>(0, kRows * kLd);
  E* key_buffer = shared_array<E>(Rows::kBytes, kRows * kLd);
  E* value_rows = shared_array<E>(2 * Rows::kBytes, kRows * kLd);
  float* stage = nullptr;
  if constexpr (Tile::kStageBytes > 0)
    stage =
        shared_array<float>(3 * Rows::kBytes + warp * Tile::Stage::kBytes, 16 * Tile::Stage::kLd);
  RowPlace* places = shared_array<RowPlace>(Tile::kPlacesAt, 2 * kRows);
  RowLabel* labels = shared_array<RowLabel>(Tile::kLabelsAt, 2 * kRows);
  const ScoreTerms<E> terms =
      load_terms<E>(p, head, Tile::kBiasAt, Tile::kMaxBias, thread, Tile::kThreads);

  find_rows<kRows>(p, plan, window, own_tile, places, labels, thread);
  __syncthreads();
  Rows::load(query_rows, p.q, head * d_qk, d_qk, places, thread);

  const int slot = warp * 16 / plan.slot_rows;
  const int first_key = slot * plan.slot_rows;  // 0 where the window is not whole
  OnlineSoftmax<E, kD, Tile::kChunk> softmax;
  if (launch.reuse) {
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const auto place = load_shared<RowPlace>(places + 16 * warp + Scores::row(lane, i));
      softmax.highest[i] =
          place.n < 0 ? 0.0f : load_global<float>(row_pointer<const float>(p.lse, place, head));
    }
  }

#pragma unroll 1
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const bool own = tile == own_tile;
    const E* key_rows = own && shared_keys ? query_rows : key_buffer;
    const RowPlace* key_places = own ? places : places + kRows;
    const RowLabel* key_labels = own ? labels : labels + kRows;
    if (tile > 0) __syncthreads();  // the tile before has been used
    if (!own) {
      find_rows<kRows>(p, plan, window, tile, places + kRows, labels + kRows, thread);
      __syncthreads();
    }
    if (!own || !shared_keys)
      Rows::load(key_buffer, shared_keys ? p.q : p.k, head * d_qk, d_qk, key_places, thread);
    Rows::load(value_rows, p.v, head * d_v, d_v, key_places, thread);
    finish_copies();

    const int keys = columns_of(plan, slot, tile);
    softmax.add(query_rows + 16 * warp * kLd, key_rows + first_key * kLd,
                value_rows + first_key * kLd, kLd, stage, d_qk, d_v, keys, terms,
                labels + 16 * warp, key_labels + first_key, launch.reuse, lane);
  }

  if (!launch.reuse) {
    softmax.finish();
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const auto place = load_shared<RowPlace>(places + 16 * warp + Scores::row(lane, i));
      if (p.lse.data != nullptr && lane % Scores::kLanesOfRow == 0 && place.n >= 0)
        store_global<float>(row_pointer<float>(p.lse, place, head),
                            softmax.highest[i] + logf(softmax.sum[i]));
    }
  }
  __syncthreads();  // the queries may have been other warps' keys
  store_weighted<E, kD>(softmax.weighted, 1.0f, query_rows + 16 * warp * kLd, kLd, d_v, lane);
  __syncthreads();
  Rows::store(query_rows, p.out, head * d_v, d_v, places, thread);
}

}  // namespace sr_kernels
