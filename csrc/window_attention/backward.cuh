// Window attention on CUDA, backward. With P the probabilities, dO the gradient of out:
//
//   dP = dO v^T,  dS = P (dP - delta),  delta = rowsum(P dP),
//   dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO,  dbias[index(i, j)] = sum dS[i, j]
//
// window_statistics_kernel, window_gradient_kernel and, for dbias, window_bias_kernel.
//
// Tile: as the forward's. A block owns rows (tokens) and streams its windows past them, once with
// the rows as queries, which makes dq, and once as keys, which makes dk and dv: each gradient is
// summed in the registers of one warp, nothing is added up between blocks. Where the keys are the
// queries, both roles add to the same sums, and whole windows are loaded once for both. P is
// recomputed in either role, 32 columns at a time (16 for wide heads), from what
// window_statistics_kernel left for every row: its maximum, 1 / its sum and delta (in 16 bits
// log-sum-exp, 1 and delta).
//
// dbias: a row of dS meets every element of the table at most once, so a warp adds its rows one
// after the other, lanes side by side, to a table of its own, in shared memory where it fits. Then
// the tables are added in order: no atomics, the same bits every time. The number of tables depends
// on the sizes alone, not on the GPU.
//
// Floor, per pixel and head, e bytes an element, t tokens a window: e (4 d_qk + 3 d_v) bytes (2
// d_qk less where the keys are the queries) + 4, 2 t (3 d_qk + 2 d_v) FLOP and t exponentials.
// Here 2 t (5 d_qk + 4 d_v) FLOP (statistics: d_qk + d_v, queries: 2 d_qk + d_v, keys: 2 d_qk + 2
// d_v) and 3 t exponentials. Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "window_attention/forward.cuh"

namespace sr_kernels {

// What a row of scores comes to.
struct alignas(16) RowStatistics {
  float highest, factor, delta, unused;  // P = exp(s - highest) * factor
};

struct WindowGradientGroup {
  WindowAttentionParams forward;  // out is not read
  FeatureMap grad, dq, dk, dv;    // data nullptr: not wanted
  RowStatistics* statistics;      // kRows for every unit and head: [unit][head][row]
  int64_t blocks_per_head;        // of the gradient kernel, each with consecutive units
  // With a bias gradient: blocks_per_head x tables tables of bias_rows() for each head.
  float* dbias_parts;
  int tables;  // 1, or as many as warps where they do not fit in shared memory
};
struct WindowGradientLaunch {
  int count;
  bool reuse;  // the log-sum-exp is accurate enough
  WindowGradientGroup group[kMaxGroups];
  int64_t statistics_end[kMaxGroups], end[kMaxGroups];  // blocks of groups 0 to i
};

template <typename E, int kD>
struct WindowBackwardTile {
  static constexpr int kRows = 16 * kWindowWarps<E, kD>, kThreads = 2 * kRows;
  static constexpr int kChunk =
      sizeof(E) == 2 && kD <= 64 ? 32 : 16;  // columns at a time: what registers allow
  using Rows = RowTile<E, kRows, kD>;
  using Stage = ScoreStage<E, kChunk>;
  static constexpr int kPlacesAt = 4 * Rows::kBytes;
  static constexpr int kLabelsAt = kPlacesAt + 2 * kRows * static_cast<int>(sizeof(RowPlace));
  static constexpr int kStatisticsAt = kLabelsAt + 2 * kRows * static_cast<int>(sizeof(RowLabel));
  static constexpr int kStageAt = kStatisticsAt + kRows * static_cast<int>(sizeof(RowStatistics));
  // float32 always stages its scores, 16 bits for the bias gradient alone.
  static constexpr int kBiasAt = kStageAt + kThreads / 32 * Stage::kBytes;
  static_assert(kBiasAt <= kMaxSharedBytes, "starts on every GPU");
  static constexpr int kRoom = (kMaxSharedBytes - kBiasAt) / 4;
  // Rows of a bias table that leave room for the table itself, for that and a gradient a warp.
  static constexpr int kMaxBias = kRoom;
  static constexpr int kMaxGradient = kRoom / (kThreads / 32 + 1) - 4;
};

// ------------------------------------------------------------------ statistics of every row

template <typename E, int kD>
__global__ void __launch_bounds__(2 * 16 * kWindowWarps<E, kD>, 1)
    window_statistics_kernel(const __grid_constant__ WindowGradientLaunch launch) {
  using Tile = WindowBackwardTile<E, kD>;
  using Rows = typename Tile::Rows;
  using Scores = WarpScores<E, Tile::kChunk>;
  constexpr int kRows = Tile::kRows, kLd = Rows::kLd, kRowsOfLane = Scores::kRowsOfLane;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t block = blockIdx.x;
  const WindowGradientGroup& g = launch.group[group_of_block(launch.statistics_end, &block)];
  const WindowAttentionParams& p = g.forward;
  const RowPlan plan(p.geometry, p.batch, kRows);
  const int head = static_cast<int>(block % p.num_heads);
  const int64_t unit = block / p.num_heads, window = plan.first_window(unit);
  const int own_tile = plan.tile(unit);
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);
  const bool shared_keys = p.k.data == nullptr;

