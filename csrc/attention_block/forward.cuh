// The attention block on CUDA, inference only. Per channel group g and window:
//
//   y = W_out a + b_out + x,  a_g = softmax(q_g q_g^T) v_g,  q and v from W_in x + b_in
//
// Two launches in 16 bits with groups of up to 32 channels. attention_block_kernel makes a: a block
// takes 128 tokens of a group's windows, as window attention does, projects q and v from their
// pixels of x on its way (W_in's rows of the group, all of K), and streams the rest of a larger
// window past them, projected likewise; q goes to memory only for a later call to reuse. All groups
// are one launch. Windows of two groups do not coincide when shifted, hence the second launch:
// shift_conv's conv_kernel without a shift, for W_out, bias and residual.
//
// Otherwise (float32, wider groups), a sequence: projection, copy_queries_kernel where q is to be
// kept, window attention, projection.
//
// Tile: x, 128 tokens x 64 channels at a time, 2 d x 64 of W_in, and q and v of the tokens and of
// one tile of keys in shared memory; scores and softmax in registers (window_attention).
//
// Floor, per pixel, C channels, G groups of t_g tokens a window, e bytes an element: 3 e C bytes
// (x, y, q; reuse the same), 2 C (3 C) + 4 (C / G) sum t_g FLOP (2 C (2 C) + ... in reuse), sum t_g
// exponentials. Here x is read once for each group of at most 128 tokens a window and once for each
// 128 tokens of a larger one (ELAN's windows of 4, 8 and 16: 4 e C), which the second-level cache
// may serve; with a and q written and a, x and y of the second launch 9 e C in all (8 e C without
// q). The sequence of launches moves 11 e C: x, q and v, q again and its copy, q and v, a; a, x, y.
// Products with W_in repeat with the reads. Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "attention_block/params.h"
#include "common/launch.cuh"
#include "shift_conv/forward.cuh"
#include "window_attention/forward.cuh"

