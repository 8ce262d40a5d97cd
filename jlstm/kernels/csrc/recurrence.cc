// One translation unit for each set of instructions: the compiler is told which by its
// options, and JLSTM_LOOPS is the name under which it is found.
#include "recurrence.h"

#include "cross_entropy.h"
#include "vectors.h"

namespace jlstm {
namespace {

template <Cell C>
constexpr int64_t kGates = C == Cell::kLstm ? 4 : 3;

// Rows at work in a step, as places in the list of a thread's rows.
struct Active {
  Scratch<int64_t> places;
  int64_t count = 0;

  template <typename F>
  void find(const Flags& flags, const int64_t* rows, int64_t all, int64_t stride,
            int64_t t, const F& masked) {
    count = 0;
    for (int64_t i = 0; i < all; ++i) {
      if (flags.mask == nullptr || flags.mask[rows[i] * stride + t]) {
        places[count++] = i;
      } else {
        masked(i);
      }
    }
  }
};

// Makes gates of pre-activations, in their place, and returns the next h. Of an LSTM,
// before is c, and the next c is written; of a GRU, before is h, and the fourth
// pre-activation is h W_n + b_n, which goes before the candidate.
template <Cell C>
INLINE Vec update(Vec (&z)[4], Vec before, Vec& c) {
  z[0] = sigmoid(z[0]);
  z[1] = sigmoid(z[1]);
  if (C == Cell::kLstm) {
    z[2] = tanh(z[2]);
    z[3] = sigmoid(z[3]);
    c = z[1] * before + z[0] * z[2];
    return z[3] * tanh(c);
  }
  const Vec candidate = tanh(z[2] + z[0] * z[3]);
  z[2] = z[3];
  z[3] = candidate;
  return candidate + z[1] * (before - candidate);
}

// Forward. Weights of a panel, W hidden units: [D, G, W] where it projects, [H, G, W].

template <Cell C>
void pack_forward(const Shape& s, const float* w_ih, const float* w_hh, int64_t panel,
                  float* out) {
  constexpr int64_t G = kGates<C>;
  const int64_t u = panel * W, n = least(W, s.H - u);
  out += panel * ((w_ih == nullptr ? 0 : s.D) + s.H) * G * W;
  const auto append = [&](const float* w, int64_t height) {
    for (int64_t k = 0; k < height; ++k) {
      for (int64_t g = 0; g < G; ++g, out += W) {
        store(out, load(w + (k * G + g) * s.H + u, n));
      }
    }
  };
  if (w_ih != nullptr) append(w_ih, s.D);
  append(w_hh, s.H);
}

// So many rows of a few steps are multiplied with the weights of the inputs at once.
constexpr int64_t kAhead = 64;

template <Cell C>
void forward(const Shape& s, const Flags& flags, const Forward& io, const float* packed,
             const int64_t* rows, int64_t count) {
  constexpr int64_t G = kGates<C>;
  constexpr bool kLstm = C == Cell::kLstm;
  const int64_t H = s.H, P = vectors(H), padded = P * W;
  const int64_t x_size = io.projected ? G * H : s.D;
  const int64_t x_count = io.projected ? 0 : s.D;
  const bool keep = io.gates != nullptr;
  const auto time = [&](int64_t step) { return flags.reverse ? s.T - 1 - step : step; };

  // The carry h of a row has two places: a step reads one and writes the other.
  const Scratch<float> hs(2 * count * padded), cs(kLstm ? count * padded : 0);
  const Scratch<int64_t> now(count);
  const auto h_at = [&](int64_t i, int64_t which) {
    return hs.at((2 * i + (now[i] ^ which)) * padded);
  };
  const auto set = [&](int64_t i, const float* h, const float* c) {
    copy(h + rows[i] * H, H, h_at(i, 0));
    if (kLstm) copy(c + rows[i] * H, H, cs.at(i * padded));
  };
  for (int64_t i = 0; i < count; ++i) set(i, io.h0, io.c0);

  // Where rows are few, a step then reads no weights but the recurrent ones.
  const int64_t ahead = io.projected ? 0 : kAhead / count, width = ahead * count;
  const Scratch<float> zs(P * width * G * W, false);  // [P, ahead, count, G, W]
  const Scratch<const float*> found_x(width);
  const Scratch<float*> found_z(width);
  const auto project = [&](int64_t first) {
    int64_t found = 0;
    for (int64_t k = 0; k < ahead && first + k < s.T; ++k) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = rows[i] * s.stride + time(first + k);
        if (flags.mask != nullptr && !flags.mask[at]) continue;
        found_x[found] = io.xs + at * s.D;
        found_z[found++] = zs.at((k * count + i) * G * W);
      }
    }
    for (int64_t p = 0; p < P; ++p) {
      const float* weights = packed + p * (s.D + H) * G * W;
      in_groups<most_rows(G)>(found, [&](int64_t start, auto size) {
        constexpr int R = decltype(size)::value;
        Vec acc[R][G];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
          for (int g = 0; g < G; ++g) {
            acc[r][g] = load(io.bias + g * H + p * W, least(W, H - p * W));
          }
        }
        multiply<R, G, G - 1>(found_x.at(start), weights, s.D, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
          for (int g = 0; g < G; ++g) {
            store(found_z[start + r] + (p * width * G + g) * W, acc[r][g]);
          }
        }
      });
    }
  };

  Active active{Scratch<int64_t>(count)};
  for (int64_t step = 0; step < s.T; ++step) {
    const int64_t t = time(step), block = ahead ? step % ahead : 0;
    if (ahead && block == 0) project(step);
    if (flags.resets != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        if (flags.resets[rows[i] * s.stride + t]) set(i, io.fresh_h, io.fresh_c);
      }
    }
    active.find(flags, rows, count, s.stride, t, [&](int64_t i) {
      clear(io.ys + (rows[i] * s.kept + t) * H, H);
    });
    for (int64_t p = 0; p < P; ++p) {
      const float* w_x = packed + p * (x_count + H) * G * W;
      const float* w_h = w_x + x_count * G * W;
      const int64_t u = p * W, n = least(W, H - u);
      in_groups<most_rows(4)>(active.count, [&](int64_t start, auto size) {
        constexpr int R = decltype(size)::value;
        const int64_t* places = active.places.at(start);
        Vec acc[R][4];
        const float *x[R], *h[R];
        int64_t at[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          at[r] = rows[places[r]] * s.kept + t;
          x[r] = io.xs + (rows[places[r]] * s.stride + t) * x_size;
          h[r] = h_at(places[r], 0);
          if (!kLstm) acc[r][3] = load(io.bias_n + u, n);
        }
        if (ahead) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const float* z = zs.at((p * width + block * count + places[r]) * G * W);
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) acc[r][g] = load(z + g * W);
          }
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) acc[r][g] = load(io.bias + g * H + u, n);
          }
        }
        if (io.projected) {
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) acc[r][g] += load(x[r] + g * H + u, n);
          }
        } else if (!ahead) {
          multiply<R, G, G - 1>(x, w_x, x_count, acc);
        }
        if (keep) {
          // Where the next step will write.
          const int64_t next = flags.reverse ? (t ? -1 : 0) : (t < s.T - 1 ? 1 : 0);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const int64_t to = at[r] + next;
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) {
              __builtin_prefetch(io.gates + (to * 4 + g) * H + u, 1);
            }
            if (kLstm) __builtin_prefetch(io.before_c + to * H + u, 1);
            __builtin_prefetch(io.ys + to * H + u, 1);
          }
        }
        multiply<R, G, 3>(h, w_h, H, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          float* before_at = kLstm ? cs.at(places[r] * padded + u) : nullptr;
          const Vec before = load(kLstm ? before_at : h[r] + u);
          Vec c;
          const Vec next = update<C>(acc[r], before, c);
          if (kLstm) store(before_at, c);
          if (keep) {
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) {
              store(io.gates + (at[r] * 4 + g) * H + u, acc[r][g], n);
            }
            if (kLstm) store(io.before_c + at[r] * H + u, before, n);
          }
          store(h_at(places[r], 1) + u, next);
          store(io.ys + at[r] * H + u, next, n);
        }
      });
    }
    for (int64_t a = 0; a < active.count; ++a) now[active.places[a]] ^= 1;
  }
  for (int64_t i = 0; i < count; ++i) {
    copy(h_at(i, 0), H, io.h + rows[i] * H);
    if (kLstm) copy(cs.at(i * padded), H, io.c + rows[i] * H);
  }
}

