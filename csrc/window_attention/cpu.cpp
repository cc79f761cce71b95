// Window attention on the CPU.
//
//   out = softmax(scale q k^T + bias) v      inside each (shifted) window, per head
//
// One window of one head at a time. q and k are gathered channel-major, [d][tokens], v token-major,
// [tokens][d]; roll, partition and mask are index arithmetic of the gather. Scores are kept
// transposed, S[j][i] with the keys j as rows and a block of queries i as columns, so that softmax,
// bias, mask and both products run down the columns: no reduction across a vector anywhere. The
// block is tokens x kBlockVectors vectors and the only piece of the attention matrix that exists.
//
// Where the keys are the queries and nothing is added to q q^T, the forward computes half of the
// scores (symmetric_softmax.h).
//
// A whole column of scores is at hand, so the softmax is never rebuilt from the log-sum-exp: reuse
// and backward repeat maximum and sum, which costs little and keeps the digits that
// exp(s - lse) loses where |lse| is large (trained weights reach 877).
//
// Floor, float32, per pixel: 4 (2 d_qk + 2 d_v) bytes a head, 2 tokens (d_qk + d_v) FLOP and tokens
// exponentials a head; for ELAN-light's three groups, d = 20, together 27 kFLOP and 336
// exponentials. Where the forward is symmetric, about half of the exponentials and of the scores'
// products: 20 kFLOP and 168. Bound by arithmetic. Measured on two Zen 4 cores with AVX-512: those
// groups 0.60 of the products' floor, their reuse 0.34; SwinIR-light's call (six heads of 10,
// windows of 8, bias and mask) 0.60 to 0.88 of the exponentials', 0.62 on channels_last maps.
//
// Backward, with P the probabilities, recomputed block by block:
//   dP = dO v^T,  dS = P (dP - rowsum(P dP)),
//   dq = scale dS k,  dk = scale dS^T q,  dv = P^T dO,  dbias[index(i, j)] = sum dS[i, j].
// A pixel belongs to one window, so each element of dq, dk and dv has one writer. dbias is summed
// over chunks of windows in a fixed order. Five products of tokens x d FLOP pairs where the forward
// has two: at 4 x 60 x 64 x 64, windows of 4, 8 and 16, 22 to 23 ms on a shared Zen 3 core where a
// 1024 x 1024 product reached 87 to 91 GFLOP/s, 0.55 of the products' floor. Three and a half where
// scores are symmetric (SymmetricBackwardWorker): 17.0 ms, 0.5 of theirs.
#include "window_attention/params.h"

#include <memory>

#include "common/simd.h"
#include "common/tiling.h"
#include "window_attention/symmetric_softmax.h"
#include "window_attention/window_tile.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

constexpr int kBlockVectors = 4;  // queries at a time, in vectors
// Windows whose backward keeps all numerators at a time (256 tokens have 256 KiB). In smaller ones
// padding eats what symmetry saves, and a gradient that is zero would be a difference of products.
constexpr int64_t kMinSymmetricTokens = 16, kMaxSymmetricTokens = 512;

// ------------------------------------------------------------------ what all windows of a call
// share

template <typename S>
struct Shared {
  using T = typename Compute<S>::type;
  const WindowAttentionParams& p;
  int64_t tokens, stride, block;  // stride: a row of tokens; block: columns of the score block
  int64_t qk_stride, v_stride;    // a token's row of channels
  int64_t windows;                // of the batch
  bool shared_keys;
  BiasBands bands;
  Scratch scratch;
  T* bias = nullptr;  // bands of every head

  explicit Shared(const WindowAttentionParams& params)
      : p(params),
        tokens(params.geometry.tokens()),
        stride(padded<T>(tokens)),
        block(min64(stride, kBlockVectors * Simd<T>::width)),
        qk_stride(padded<T>(params.d_qk)),
        v_stride(padded<T>(params.d_v)),
        windows(params.batch * params.geometry.windows_h() * params.geometry.windows_w()),
        shared_keys(params.k.data == nullptr),
        bands(params.geometry),
        scratch(params.bias == nullptr ? 0
                                       : Scratch::bytes_for<T>(params.num_heads * bands.size())) {
    if (params.bias == nullptr) return;
    bias = scratch.take<T>(p.num_heads * bands.size());
    const S* table = static_cast<const S*>(p.bias);
    for (int64_t m = 0; m < p.num_heads; ++m)
      bands.for_each([&](int64_t position, int64_t row) {
        bias[m * bands.size() + position] = to_compute(table[row * p.num_heads + m]);
      });
  }

  // region: room for one row of tokens, filled where the window has something to mask.
  ScoreTerms<T> terms(const WindowPosition& window, int64_t head, T* region) const {
    ScoreTerms<T> terms{T(p.scale), bias == nullptr ? nullptr : bias + head * bands.size(), bands,
                        nullptr};
    if (p.mask && p.geometry.is_divided(window.a, window.b)) {
      for (int64_t i = 0; i < tokens; ++i)
        region[i] = T(p.geometry.region(window.a, window.b, static_cast<int>(i)));
      terms.region = region;
    }
    return terms;
  }
};