namespace sr_kernels {

struct AttentionBlockLaunch {
  // q of each group: read in reuse, else written unless absent; k, v and lse unused.
  WindowAttentionLaunch attention;
  int first_row[kMaxGroups];  // of W_in
  FeatureMap x;
  int channels;
  const void *weight, *bias;
};

template <typename E>
struct AttentionBlockTile {
  static constexpr int kD = 32, kK = 64;
  using Attention = WindowForwardTile<E, kD>;
  static constexpr int kRows = Attention::kRows;
  using Rows = RowTile<E, kRows, kD>;
  using Pixels = RowTile<E, kRows, kK>;
  static constexpr int kPixelsAt = 3 * Rows::kBytes;
  static constexpr int kWeightsAt = kPixelsAt + Pixels::kBytes;
  static constexpr int kWeights = kProductRows * Pixels::kLd;
  static constexpr int kPlacesAt = kWeightsAt + kWeights * static_cast<int>(sizeof(E));
  static constexpr int kLabelsAt = kPlacesAt + 2 * kRows * static_cast<int>(sizeof(RowPlace));
  static constexpr int kSharedBytes = kLabelsAt + 2 * kRows * static_cast<int>(sizeof(RowLabel));
  static_assert(kSharedBytes <= kMaxSharedBytes, "starts on every GPU");
  static_assert(Attention::kThreads == kBlockThreads && 2 * kD == kProductRows, "one of each");
};

template <typename E>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_block_kernel(const __grid_constant__ AttentionBlockLaunch launch) {
  using Tile = AttentionBlockTile<E>;
  using Rows = typename Tile::Rows;
  constexpr int kRows = Tile::kRows, kLd = Rows::kLd, kD = Tile::kD, kK = Tile::kK;
  constexpr int kLdX = Tile::Pixels::kLd;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t unit = blockIdx.x;
  const int g = group_of_block(launch.attention.end, &unit);
  const WindowAttentionParams& p = launch.attention.group[g];
  const bool reuse = launch.attention.reuse;
  const RowPlan plan(p.geometry, p.batch, kRows);
  const int64_t window = plan.first_window(unit);
  const int own_tile = plan.tile(unit);
  const int d = static_cast<int>(p.d_qk), projected = reuse ? d : 2 * d;
  const int columns = round_up(projected, 16);
  const E* weight = static_cast<const E*>(launch.weight) +
                    static_cast<int64_t>(launch.first_row[g]) * launch.channels;

  E* query_rows = shared_array<E>(0, kRows * kLd);
  E* key_buffer = shared_array<E>(Rows::kBytes, kRows * kLd);
  E* value_rows = shared_array<E>(2 * Rows::kBytes, kRows * kLd);
  E* x_rows = shared_array<E>(Tile::kPixelsAt, kRows * kLdX);
  E* weights = shared_array<E>(Tile::kWeightsAt, Tile::kWeights);
  RowPlace* places = shared_array<RowPlace>(Tile::kPlacesAt, 2 * kRows);
  RowLabel* labels = shared_array<RowLabel>(Tile::kLabelsAt, 2 * kRows);
  const ScoreTerms<E> terms = load_terms<E>(p, 0, 0, 0, thread, kBlockThreads);
  // What pads the head dimension stays zero.
  for (int i = thread; i < 3 * kRows * kD; i += kBlockThreads)
    if (i % kD >= d) store_shared<E>(query_rows + i / kD * kLd + i % kD, from_float<E>(0.0f));

  const int slot = warp * 16 / plan.slot_rows;
  const int first_key = slot * plan.slot_rows;
  OnlineSoftmax<E, kD, Tile::Attention::kChunk> softmax;
#pragma unroll 1
  for (int step = 0; step < plan.tiles; ++step) {  // the block's own tokens first
    const bool own = step == 0;
    const int tile = own_tile + step < plan.tiles ? own_tile + step : own_tile + step - plan.tiles;
    E* key_rows = own ? query_rows : key_buffer;
    RowPlace* key_places = own ? places : places + kRows;
    RowLabel* key_labels = own ? labels : labels + kRows;
    __syncthreads();  // the tile before has been used
    find_rows<kRows>(p, plan, window, tile, key_places, key_labels, thread);
    __syncthreads();
    if (reuse) Rows::load(key_rows, p.q, 0, d, key_places, thread);
    WarpScores<E, kProductRows> sums;  // [token][row of W_in]
#pragma unroll 1
    for (int k0 = 0; k0 < launch.channels; k0 += kK) {
      const int k_count = launch.channels - k0 < kK ? launch.channels - k0 : kK;
      if (k0 > 0) __syncthreads();
      Tile::Pixels::load(x_rows, launch.x, k0, k_count, key_places, thread);
      if (own || launch.channels > kK)
        load_weights<E, kK>(weights, kLdX, round_up(k_count, kStepOfK<E>), weight + k0,
                            launch.channels, 1, projected, k_count, thread);
      finish_copies();
      sums.add_product(x_rows + 16 * warp * kLdX, weights, kLdX, round_up(k_count, kStepOfK<E>),
                       columns, lane);
    }
#pragma unroll
    for (int j = 0; j < sums.kColumnsOfLane; ++j) {
      const int column = sums.column(lane, j);
      if (column >= projected) continue;
      float bias = 0.0f;
      if (launch.bias != nullptr)
        bias = to_float(
            load_global<E>(static_cast<const E*>(launch.bias) + launch.first_row[g] + column));
      const bool is_query = !reuse && column < d;
      E* to = is_query ? key_rows + column : value_rows + column - (projected - d);
#pragma unroll
      for (int i = 0; i < sums.kRowsOfLane; ++i)
        store_shared<E>(to + (16 * warp + sums.row(lane, i)) * kLd,
                        from_float<E>(sums.at(i, j) + bias));
    }
    __syncthreads();
    if (own && !reuse && p.q.data != nullptr) Rows::store(query_rows, p.q, 0, d, places, thread);
    softmax.add(query_rows + 16 * warp * kLd, key_rows + first_key * kLd,
                value_rows + first_key * kLd, kLd, nullptr, d, d, columns_of(plan, slot, tile),
                terms, labels + 16 * warp, key_labels + first_key, false, lane);
  }
  softmax.finish();
  __syncthreads();  // the queries have been other warps' keys
  store_weighted<E, kD>(softmax.weighted, 1.0f, query_rows + 16 * warp * kLd, kLd, d, lane);
  __syncthreads();
  Rows::store(query_rows, p.out, 0, d, places, thread);
}

// q[p][g d + i] = qv[p][2 g d + i], a thread for each element.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads)
    copy_queries_kernel(const E* qv, E* q, int64_t count, int channels, int d) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t pixel = i / channels;
  const int c = static_cast<int>(i % channels);
  store_global<E>(q + i, load_global<E>(qv + pixel * 2 * channels + c + c / d * d));
}

}  // namespace sr_kernels