// One step of few rows, which reads the weights where they are.

constexpr int64_t kStepVectors = kAccumulators / 6;

// acc[g] += a[k] * w[k], of columns that begin at u; the last gate goes to acc[Last].
template <int G, int Last>
INLINE void multiply_columns(const float* a, const float* w, int64_t count, int64_t H,
                             int64_t u, Vec (&acc)[4][kStepVectors]) {
  // Lanes behind the end are of another gate and are not used; but behind the last one
  // there may be no memory.
  const auto add = [&](int64_t k, auto read) __attribute__((always_inline)) {
    const float* row = w + k * G * H + u;
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 4
      for (int v = 0; v < kStepVectors; ++v) {
        acc[g == G - 1 ? Last : g][v] += read(row + g * H + v * W, H - u - v * W) * a[k];
      }
    }
  };
  const auto whole = [](const float* from, int64_t) { return load(from); };
  const auto part = [](const float* from, int64_t n) { return load(from, n); };
  // A row before the end has at least a row behind it.
  const int64_t safe = (kStepVectors * W + G * H - 1) / (G * H);
  int64_t k = 0;
  for (; k < count - safe; ++k) add(k, whole);
  for (; k < count; ++k) add(k, part);
}

template <Cell C>
void step(const Shape& s, const Flags& flags, const Forward& io, const float* w_ih,
          const float* w_hh, int64_t panel) {
  constexpr int G = kGates<C>;
  constexpr bool kLstm = C == Cell::kLstm;
  const int64_t H = s.H, u = panel * kStepVectors * W;
  const int64_t n = least(H - u, kStepVectors * W);
  for (int64_t b = 0; b < s.B; ++b) {
    const bool reset = flags.resets != nullptr && flags.resets[b];
    const float* h = (reset ? io.fresh_h : io.h0) + b * H;
    const float* c = kLstm ? (reset ? io.fresh_c : io.c0) + b * H : nullptr;
    if (flags.mask != nullptr && !flags.mask[b]) {
      clear(io.ys + b * H + u, n);
      copy(h + u, n, io.h + b * H + u);
      if (kLstm) copy(c + u, n, io.c + b * H + u);
      continue;
    }
    Vec acc[4][kStepVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kStepVectors; ++v) {
      const int64_t at = u + v * W, left = H - at;
      for (int g = 0; g < G; ++g) acc[g][v] = load(io.bias + g * H + at, left);
      if (!kLstm) acc[3][v] = load(io.bias_n + at, left);
    }
    multiply_columns<G, G - 1>(io.xs + b * s.D, w_ih, s.D, H, u, acc);
    multiply_columns<G, 3>(h, w_hh, H, H, u, acc);
    for (int v = 0; v < kStepVectors; ++v) {
      const int64_t at = u + v * W, left = H - at;
      if (left <= 0) break;
      Vec z[4] = {acc[0][v], acc[1][v], acc[2][v], acc[3][v]}, next_c;
      const Vec next = update<C>(z, load((kLstm ? c : h) + at, left), next_c);
      store(io.ys + b * H + at, next, left);
      store(io.h + b * H + at, next, left);
      if (kLstm) store(io.c + b * H + at, next_c, left);
    }
  }
}

