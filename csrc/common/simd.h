// CPU vectors, element conversions, scratch memory and the two matrix products that every CPU
// kernel is made of. Written with the compilers' vector extension, so that one source serves
// AVX-512, AVX2 and any other machine; the width follows the flags of the translation unit.
//
// Include only from a kernel's cpu.cpp, inside no namespace. Everything here has internal linkage
// (see platform.h for why).
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/platform.h"

#if !defined(SR_KERNELS_ISA)
#error "compile CPU kernels with -DSR_KERNELS_ISA=portable|avx2|avx512"
#endif

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 accumulators of 32 registers
constexpr int kInnerRows = 4, kInnerColumns = 6;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 accumulators of 16 registers
constexpr int kInnerRows = 4, kInnerColumns = 3;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4, kTileVectors = 2;  // 8 accumulators of 16 registers
constexpr int kInnerRows = 3, kInnerColumns = 3;
#endif

#define SR_INLINE inline __attribute__((always_inline))

template <typename T>
struct Simd {
  typedef T vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));
};
template <typename T>
using Vec = typename Simd<T>::vector;

template <typename T>
SR_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
SR_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}
template <typename T>
SR_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
// The lanes of v, kStep places further on (round the end).
template <typename T, int kStep, int... J>
SR_INLINE Vec<T> rotate(Vec<T> v, std::integer_sequence<int, J...>) {
  constexpr int W = Simd<T>::width;
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((J + kStep) % W)...);
#else
  using Indices = decltype(Vec<T>{} < Vec<T>{});
  return __builtin_shuffle(v, Indices{((J + kStep) % W)...});
#endif
}
// The sum of the lanes: halves are added, then quarters, down to single lanes. Shorter than
// horizontal_sum(), where sums of lanes are a good part of the work.
template <typename T, int kStep = Simd<T>::width / 2>
SR_INLINE T sum_by_halves(Vec<T> v) {
  v += rotate<T, kStep>(v, std::make_integer_sequence<int, Simd<T>::width>{});
  if constexpr (kStep > 1)
    return sum_by_halves<T, kStep / 2>(v);
  else
    return v[0];
}
template <typename T>
SR_INLINE T horizontal_sum(Vec<T> v) {
  T sum = T(0);
  for (int i = 0; i < Simd<T>::width; ++i) sum += v[i];
  return sum;
}

SR_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The smallest multiple of the vector width that holds count elements.
template <typename T>
SR_INLINE int64_t padded(int64_t count) {
  return ceil_div(count, Simd<T>::width) * Simd<T>::width;
}
SR_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
SR_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------- elements in memory

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The arithmetic type of a stored element.
template <typename S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

SR_INLINE float to_compute(float x) { return x; }
SR_INLINE double to_compute(double x) { return x; }
SR_INLINE float to_compute(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
SR_INLINE float to_compute(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Move the exponent and mantissa into place and rescale by 2^112: subnormals come out right.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  float magnitude;
  if ((x.bits & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    std::memcpy(&magnitude, &bits, 4);
  } else {
    std::memcpy(&magnitude, &bits, 4);
    magnitude *= 5.192296858534828e+33f;  // 2^112
  }
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
#endif
}

SR_INLINE void from_compute(float x, float* out) { *out = x; }
SR_INLINE void from_compute(double x, double* out) { *out = x; }
SR_INLINE void from_compute(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  out->bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : static_cast<uint16_t>(rounded);
}
SR_INLINE void from_compute(float x, Half* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (bits < 0x38800000u) {
    // Subnormal in half: let one float addition do the rounding at the right bit.
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&bits, &f, 4);
    half = bits - 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// A vector of compute elements from as many consecutive elements in memory, and back.
SR_INLINE Vec<float> load_vector_of(const float* p) { return load(p); }
SR_INLINE Vec<double> load_vector_of(const double* p) { return load(p); }
SR_INLINE void store_vector_of(float* p, Vec<float> v) { store<float>(p, v); }
SR_INLINE void store_vector_of(double* p, Vec<double> v) { store<double>(p, v); }

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVectorBytes)));

