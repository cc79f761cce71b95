// softmax(q q^T) v inside one window, from half of its scores.
//
// Scores are symmetric. With one shift for all rows in the softmax's exponential, the largest
// |q_i|^2 of the window, its numerators are too: squares of tokens on one side of the diagonal are
// computed and transposed in registers for the other side. Products with v go block by block of 64
// tokens, so that no more than two blocks of numerators exist. A window whose |q_i|^2 spread too
// far for one shift takes one for each token of a pair, and beyond that one for each row, which
// costs a few integer instructions more; only where logits are so large that no shift can be
// foreseen, the rows' maxima are searched.
//
// Include only from a kernel's cpu.cpp; internal linkage, as simd.h.
#pragma once

#include "common/exp2.h"
#include "common/row_product.h"
#include "common/simd.h"
#include "window_attention/window_tile.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

constexpr int64_t kBlock = 64;  // tokens a side of a block of scores

// A score tile is a square of kSquare tokens: whole vectors, and accumulators enough to cover the
// latency of a multiplication.
template <typename T>
constexpr int kStrips = Simd<T>::width >= 8 ? 1 : 8 / Simd<T>::width;
template <typename T>
constexpr int kSquare = kStrips<T> * Simd<T>::width;

// One shift for all rows of a window serves while no row's maximum, which is at least |q_i|^2, lies
// farther below it: what is lost to the least numerator is then below exp(50 - 86) of a row's sum.
// The largest logit is limited by what numerators() can round to an integer.
constexpr int kMaxSpread = 50, kMaxLogit = 1 << 20;

// Numerators of the softmax, exp(x - shift) for x - shift <= 1 and no NaN. For float32 the shift is
// a whole number of bits, and applied to the exponent alone: x far below the shift loses no digit.
// The least numerator is
// 2^-125.
template <typename T>
struct Numerators;
template <>
struct Numerators<float> {
  // Unsigned: what stands in a window's padding may wrap around.
  typedef uint32_t BitsVec __attribute__((vector_size(kVectorBytes)));
  BitsVec shift;  // and the bits of the magic number
  explicit Numerators(float largest)
      : shift(0x4b400001u + static_cast<uint32_t>(largest * 1.44269504088896341f) - BitsVec{}) {}
  double subtracted() const { return 0.69314718055994530942 * (shift[0] - 0x4b400000u); }
  SR_INLINE Vec<float> operator()(Vec<float> x) const {
    const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float> shifted = x * 1.44269504088896341f + magic;
    const Vec<float> f = x * 1.44269504088896341f - (shifted - magic);
    Vec<float> p = exp2_of_fraction(f);
    BitsVec exponent, bits;
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    std::memcpy(&bits, &p, sizeof(bits));
    exponent -= shift;
    const IntVec power = reinterpret_cast<IntVec>(exponent);
    bits += reinterpret_cast<BitsVec>(power > -125 ? power : -125 - IntVec{}) << 23;
    std::memcpy(&p, &bits, sizeof(p));
    return p;
  }
};
template <>
struct Numerators<double> {
  double shift;
  explicit Numerators(double largest) : shift(largest) {}
  double subtracted() const { return shift; }
  SR_INLINE Vec<double> operator()(Vec<double> x) const { return exp_nonpositive(x - shift); }
};

// The sum of kCount vectors, in pairs.
template <typename T, int kCount>
SR_INLINE Vec<T> pairwise_sum(const Vec<T>* vectors) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    return pairwise_sum<T, kCount / 2>(vectors) +
           pairwise_sum<T, kCount - kCount / 2>(vectors + kCount / 2);
  }
}

// Writes the transpose of strip `strip` of a square; see(part, rows) is shown its parts before
// that.
template <typename T, typename See>
SR_INLINE void store_mirror(const Vec<T>* rows, int strip, T* mirror, const See& see) {
  constexpr int W = Simd<T>::width;
#pragma GCC unroll 8
  for (int part = 0; part < kStrips<T>; ++part) {
    Vec<T> square[W];
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) square[l] = rows[part * W + l];
    transpose(square);
    see(part, square);
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) store<T>(mirror + (strip * W + l) * kBlock + part * W, square[l]);
  }
}