// Backward. The cotangents of gates are kept for some steps, as [P, block, 4, W] with P
// panels of W units: of a GRU in the order r, z, n by h and n by x. The recurrence reads
// them row by row, and then the gradients of the weights read them panel by panel.

// So many rows of a few steps; what they take stays in the second cache.
constexpr int64_t kBlock = 256;

// Weights of a panel, a span of hidden units: [P, G, W, span].
template <Cell C>
void pack_backward(const float* w, int64_t height, int64_t H, int64_t panel,
                   float* out) {
  constexpr int64_t G = kGates<C>;
  const int64_t padded = vectors(H) * W;
  const Span part = span(height, panel);
  const int64_t width = part.count * W, first = part.first * W;
  out += first * G * padded;
  const int64_t n = least(width, height - first);
  // Tile by tile, which stays in the first cache.
  for (int64_t u = 0; u < H; u += W) {
    for (int64_t g = 0; g < G; ++g, out += W * width) {
      const int64_t m = least(W, H - u);
      if (n < width || m < W) clear(out, W * width);
      for (int64_t j = 0; j < n; ++j) {
        const float* row = w + ((first + j) * G + g) * H + u;
        for (int64_t i = 0; i < m; ++i) out[i * width + j] = row[i];
      }
    }
  }
}