SR_INLINE Vec<float> load_vector_of(const BFloat16* p) {
  HalfBits half;
  std::memcpy(&half, p, sizeof(half));
  const FloatBits bits = __builtin_convertvector(half, FloatBits) << 16;
  Vec<float> v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
SR_INLINE void store_vector_of(BFloat16* p, Vec<float> v) {
  FloatBits bits;
  std::memcpy(&bits, &v, sizeof(bits));
  FloatBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v != v ? (FloatBits{} | 0x7fc0u) : rounded;
  const HalfBits half = __builtin_convertvector(rounded, HalfBits);
  std::memcpy(p, &half, sizeof(half));
}
SR_INLINE Vec<float> load_vector_of(const Half* p) {
  Vec<float> v;
#if defined(__AVX512F__)
  // The masked form, all lanes: g++ takes the plain one's operand for uninitialized.
  const __m512 values =
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  std::memcpy(&v, &values, sizeof(v));
#elif defined(__AVX2__) && defined(__F16C__)
  const __m256 values = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  std::memcpy(&v, &values, sizeof(v));
#else
  for (int i = 0; i < Simd<float>::width; ++i) v[i] = to_compute(p[i]);
#endif
  return v;
}
SR_INLINE void store_vector_of(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  __m512 values;
  std::memcpy(&values, &v, sizeof(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, values, 0));
#elif defined(__AVX2__) && defined(__F16C__)
  __m256 values;
  std::memcpy(&values, &v, sizeof(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(values, 0));
#else
  for (int i = 0; i < Simd<float>::width; ++i) from_compute(v[i], p + i);
#endif
}

// count elements, stride apart (in elements), into consecutive compute elements.
template <typename S>
SR_INLINE void load_elements(const S* source, int64_t stride, int64_t count,
                             typename Compute<S>::type* destination) {
  using T = typename Compute<S>::type;
  if (stride == 1) {
    int64_t i = 0;
    for (; i + Simd<T>::width <= count; i += Simd<T>::width)
      store<T>(destination + i, load_vector_of(source + i));
    for (; i < count; ++i) destination[i] = to_compute(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) destination[i] = to_compute(source[i * stride]);
  }
}
template <typename S>
SR_INLINE void store_elements(const typename Compute<S>::type* source, int64_t count,
                              S* destination, int64_t stride) {
  using T = typename Compute<S>::type;
  if (stride == 1) {
    int64_t i = 0;
    for (; i + Simd<T>::width <= count; i += Simd<T>::width)
      store_vector_of(destination + i, load(source + i));
    for (; i < count; ++i) from_compute(source[i], destination + i);
  } else {
    for (int64_t i = 0; i < count; ++i) from_compute(source[i], destination + i * stride);
  }
}

template <typename S>
SR_INLINE S* at(const FeatureMap& map, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<S*>(map.data) + n * map.stride_n + c * map.stride_c + h * map.stride_h +
         w * map.stride_w;
}

// Exchanges the off-diagonal blocks of rows a and b, kStep apart in a matrix of whole vectors:
// where an index has kStep's bit, a takes from b and b from a.
template <int kStep, typename V, int... J>
SR_INLINE void exchange(V& a, V& b, std::integer_sequence<int, J...>) {
  constexpr int W = sizeof...(J);
  const V a_old = a, b_old = b;
#if defined(__clang__)
  a = __builtin_shufflevector(a_old, b_old, ((J & kStep) != 0 ? W + J - kStep : J)...);
  b = __builtin_shufflevector(a_old, b_old, ((J & kStep) != 0 ? W + J : J + kStep)...);
#else
  using Indices = decltype(V{} < V{});
  a = __builtin_shuffle(a_old, b_old, Indices{((J & kStep) != 0 ? W + J - kStep : J)...});
  b = __builtin_shuffle(a_old, b_old, Indices{((J & kStep) != 0 ? W + J : J + kStep)...});
#endif
}
// Transposes a square of vectors.
template <int kStep = 1, typename V, int W>
SR_INLINE void transpose(V (&rows)[W]) {
  if constexpr (kStep < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if ((i & kStep) == 0)
        exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, W>{});
    transpose<2 * kStep>(rows);
  }
}
// Lane j of the result is the sum of the lanes of rows[j]: half the work of as many single sums.
template <typename T, int kStep = 1>
SR_INLINE Vec<T> sums_of_lanes(const Vec<T>* rows) {
  constexpr int W = Simd<T>::width;
  if constexpr (kStep == W) {
    return rows[0];
  } else {
    Vec<T> halves[W / (2 * kStep)];
#pragma GCC unroll 16
    for (int i = 0; i < W / (2 * kStep); ++i) {
      Vec<T> a = rows[2 * i], b = rows[2 * i + 1];
      exchange<kStep>(a, b, std::make_integer_sequence<int, W>{});
      halves[i] = a + b;
    }
    return sums_of_lanes<T, 2 * kStep>(halves);
  }
}
// W elements, W at most a whole vector.
template <typename T, int W>
struct Lanes {
  typedef T vector __attribute__((vector_size(W * sizeof(T))));
};
template <int W, typename S>
SR_INLINE auto load_lanes(const S* p) {
  using T = typename Compute<S>::type;
  if constexpr (W == Simd<T>::width) {
    return load_vector_of(p);
  } else {
    typename Lanes<T, W>::vector v;
    if constexpr (std::is_same_v<S, T>)
      std::memcpy(&v, p, sizeof(v));
    else
      for (int i = 0; i < W; ++i) v[i] = to_compute(p[i]);
    return v;
  }
}
template <int W, typename S, typename V>
SR_INLINE void store_lanes(S* p, V v) {
  using T = typename Compute<S>::type;
  if constexpr (W == Simd<T>::width)
    store_vector_of(p, v);
  else if constexpr (std::is_same_v<S, T>)
    std::memcpy(p, &v, sizeof(v));
  else
    for (int i = 0; i < W; ++i) from_compute(v[i], p + i);
}

// Calls squares(W as a constant) with the side of the largest squares that `side` elements fill, or
// rest() where there is none.
template <typename T, typename Squares, typename Rest>
SR_INLINE void with_squares(int64_t side, const Squares& squares, const Rest& rest) {
  constexpr int W = Simd<T>::width;
  if (side >= W) return squares(std::integral_constant<int, W>{});
  if constexpr (W > 8)
    if (side >= 8) return squares(std::integral_constant<int, 8>{});
  if constexpr (W > 4)
    if (side >= 4) return squares(std::integral_constant<int, 4>{});
  rest();
}

// transpose_block() in squares of W elements, of which rows and columns must have as many.
template <int W, typename From, typename To>
void transpose_squares(const From* source, int64_t source_stride, int64_t rows, int64_t columns,
                       To* destination, int64_t destination_stride, bool rows_outer) {
  const int64_t outer_count = rows_outer ? rows : columns;
  const int64_t inner_count = rows_outer ? columns : rows;
  for (int64_t outer0 = 0; outer0 < outer_count; outer0 += W) {
    const int64_t outer = min64(outer0, outer_count - W);
    for (int64_t inner0 = 0; inner0 < inner_count; inner0 += W) {
      const int64_t inner = min64(inner0, inner_count - W);
      const int64_t i = rows_outer ? outer : inner, j = rows_outer ? inner : outer;
      decltype(load_lanes<W>(source)) square[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) square[k] = load_lanes<W>(source + (i + k) * source_stride + j);
      transpose(square);
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k)
        store_lanes<W>(destination + (j + k) * destination_stride + i, square[k]);
    }
  }
}
// destination[j * destination_stride + i] = source[i * source_stride + j] for i < rows and
// j < columns, in squares as large as vectors and the shorter side allow; the last squares overlap
// those before them. Rows are the outer loop, or else columns: the side whose other end is memory,
// so that memory is walked in order.
//
// One of From and To is an element in memory, the other its compute type.
template <typename From, typename To>
void transpose_block(const From* source, int64_t source_stride, int64_t rows, int64_t columns,
                     To* destination, int64_t destination_stride, bool rows_outer) {
  const auto squares = [&](auto width) {
    transpose_squares<decltype(width)::value>(source, source_stride, rows, columns, destination,
                                              destination_stride, rows_outer);
  };
  with_squares<typename Compute<From>::type>(min64(rows, columns), squares, [&] {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        from_compute(to_compute(source[i * source_stride + j]),
                     destination + j * destination_stride + i);
  });
}