// The square of keys [j0, j0 + kSquare) and queries [i0, i0 + kSquare) of one window:
//   e[j][i] = numerators(q_j . q_i),  sum_i[i] += sum_j e[j][i]
// and, unless mirror is nullptr, the same with j and i exchanged: mirror[i][j] = e[j][i],
// sum_j[j] += sum_i e[j][i]. Tokens from n on count as zero. d x ld is q.
template <typename T>
SR_INLINE void score_square(const T* q, int64_t ld, int64_t d, int64_t n, int64_t j0, int64_t i0,
                            const Numerators<T>& numerators, T* e, T* mirror, T* sum) {
  constexpr int W = Simd<T>::width, kRows = kSquare<T>;
#pragma GCC unroll 8
  for (int strip = 0; strip < kStrips<T>; ++strip) {
    const int64_t i = i0 + strip * W;
    Vec<T> acc[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> right = load(q + k * ld + i);
      const T* left = q + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(left[r]) * right;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = numerators(acc[r]);
    if (j0 + kRows > n || i + W > n) {
      for (int r = 0; r < kRows; ++r)
        for (int l = 0; l < W; ++l)
          if (j0 + r >= n || i + l >= n) acc[r][l] = T(0);
    }
    store<T>(sum + i, load(sum + i) + pairwise_sum<T, kRows>(acc));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store<T>(e + r * kBlock + strip * W, acc[r]);
    if (mirror != nullptr)
      store_mirror<T>(acc, strip, mirror, [&](int part, const Vec<T>* square) {
        T* sum_j = sum + j0 + part * W;
        store<T>(sum_j, load(sum_j) + pairwise_sum<T, W>(square));
      });
  }
}

// A shift for each row of scores, halfway between the least that the row's maximum can be, |q_i|^2,
// and the most, |q_i| max|q| by Cauchy and Schwarz: at most max|q|^2 / 8 off. For float32 it is a
// whole number of bits, so that one polynomial serves both sides of a pair.
constexpr int kMaxRowShiftLogit = 8 * kMaxSpread;
template <typename T>
struct RowShift;
template <>
struct RowShift<float> {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  uint32_t bits;  // with those of the magic number
  static RowShift of(float shift) {
    return {0x4b400000u + static_cast<uint32_t>(shift * 1.44269504088896341f)};
  }
  double subtracted() const { return 0.69314718055994530942 * (bits - 0x4b400000u); }
  // exp(x - shift) with a shift for each lane, by_lane, and with that of row j, by_row.
  static SR_INLINE void numerators(Vec<float> x, const RowShift* lanes, RowShift row,
                                   Vec<float>* by_lane, Vec<float>* by_row) {
    const Vec<float> magic = broadcast(12582912.0f);  // as Numerators
    const Vec<float> shifted = x * 1.44269504088896341f + magic;
    const Vec<float> p = exp2_of_fraction(x * 1.44269504088896341f - (shifted - magic));
    Bits exponent, mantissa, shifts;
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    std::memcpy(&mantissa, &p, sizeof(mantissa));
    std::memcpy(&shifts, lanes, sizeof(shifts));
    *by_lane = scaled(mantissa, exponent - shifts);
    *by_row = scaled(mantissa, exponent - row.bits);
  }

 private:
  static SR_INLINE Vec<float> scaled(Bits mantissa, Bits exponent) {
    const IntVec power = reinterpret_cast<IntVec>(exponent);
    mantissa += reinterpret_cast<Bits>(power > -125 ? power : -125 - IntVec{}) << 23;
    Vec<float> value;
    std::memcpy(&value, &mantissa, sizeof(value));
    return value;
  }
};
template <>
struct RowShift<double> {
  double shift;
  static RowShift of(double shift) { return {shift}; }
  double subtracted() const { return shift; }
  static SR_INLINE void numerators(Vec<double> x, const RowShift* lanes, RowShift row,
                                   Vec<double>* by_lane, Vec<double>* by_row) {
    *by_lane = exp(x - load(&lanes->shift));
    *by_row = exp(x - row.shift);
  }
};

// As score_square(), with a shift for each query's row of scores: with queries along columns
// e[j][i] = exp(q_j . q_i - shift_i) and mirror[i][j] = exp(q_j . q_i - shift_j), with queries
// along rows the other way round. Sums are those of queries.
template <bool kQueryRows, typename T>
SR_INLINE void shifted_square(const T* q, int64_t ld, int64_t d, int64_t n, int64_t j0, int64_t i0,
                              const RowShift<T>* shift, T* e, T* mirror, T* sum) {
  constexpr int W = Simd<T>::width, kRows = kSquare<T>;
#pragma GCC unroll 8
  for (int strip = 0; strip < kStrips<T>; ++strip) {
    const int64_t i = i0 + strip * W;
    Vec<T> acc[kRows], other[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> right = load(q + k * ld + i);
      const T* left = q + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(left[r]) * right;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      RowShift<T>::numerators(acc[r], shift + i, shift[j0 + r], &acc[r], &other[r]);
    if (j0 + kRows > n || i + W > n) {
      for (int r = 0; r < kRows; ++r)
        for (int l = 0; l < W; ++l)
          if (j0 + r >= n || i + l >= n) acc[r][l] = other[r][l] = T(0);
    }
    store<T>(sum + i, load(sum + i) + pairwise_sum<T, kRows>(acc));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      store<T>(e + r * kBlock + strip * W, kQueryRows ? other[r] : acc[r]);
    if (mirror == nullptr) continue;
    store_mirror<T>(kQueryRows ? acc : other, strip, mirror, [](int, const Vec<T>*) {});
#pragma GCC unroll 8
    for (int part = 0; part < kStrips<T>; ++part) {
      T* sum_j = sum + j0 + part * W;
      store<T>(sum_j, load(sum_j) + sums_of_lanes<T>(other + part * W));
    }
  }
}

// A shift a for each token, taken from both sides of its pairs: e_ij = exp(q_i . q_j - a_i - a_j),
// with a_i about |q_i|^2 / 2, is symmetric and hardly above 1. Row i of the softmax is
// proportional to e_ij w_j with w_j = exp(a_j - b) for any b: the weights go to v and to the sums.
// What is lost to the least numerator is below exp(kMaxPairSpread / 2 - 81) of a row's sum.
constexpr int kMaxPairSpread = 120;
template <typename T>
struct PairShift;
template <>
struct PairShift<float> {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  uint32_t bits;  // a whole number of them, as in RowShift
  static PairShift of(float norm) { return {static_cast<uint32_t>(norm * 0.72134752044448170f)}; }
  // exp(a - b)
  float weight(PairShift b) const {
    const uint32_t power = (bits - b.bits + 127u) << 23;
    float value;
    std::memcpy(&value, &power, sizeof(value));
    return value;
  }
  static PairShift between(PairShift a, PairShift b) { return {(a.bits + b.bits) / 2}; }
  // a + b
  double subtracted(PairShift b) const { return 0.69314718055994530942 * (bits + b.bits); }
  // The numerators of queries `lanes` and key j, the shift of which is `row`.
  static SR_INLINE Vec<float> numerators(Vec<float> x, const PairShift* lanes, PairShift row) {
    const Vec<float> magic = broadcast(12582912.0f);  // as Numerators
    const Vec<float> shifted = x * 1.44269504088896341f + magic;
    Vec<float> p = exp2_of_fraction(x * 1.44269504088896341f - (shifted - magic));
    Bits exponent, mantissa, shifts;
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    std::memcpy(&mantissa, &p, sizeof(mantissa));
    std::memcpy(&shifts, lanes, sizeof(shifts));
    exponent -= shifts + (0x4b400000u + row.bits);
    const IntVec power = reinterpret_cast<IntVec>(exponent);
    mantissa += reinterpret_cast<Bits>(power > -125 ? power : -125 - IntVec{}) << 23;
    std::memcpy(&p, &mantissa, sizeof(p));
    return p;
  }
};
template <>
struct PairShift<double> {
  double shift;  // a whole number, so that the sum of two is exact
  static PairShift of(double norm) { return {std::floor(norm / 2)}; }
  double weight(PairShift b) const { return std::exp(shift - b.shift); }
  static PairShift between(PairShift a, PairShift b) {
    return {std::floor((a.shift + b.shift) / 2)};
  }
  double subtracted(PairShift b) const { return shift + b.shift; }
  static SR_INLINE Vec<double> numerators(Vec<double> x, const PairShift* lanes, PairShift row) {
    return exp(x - (load(&lanes->shift) + row.shift));
  }
};

// Shifts and weights of a window's tokens, `stride` of them with the padding, and b, if they serve
// it. norm: |q_i|^2.
template <typename T>
bool pair_shifts(const T* norm, int64_t n, int64_t stride, PairShift<T>* shift, T* weight,
                 PairShift<T>* b) {
  T lowest = norm[0], highest = norm[0];
  bool ordered = true;
  for (int64_t i = 0; i < n; ++i) {
    lowest = norm[i] < lowest ? norm[i] : lowest;
    highest = norm[i] > highest ? norm[i] : highest;
    ordered &= norm[i] == norm[i];
  }
  if (!ordered || highest > T(kMaxLogit) || highest - lowest > T(kMaxPairSpread)) return false;
  *b = PairShift<T>::between(PairShift<T>::of(lowest), PairShift<T>::of(highest));
  for (int64_t i = 0; i < stride; ++i) {
    shift[i] = PairShift<T>::of(i < n ? norm[i] : lowest);
    weight[i] = i < n ? shift[i].weight(*b) : T(0);
  }
  return true;
}

// sum[lanes] += sum_r weight[r] rows[r]
template <typename T, int kCount>
SR_INLINE void add_weighted(const Vec<T>* rows, const T* weight, T* sum) {
  Vec<T> even = rows[0] * weight[0], odd = rows[1] * weight[1];
#pragma GCC unroll 16
  for (int r = 2; r < kCount; r += 2) {
    even += rows[r] * weight[r];
    odd += rows[r + 1] * weight[r + 1];
  }
  store<T>(sum, load(sum) + (even + odd));
}

// As score_square(), with a shift for each token: sums are weighted ones.
template <typename T>
SR_INLINE void pair_square(const T* q, int64_t ld, int64_t d, int64_t n, int64_t j0, int64_t i0,
                           const PairShift<T>* shift, const T* weight, T* e, T* mirror, T* sum) {
  constexpr int W = Simd<T>::width, kRows = kSquare<T>;
#pragma GCC unroll 8
  for (int strip = 0; strip < kStrips<T>; ++strip) {
    const int64_t i = i0 + strip * W;
    Vec<T> acc[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> right = load(q + k * ld + i);
      const T* left = q + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(left[r]) * right;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) keep_in_register(acc[r]);  // else g++ keeps the sums in memory
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      acc[r] = PairShift<T>::numerators(acc[r], shift + i, shift[j0 + r]);
    if (j0 + kRows > n || i + W > n) {
      for (int r = 0; r < kRows; ++r)
        for (int l = 0; l < W; ++l)
          if (j0 + r >= n || i + l >= n) acc[r][l] = T(0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store<T>(e + r * kBlock + strip * W, acc[r]);
    add_weighted<T, kRows>(acc, weight + j0, sum + i);
    if (mirror != nullptr)
      store_mirror<T>(acc, strip, mirror, [&](int part, const Vec<T>* square) {
        add_weighted<T, W>(square, weight + i, sum + j0 + part * W);
      });
  }
}

// A square of the gradient of q q^T, both of its sides at once:
//   t[j][i] = e[j][i] (g_j . v_i - c_j) + e_mirror[i][j] (g_i . v_j - c_i)
// and, unless mirror is nullptr, mirror[i][j] = t[j][i]. v and g are d x ld; rows of e, e_mirror, t
// and mirror are kBlock apart.
template <typename T>
SR_INLINE void gradient_square(const T* v, const T* g, const T* c, int64_t ld, int64_t d,
                               int64_t j0, int64_t i0, const T* e, const T* e_mirror, T* t,
                               T* mirror) {
  constexpr int W = Simd<T>::width, kRows = kSquare<T>;
#pragma GCC unroll 8
  for (int strip = 0; strip < kStrips<T>; ++strip) {
    const int64_t i = i0 + strip * W;
    Vec<T> acc[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> right = load(v + k * ld + i);
      const T* left = g + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(left[r]) * right;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
      store<T>(t + r * kBlock + strip * W, load(e + r * kBlock + strip * W) * (acc[r] - c[j0 + r]));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> right = load(g + k * ld + i);
      const T* left = v + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(left[r]) * right;
    }
    const Vec<T> c_i = load(c + i);
#pragma GCC unroll 8
    for (int part = 0; part < kStrips<T>; ++part) {
      Vec<T> square[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) square[l] = load(e_mirror + (strip * W + l) * kBlock + part * W);
      transpose(square);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        const int r = part * W + l;
        T* place = t + r * kBlock + strip * W;
        acc[r] = load(place) + square[l] * (acc[r] - c_i);
        store<T>(place, acc[r]);
      }
    }
    if (mirror != nullptr) store_mirror<T>(acc, strip, mirror, [](int, const Vec<T>*) {});
  }
}

// As gradient_square() where e is symmetric, e_mirror[i][j] = e[j][i], and the last of the d rows
// of g is -c: t[j][i] = e[j][i] (g_j . v_i + g_i . v_j), one product of g and v with v and g.
template <typename T>
SR_INLINE void symmetric_gradient_square(const T* v, const T* g, int64_t ld, int64_t d, int64_t j0,
                                         int64_t i0, const T* e, T* t, T* mirror) {
  constexpr int W = Simd<T>::width, kRows = kSquare<T>;
#pragma GCC unroll 8
  for (int strip = 0; strip < kStrips<T>; ++strip) {
    const int64_t i = i0 + strip * W;
    Vec<T> acc[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> v_i = load(v + k * ld + i), g_i = load(g + k * ld + i);
      const T *v_j = v + k * ld + j0, *g_j = g + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(g_j[r]) * v_i;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(v_j[r]) * g_i;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r] *= load(e + r * kBlock + strip * W);
      store<T>(t + r * kBlock + strip * W, acc[r]);
    }
    if (mirror != nullptr) store_mirror<T>(acc, strip, mirror, [](int, const Vec<T>*) {});
  }
}

// Scratch of attend(); stride: tokens of a window, padded to kSquare.
template <typename T>
struct SymmetricSoftmax {
  static constexpr int64_t kStrip = 4 * Simd<T>::width;  // queries at a time with a shift each
  T *e, *mirror, *sum, *norm, *weight, *column;
  RowShift<T>* shift;
  PairShift<T>* pair_shift;
  static int64_t elements(int64_t stride) {
    return 2 * kBlock * kBlock + 5 * stride + stride * kStrip;
  }
  SymmetricSoftmax(T* memory, int64_t stride)
      : e(memory),
        mirror(e + kBlock * kBlock),
        sum(mirror + kBlock * kBlock),
        norm(sum + stride),
        weight(norm + stride),
        column(weight + stride),
        shift(reinterpret_cast<RowShift<T>*>(column + stride * kStrip)),
        pair_shift(reinterpret_cast<PairShift<T>*>(column + stride * kStrip + stride)) {
    static_assert(sizeof(RowShift<T>) == sizeof(T) && sizeof(PairShift<T>) == sizeof(T),
                  "shifts are counted as elements");
  }
};

// |q_i|^2 of every token.
template <typename T>
void squared_norms(const T* q, int64_t ld, int64_t d, int64_t n, T* norm) {
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; i += W) {
    Vec<T> sum{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> value = load(q + k * ld + i);
      sum += value * value;
    }
    store<T>(norm + i, sum);
  }
}

// A shift for each row (see RowShift), if they serve the window. norm: |q_i|^2.
template <typename T>
bool row_shifts(const T* norm, int64_t n, RowShift<T>* shift) {
  T highest = norm[0];
  bool ordered = true;
  for (int64_t i = 0; i < n; ++i) {
    highest = norm[i] > highest ? norm[i] : highest;
    ordered &= norm[i] == norm[i];
  }
  if (!ordered || highest > T(kMaxRowShiftLogit)) return false;
  for (int64_t i = 0; i < n; ++i)
    shift[i] = RowShift<T>::of((norm[i] + std::sqrt(norm[i] * highest)) / 2);
  return true;
}

// Whether one shift serves the window (see kMaxSpread), and which: its largest logit, which by
// Cauchy and Schwarz is the largest |q_i|^2.
template <typename T>
bool one_shift(const T* q, int64_t ld, int64_t d, int64_t n, T* norm, T* largest) {
  squared_norms(q, ld, d, n, norm);
  T lowest = norm[0], highest = norm[0];
  bool ordered = true;
  for (int64_t i = 0; i < n; ++i) {
    lowest = norm[i] < lowest ? norm[i] : lowest;
    highest = norm[i] > highest ? norm[i] : highest;
    ordered &= norm[i] == norm[i];
  }
  *largest = highest;
  return ordered && highest <= T(kMaxLogit) && highest - lowest <= T(kMaxSpread);
}

// out = softmax(q q^T) v for one window of n tokens; q is d_qk x ld, v and out are d_v x ld, padded
// to kSquare tokens; v is used up. lse: the log-sum-exp of each row of scores, or nullptr. Not
// inlined, which costs 2 %.
template <typename T>
__attribute__((noinline)) void attend(const SymmetricSoftmax<T>& s, const T* q, int64_t d_qk, T* v,
                                      int64_t d_v, int64_t n, int64_t ld, T* out, T* lse) {
  constexpr int W = Simd<T>::width, kSide = kSquare<T>;
  const int64_t stride = ceil_div(n, kSide) * kSide;
  // square(j0, i0, e, mirror) computes numerators of a square.
  const auto by_squares = [&](const auto& square) {
    for (int64_t i = 0; i < stride; ++i) s.sum[i] = T(0);
    for (int64_t j0 = 0; j0 < stride; j0 += kBlock) {
      const int64_t rows = min64(kBlock, stride - j0);
      for (int64_t i0 = j0; i0 < stride; i0 += kBlock) {
        const int64_t columns = min64(kBlock, stride - i0);
        const bool diagonal = i0 == j0;
        T* mirror = diagonal ? s.e : s.mirror;
        for (int64_t j = 0; j < rows; j += kSide)
          for (int64_t i = diagonal ? j : 0; i < columns; i += kSide)
            square(j0 + j, i0 + i, s.e + j * kBlock + i,
                   diagonal && i == j ? nullptr : mirror + i * kBlock + j);
        row_product<T>(nullptr, j0 > 0, d_v, min64(rows, n - j0), columns, v + j0, ld, 1, s.e,
                       kBlock, out + i0, ld);
        if (!diagonal)
          row_product<T>(nullptr, true, d_v, min64(columns, n - i0), rows, v + i0, ld, 1, s.mirror,
                         kBlock, out + j0, ld);
      }
    }
  };
  T largest;
  PairShift<T> b;
  if (one_shift(q, ld, d_qk, n, s.norm, &largest)) {
    const Numerators<T> numerators(largest);
    by_squares([&](int64_t j, int64_t i, T* e, T* mirror) {
      score_square<T>(q, ld, d_qk, n, j, i, numerators, e, mirror, s.sum);
    });
    if (lse != nullptr)
      for (int64_t i = 0; i < n; ++i) s.norm[i] = static_cast<T>(numerators.subtracted());
  } else if (pair_shifts(s.norm, n, stride, s.pair_shift, s.weight, &b)) {
    for (int64_t c = 0; c < d_v; ++c)
      for (int64_t i = 0; i < stride; i += W)
        store<T>(v + c * ld + i, load(v + c * ld + i) * load(s.weight + i));
    by_squares([&](int64_t j, int64_t i, T* e, T* mirror) {
      pair_square<T>(q, ld, d_qk, n, j, i, s.pair_shift, s.weight, e, mirror, s.sum);
    });
    if (lse != nullptr)
      for (int64_t i = 0; i < n; ++i) s.norm[i] = static_cast<T>(s.pair_shift[i].subtracted(b));
  } else if (row_shifts(s.norm, n, s.shift)) {
    by_squares([&](int64_t j, int64_t i, T* e, T* mirror) {
      shifted_square<false, T>(q, ld, d_qk, n, j, i, s.shift, e, mirror, s.sum);
    });
    if (lse != nullptr)
      for (int64_t i = 0; i < n; ++i) s.norm[i] = static_cast<T>(s.shift[i].subtracted());
  } else {
    constexpr int64_t strip = SymmetricSoftmax<T>::kStrip;
    const ScoreTerms<T> terms{T(1), nullptr, BiasBands(WindowGeometry{}), nullptr};
    for (int64_t i0 = 0; i0 < stride; i0 += strip) {
      const int64_t columns = min64(strip, stride - i0);
      score_block(terms, q, q, d_qk, n, ld, i0, columns, s.column, strip, s.norm + i0, s.sum + i0);
      for (int64_t j0 = 0; j0 < n; j0 += kBlock)
        row_product<T>(nullptr, j0 > 0, d_v, min64(kBlock, n - j0), columns, v + j0, ld, 1,
                       s.column + j0 * strip, strip, out + i0, ld);
    }
  }
  if (lse != nullptr)
    for (int64_t i = 0; i < n; ++i) lse[i] = s.norm[i] + std::log(s.sum[i]);
  for (int64_t i = 0; i < stride; i += W) {
    const Vec<T> factor = 1 / load(s.sum + i);
    for (int64_t c = 0; c < d_v; ++c) store<T>(out + c * ld + i, load(out + c * ld + i) * factor);
  }
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