// Adds a^T dz to the columns of a gradient [height, N H] that belong to a panel; the
// first product is written there.
template <int N, int Last>
void add_product(const float* const* a, int64_t height, const float* dz, int64_t count,
                 int64_t u, int64_t H, bool first, float* gradient) {
  const int64_t n = least(W, H - u);
  in_groups<most_rows(4)>(height, [&](int64_t start, auto size) {
    constexpr int R = decltype(size)::value;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int g = 0; g < N; ++g) {
        __builtin_prefetch(gradient + ((start + r) * N + g) * H + u, 1);
      }
    }
    Vec acc[R][N] = {};
    outer<R, N, Last>(a, start, dz, 4, count, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int g = 0; g < N; ++g) {
        float* to = gradient + ((start + r) * N + g) * H + u;
        store(to, first ? acc[r][g] : load(to, n) + acc[r][g], n);
      }
    }
  });
}

// The rows of a block of steps: blocks are about equal.
INLINE int64_t block_of(int64_t count, int64_t T) {
  const int64_t steps = kBlock > count ? kBlock / count : 1;
  const int64_t blocks = (T + steps - 1) / steps;
  return (T + blocks - 1) / blocks * count;
}

template <Cell C>
class Backwards {
 public:
  Backwards(const Shape& s, const Flags& flags, const Backward& io, const Sums& to,
            const Each& each, const float* packed, const int64_t* rows, int64_t count)
      : s(s), flags(flags), io(io), to(to), each(each), packed(packed), rows(rows),
        count(count), size(block_of(count, s.T)), source(count * s.T),
        dhs(count * padded), dcs(kLstm ? count * padded : 0), dzs(4 * padded * size, false),
        sums(4 * padded), xs(size), hs(size), active{Scratch<int64_t>(count)} {}

  void run() {
    start();
    for (int64_t step = s.T - 1; step >= 0; --step) {
      const int64_t t = time(step);
      active.find(flags, rows, count, s.stride, t, [&](int64_t i) {
        const int64_t at = rows[i] * s.stride + t;
        if (io.dz != nullptr) {
          clear(io.dz + at * G * H, G * H);
        } else {
          clear(io.dxs + at * s.D, s.D);
        }
      });
      if (filled + active.count > size) flush();
      gates(t);
      const int64_t next = step == 0 ? t : time(step - 1);
      for (int64_t panel = 0; panel < spans(H); ++panel) carry(panel, next);
      filled += active.count;
      if (flags.resets != nullptr) reset(t);
    }
    flush();
    for (int64_t i = 0; i < count; ++i) {
      copy(dhs.at(i * padded), H, io.dh0 + rows[i] * H);
      if (kLstm) copy(dcs.at(i * padded), H, io.dc0 + rows[i] * H);
    }
    for (int64_t g = 0; g < 4; ++g) {
      const float* sum = sums.at((kLstm || g < 2 ? g : 5 - g) * padded);
      float* into = to.dbias + g * H;
      for (int64_t u = 0; u < H; ++u) into[u] = sum[u] + (to.add ? into[u] : 0.0f);
    }
  }

 private:
  static constexpr int64_t G = kGates<C>;
  static constexpr bool kLstm = C == Cell::kLstm;
  static constexpr int64_t kInitial = -1, kFresh = -2;

  int64_t time(int64_t step) const { return flags.reverse ? s.T - 1 - step : step; }

  // Finds where the carry before each step came from: an earlier step, or neither.
  void start() {
    for (int64_t i = 0; i < count; ++i) {
      copy(io.dh + rows[i] * H, H, dhs.at(i * padded));
      if (kLstm) copy(io.dc + rows[i] * H, H, dcs.at(i * padded));
      if (flags.resets != nullptr && !to.add) {
        clear(io.dfresh_h + rows[i] * H, H);
        if (kLstm) clear(io.dfresh_c + rows[i] * H, H);
      }
      int64_t from = kInitial;
      for (int64_t step = 0; step < s.T; ++step) {
        const int64_t t = time(step), at = rows[i] * s.stride + t;
        if (flags.resets != nullptr && flags.resets[at]) from = kFresh;
        source[i * s.T + t] = from;
        if (flags.mask == nullptr || flags.mask[at]) from = t;
      }
    }
  }

  const float* before_h(int64_t i, int64_t t) const {
    const int64_t from = source[i * s.T + t];
    if (from == kInitial) return io.h0 + rows[i] * H;
    if (from == kFresh) return io.fresh_h + rows[i] * H;
    return io.ys + (rows[i] * s.kept + from) * H;
  }