// A rectangle of a feature map as rows of compute elements:
//   destination[c * channel_stride + r * row_stride + i] = map[n, c, h0 + r, w0 + i]
// for c in [0, channels), r in [0, rows), i in [0, columns); zero where (h, w) lies outside
// (height, width). Columns [columns, row_stride) are zeroed too, so that whole vectors can be read.
// Channels-last maps are read pixel by pixel, so that memory is walked in its own order.
template <typename S, typename T>
void load_tile(const FeatureMap& map, int64_t n, int64_t c0, int64_t channels, int64_t h0,
               int64_t rows, int64_t w0, int64_t columns, int64_t height, int64_t width,
               T* destination, int64_t channel_stride, int64_t row_stride) {
  const int64_t first = min64(max64(0, -w0), columns);            // first column inside
  const int64_t last = max64(first, min64(columns, width - w0));  // one past the last inside
  const bool channels_last = map.stride_c == 1 && map.stride_w != 1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = h0 + r;
    const bool inside = h >= 0 && h < height && last > first;
    const int64_t begin = inside ? first : 0, end = inside ? last : 0;
    for (int64_t c = 0; c < channels; ++c) {
      T* row = destination + c * channel_stride + r * row_stride;
      for (int64_t i = 0; i < begin; ++i) row[i] = T(0);
      if (inside && !channels_last)
        load_elements(at<S>(map, n, c0 + c, h, w0 + begin), map.stride_w, end - begin, row + begin);
      for (int64_t i = end; i < row_stride; ++i) row[i] = T(0);
    }
    if (inside && channels_last)
      transpose_block(at<S>(map, n, c0, h, w0 + begin), map.stride_w, end - begin, channels,
                      destination + r * row_stride + begin, channel_stride, true);
  }
}