// ------------------------------------------------------------------ forward

int64_t windows_of(const WindowAttentionParams& p) {
  return p.batch * p.geometry.windows_h() * p.geometry.windows_w();
}

// The keys are the queries, and nothing is added to q q^T.
bool scores_are_symmetric(const WindowAttentionParams& p) {
  return p.k.data == nullptr && p.scale == 1.0 && p.bias == nullptr && !p.mask;
}

// Scores that are symmetric: windows [begin, end) of all heads, head by head.
template <typename S>
void forward_symmetric(const WindowAttentionParams& p, int64_t begin, int64_t end) {
  using T = typename Compute<S>::type;
  const WindowGeometry& geometry = p.geometry;
  const int64_t tokens = geometry.tokens(), windows = windows_of(p);
  const int64_t stride = ceil_div(tokens, kSquare<T>) * kSquare<T>;
  const int64_t ld = spread_stride<T>(stride);
  const int64_t elements = SymmetricSoftmax<T>::elements(stride);
  const int64_t most = WindowRun::most<S>(geometry), q_size = p.d_qk * ld, v_size = p.d_v * ld;
  Scratch scratch(Scratch::bytes_for<T>(most * q_size) + 2 * Scratch::bytes_for<T>(most * v_size) +
                  Scratch::bytes_for<T>(most * stride) + Scratch::bytes_for<T>(elements));
  T* q = scratch.take<T>(most * q_size);
  T* v = scratch.take<T>(most * v_size);
  T* out = scratch.take<T>(most * v_size);
  T* lse = p.lse.data != nullptr ? scratch.take<T>(most * stride) : nullptr;
  const SymmetricSoftmax<T> softmax(scratch.take<T>(elements), stride);
  for (int64_t index = begin, count; index < end; index += count) {
    const int64_t head = index / windows, first = index % windows;
    const WindowRun run(geometry, first, min64(windows, first + end - index), most);
    count = run.count;
    gather<S>(p.q, head * p.d_qk, p.d_qk, geometry, run, q, ld, q_size);
    gather<S>(p.v, head * p.d_v, p.d_v, geometry, run, v, ld, v_size);
    for (int64_t i = 0; i < count; ++i)
      attend(softmax, q + i * q_size, p.d_qk, v + i * v_size, p.d_v, tokens, ld, out + i * v_size,
             lse == nullptr ? nullptr : lse + i * stride);
    scatter<S>(out, ld, v_size, p.out, head * p.d_v, p.d_v, geometry, run);
    if (lse != nullptr) scatter<T>(lse, ld, stride, p.lse, head, 1, geometry, run);
  }
}

// Groups of one channels_last image, whose channels share cache lines: band by band of the image,
// so that a line comes from memory once for all of them. A band is a row of the largest windows.
void forward_by_bands(const WindowAttentionParams* groups, int64_t group_count,
                      ParallelFor parallel) {
  const WindowAttentionParams* largest = groups;
  for (int64_t i = 1; i < group_count; ++i)
    if (windows_of(groups[i]) < windows_of(*largest)) largest = groups + i;
  const int64_t parts = windows_of(*largest), band = largest->geometry.windows_w();
  parallel_for(parallel, parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part += band) {
      const int64_t next = min64(part + band, end);
      for (int64_t i = 0; i < group_count; ++i) {
        const int64_t windows = windows_of(groups[i]);
        dispatch_scalar(groups[i].kind, [&](auto element) {
          forward_symmetric<decltype(element)>(groups[i], windows * part / parts,
                                               windows * next / parts);
        });
      }
    }
  });
}