  // Computes the cotangents of the gates of a step, and of the carry but for W_hh.
  void gates(int64_t t) {
    for (int64_t a = 0; a < active.count; ++a) {
      const int64_t i = active.places[a], at = rows[i] * s.stride + t;
      xs[filled + a] = io.xs + at * s.D;
      hs[filled + a] = before_h(i, t);
    }
    for (int64_t p = 0; p < P; ++p) {
      const int64_t u = p * W, n = least(W, H - u);
      Vec sum[4];
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) sum[g] = load(sums.at(g * padded + u));
      for (int64_t a = 0; a < active.count; ++a) {
        const int64_t i = active.places[a], at = rows[i] * s.kept + t;
        const float* gates = io.gates + at * 4 * H + u;
        float* dz = dzs.at((p * size + filled + a) * 4 * W);
        float* dh_at = dhs.at(i * padded + u);
        const int64_t whole = rows[i] * s.stride + t;
        const Vec dh = load(dh_at) + load(io.dys + whole * H + u, n);
        Vec d[4];
        if (kLstm) {
          const Vec i_ = load(gates, n), f = load(gates + H, n);
          const Vec g = load(gates + 2 * H, n), o = load(gates + 3 * H, n);
          const Vec c = load(io.before_c + at * H + u, n);
          float* dc_at = dcs.at(i * padded + u);
          const Vec y = tanh(f * c + i_ * g);
          const Vec dc = load(dc_at) + dh * o * (1.0f - y * y);
          d[0] = dc * g * (i_ - i_ * i_);
          d[1] = dc * c * (f - f * f);
          d[2] = dc * i_ * (1.0f - g * g);
          d[3] = dh * y * (o - o * o);
          store(dc_at, dc * f);
        } else {
          const Vec r = load(gates, n), z = load(gates + H, n);
          const Vec q = load(gates + 2 * H, n), c = load(gates + 3 * H, n);
          const Vec before = load(hs[filled + a] + u, n);
          d[3] = (dh - dh * z) * (1.0f - c * c);
          d[2] = d[3] * r;
          d[1] = dh * (before - c) * (z - z * z);
          d[0] = d[3] * q * (r - r * r);
          store(dh_at, dh * z);
        }
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
          store(dz + g * W, d[g]);
          sum[g] += d[g];
        }
        if (io.dz != nullptr) {
          float* dzx = io.dz + whole * G * H + u;
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) store(dzx + g * H, d[g < G - 1 ? g : 3], n);
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) store(sums.at(g * padded + u), sum[g]);
    }
  }

  // Takes the cotangents of gates through W_hh to those of a span of the carry.
  // Meanwhile what the next step reads comes from memory.
  void carry(int64_t panel, int64_t next) {
    const Span part = span(H, panel);
    with_vectors(part, [&](auto n) { carry_of<decltype(n)::value>(part, panel, next); });
  }

  void fetch(int64_t i, int64_t t, int64_t u) const {
    const int64_t at = rows[i] * s.kept + t;
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) __builtin_prefetch(io.gates + (at * 4 + g) * H + u);
    __builtin_prefetch(io.dys + (rows[i] * s.stride + t) * H + u);
    if (kLstm) __builtin_prefetch(io.before_c + at * H + u);
  }

  template <int N>
  void carry_of(Span part, int64_t panel, int64_t next) {
    const float* weights = packed + part.first * W * G * padded;
    in_groups<most_rows(N)>(active.count, [&](int64_t start, auto group) {
      constexpr int R = decltype(group)::value;
      Vec acc[R][N];
      const float* dz[R];
      float* dh[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        dz[r] = dzs.at((filled + start + r) * 4 * W);
        dh[r] = dhs.at(active.places[start + r] * padded + part.first * W);
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) acc[r][v] = kLstm ? Vec{} : load(dh[r] + v * W);
      }
      for (int64_t p = 0; p < P; ++p) {
        for (int64_t r = panel; r < R; r += spans(H)) {
          fetch(active.places[start + r], next, p * W);
        }
        multiply<R, N, N - 1>(dz, weights + p * G * W * N * W, G * W, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dz[r] += size * 4 * W;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) store(dh[r] + v * W, acc[r][v]);
      }
    });
  }

  // Takes the cotangents of the gates of a block to the gradients of the weights and
  // to a span of those of the inputs.
  void flush() {
    const auto work = [](void* self, int64_t i) {
      Backwards& loop = *static_cast<Backwards*>(self);
      i < loop.P ? loop.add_weights_of(i) : loop.inputs(i - loop.P);
    };
    const int64_t all = P + (io.dz == nullptr ? spans(s.D) : 0);
    if (each.run != nullptr) {
      each.run(each.threads, all, work, this);
    } else {
      for (int64_t i = 0; i < all; ++i) work(this, i);
    }
    filled = 0;
    first = false;
  }

  void inputs(int64_t panel) {
    const Span part = span(s.D, panel);
    with_vectors(part, [&](auto n) { inputs_of<decltype(n)::value>(part); });
  }

  template <int N>
  void inputs_of(Span part) {
    const float* weights = packed + (padded + part.first * W) * G * padded;
    const int64_t last = least(W, s.D - (part.first + N - 1) * W);
    in_groups<most_rows(N)>(filled, [&](int64_t start, auto group) {
      constexpr int R = decltype(group)::value;
      Vec acc[R][N] = {};
      const float *dz[R], *of_candidate[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        dz[r] = dzs.at((start + r) * 4 * W);
        of_candidate[r] = dz[r] + 3 * W;
      }
      for (int64_t p = 0; p < P; ++p) {
        const float* w = weights + p * G * W * N * W;
        multiply<R, N, N - 1>(dz, w, (kLstm ? 4 : 2) * W, acc);
        if (!kLstm) multiply<R, N, N - 1>(of_candidate, w + 2 * W * N * W, W, acc);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          dz[r] += size * 4 * W;
          of_candidate[r] += size * 4 * W;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* to = io.dxs + (xs[start + r] - io.xs) + part.first * W;
#pragma GCC unroll 8
        for (int v = 0; v < N - 1; ++v) store(to + v * W, acc[r][v]);
        store(to + (N - 1) * W, acc[r][N - 1], last);
      }
    });
  }

  void add_weights_of(int64_t p) {
    const float* dz = dzs.at(p * size * 4 * W);
    add_product<G, G - 1>(hs.at(0), H, dz, filled, p * W, H, first, to.dw_hh);
    add_product<G, 3>(xs.at(0), s.D, dz, filled, p * W, H, first, to.dw_ih);
  }

  // Hands the cotangent of a carry that was reset to the fresh one.
  void reset(int64_t t) {
    for (int64_t i = 0; i < count; ++i) {
      if (!flags.resets[rows[i] * s.stride + t]) continue;
      const auto move = [&](float* from, float* into) {
        for (int64_t u = 0; u < H; ++u) into[rows[i] * H + u] += from[u];
        clear(from, H);
      };
      move(dhs.at(i * padded), io.dfresh_h);
      if (kLstm) move(dcs.at(i * padded), io.dfresh_c);
    }
  }

  const Shape& s;
  const Flags& flags;
  const Backward& io;
  const Sums& to;
  const Each& each;
  const float* packed;
  const int64_t* rows;
  const int64_t count;
  const int64_t H = s.H, P = vectors(H), padded = P * W;
  const int64_t size;            // of a block
  const Scratch<int64_t> source;   // [count, T]
  const Scratch<float> dhs, dcs;   // [count, padded]
  const Scratch<float> dzs, sums;  // [P, size, 4, W], [4, padded]
  const Scratch<const float*> xs, hs;
  int64_t filled = 0;  // of the block
  bool first = !to.add;
  Active active;
};

