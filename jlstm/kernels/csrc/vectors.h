// Vectors of floats, and products of rows with panels of weights in registers. What is
// here is compiled anew for each set of instructions and shared with no other.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "recurrence.h"

namespace jlstm {
namespace {

#if defined(__AVX512F__)
constexpr int64_t W = 16;
constexpr int kAccumulators = 24;
#elif defined(__AVX2__)
constexpr int64_t W = 8;
constexpr int kAccumulators = 12;
#elif defined(__aarch64__)
constexpr int64_t W = 4;
constexpr int kAccumulators = 24;
#else
constexpr int64_t W = 4;
constexpr int kAccumulators = 12;
#endif
constexpr int kMostRows = 8;
constexpr int kMostVectors = 4;

typedef float Vec __attribute__((vector_size(W * sizeof(float))));

constexpr float kLargest = 3.4028235e38f;
constexpr float kInfinity = __builtin_inff();

#define INLINE inline __attribute__((always_inline))

// Nothing here may be shared with a unit for other instructions, as templates of the
// standard library would be.
template <typename T>
constexpr T least(T a, T b) {
  return a < b ? a : b;
}

INLINE void copy(const float* from, int64_t n, float* to) {
  std::memcpy(to, from, n * sizeof(float));
}

INLINE void clear(float* to, int64_t n) { std::memset(to, 0, n * sizeof(float)); }

// Memory for as long as a loop runs; zeros unless it is said that they are not needed.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n, bool zeros = true)
      : bytes_(n * sizeof(T)), data_(static_cast<T*>(take(bytes_))) {
    if (zeros) std::memset(data_, 0, bytes_);
  }
  ~Scratch() { give(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* at(int64_t i) const { return data_ + i; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
};

INLINE int64_t vectors(int64_t size) { return (size + W - 1) / W; }

INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

// The first n lanes; the others are zero.
#if defined(__AVX512F__)
INLINE __mmask16 lanes(int64_t n) { return n > 0 ? (1 << n) - 1 : 0; }
INLINE Vec load_lanes(const float* from, int64_t n) {
  return Vec(_mm512_maskz_loadu_ps(lanes(n), from));
}
INLINE void store_lanes(float* to, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(to, lanes(n), __m512(v));
}
#elif defined(__AVX2__)
INLINE __m256i lanes(int64_t n) {
  const __m256i each = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), each);
}
INLINE Vec load_lanes(const float* from, int64_t n) {
  return Vec(_mm256_maskload_ps(from, lanes(n)));
}
INLINE void store_lanes(float* to, Vec v, int64_t n) {
  _mm256_maskstore_ps(to, lanes(n), __m256(v));
}
#else
INLINE Vec load_lanes(const float* from, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
}
INLINE void store_lanes(float* to, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}
#endif

INLINE Vec load(const float* from, int64_t n) {
  return n >= W ? load(from) : load_lanes(from, n);
}

INLINE void store(float* to, Vec v, int64_t n) {
  n >= W ? store(to, v) : store_lanes(to, v, n);
}

// 1 / x of a normal number.
INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec about = Vec(_mm512_rcp14_ps(__m512(x)));
  return about + about * (1.0f - x * about);
#else
  return 1.0f / x;
#endif
}

// A rational function in x^2, fitted to the least relative error on [-8, 8], where tanh
// is 1 in float32: 3e-7 with rounding.
INLINE Vec tanh(Vec x) {
  const Vec most = Vec{} + 8.0f;
  x = x > most ? most : x;
  x = x < -most ? -most : x;
  Vec u = x * x;
  Vec p = u * 1.523041959217153e-08f + 2.1894664314459078e-05f;
  p = p * u + 0.0035715983249247074f;
  p = p * u + 0.1344449818134308f;
  p = p * u + 1.0f;
  Vec q = u * 8.522447956238466e-07f + 0.00034112922730855644f;
  q = q * u + 0.026164444163441658f;
  q = q * u + 0.4677782654762268f;
  q = q * u + 1.0f;
  return x * p * reciprocal(q);
}

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, of which the series to the sixth power has
// a relative error of 2e-7; 0 where it would be subnormal.
INLINE Vec exp(Vec x) {
  typedef int32_t Integers __attribute__((vector_size(W * sizeof(int32_t))));
  const Vec least = Vec{} - 87.0f, most = Vec{} + 88.7228394f;
  const Vec within = x < least ? least : x > most ? most : x;
  // Adding so much leaves no room for digits behind the point.
  const Vec shift = Vec{} + 12582912.0f;
  const Vec shifted = within * 1.44269504f + shift, n = shifted - shift;
  const Vec r = within - n * 0.693145752f - n * 1.42860677e-06f;
  Vec p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Integers power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power << 23) + (126 << 23);  // half of it, as the whole may be too much
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  const Vec made = p * scale * 2.0f;
  return x < least ? Vec{} : x > most ? Vec{} + kInfinity : made;
}