  E* query_rows = shared_array<E>(0, kRows * kLd);
  E* grad_rows = shared_array<E>(Rows::kBytes, kRows * kLd);
  E* key_buffer = shared_array<E>(2 * Rows::kBytes, kRows * kLd);
  E* value_rows = shared_array<E>(3 * Rows::kBytes, kRows * kLd);
  RowPlace* places = shared_array<RowPlace>(Tile::kPlacesAt, 2 * kRows);
  RowLabel* labels = shared_array<RowLabel>(Tile::kLabelsAt, 2 * kRows);
  const ScoreTerms<E> terms =
      load_terms<E>(p, head, Tile::kBiasAt, Tile::kMaxBias, thread, Tile::kThreads);
  find_rows<kRows>(p, plan, window, own_tile, places, labels, thread);
  __syncthreads();
  Rows::load(query_rows, p.q, head * d_qk, d_qk, places, thread);
  Rows::load(grad_rows, g.grad, head * d_v, d_v, places, thread);

  const int slot = warp * 16 / plan.slot_rows;
  const int first_key = slot * plan.slot_rows;
  float highest[kRowsOfLane], sum[kRowsOfLane], weighted[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    highest[i] = launch.reuse ? 0.0f : kMinusInfinity;
    sum[i] = weighted[i] = 0.0f;
    if (!launch.reuse) continue;
    const auto place = load_shared<RowPlace>(places + 16 * warp + Scores::row(lane, i));
    if (place.n >= 0) highest[i] = load_global<float>(row_pointer<const float>(p.lse, place, head));
  }

#pragma unroll 1
  for (int tile = 0; tile < plan.tiles; ++tile) {
    const bool own = tile == own_tile;
    const E* key_rows = own && shared_keys ? query_rows : key_buffer;
    const RowPlace* key_places = own ? places : places + kRows;
    const RowLabel* key_labels = own ? labels : labels + kRows;
    if (tile > 0) __syncthreads();
    if (!own) find_rows<kRows>(p, plan, window, tile, places + kRows, labels + kRows, thread);
    __syncthreads();
    if (!own || !shared_keys)
      Rows::load(key_buffer, shared_keys ? p.q : p.k, head * d_qk, d_qk, key_places, thread);
    Rows::load(value_rows, p.v, head * d_v, d_v, key_places, thread);
    finish_copies();

    const int keys = columns_of(plan, slot, tile);
#pragma unroll 1
    for (int key = 0; key < keys; key += Tile::kChunk) {
      const int columns = keys - key < Tile::kChunk ? keys - key : Tile::kChunk;
      const int row = first_key + key;
      Scores scores, dp;
      scores.add_product(query_rows + 16 * warp * kLd, key_rows + row * kLd, kLd, d_qk, columns,
                         lane);
      dp.add_product(grad_rows + 16 * warp * kLd, value_rows + row * kLd, kLd, d_v, columns, lane);
      finish_scores(scores, terms, false, labels + 16 * warp, key_labels + row, columns, lane);
#pragma unroll
      for (int i = 0; i < kRowsOfLane; ++i) {
        float base = highest[i];
        if (!launch.reuse) {
#pragma unroll
          for (int j = 0; j < Scores::kColumnsOfLane; ++j)
            if (16 * Scores::group(j) < columns) base = larger(base, scores.at(i, j));
          base = row_maximum<Scores::kLanesOfRow>(base);
          const float factor = base == kMinusInfinity ? 1.0f : exp_of(highest[i] - base);
          highest[i] = base;
          if (base == kMinusInfinity) base = 0.0f;
          sum[i] *= factor;
          weighted[i] *= factor;
        }
        float part = 0.0f, weighted_part = 0.0f;
#pragma unroll
        for (int j = 0; j < Scores::kColumnsOfLane; ++j) {
          if (16 * Scores::group(j) >= columns) break;
          const float e = exp_of(scores.at(i, j) - base);
          part += e;
          weighted_part += e * dp.at(i, j);
        }
        sum[i] += part;
        weighted[i] += weighted_part;
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    sum[i] = row_sum<Scores::kLanesOfRow>(sum[i]);
    weighted[i] = row_sum<Scores::kLanesOfRow>(weighted[i]);
    const float factor = launch.reuse ? 1.0f : 1.0f / sum[i];
    if (lane % Scores::kLanesOfRow == 0)
      store_global(
          g.statistics + (unit * p.num_heads + head) * kRows + 16 * warp + Scores::row(lane, i),
          RowStatistics{highest[i], factor, weighted[i] * factor, 0.0f});
  }
}

// ------------------------------------------------------------------ gradients

// A bias gradient as one warp sums it: in shared memory, or, where that is too small, global.
struct BiasGradient {
  float *shared, *global;
  SR_DEVICE void clear(int rows, int lane) const {
    for (int i = lane; i < rows; i += 32)
      if (shared != nullptr)
        store_shared<float>(shared + i, 0.0f);
      else
        store_global<float>(global + i, 0.0f);
  }
  SR_DEVICE void add(int row, float x) const {
    if (shared != nullptr)
      store_shared<float>(shared + row, load_shared<float>(shared + row) + x);
    else
      store_global<float>(global + row, load_global<float>(global + row) + x);
  }
};

// scores become P and dp becomes dS, both 0 where two do not see each other. `statistics` are those
// of the queries: the columns where as_keys, else the warp's rows.
template <typename Scores>
SR_DEVICE void finish_gradients(Scores& scores, Scores& dp, bool as_keys,
                                const RowStatistics* statistics, int columns, int lane) {
  const auto finish = [&](int i, int j, const RowStatistics& s) {
    const float score = scores.at(i, j);
    const bool seen = score != kMinusInfinity;
    const float probability = seen ? exp_of(score - s.highest) * s.factor : 0.0f;
    scores.at(i, j) = probability;
    dp.at(i, j) = seen ? probability * (dp.at(i, j) - s.delta) : 0.0f;
  };
  if (as_keys) {
#pragma unroll
    for (int j = 0; j < Scores::kColumnsOfLane; ++j) {
      if (16 * Scores::group(j) >= columns) break;
      const auto s = load_shared<RowStatistics>(statistics + Scores::column(lane, j));
#pragma unroll
      for (int i = 0; i < Scores::kRowsOfLane; ++i) finish(i, j, s);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Scores::kRowsOfLane; ++i) {
      const auto s = load_shared<RowStatistics>(statistics + Scores::row(lane, i));
#pragma unroll
      for (int j = 0; j < Scores::kColumnsOfLane; ++j)
        if (16 * Scores::group(j) < columns) finish(i, j, s);
    }
  }
}

// What a block's own rows are taken for.
constexpr int kQueries = 0, kKeys = 1;

template <typename E, int kD>
__global__ void __launch_bounds__(2 * 16 * kWindowWarps<E, kD>, 1)
    window_gradient_kernel(const __grid_constant__ WindowGradientLaunch launch) {
  using Tile = WindowBackwardTile<E, kD>;
  using Rows = typename Tile::Rows;
  using Stage = typename Tile::Stage;
  using Scores = WarpScores<E, Tile::kChunk>;
  using Weighted = WarpWeighted<E, kD>;
  constexpr int kRows = Tile::kRows, kLd = Rows::kLd;
  constexpr int kWarps = Tile::kThreads / 32;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t block = blockIdx.x;
  const WindowGradientGroup& g = launch.group[group_of_block(launch.end, &block)];
  const WindowAttentionParams& p = g.forward;
  const RowPlan plan(p.geometry, p.batch, kRows);
  const int head = static_cast<int>(block % p.num_heads);
  const int64_t part = block / p.num_heads;
  const int d_qk = static_cast<int>(p.d_qk), d_v = static_cast<int>(p.d_v);
  const bool shared_keys = p.k.data == nullptr;
  const FeatureMap& keys = shared_keys ? p.q : p.k;
  const bool want_bias = g.dbias_parts != nullptr;
  const bool as_queries = g.dq.data != nullptr || want_bias;
  const bool want_dk = shared_keys ? g.dq.data != nullptr : g.dk.data != nullptr;
  const bool as_keys = want_dk || g.dv.data != nullptr;

  RowPlace* places = shared_array<RowPlace>(Tile::kPlacesAt, 2 * kRows);
  RowLabel* labels = shared_array<RowLabel>(Tile::kLabelsAt, 2 * kRows);
  RowStatistics* statistics = shared_array<RowStatistics>(Tile::kStatisticsAt, kRows);
  float* stage = shared_array<float>(Tile::kStageAt + warp * Stage::kBytes, 16 * Stage::kLd);
  const int max_bias = want_bias ? Tile::kMaxGradient : Tile::kMaxBias;
  const ScoreTerms<E> terms =
      load_terms<E>(p, head, Tile::kBiasAt, max_bias, thread, Tile::kThreads);
  const int bias_rows = want_bias ? static_cast<int>(p.geometry.bias_rows()) : 0;
  BiasGradient dbias{nullptr, nullptr};
  float* dbias_part = g.dbias_parts + (head * g.blocks_per_head + part) * g.tables * bias_rows;
  const int table_bytes = round_up(bias_rows, 4) * 4;
  if (want_bias && g.tables == 1)
    dbias.shared = shared_array<float>(Tile::kBiasAt + (warp + 1) * table_bytes, bias_rows);
  else if (want_bias)
    dbias.global = dbias_part + static_cast<int64_t>(warp) * bias_rows;
  dbias.clear(bias_rows, lane);

  const int slot = warp * 16 / plan.slot_rows;
  const int first_row = slot * plan.slot_rows;  // of the warp's window
  const int64_t units = plan.units();
  const int64_t per_block = (units + g.blocks_per_head - 1) / g.blocks_per_head;
  const int64_t last = (part + 1) * per_block < units ? (part + 1) * per_block : units;
#pragma unroll 1
  for (int64_t unit = part * per_block; unit < last; ++unit) {
    const int64_t window = plan.first_window(unit);
    const int own_tile = plan.tile(unit);
    __syncthreads();  // the unit before has been stored
    find_rows<kRows>(p, plan, window, own_tile, places, labels, thread);

    // The block's own rows and those streamed past them: x, queries and keys, y, gradient and
    // values; own is the first of each as queries, the second as keys.
    Weighted dx, dv;
    bool loaded = false;
#pragma unroll 1
    for (int role = as_queries ? kQueries : kKeys; role <= (as_keys ? kKeys : kQueries); ++role) {
      // Where the keys are the queries, whole windows stay, and the tiles of y change places.
      const int own_y_at = loaded ? 3 : 1;
      E* own_x = shared_array<E>(0, kRows * kLd);
      E* own_y = shared_array<E>(own_y_at * Rows::kBytes, kRows * kLd);
      E* buffer_x = shared_array<E>(2 * Rows::kBytes, kRows * kLd);
      E* other_y = shared_array<E>((4 - own_y_at) * Rows::kBytes, kRows * kLd);
      const FeatureMap& y = role == kQueries ? g.grad : p.v;
      const FeatureMap& streamed_y = role == kQueries ? p.v : g.grad;
      __syncthreads();
      if (!loaded) {
        Rows::load(own_x, role == kQueries ? p.q : keys, head * d_qk, d_qk, places, thread);
        Rows::load(own_y, y, head * d_v, d_v, places, thread);
      }
#pragma unroll 1
      for (int tile = 0; tile < plan.tiles; ++tile) {
        const bool own = tile == own_tile;
        E* other_x = own && shared_keys ? own_x : buffer_x;
        const RowPlace* other_places = own ? places : places + kRows;
        const RowLabel* other_labels = own ? labels : labels + kRows;
        if (tile > 0) __syncthreads();
        if (!own) {
          find_rows<kRows>(p, plan, window, tile, places + kRows, labels + kRows, thread);
          __syncthreads();
        }
        if (!own || !shared_keys)
          Rows::load(buffer_x, role == kQueries ? keys : p.q, head * d_qk, d_qk, other_places,
                     thread);
        if (!loaded) Rows::load(other_y, streamed_y, head * d_v, d_v, other_places, thread);
        if (thread < kRows) {
          const int64_t of_tile = role == kQueries ? unit : unit - own_tile + tile;
          store_shared(statistics + thread,
                       load_global<RowStatistics>(g.statistics +
                                                  (of_tile * p.num_heads + head) * kRows + thread));
        }
        finish_copies();
        const int count = columns_of(plan, slot, tile);
#pragma unroll 1
        for (int c = 0; c < count; c += Tile::kChunk) {
          const int columns = count - c < Tile::kChunk ? count - c : Tile::kChunk;
          const int row = first_row + c;
          Scores scores, dp;
          scores.add_product(own_x + 16 * warp * kLd, other_x + row * kLd, kLd, d_qk, columns,
                             lane);
          dp.add_product(own_y + 16 * warp * kLd, other_y + row * kLd, kLd, d_v, columns, lane);
          finish_scores(scores, terms, role == kKeys, labels + 16 * warp, other_labels + row,
                        columns, lane);
          finish_gradients(scores, dp, role == kKeys,
                           statistics + (role == kKeys ? row : 16 * warp), columns, lane);
          if (role == kKeys)
            dv.add_product(scores, stage, other_y + row * kLd, kLd, d_v, columns, lane);
          dx.add_product(dp, stage, other_x + row * kLd, kLd, d_qk, columns, lane);
          if (!want_bias || role == kKeys) continue;
          if constexpr (sizeof(E) == 2) Stage::write(stage, dp, columns, lane);
          const auto column = load_shared<RowLabel>(other_labels + row + lane % columns);
          const bool exists = lane < columns && column.region >= 0;
#pragma unroll 1
          for (int r = 0; r < 16; ++r) {
            const auto label = load_shared<RowLabel>(labels + 16 * warp + r);
            if (exists && label.region >= 0)
              dbias.add(terms.bias_centre + label.position - column.position,
                        load_shared<float>(stage + r * Stage::kLd + lane));
            __syncwarp();
          }
        }
      }
      loaded = shared_keys && plan.tiles == 1;
      if (shared_keys && role == kQueries && as_keys) continue;  // both roles make dq
      __syncthreads();  // the rows have been used: they take the results
      E* rows = shared_array<E>(0, kRows * kLd);
      E* dv_rows = shared_array<E>(Rows::kBytes, kRows * kLd);
      store_weighted<E, kD>(dx, terms.scale, rows + 16 * warp * kLd, kLd, d_qk, lane);
      if (role == kKeys) store_weighted<E, kD>(dv, 1.0f, dv_rows + 16 * warp * kLd, kLd, d_v, lane);
      __syncthreads();
      const FeatureMap& to = role == kQueries || shared_keys ? g.dq : g.dk;
      if (to.data != nullptr) Rows::store(rows, to, head * d_qk, d_qk, places, thread);
      if (role == kKeys && g.dv.data != nullptr)
        Rows::store(dv_rows, g.dv, head * d_v, d_v, places, thread);
      dx = Weighted();
    }
  }

  if (!want_bias || g.tables != 1) return;
  __syncthreads();
  for (int i = thread; i < bias_rows; i += Tile::kThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w)
      sum += load_shared<float>(
          shared_array<float>(Tile::kBiasAt + (w + 1) * table_bytes, bias_rows) + i);
    store_global<float>(dbias_part + i, sum);
  }
}

// dbias[row][head] = the sum of the head's tables, in order.
template <typename E>
__global__ void __launch_bounds__(256)
    window_bias_kernel(const float* parts, int64_t tables, int64_t rows, int64_t heads, E* dbias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= rows * heads) return;
  const int64_t head = i % heads, row = i / heads;
  float sum = 0.0f;
  for (int64_t t = 0; t < tables; ++t)
    sum += load_global<float>(parts + (head * tables + t) * rows + row);
  store_global<E>(dbias + i, from_float<E>(sum));
}

}  // namespace sr_kernels