// The way back: writes the rectangle, dropping what lies outside (height, width).
template <typename S, typename T>
void store_tile(const T* source, int64_t channel_stride, int64_t row_stride, const FeatureMap& map,
                int64_t n, int64_t c0, int64_t channels, int64_t h0, int64_t rows, int64_t w0,
                int64_t columns, int64_t height, int64_t width) {
  const int64_t first = min64(max64(0, -w0), columns);
  const int64_t last = max64(first, min64(columns, width - w0));
  const bool channels_last = map.stride_c == 1 && map.stride_w != 1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = h0 + r;
    if (h < 0 || h >= height || last <= first) continue;
    if (channels_last) {
      transpose_block(source + r * row_stride + first, channel_stride, channels, last - first,
                      at<S>(map, n, c0, h, w0 + first), map.stride_w, false);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        store_elements(source + c * channel_stride + r * row_stride + first, last - first,
                       at<S>(map, n, c0 + c, h, w0 + first), map.stride_w);
    }
  }
}

// ---------------------------------------------------------------- scratch memory

// One 64-byte aligned block, handed out in pieces. take() leaves a vector of slack behind every
// piece, since whole vectors may be read (never written) past a row's end.
class Scratch {
 public:
  // bytes: the sum over take() calls of bytes_for<T>(count).
  explicit Scratch(int64_t bytes)
      : base_(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes))))),
        next_(base_),
        end_(base_ + round_up(bytes)) {
    if (base_ == nullptr) throw std::runtime_error("sr_kernels: not enough memory for scratch");
    // Slack and padding take part in (discarded) arithmetic: keep them free of stale NaN patterns,
    // and free of reads of unwritten memory under the sanitizers.
    std::memset(base_, 0, static_cast<size_t>(end_ - base_));
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  static int64_t bytes_for(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)) + 4 * kVectorBytes);
  }
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    if (next_ > end_)
      throw std::logic_error("sr_kernels: a kernel took more scratch than it asked for");
    return piece;
  }
  // The next take() begins from the start again; what lies there stays.
  void rewind() { next_ = base_; }

 private:
  static int64_t round_up(int64_t bytes) { return bytes <= 0 ? 64 : (bytes + 63) / 64 * 64; }
  char *base_, *next_, *end_;
};