INLINE Vec sigmoid(Vec x) { return tanh(x * 0.5f) * 0.5f + 0.5f; }

// acc[r] += rows[r][k] * weights[k], with weights [count, N, W]. The last of the N
// vectors goes to acc[r][Last].
template <int R, int N, int Last, int A>
INLINE void multiply(const float* const* rows, const float* weights, int64_t count,
                     Vec (&acc)[R][A]) {
  for (int64_t k = 0; k < count; ++k, weights += N * W) {
    Vec w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) w[n] = load(weights + n * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float a = rows[r][k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n == N - 1 ? Last : n] += w[n] * a;
    }
  }
}

// Calls f(start, integral_constant<rows>) for groups of rows as equal as can be.
template <int R>
struct Size {
  static constexpr int value = R;
};

template <int Most, typename F>
void in_groups(int64_t count, const F& f) {
  const int64_t groups = (count + Most - 1) / Most;
  int64_t start = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t size = (count - start) / (groups - g);
    switch (size) {
      case 1: f(start, Size<1>()); break;
      case 2: f(start, Size<least(2, Most)>()); break;
      case 3: f(start, Size<least(3, Most)>()); break;
      case 4: f(start, Size<least(4, Most)>()); break;
      case 5: f(start, Size<least(5, Most)>()); break;
      case 6: f(start, Size<least(6, Most)>()); break;
      case 7: f(start, Size<least(7, Most)>()); break;
      default: f(start, Size<Most>()); break;
    }
    start += size;
  }
}

constexpr int most_rows(int vectors) {
  return least(kMostRows, kAccumulators / vectors);
}

// acc[r] += a[e][r] * dz[e], of so many rows of dz. Of the vectors of a row it takes N,
// the last of them at Last.
template <int R, int N, int Last>
INLINE void outer(const float* const* a, int64_t offset, const float* dz,
                  int64_t vectors, int64_t count, Vec (&acc)[R][N]) {
  for (int64_t e = 0; e < count; ++e, dz += vectors * W) {
    const float* row = a[e] + offset;
    Vec d[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) d[n] = load(dz + (n == N - 1 ? Last : n) * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] += d[n] * row[r];
    }
  }
}

// A panel of columns: up to so many vectors.
struct Span {
  int64_t first, count;
};

INLINE int64_t spans(int64_t H) {
  return (vectors(H) + kMostVectors - 1) / kMostVectors;
}

INLINE Span span(int64_t H, int64_t panel) {
  const int64_t all = vectors(H), n = spans(H);
  const int64_t first = panel * all / n;
  return {first, (panel + 1) * all / n - first};
}

// Calls f(integral_constant<vectors>) for those of a span.
template <typename F>
INLINE void with_vectors(Span part, const F& f) {
  switch (part.count) {
    case 1: return f(Size<1>());
    case 2: return f(Size<2>());
    case 3: return f(Size<3>());
    default: return f(Size<kMostVectors>());
  }
}

}  // namespace
}  // namespace jlstm