template <typename S>
void forward(const WindowAttentionParams& p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  if (scores_are_symmetric(p))
    return parallel_for(parallel, p.num_heads * windows_of(p),
                        [&](int64_t begin, int64_t end) { forward_symmetric<S>(p, begin, end); });
  const Shared<S> shared(p);
  const int64_t tokens = shared.tokens, stride = shared.stride;
  // All heads of a window, one after the other, where they share the lines of its pixels.
  const bool by_window = is_channels_last(p.q);
  parallel_for(parallel, p.num_heads * shared.windows, [&](int64_t begin, int64_t end) {
    Scratch scratch((shared.shared_keys ? 1 : 2) * Scratch::bytes_for<T>(p.d_qk * stride) +
                    Scratch::bytes_for<T>(tokens * shared.v_stride) +
                    2 * Scratch::bytes_for<T>(p.d_v * stride) +
                    Scratch::bytes_for<T>(tokens * shared.block) +
                    3 * Scratch::bytes_for<T>(stride));
    T* q = scratch.take<T>(p.d_qk * stride);
    T* k = shared.shared_keys ? q : scratch.take<T>(p.d_qk * stride);
    T* v = scratch.take<T>(tokens * shared.v_stride);
    T* out = scratch.take<T>(p.d_v * stride);
    T* part = scratch.take<T>(p.d_v * stride);
    T* s = scratch.take<T>(tokens * shared.block);
    T* highest = scratch.take<T>(stride);
    T* sum = scratch.take<T>(stride);
    T* region = scratch.take<T>(stride);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t head = by_window ? index % p.num_heads : index / shared.windows;
      const int64_t position = by_window ? index / p.num_heads : index % shared.windows;
      const WindowPosition window(p.geometry, position);
      gather<S>(p.q, head * p.d_qk, p.d_qk, p.geometry, window, q, stride, 1);
      if (!shared.shared_keys)
        gather<S>(p.k, head * p.d_qk, p.d_qk, p.geometry, window, k, stride, 1);
      gather<S>(p.v, head * p.d_v, p.d_v, p.geometry, window, v, 1, shared.v_stride);
      const ScoreTerms<T> terms = shared.terms(window, head, region);
      for (int64_t i0 = 0; i0 < stride; i0 += shared.block) {
        const int64_t columns = min64(shared.block, stride - i0);
        score_block(terms, q, k, p.d_qk, tokens, stride, i0, columns, s, shared.block, highest + i0,
                    sum + i0);
        product_in_runs(p.d_v, tokens, columns, v, shared.v_stride, s, shared.block, out + i0,
                        stride, part);
        for (int64_t i = i0; i < i0 + columns; i += Simd<T>::width) {
          const Vec<T> divisor = load(sum + i);
          for (int64_t c = 0; c < p.d_v; ++c)
            store<T>(out + c * stride + i, load(out + c * stride + i) / divisor);
        }
      }
      scatter<S>(out, stride, p.out, head * p.d_v, p.d_v, p.geometry, window);
      if (p.lse.data != nullptr) {
        for (int64_t i = 0; i < tokens; ++i) highest[i] += std::log(sum[i]);
        scatter<T>(highest, stride, p.lse, head, 1, p.geometry, window);
      }
    }
  });
}

// ------------------------------------------------------------------ backward