template <typename Body>
void parallel_for(ParallelFor run, int64_t count, const Body& body) {
  if (count <= 0) return;
  run(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// parallel_for() whose body(worker, begin, end) has scratch of its own: make() returns a new
// Worker, which is used for one run of work items after the other, so that a call allocates and
// clears no more of them than there are threads.
template <typename Make, typename Body>
void parallel_for_workers(ParallelFor run, int64_t count, const Make& make, const Body& body) {
  using Pointer = decltype(make());
  using Worker = typename Pointer::element_type;
  struct Idle {  // the workers that no thread is using
    std::atomic<Worker*> slot[32] = {};
    Pointer take() {
      for (std::atomic<Worker*>& place : slot)
        if (Worker* worker = place.exchange(nullptr)) return Pointer(worker);
      return nullptr;
    }
    void give_back(Pointer worker) {
      for (std::atomic<Worker*>& place : slot) {
        Worker* empty = nullptr;
        if (place.compare_exchange_strong(empty, worker.get())) return (void)worker.release();
      }
    }
    ~Idle() {
      while (take() != nullptr) {
      }
    }
  } idle;
  parallel_for(run, count, [&](int64_t begin, int64_t end) {
    Pointer worker = idle.take();
    if (worker == nullptr) worker = make();
    body(*worker, begin, end);
    idle.give_back(std::move(worker));
  });
}
// parallel_for() whose body(scratch, begin, end) takes pieces of `bytes` of scratch. A run of work
// items finds what the one before it left in them.
template <typename Body>
void parallel_for_scratch(ParallelFor run, int64_t count, int64_t bytes, const Body& body) {
  parallel_for_workers(
      run, count, [&] { return std::make_unique<Scratch>(bytes); },
      [&](Scratch& scratch, int64_t begin, int64_t end) {
        scratch.rewind();
        body(scratch, begin, end);
      });
}

// ---------------------------------------------------------------- functions of vectors

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

// exp(x) = mantissa * 2^exponent for |x| < 89: range reduction by ln 2 in two parts, degree-6
// polynomial, about 1 ulp. A NaN makes the mantissa NaN.
struct ReducedExp {
  Vec<float> mantissa;
  IntVec exponent;
};
SR_INLINE ReducedExp reduced_exp(Vec<float> x) {
  const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> n = shifted - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return {p * (r * r) + r + 1.0f, bits - 0x4b400000};  // less the magic number's own bits
}
// 2^n for -127 < n < 128.
SR_INLINE Vec<float> power_of_two(IntVec n) {
  const IntVec bits = (n + 127) << 23;
  Vec<float> power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// exp(x), float32: 0 below -87.3 (where the result would be subnormal), inf above 88.7, NaN passes.
SR_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> low = broadcast(-87.33654f), high = broadcast(88.72283f);
  const ReducedExp e = reduced_exp(x < low ? low : (x > high ? high : x));
  // 2^n in two factors: n can be 128, whose exponent does not fit in one.
  const IntVec half = e.exponent >> 1;
  Vec<float> p = e.mantissa * power_of_two(half) * power_of_two(e.exponent - half);
  p = x < low ? Vec<float>{} : p;
  p = x > high ? broadcast(__builtin_inff()) : p;
  return x != x ? x : p;
}
// exp(x), float64, about 1 ulp: the same with exp's Taylor polynomial of degree 13, whose remainder
// is below 1e-17 for |r| <= ln 2 / 2; 0 below -708.4, inf above 709.78, NaN passes.
SR_INLINE Vec<double> exp(Vec<double> x) {
  typedef uint64_t BitsVec __attribute__((vector_size(kVectorBytes)));
  const Vec<double> low = broadcast(-708.396418532264), high = broadcast(709.782712893384);
  const Vec<double> clamped = x < low ? low : (x > high ? high : x);
  const Vec<double> magic = broadcast(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> shifted = clamped * 1.44269504088896340736 + magic;
  const Vec<double> n = shifted - magic;
  Vec<double> r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> p = broadcast(1.0 / 6227020800);
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  // 2^n in two factors, as above. n + 2 * 1023, split in halves, is their biased exponents.
  BitsVec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = bits - 0x4338000000000000u + 2046u;
  const BitsVec half = bits >> 1;
  const BitsVec factor1 = half << 52, factor2 = (bits - half) << 52;
  Vec<double> scale1, scale2;
  std::memcpy(&scale1, &factor1, sizeof(scale1));
  std::memcpy(&scale2, &factor2, sizeof(scale2));
  p = p * scale1 * scale2;
  p = x < low ? Vec<double>{} : p;
  p = x > high ? broadcast(__builtin_inf()) : p;
  return x != x ? x : p;
}
template <typename V>
SR_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}
// erf(x), float32, absolute error below 2e-7: x P(x^2) up to 1, beyond it 1 - exp(-x^2) Q(t) with
// t = 1 / (1 + |x| / 2). P and Q are Chebyshev fits of degree 7 on [0, 1] and |x| in [1, 4.2].
SR_INLINE Vec<float> erf(Vec<float> x) {
  const Vec<float> a = x < 0 ? -x : x, s = x * x;
  Vec<float> p = broadcast(-9.6735900e-6f);
  p = p * s + 1.1268253619e-4f;
  p = p * s - 8.4843965124e-4f;
  p = p * s + 5.2210534099e-3f;
  p = p * s - 2.6865438310e-2f;
  p = p * s + 1.1283782622e-1f;
  p = p * s - 3.7612638476e-1f;
  p = (p * s + 1.1283791671f) * x;
  const Vec<float> t = 1 / (1 + 0.5f * a);
  Vec<float> q = broadcast(1.1925904723e-1f);
  q = q * t - 4.7088178572e-1f;
  q = q * t + 5.6277311142e-1f;
  q = q * t - 1.0317263329e-1f;
  q = q * t + 3.4756502659e-1f;
  q = q * t + 2.5976581173e-1f;
  q = q * t + 2.8489821242e-1f;
  q = q * t - 1.5306479782e-4f;
  const Vec<float> large = 1 - exp(-s) * q;
  return a < 1 ? p : (x < 0 ? -large : large);
}
SR_INLINE Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::erf(x[i]);
  return x;
}

// ---------------------------------------------------------------- matrix products

// The left operand of a product: element (m, k) is
//   data[(m / kTileRows) * panel_stride + k * k_stride + m % kTileRows].
// pack() makes one from a weight matrix; rows_of_k() views a k-major matrix (m contiguous).
// Up to kTileRows - 1 elements past the last m are read (and ignored): memory must exist there.
template <typename T>
struct LeftOperand {
  const T* data;
  int64_t panel_stride, k_stride;
};
template <typename T>
SR_INLINE LeftOperand<T> rows_of_k(const T* data, int64_t ld) {
  return {data, kTileRows, ld};
}
// Elements that pack() needs for an M x K matrix.
SR_INLINE int64_t packed_size(int64_t m, int64_t k) {
  return ceil_div(m, kTileRows) * kTileRows * k;
}
// Packs A[m, k] = source[m * row_stride + k * column_stride].
template <typename S, typename T>
LeftOperand<T> pack(const S* source, int64_t row_stride, int64_t column_stride, int64_t m_count,
                    int64_t k_count, T* destination) {
  for (int64_t m0 = 0; m0 < m_count; m0 += kTileRows)
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t i = 0; i < kTileRows; ++i)
        destination[m0 * k_count + k * kTileRows + i] =
            m0 + i < m_count ? T(to_compute(source[(m0 + i) * row_stride + k * column_stride]))
                             : T(0);
  return {destination, kTileRows * k_count, kTileRows};
}

