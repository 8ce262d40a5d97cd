// The cross-entropy of a projection and its gradients, a panel of classes at a time.
#pragma once

#include "recurrence.h"
#include "vectors.h"

namespace jlstm {
namespace {

// The logits of a panel: [rows, vectors, W] at the place of its first class.
INLINE float* logits_of(float* z, Span part, int64_t rows) {
  return z + part.first * W * rows;
}

template <int N>
void logits_panel(const CrossEntropy& s, Span part, int64_t first_row, int64_t rows,
                  float* weights, float* z, Vec* most, Vec* sum, Vec* total,
                  float* scores) {
  const int64_t first = part.first * W, n = least(N * W, s.V - first);
  const int64_t last = n - (N - 1) * W;
  for (int64_t k = 0; k < s.D; ++k) {
    float* to = weights + k * N * W;
    if (n < N * W) clear(to, N * W);
    copy(s.w + k * s.V + first, n, to);
  }
  Vec lane, bias[N];
  for (int64_t i = 0; i < W; ++i) lane[i] = i;
  for (int v = 0; v < N; ++v) bias[v] = load(s.b + first + v * W, n - v * W);
  in_groups<most_rows(N)>(rows, [&](int64_t start, auto size) {
    constexpr int R = decltype(size)::value;
    const float* x[R];
    Vec acc[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      x[r] = s.x + (first_row + start + r) * s.D;
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[r][v] = bias[v];
    }
    multiply<R, N, N - 1>(x, weights, s.D, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t row = start + r;
      Vec largest = most[row], all = total[row];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        all += acc[r][v];
        if (v == N - 1 && last < W) {
          acc[r][v] = lane < static_cast<float>(last) ? acc[r][v] : Vec{} - kInfinity;
        }
        largest = acc[r][v] > largest ? acc[r][v] : largest;
        store(z + (row * N + v) * W, acc[r][v]);
      }
      Vec exponentials = sum[row] * exp(most[row] - largest);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) exponentials += exp(acc[r][v] - largest);
      most[row] = largest;
      sum[row] = exponentials;
      total[row] = all;
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = s.labels[first_row + r] - first;
    if (0 <= at && at < n) scores[r] = z[r * N * W + at];
  }
}

void logits(const CrossEntropy& s, int64_t first_row, int64_t rows, int64_t begin,
            int64_t end, float* z, const LogitSums& sums) {
  const Scratch<float> weights(s.D * kMostVectors * W, false);
  const Scratch<Vec> most(rows), sum(rows), total(rows);
  for (int64_t r = 0; r < rows; ++r) most[r] = Vec{} - kLargest;
  for (int64_t panel = begin; panel < end; ++panel) {
    const Span part = span(s.V, panel);
    with_vectors(part, [&](auto n) {
      logits_panel<decltype(n)::value>(s, part, first_row, rows, weights.at(0),
                                       logits_of(z, part, rows), most.at(0), sum.at(0),
                                       total.at(0), sums.scores);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float largest = -kLargest, all = 0, exponentials = 0;
    for (int64_t i = 0; i < W; ++i) {
      largest = most[r][i] > largest ? most[r][i] : largest;
      all += total[r][i];
    }
    const Vec scaled = sum[r] * exp(most[r] - largest);
    for (int64_t i = 0; i < W; ++i) exponentials += scaled[i];
    sums.most[r] = largest;
    sums.exponentials[r] = exponentials;
    sums.total[r] = all;
  }
}

template <int N>
void slopes_panel(const CrossEntropy& s, Span part, int64_t first_row, int64_t rows,
                  float* weights, float* z, const float* log_sums,
                  const float* const* x, bool first_block, float* dx, float* dw,
                  float* db) {
  const int64_t first = part.first * W, n = least(N * W, s.V - first);
  const int64_t padded = vectors(s.D) * W;
  // The logits become their gradients.
  Vec bias[N] = {};
  for (int64_t r = 0; r < rows; ++r) {
    float* row = z + r * N * W;
    if (!s.valid[first_row + r]) {
      clear(row, N * W);
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      store(row + v * W, exp(load(row + v * W) - log_sums[r]) - s.smoothing / s.V);
    }
    const int64_t at = s.labels[first_row + r] - first;
    if (0 <= at && at < n) row[at] -= 1.0f - s.smoothing;
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) bias[v] += load(row + v * W);
  }
  const auto add = [&](float* to, Vec more, int64_t lanes) __attribute__((always_inline)) {
    store(to, first_block ? more : load(to, lanes) + more, lanes);
  };
  for (int v = 0; v < N; ++v) add(db + first + v * W, bias[v], n - v * W);

  in_groups<most_rows(N)>(s.D, [&](int64_t start, auto size) {
    constexpr int R = decltype(size)::value;
    Vec acc[R][N] = {};
    outer<R, N, N - 1>(x, start, z, N, rows, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        add(dw + (start + r) * s.V + first + v * W, acc[r][v], n - v * W);
      }
    }
  });

  for (int64_t panel = 0; panel < spans(s.D); ++panel) {
    const Span features = span(s.D, panel);
    with_vectors(features, [&](auto vectors_of) {
      constexpr int M = decltype(vectors_of)::value;
      const int64_t from = features.first * W, m = least(M * W, s.D - from);
      if (n < N * W || m < M * W) clear(weights, N * W * M * W);
      for (int64_t k = 0; k < m; ++k) {
        const float* row = s.w + (from + k) * s.V + first;
        for (int64_t j = 0; j < n; ++j) weights[j * M * W + k] = row[j];
      }
      in_groups<most_rows(M)>(rows, [&](int64_t start, auto size) {
        constexpr int R = decltype(size)::value;
        const float* dz[R];
        float* to = dx + start * padded + from;
        // From zero, so that not all classes are added up one by one.
        Vec acc[R][M] = {};
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dz[r] = z + (start + r) * N * W;
        multiply<R, M, M - 1>(dz, weights, N * W, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
          for (int v = 0; v < M; ++v) {
            float* sum = to + r * padded + v * W;
            store(sum, load(sum) + acc[r][v]);
          }
        }
      });
    });
  }
}

void slopes(const CrossEntropy& s, int64_t first_row, int64_t rows, int64_t begin,
            int64_t end, float* z, const float* log_sums, bool first_block, float* dx,
            float* dw, float* db) {
  const int64_t padded = vectors(s.D) * W;
  const Scratch<float> weights(kMostVectors * W * kMostVectors * W, false);
  const Scratch<float> sums(rows * padded);
  const Scratch<const float*> x(rows);
  for (int64_t r = 0; r < rows; ++r) x[r] = s.x + (first_row + r) * s.D;
  for (int64_t panel = begin; panel < end; ++panel) {
    const Span part = span(s.V, panel);
    with_vectors(part, [&](auto n) {
      slopes_panel<decltype(n)::value>(s, part, first_row, rows, weights.at(0),
                                       logits_of(z, part, rows), log_sums, x.at(0),
                                       first_block, sums.at(0), dw, db);
    });
  }
  for (int64_t r = 0; r < rows; ++r) copy(sums.at(r * padded), s.D, dx + r * s.D);
}

}  // namespace
}  // namespace jlstm