// M rows and V vectors of the product below, in registers.
template <typename T, int M, int V>
SR_INLINE void accumulate_tile(int64_t k_count, const T* a, int64_t lda, const T* b, int64_t ldb,
                               T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  Vec<T> acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = load(c + i * ldc + j * W);
  for (int64_t k = 0; k < k_count; ++k) {
    Vec<T> right[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      right[j] = load(b + k * ldb + j * W);
      keep_in_register(right[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> left = broadcast(a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<T>(c + i * ldc + j * W, acc[i][j]);
}
template <typename T, int M>
SR_INLINE void accumulate_rows(int64_t k_count, int64_t p_count, const T* a, int64_t lda,
                               const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  int64_t p = 0;
  for (; p + 3 * W <= p_count; p += 3 * W)
    accumulate_tile<T, M, 3>(k_count, a, lda, b + p, ldb, c + p, ldc);
  for (; p < p_count; p += W) accumulate_tile<T, M, 1>(k_count, a, lda, b + p, ldb, c + p, ldc);
}

// C[m, p] += sum_k A[m, k] B[k, p], all three row by row; p_count a multiple of the vector width.
// The product of dk and dv, whose left operand (dS, P) has the summed index contiguous. Three
// vectors at a time: the row of a head of 20 channels, AVX2.
template <typename T>
void accumulate_product(int64_t m_count, int64_t k_count, int64_t p_count, const T* a, int64_t lda,
                        const T* b, int64_t ldb, T* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + 4 <= m_count; m += 4)
    accumulate_rows<T, 4>(k_count, p_count, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
  for (; m < m_count; ++m)
    accumulate_rows<T, 1>(k_count, p_count, a + m * lda, lda, b, ldb, c + m * ldc, ldc);
}

template <typename T>
SR_INLINE void multiply(T* values, int64_t count, T factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

// A gradient of the scores that two uses of them share: with both uses' values and gradients side
// by side as channels, v = [v, v'] and dO = [dO, dO'], dP = dO v^T is already their sum, and so are
// dS, dq and dk. Of dv only the first use's is wanted.
bool has_reuse(const WindowAttentionBackwardParams& params) {
  return params.reuse_grad.data != nullptr;
}
int64_t joint_value_channels(const WindowAttentionBackwardParams& params) {
  return (has_reuse(params) ? 2 : 1) * params.forward.d_v;
}

template <typename S>
class BackwardWorker {
  using T = typename Compute<S>::type;

 public:
  BackwardWorker(const WindowAttentionBackwardParams& params, const Shared<S>& shared_)
      : g(params),
        p(params.forward),
        shared(shared_),
        d_v(joint_value_channels(params)),
        v_stride(padded<T>(d_v)),
        want_q(params.dq.data != nullptr),
        want_k(shared_.shared_keys ? want_q : params.dk.data != nullptr),
        want_v(params.dv.data != nullptr),
        want_bias(params.dbias != nullptr),
        scratch(bytes()) {
    const int64_t qk = p.d_qk * shared.stride, qk_rows = shared.tokens * shared.qk_stride;
    const int64_t v_size = d_v * shared.stride, v_rows = shared.tokens * v_stride;
    q = scratch.template take<T>(qk);
    k = scratch.template take<T>(qk);
    dq = scratch.template take<T>(qk);
    dk = scratch.template take<T>(qk);
    q_rows = scratch.template take<T>(qk_rows);
    k_rows = scratch.template take<T>(qk_rows);
    dk_rows = scratch.template take<T>(qk_rows);
    v = scratch.template take<T>(v_size);
    grad = scratch.template take<T>(v_size);
    dv = scratch.template take<T>(v_size);
    grad_rows = scratch.template take<T>(v_rows);
    dv_rows = scratch.template take<T>(v_rows);
    probability = scratch.template take<T>(shared.tokens * shared.block);
    dscore = scratch.template take<T>(shared.tokens * shared.block);
    highest = scratch.template take<T>(shared.stride);
    sum = scratch.template take<T>(shared.stride);
    region = scratch.template take<T>(shared.stride);
    dbias_bands = scratch.template take<T>(shared.bands.size());
    if (shared.shared_keys) {
      k = q;
      k_rows = q_rows;
    }
  }

  // Sums dbias of windows [begin, end) of one head into dbias_table (where wanted).
  void run(int64_t head, int64_t begin, int64_t end, T* dbias_table) {
    if (want_bias)
      for (int64_t i = 0; i < shared.bands.size(); ++i) dbias_bands[i] = T(0);
    for (int64_t index = begin; index < end; ++index)
      one_window(head, WindowPosition(p.geometry, index),
                 WindowPosition(p.geometry, min64(index + 1, end - 1)));
    if (want_bias)
      shared.bands.for_each(
          [&](int64_t position, int64_t row) { dbias_table[row] += dbias_bands[position]; });
  }

 private:
  int64_t bytes() const {
    return 4 * Scratch::bytes_for<T>(p.d_qk * shared.stride) +
           3 * Scratch::bytes_for<T>(shared.tokens * shared.qk_stride) +
           3 * Scratch::bytes_for<T>(d_v * shared.stride) +
           2 * Scratch::bytes_for<T>(shared.tokens * v_stride) +
           2 * Scratch::bytes_for<T>(shared.tokens * shared.block) +
           3 * Scratch::bytes_for<T>(shared.stride) + Scratch::bytes_for<T>(shared.bands.size());
  }
  // v or grad of a window, and below it that of the reuse.
  void gather_values(const FeatureMap& map, const FeatureMap& reuse, int64_t head,
                     const WindowPosition& window, T* destination) const {
    gather<S>(map, head * p.d_v, p.d_v, p.geometry, window, destination, shared.stride, 1);
    if (has_reuse(g))
      gather<S>(reuse, head * p.d_v, p.d_v, p.geometry, window, destination + p.d_v * shared.stride,
                shared.stride, 1);
  }

  // next: the window after this one, of the same head.
  void one_window(int64_t head, const WindowPosition& window, const WindowPosition& next) {
    const int64_t tokens = shared.tokens, stride = shared.stride, block = shared.block;
    const bool want_scores = want_q || want_k || want_bias;
    gather<S>(p.q, head * p.d_qk, p.d_qk, p.geometry, window, q, stride, 1);
    if (!shared.shared_keys)
      gather<S>(p.k, head * p.d_qk, p.d_qk, p.geometry, window, k, stride, 1);
    gather_values(g.grad, g.reuse_grad, head, window, grad);
    if (want_scores) gather_values(p.v, g.reuse_v, head, window, v);
    if (want_k || shared.shared_keys)
      transpose(q, stride, p.d_qk, tokens, q_rows, shared.qk_stride);
    if (want_q && !shared.shared_keys)
      transpose(k, stride, p.d_qk, tokens, k_rows, shared.qk_stride);
    if (want_v) transpose(grad, stride, d_v, tokens, grad_rows, v_stride);
    if (want_k) std::memset(dk_rows, 0, sizeof(T) * static_cast<size_t>(tokens * shared.qk_stride));
    if (want_v) std::memset(dv_rows, 0, sizeof(T) * static_cast<size_t>(tokens * v_stride));

    const ScoreTerms<T> terms = shared.terms(window, head, region);
    for (int64_t i0 = 0; i0 < stride; i0 += block) {
      const int64_t columns = min64(block, stride - i0), real = min64(columns, tokens - i0);
      if (stride > block) {  // else the window is so small that asking costs as much as waiting
        const int r0 = static_cast<int>(p.geometry.window_h * i0 / stride);
        const int r1 = static_cast<int>(p.geometry.window_h * (i0 + columns) / stride);
        prefetch_rows<S>(p.q, head * p.d_qk, p.d_qk, p.geometry, next, r0, r1);
        prefetch_rows<S>(p.v, head * p.d_v, p.d_v, p.geometry, next, r0, r1);
        prefetch_rows<S>(g.grad, head * p.d_v, p.d_v, p.geometry, next, r0, r1);
      }
      score_block(terms, q, k, p.d_qk, tokens, stride, i0, columns, probability, block,
                  highest + i0, sum + i0);
      if (want_scores)
        product<T>(Start::kZero, tokens, d_v, columns, rows_of_k(v, stride),
                   StridedRows<T>{grad + i0, stride}, nullptr, dscore, block);
      int64_t i = 0;
      for (; i + 4 * Simd<T>::width <= columns; i += 4 * Simd<T>::width)
        normalise_columns<4>(i, i0, want_scores);
      for (; i < columns; i += Simd<T>::width) normalise_columns<1>(i, i0, want_scores);
      if (want_v)
        accumulate_product(tokens, real, v_stride, probability, block, grad_rows + i0 * v_stride,
                           v_stride, dv_rows, v_stride);
      if (want_q)
        product_in_runs(p.d_qk, tokens, columns, k_rows, shared.qk_stride, dscore, block, dq + i0,
                        stride, dk);  // dk is free until the rows of dk are turned into it
      if (want_k)
        accumulate_product(tokens, real, shared.qk_stride, dscore, block,
                           q_rows + i0 * shared.qk_stride, shared.qk_stride, dk_rows,
                           shared.qk_stride);
      if (want_bias) {
        for (int64_t j = 0; j < tokens; ++j) {
          const T* row = dscore + j * block;
          T* target = dbias_bands + shared.bands.row(j) + i0;
          for (int64_t i = 0; i < real; ++i) target[i] += row[i];
        }
      }
    }

    if (want_k) transpose(dk_rows, shared.qk_stride, tokens, p.d_qk, dk, stride);
    if (shared.shared_keys && want_q)
      for (int64_t i = 0; i < p.d_qk * stride; ++i) dq[i] += dk[i];
    if (want_q) {
      multiply(dq, p.d_qk * stride, T(p.scale));
      scatter<S>(dq, stride, g.dq, head * p.d_qk, p.d_qk, p.geometry, window);
    }
    if (want_k && !shared.shared_keys) {
      multiply(dk, p.d_qk * stride, T(p.scale));
      scatter<S>(dk, stride, g.dk, head * p.d_qk, p.d_qk, p.geometry, window);
    }
    if (want_v) {
      transpose(dv_rows, v_stride, tokens, p.d_v, dv, stride);
      scatter<S>(dv, stride, g.dv, head * p.d_v, p.d_v, p.geometry, window);
    }
  }

  // V vectors of columns of the block, from column i on: numerators -> probabilities, dP -> dS.
  template <int V>
  void normalise_columns(int64_t i, int64_t i0, bool want_scores) {
    constexpr int W = Simd<T>::width;
    const int64_t block = shared.block;
    Vec<T> factor[V], delta[V];
#pragma GCC unroll 4
    for (int x = 0; x < V; ++x) {
      factor[x] = 1 / load(sum + i0 + i + x * W);
      delta[x] = Vec<T>{};
    }
    if (want_scores) {
      for (int64_t j = 0; j < shared.tokens; ++j)
#pragma GCC unroll 4
        for (int x = 0; x < V; ++x) {
          const int64_t place = j * block + i + x * W;
          delta[x] += load(probability + place) * load(dscore + place);
        }
#pragma GCC unroll 4
      for (int x = 0; x < V; ++x) delta[x] *= factor[x];
    }
    for (int64_t j = 0; j < shared.tokens; ++j)
#pragma GCC unroll 4
      for (int x = 0; x < V; ++x) {
        const int64_t place = j * block + i + x * W;
        const Vec<T> value = load(probability + place) * factor[x];
        store<T>(probability + place, value);
        if (want_scores) store<T>(dscore + place, value * (load(dscore + place) - delta[x]));
      }
  }

  const WindowAttentionBackwardParams& g;
  const WindowAttentionParams& p;
  const Shared<S>& shared;
  const int64_t d_v, v_stride;  // channels of v and grad, with those of a reuse; a token's row
  const bool want_q, want_k, want_v, want_bias;
  Scratch scratch;
  T *q, *k, *dq, *dk, *q_rows, *k_rows, *dk_rows;
  T *v, *grad, *dv, *grad_rows, *dv_rows;
  T *probability, *dscore, *highest, *sum, *region, *dbias_bands;
};

// Scores that are symmetric, and what the forward made of them is given. With e_ij = exp(s_ij -
// shift_i) the softmax's numerators, r_i = 1 / sum_j e_ij, g_i = r_i dO_i and c_i = g_i . O_i,
// which is r_i sum_j P_ij dP_ij, both sides of a pair add up to
//   t_ij = dS_ij + dS_ji = e_ij (g_i . v_j - c_i) + e_ji (g_j . v_i - c_j),
// which is symmetric: dq = t q, dv_j = sum_i e_ij g_i, and of s and t one triangle is computed.
// With shifts of pairs in the place of those of rows (PairShift) e is symmetric too: with values
// u_j = w_j v_j, and -c and w as one more channel of g and u, t_ij = e_ij (g_i . u_j + g_j . u_i)
// is one product, and dv_j = w_j sum_i e_ij g_i. Only where |q_i|^2 spread too far, rows have
// shifts.
template <typename S>
class SymmetricBackwardWorker {
  using T = typename Compute<S>::type;

 public:
  SymmetricBackwardWorker(const WindowAttentionBackwardParams& params, const Shared<S>& shared_)
      : g(params),
        p(params.forward),
        shared(shared_),
        stride(ceil_div(shared_.tokens, kSquare<T>) * kSquare<T>),
        ld(spread_stride<T>(stride)),
        blocks(ceil_div(stride, kBlock)),
        want_q(params.dq.data != nullptr),
        want_v(params.dv.data != nullptr),
        most(WindowRun::most<S>(p.geometry)),
        d_v(joint_value_channels(params)),
        q_size(p.d_qk * ld),
        v_size((d_v + 1) * ld),
        scratch(2 * Scratch::bytes_for<T>(most * q_size) +
                3 * Scratch::bytes_for<T>(most * v_size) + 4 * Scratch::bytes_for<T>(stride) +
                Scratch::bytes_for<RowShift<T>>(stride) + Scratch::bytes_for<PairShift<T>>(stride) +
                Scratch::bytes_for<T>((blocks * blocks + 2) * kBlockSize)) {
    q = scratch.template take<T>(most * q_size);
    dq = scratch.template take<T>(most * q_size);
    v = scratch.template take<T>(most * v_size);
    grad = scratch.template take<T>(most * v_size);
    out = scratch.template take<T>(most * v_size);
    sum = scratch.template take<T>(stride);
    factor = scratch.template take<T>(stride);
    shares = scratch.template take<T>(stride);
    weight = scratch.template take<T>(stride);
    shift = scratch.template take<RowShift<T>>(stride);
    pair_shift = scratch.template take<PairShift<T>>(stride);
    numerator = scratch.template take<T>((blocks * blocks + 2) * kBlockSize);
    gradient = numerator + blocks * blocks * kBlockSize;
  }

  void run(int64_t head, int64_t begin, int64_t end) {
    for (int64_t index = begin, count; index < end; index += count) {
      const WindowRun run(p.geometry, index, end, most);
      count = run.count;
      gather<S>(p.q, head * p.d_qk, p.d_qk, p.geometry, run, q, ld, q_size);
      gather_values(g.grad, g.reuse_grad, head, run, grad);
      if (want_q) {
        gather_values(p.v, g.reuse_v, head, run, v);
        gather_values(p.out, g.reuse_out, head, run, out);
      }
      const WindowPosition next(p.geometry, min64(index + count, end - 1));
      uint64_t too_large = 0;  // which windows' logits are
      for (int64_t i = 0; i < count; ++i)
        if (!one_window(head, next, q + i * q_size, v + i * v_size, grad + i * v_size,
                        out + i * v_size, dq + i * q_size))
          too_large |= uint64_t{1} << i;
      if (want_q) scatter<S>(dq, ld, q_size, g.dq, head * p.d_qk, p.d_qk, p.geometry, run);
      if (want_v) scatter<S>(out, ld, v_size, g.dv, head * p.d_v, p.d_v, p.geometry, run);
      if (too_large == 0) continue;
      if (!row_by_row) row_by_row = std::make_unique<BackwardWorker<S>>(g, shared);
      for (int64_t i = 0; i < count; ++i)
        if (too_large >> i & 1) row_by_row->run(head, index + i, index + i + 1, nullptr);
    }
  }

 private:
  static constexpr int64_t kBlockSize = kBlock * kBlock;

  // v, out or grad of a run of windows, and below it that of the reuse.
  void gather_values(const FeatureMap& map, const FeatureMap& reuse, int64_t head,
                     const WindowRun& run, T* destination) const {
    gather<S>(map, head * p.d_v, p.d_v, p.geometry, run, destination, ld, v_size);
    if (has_reuse(g))
      gather<S>(reuse, head * p.d_v, p.d_v, p.geometry, run, destination + p.d_v * ld, ld, v_size);
  }

  // Calls visit(j0, i0, rows, columns) for the blocks of tokens on and above the diagonal.
  template <typename Visit>
  void for_each_block(const Visit& visit) const {
    for (int64_t j0 = 0; j0 < stride; j0 += kBlock)
      for (int64_t i0 = j0; i0 < stride; i0 += kBlock)
        visit(j0, i0, min64(kBlock, stride - j0), min64(kBlock, stride - i0));
  }
  // The same for the squares of one of them: visit(j, i, whether it lies on the diagonal).
  template <typename Visit>
  SR_INLINE static void for_each_square(int64_t rows, int64_t columns, bool diagonal,
                                        const Visit& visit) {
    for (int64_t j = 0; j < rows; j += kSquare<T>)
      for (int64_t i = diagonal ? j : 0; i < columns; i += kSquare<T>)
        visit(j, i, diagonal && i == j);
  }
  T* numerators_at(int64_t j0, int64_t i0) const {
    return numerator + (j0 / kBlock * blocks + i0 / kBlock) * kBlockSize;
  }

  // dq and dv, which takes the place of out, from the gathered rest; whether its logits are small
  // enough for that. next: the window gathered next.
  bool one_window(int64_t head, const WindowPosition& next, const T* q, T* v, T* grad, T* out,
                  T* dq) {
    const int64_t n = shared.tokens;
    squared_norms(q, ld, p.d_qk, n, factor);
    PairShift<T> b;
    const bool pairs = pair_shifts(factor, n, stride, pair_shift, weight, &b);
    if (!pairs && !row_shifts(factor, n, shift)) return false;
    for (int64_t i = 0; i < stride; ++i) sum[i] = T(0);
    for_each_block([&](int64_t j0, int64_t i0, int64_t rows, int64_t columns) {
      T *e = numerators_at(j0, i0), *mirror = numerators_at(i0, j0);
      for_each_square(rows, columns, i0 == j0, [&](int64_t j, int64_t i, bool diagonal) {
        T *at = e + j * kBlock + i, *other = diagonal ? nullptr : mirror + i * kBlock + j;
        if (pairs)
          pair_square<T>(q, ld, p.d_qk, n, j0 + j, i0 + i, pair_shift, weight, at, other, sum);
        else
          shifted_square<true, T>(q, ld, p.d_qk, n, j0 + j, i0 + i, shift, at, other, sum);
      });
    });
    for (int64_t i = 0; i < stride; ++i) factor[i] = i < n ? 1 / sum[i] : T(0);
    for (int64_t i = 0; i < stride; i += Simd<T>::width) {
      const Vec<T> r = load(factor + i);
      Vec<T> share{};
      for (int64_t c = 0; c < d_v; ++c) {
        const Vec<T> scaled = load(grad + c * ld + i) * r;
        store<T>(grad + c * ld + i, scaled);
        if (want_q) share += scaled * load(out + c * ld + i);
      }
      store<T>(shares + i, share);
      if (!want_q || !pairs) continue;
      const Vec<T> w = load(weight + i);
      for (int64_t c = 0; c < d_v; ++c) store<T>(v + c * ld + i, load(v + c * ld + i) * w);
      store<T>(v + d_v * ld + i, w);
      store<T>(grad + d_v * ld + i, -share);
    }
    T* dv = out;  // which is not needed any more
    for_each_block([&](int64_t j0, int64_t i0, int64_t rows, int64_t columns) {
      if (i0 == j0 && stride > kBlock) ask_for_rows(head, next, j0, rows);
      const bool diagonal = i0 == j0;
      const T *e = numerators_at(j0, i0), *e_mirror = numerators_at(i0, j0);
      if (want_q) {
        T *t = gradient, *mirror = diagonal ? t : t + kBlockSize;
        for_each_square(rows, columns, diagonal, [&](int64_t j, int64_t i, bool on_diagonal) {
          const int64_t at = j * kBlock + i;
          T* other = on_diagonal ? nullptr : mirror + i * kBlock + j;
          if (pairs)
            symmetric_gradient_square<T>(v, grad, ld, d_v + 1, j0 + j, i0 + i, e + at, t + at,
                                         other);
          else
            gradient_square<T>(v, grad, shares, ld, d_v, j0 + j, i0 + i, e + at,
                               e_mirror + i * kBlock + j, t + at, other);
        });
        multiply_blocks(p.d_qk, q, t, mirror, j0, i0, rows, columns, dq);
      }
      if (want_v) multiply_blocks(p.d_v, grad, e, e_mirror, j0, i0, rows, columns, dv);
    });
    for (int64_t i = 0; want_v && pairs && i < stride; i += Simd<T>::width) {
      const Vec<T> w = load(weight + i);
      for (int64_t c = 0; c < p.d_v; ++c) store<T>(dv + c * ld + i, load(dv + c * ld + i) * w);
    }
    return true;
  }

  // result[:, i] += left[:, j] block[j][i] for a block and its mirror image; the first block of a
  // column of blocks starts the sum.
  void multiply_blocks(int64_t d, const T* left, const T* block, const T* mirror, int64_t j0,
                       int64_t i0, int64_t rows, int64_t columns, T* result) const {
    const int64_t n = shared.tokens;
    row_product<T>(nullptr, j0 > 0, d, min64(rows, n - j0), columns, left + j0, ld, 1, block,
                   kBlock, result + i0, ld);
    if (i0 > j0)
      row_product<T>(nullptr, true, d, min64(columns, n - i0), rows, left + i0, ld, 1, mirror,
                     kBlock, result + j0, ld);
  }

  // The part of the window after this one that lies where tokens [j0, j0 + rows) do.
  void ask_for_rows(int64_t head, const WindowPosition& next, int64_t j0, int64_t rows) const {
    const int r0 = static_cast<int>(p.geometry.window_h * j0 / stride);
    const int r1 = static_cast<int>(p.geometry.window_h * (j0 + rows) / stride);
    prefetch_rows<S>(p.q, head * p.d_qk, p.d_qk, p.geometry, next, r0, r1);
    const auto ask_for = [&](const FeatureMap& map) {
      prefetch_rows<S>(map, head * p.d_v, p.d_v, p.geometry, next, r0, r1);
    };
    ask_for(g.grad);
    if (!want_q) return;
    ask_for(p.v);
    ask_for(p.out);
    if (!has_reuse(g)) return;
    ask_for(g.reuse_grad);
    ask_for(g.reuse_v);
    ask_for(g.reuse_out);
  }

  const WindowAttentionBackwardParams& g;
  const WindowAttentionParams& p;
  const Shared<S>& shared;
  const int64_t stride, ld, blocks;
  const bool want_q, want_v;
  const int64_t most;            // windows taken together
  const int64_t d_v;             // channels of v and grad, with those of a reuse
  const int64_t q_size, v_size;  // the room of a window
  Scratch scratch;
  T *q, *dq, *v, *grad, *out;  // of all of them
  T *sum, *factor, *shares, *weight;
  RowShift<T>* shift;
  PairShift<T>* pair_shift;
  T* numerator;  // of the whole window, block by block
  T* gradient;   // a block of t, and its mirror image
  std::unique_ptr<BackwardWorker<S>>
      row_by_row;  // for windows whose logits are too large for RowShift
};

template <typename S>
void backward(const WindowAttentionBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const WindowAttentionParams& p = params.forward;
  const Shared<S> shared(p);
  // Not from an out that was rounded to 16 bits: c_i would be no better than that.
  if constexpr (std::is_same_v<S, T>) {
    const bool fits = shared.tokens >= kMinSymmetricTokens && shared.tokens <= kMaxSymmetricTokens;
    if (p.out.data != nullptr && scores_are_symmetric(p) && fits)
      return parallel_for_workers(
          parallel, p.num_heads * shared.windows,
          [&] { return std::make_unique<SymmetricBackwardWorker<S>>(params, shared); },
          [&](SymmetricBackwardWorker<S>& worker, int64_t begin, int64_t end) {
            while (begin < end) {
              const int64_t head = begin / shared.windows, first = begin % shared.windows;
              const int64_t count = min64(end - begin, shared.windows - first);
              worker.run(head, first, first + count);
              begin += count;
            }
          });
  }
  // Each head's windows are dealt to chunks; a work item is one chunk of one head.
  const Chunks chunks(shared.windows);
  const int64_t rows = params.dbias == nullptr ? 0 : p.geometry.bias_rows();
  Scratch sums(Scratch::bytes_for<T>(p.num_heads * chunks.count * rows));
  T* partial = sums.take<T>(p.num_heads * chunks.count * rows);
  parallel_for_workers(
      parallel, p.num_heads * chunks.count,
      [&] { return std::make_unique<BackwardWorker<S>>(params, shared); },
      [&](BackwardWorker<S>& worker, int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item)
          worker.run(item / chunks.count, chunks.begin(item % chunks.count),
                     chunks.end(item % chunks.count), partial + item * rows);
      });
  S* dbias = static_cast<S*>(params.dbias);
  for (int64_t m = 0; rows > 0 && m < p.num_heads; ++m)
    for (int64_t row = 0; row < rows; ++row)
      reduce_chunks(partial + m * chunks.count * rows + row, chunks.count, rows, 1,
                    dbias + row * p.num_heads + m);
}

}  // namespace

// Groups differ in the cost of a window: one after the other, each shared out evenly, but for those
// of a channels_last image.
void window_attention(const WindowAttentionParams* groups, int64_t group_count,
                      ParallelFor parallel) {
  bool together = group_count > 1;
  for (int64_t i = 0; i < group_count; ++i)
    together = together && groups[i].num_heads == 1 && scores_are_symmetric(groups[i]) &&
               is_channels_last(groups[i].q) && is_channels_last(groups[i].v);
  if (together) return forward_by_bands(groups, group_count, parallel);
  for (int64_t i = 0; i < group_count; ++i)
    dispatch_scalar(groups[i].kind,
                    [&](auto element) { forward<decltype(element)>(groups[i], parallel); });
}
void window_attention_backward(const WindowAttentionBackwardParams* groups, int64_t group_count,
                               ParallelFor parallel) {
  for (int64_t i = 0; i < group_count; ++i)
    dispatch_scalar(groups[i].forward.kind,
                    [&](auto element) { backward<decltype(element)>(groups[i], parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