template <Cell C>
void backward(const Shape& s, const Flags& flags, const Backward& io, const Sums& to,
              const Each& each, const float* packed, const int64_t* rows,
              int64_t count) {
  Backwards<C>(s, flags, io, to, each, packed, rows, count).run();
}

// A product of rows and weights: panels [inner, vectors, W] of up to four vectors.

void pack_product(const Matrix& m, int64_t panel, float* packed) {
  const Span part = span(m.columns(), panel);
  const int64_t width = part.count * W, first = part.first * W;
  const int64_t inner = m.inner(), n = least(width, m.columns() - first);
  float* out = packed + first * inner;
  if (n < width) clear(out, inner * width);
  if (!m.transposed) {
    for (int64_t k = 0; k < inner; ++k) {
      copy(m.data + k * m.width + first, n, out + k * width);
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const float* row = m.data + (first + j) * m.width;
    for (int64_t k = 0; k < inner; ++k) out[k * width + j] = row[k];
  }
}

template <int N>
void product_of(const Matrix& m, const float* packed, Span part, const float* rows,
                int64_t stride, int64_t count, float* out) {
  const int64_t inner = m.inner(), columns = m.columns(), first = part.first * W;
  const int64_t last = least(W, columns - first - (N - 1) * W);
  in_groups<most_rows(N)>(count, [&](int64_t start, auto size) {
    constexpr int R = decltype(size)::value;
    Vec acc[R][N];
    const float* a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      a[r] = rows + (start + r) * stride;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = Vec{};
    }
    multiply<R, N, N - 1>(a, packed + first * inner, inner, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* to = out + (start + r) * columns + first;
#pragma GCC unroll 8
      for (int n = 0; n < N - 1; ++n) store(to + n * W, acc[r][n]);
      store(to + (N - 1) * W, acc[r][N - 1], last);
    }
  });
}