// The right operand: row k is a run of whole vectors.
template <typename T>
struct StridedRows {
  const T* data;
  int64_t ld;
  SR_INLINE const T* operator[](int64_t k) const { return data + k * ld; }
  SR_INLINE StridedRows from_column(int64_t p) const { return {data + p, ld}; }
};
template <typename T>
struct PointerRows {  // rows anywhere, as when each has a shift of its own
  const T* const* rows;
  SR_INLINE const T* operator[](int64_t k) const { return rows[k]; }
};
// Strips as wide as a register tile, one behind the other, k_count rows each: what one tile reads
// is consecutive. Element (k, p) is data[offset(k_count, p) + k * kTileColumns].
template <typename T>
struct StripRows {
  static constexpr int64_t kTileColumns = kTileVectors * Simd<T>::width;
  const T* data;
  int64_t k_count;
  static SR_INLINE int64_t offset(int64_t k_count, int64_t p) {
    return p / kTileColumns * kTileColumns * k_count + p % kTileColumns;
  }
  SR_INLINE StridedRows<T> from_column(int64_t p) const {
    return {data + offset(k_count, p), kTileColumns};
  }
};

// Makes v a register's content at this point. Without it g++ turns a load that serves several
// multiplications into an operand in memory of each, and the loads become the bottleneck.
template <typename V>
SR_INLINE void keep_in_register(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

// What the product's accumulators start from.
enum class Start { kZero, kBias, kAccumulate };

template <typename T, typename Rows, int M, int V>
SR_INLINE void product_tile(Start start, int64_t k_count, const T* a, int64_t a_k_stride,
                            const Rows& b, int64_t p, const T* bias, T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  Vec<T> acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j)
      acc[i][j] = start == Start::kZero   ? Vec<T>{}
                  : start == Start::kBias ? broadcast(bias[i])
                                          : load(c + i * ldc + j * W);
  for (int64_t k = 0; k < k_count; ++k) {
    const T* row = b[k] + p;
    Vec<T> column[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      column[j] = load(row + j * W);
      keep_in_register(column[j]);
    }
    const T* left = a + k * a_k_stride;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> value = broadcast(left[i]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += value * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

// At most M rows.
template <typename T, typename Rows, int M>
SR_INLINE void product_row_tile(int64_t row_count, Start start, int64_t k_count, int64_t p_begin,
                                int64_t p_end, const T* a, int64_t a_k_stride, const Rows& b,
                                const T* bias, T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  if constexpr (M > 1) {
    if (row_count < M)
      return product_row_tile<T, Rows, M - 1>(row_count, start, k_count, p_begin, p_end, a,
                                              a_k_stride, b, bias, c, ldc);
  }
  int64_t p = p_begin;
  for (; p + kTileVectors * W <= p_end; p += kTileVectors * W)
    product_tile<T, Rows, M, kTileVectors>(start, k_count, a, a_k_stride, b, p, bias, c + p, ldc);
  for (; p < p_end; p += W)
    product_tile<T, Rows, M, 1>(start, k_count, a, a_k_stride, b, p, bias, c + p, ldc);
}

// C[m, p] = start + sum_k A[m, k] B[k, p] for m < m_count, p < p_count; p_count a multiple of the
// vector width. bias has m_count elements (Start::kBias). Blocks of B columns stay in L1 while all
// of A passes over them.
template <typename T, typename Rows>
void product(Start start, int64_t m_count, int64_t k_count, int64_t p_count, LeftOperand<T> a,
             const Rows& b, const T* bias, T* c, int64_t ldc) {
  constexpr int64_t kBlock = 8 * Simd<T>::width;
  for (int64_t p0 = 0; p0 < p_count; p0 += kBlock) {
    const int64_t p1 = min64(p0 + kBlock, p_count);
    for (int64_t m = 0; m < m_count; m += kTileRows) {
      const T* left = a.data + m / kTileRows * a.panel_stride;
      product_row_tile<T, Rows, kTileRows>(m_count - m, start, k_count, p0, p1, left, a.k_stride, b,
                                           bias == nullptr ? nullptr : bias + m, c + m * ldc, ldc);
    }
  }
}

// Rows dealt to register tiles of nearly equal height: 20 rows are 4 tiles of 5, not 3 of 6 and one
// of 2, whose few accumulators could not hide an addition's latency.
struct RowTiles {
  int64_t rows, count;
  explicit RowTiles(int64_t row_count) : rows(row_count), count(ceil_div(row_count, kTileRows)) {}
  SR_INLINE int64_t begin(int64_t tile) const { return rows * tile / count; }
};
// Packs A[m, k] = source[m * row_stride + k * column_stride] for tiled_product(): tile t's element
// (m, k) is destination[(t * k_count + k) * kTileRows + m - begin(t)]; packed_size() elements.
template <typename S, typename T>
const T* pack_tiles(const S* source, int64_t row_stride, int64_t column_stride, int64_t m_count,
                    int64_t k_count, T* destination) {
  const RowTiles tiles(m_count);
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const int64_t m0 = tiles.begin(tile), m1 = tiles.begin(tile + 1);
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t i = 0; i < kTileRows; ++i)
        destination[(tile * k_count + k) * kTileRows + i] =
            m0 + i < m1 ? T(to_compute(source[(m0 + i) * row_stride + k * column_stride])) : T(0);
  }
  return destination;
}

template <typename T, int M, int V, typename Begin, typename End>
SR_INLINE void register_tile(int64_t k_count, const T* a, const StridedRows<T>& b, int64_t m,
                             int64_t p, const Begin& begin, const End& end) {
  constexpr int W = Simd<T>::width;
  Vec<T> acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = begin(m, p, i, j * W);
  const T* row = b.data;
  for (int64_t k = 0; k < k_count; ++k, a += kTileRows, row += b.ld) {
    Vec<T> column[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      column[j] = load(row + j * W);
      keep_in_register(column[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> value = broadcast(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += value * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) end(m, p, i, j * W, acc[i][j]);
}
template <typename T, int M, typename Rows, typename Begin, typename End>
SR_INLINE void register_row_tile(int64_t row_count, int64_t k_count, int64_t p_begin, int64_t p_end,
                                 const T* a, const Rows& b, int64_t m, const Begin& begin,
                                 const End& end) {
  constexpr int W = Simd<T>::width;
  if constexpr (M > 1) {
    if (row_count < M)
      return register_row_tile<T, M - 1>(row_count, k_count, p_begin, p_end, a, b, m, begin, end);
  }
  int64_t p = p_begin;
  for (; p + kTileVectors * W <= p_end; p += kTileVectors * W)
    register_tile<T, M, kTileVectors>(k_count, a, b.from_column(p), m, p, begin, end);
  for (; p < p_end; p += W) register_tile<T, M, 1>(k_count, a, b.from_column(p), m, p, begin, end);
}

// A product that begins and ends in registers: for every vector of C, at rows m + i and columns
// p + j onwards (i, j: constants within a register tile, whose corner is (m, p)),
//
//   end(m, p, i, j, begin(m, p, i, j) + sum_k A[m + i, k] B[k, p + j ...])
//
// A comes from pack_tiles(); b is StridedRows or StripRows (a pointer
// or a shift for each row would cost a tenth); p_begin and p_end are multiples of the
// vector width. Columns go in blocks of which B stays in L1 while all of A passes over them.
template <typename T, typename Rows, typename Begin, typename End>
SR_INLINE void tiled_product(int64_t m_count, int64_t k_count, int64_t p_begin, int64_t p_end,
                             const T* a, const Rows& b, const Begin& begin, const End& end) {
  constexpr int64_t kTileColumns = kTileVectors * Simd<T>::width;
  const int64_t fit = (int64_t{16} << 10) / (k_count * static_cast<int64_t>(sizeof(T)));
  const int64_t block = max64(1, fit / kTileColumns) * kTileColumns;
  const RowTiles tiles(m_count);
  for (int64_t p0 = p_begin; p0 < p_end; p0 += block) {
    const int64_t p1 = min64(p0 + block, p_end);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const int64_t m = tiles.begin(tile);
      register_row_tile<T, kTileRows>(tiles.begin(tile + 1) - m, k_count, p0, p1,
                                      a + tile * k_count * kTileRows, b, m, begin, end);
    }
  }
}

template <typename T, typename ARows, typename BRows, int M, int N>
SR_INLINE void inner_tile(const ARows& a, const BRows& b, int64_t m, int64_t n, int64_t p_count,
                          T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  Vec<T> acc[M][N] = {};
  const T *ra[M], *rb[N];
  for (int i = 0; i < M; ++i) ra[i] = a[m + i];
  for (int j = 0; j < N; ++j) rb[j] = b[n + j];
  for (int64_t p = 0; p < p_count; p += W) {
    Vec<T> right[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      right[j] = load(rb[j] + p);
      keep_in_register(right[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      Vec<T> left = load(ra[i] + p);
      keep_in_register(left);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += left * right[j];
    }
  }
  if constexpr (2 * M * N < W) {
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) c[i * ldc + j] += sum_by_halves<T>(acc[i][j]);
  } else {
#pragma GCC unroll 8
    for (int first = 0; first < M * N; first += W) {
      Vec<T> rows[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l)
        rows[l] = first + l < M * N ? acc[(first + l) / N][(first + l) % N] : Vec<T>{};
      const Vec<T> sums = sums_of_lanes<T>(rows);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l)
        if (first + l < M * N) c[(first + l) / N * ldc + (first + l) % N] += sums[l];
    }
  }
}
// M rows of A against rows [n_begin, n_end) of B.
template <typename T, typename ARows, typename BRows, int M>
SR_INLINE void inner_row_tile(const ARows& a, const BRows& b, int64_t m, int64_t n_begin,
                              int64_t n_end, int64_t p_count, T* c, int64_t ldc) {
  constexpr int N = kInnerColumns;
  int64_t n = n_begin;
  for (; n + N <= n_end; n += N)
    inner_tile<T, ARows, BRows, M, N>(a, b, m, n, p_count, c + m * ldc + n, ldc);
  for (; n < n_end; ++n)
    inner_tile<T, ARows, BRows, M, 1>(a, b, m, n, p_count, c + m * ldc + n, ldc);
}

// C[m, n] += sum_p A[m, p] B[n, p]: the product of a weight gradient. p_count a multiple of the
// vector width; padding must be zero in one of the two. A few rows of B stay in L1 while all of A
// passes over them.
template <typename T, typename ARows, typename BRows>
void accumulate_inner_products(int64_t m_count, int64_t n_count, int64_t p_count, const ARows& a,
                               const BRows& b, T* c, int64_t ldc) {
  constexpr int M = kInnerRows, N = kInnerColumns;
  const int64_t fit = (int64_t{20} << 10) / (p_count * static_cast<int64_t>(sizeof(T)));
  const int64_t block = max64(1, fit / N) * N;
  for (int64_t n0 = 0; n0 < n_count; n0 += block) {
    const int64_t n1 = min64(n0 + block, n_count);
    int64_t m = 0;
    for (; m + M <= m_count; m += M)
      inner_row_tile<T, ARows, BRows, M>(a, b, m, n0, n1, p_count, c, ldc);
    for (; m < m_count; ++m) inner_row_tile<T, ARows, BRows, 1>(a, b, m, n0, n1, p_count, c, ldc);
  }
}

// sum[m] += sum_p A[m, p]
template <typename T, typename ARows>
void accumulate_row_sums(int64_t m_count, int64_t p_count, const ARows& a, T* sum) {
  for (int64_t m = 0; m < m_count; ++m) {
    Vec<T> acc{};
    const T* row = a[m];
    for (int64_t p = 0; p < p_count; p += Simd<T>::width) acc += load(row + p);
    sum[m] += horizontal_sum<T>(acc);
  }
}

// ---------------------------------------------------------------- deterministic reductions

// Work items are dealt to at most kMaxChunks consecutive runs, whatever the number of threads; each
// run sums into a buffer of its own and the buffers are added in order. The result therefore does
// not depend on the number of threads, nor on their timing.
constexpr int64_t kMaxChunks = 32;

struct Chunks {
  int64_t items, count;
  explicit Chunks(int64_t item_count)
      : items(item_count), count(min64(kMaxChunks, max64(item_count, 1))) {}
  int64_t begin(int64_t chunk) const { return items * chunk / count; }
  int64_t end(int64_t chunk) const { return items * (chunk + 1) / count; }
};

// destination[i] = sum over chunks of partial[chunk * stride + i], rounded to S once.
template <typename S, typename T>
void reduce_chunks(const T* partial, int64_t chunk_count, int64_t stride, int64_t size,
                   S* destination) {
  int64_t i = 0;
  for (; i + Simd<T>::width <= size; i += Simd<T>::width) {
    Vec<T> sum{};
    for (int64_t chunk = 0; chunk < chunk_count; ++chunk) sum += load(partial + chunk * stride + i);
    if constexpr (std::is_same_v<T, typename Compute<S>::type>)
      store_vector_of(destination + i, sum);
    else
      for (int l = 0; l < Simd<T>::width; ++l) from_compute(sum[l], destination + i + l);
  }
  for (; i < size; ++i) {
    T sum = T(0);
    for (int64_t chunk = 0; chunk < chunk_count; ++chunk) sum += partial[chunk * stride + i];
    from_compute(sum, destination + i);
  }
}

// Calls function(S{}) with the element type that kind names.
template <typename Function>
SR_INLINE void dispatch_scalar(ScalarKind kind, const Function& function) {
  switch (kind) {
    case ScalarKind::kFloat32:
      return function(float{});
    case ScalarKind::kFloat64:
      return function(double{});
    case ScalarKind::kFloat16:
      return function(Half{});
    case ScalarKind::kBFloat16:
      return function(BFloat16{});
  }
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