int64_t product_panels(int64_t columns) { return spans(columns); }

void product(const Matrix& m, const float* packed, int64_t panel, const float* rows,
             int64_t count, float* out) {
  const Span part = span(m.columns(), panel);
  with_vectors(part, [&](auto n) {
    product_of<decltype(n)::value>(m, packed, part, rows, m.inner(), count, out);
  });
}

void run_step(Cell cell, const Shape& s, const Flags& flags, const Forward& io,
              const float* w_ih, const float* w_hh, int64_t panel) {
  const bool lstm = cell == Cell::kLstm;
  (lstm ? step<Cell::kLstm> : step<Cell::kGru>)(s, flags, io, w_ih, w_hh, panel);
}

int64_t step_panels(const Shape& s) {
  return (vectors(s.H) + kStepVectors - 1) / kStepVectors;
}

int64_t panels(const Shape& s, bool backward, bool projected) {
  if (!backward) return vectors(s.H);
  return spans(s.H) + (projected ? 0 : spans(s.D));
}

int64_t packed_size(Cell cell, const Shape& s, bool backward, bool projected) {
  const int64_t G = cell == Cell::kLstm ? 4 : 3, padded = vectors(s.H) * W;
  if (!backward) return (s.H + (projected ? 0 : s.D)) * G * padded;
  return (padded + (projected ? 0 : vectors(s.D) * W)) * G * padded;
}

template <Cell C>
void pack_of(const Shape& s, bool backward, const float* w_ih, const float* w_hh,
             int64_t panel, float* packed) {
  if (!backward) return pack_forward<C>(s, w_ih, w_hh, panel, packed);
  const int64_t others = panel - spans(s.H), padded = vectors(s.H) * W;
  if (others < 0) return pack_backward<C>(w_hh, s.H, s.H, panel, packed);
  pack_backward<C>(w_ih, s.D, s.H, others, packed + padded * kGates<C> * padded);
}

void pack(Cell cell, const Shape& s, bool backward, const float* w_ih,
          const float* w_hh, int64_t panel, float* packed) {
  const bool lstm = cell == Cell::kLstm;
  (lstm ? pack_of<Cell::kLstm> : pack_of<Cell::kGru>)(s, backward, w_ih, w_hh, panel,
                                                      packed);
}

void run_forward(Cell cell, const Shape& s, const Flags& flags, const Forward& io,
                 const float* packed, const int64_t* rows, int64_t count) {
  const bool lstm = cell == Cell::kLstm;
  (lstm ? forward<Cell::kLstm> : forward<Cell::kGru>)(s, flags, io, packed, rows,
                                                      count);
}

void run_backward(Cell cell, const Shape& s, const Flags& flags, const Backward& io,
                  const Sums& to, const Each& each, const float* packed,
                  const int64_t* rows, int64_t count) {
  const bool lstm = cell == Cell::kLstm;
  (lstm ? backward<Cell::kLstm> : backward<Cell::kGru>)(s, flags, io, to, each, packed,
                                                        rows, count);
}

}  // namespace
}  // namespace jlstm

#include "program.h"

namespace jlstm {

extern const Loops JLSTM_LOOPS;
const Loops JLSTM_LOOPS = {panels,       packed_size, pack,       run_forward,
                           run_backward, step_panels, run_step,
                           product_panels, pack_product, product, run_program, logits, slopes};

}  // namespace jlstm
