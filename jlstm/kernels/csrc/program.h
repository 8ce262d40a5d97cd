// Steps of a recurrence as a program of vector instructions; see program.py, which makes
// it. A phase runs over the rows of a thread, a chunk of vectors at a time; products come
// between phases.
#pragma once

#include <cmath>

#include "vectors.h"

namespace jlstm {
namespace {

// As they are numbered in program.py.
enum Op : int32_t {
  kLoad, kSplat, kStore, kAdd, kSub, kMul, kDiv, kMax, kMin, kMulAdd, kMulSub, kSubMul,
  kNeg, kAbs, kSign, kSqrt, kExp, kTanh, kLogistic, kLog, kLog1p, kExpm1, kErf,
  kGreater, kGreaterEqual, kEqual, kNotEqual, kWhere
};

// So many vectors go through an instruction at once.
constexpr int kChunk = W == 16 ? 8 : 16;

typedef int32_t Bits __attribute__((vector_size(W * sizeof(int32_t))));

INLINE Bits bits(Vec v) {
  Bits b;
  std::memcpy(&b, &v, sizeof b);
  return b;
}

INLINE Vec floats(Bits b) {
  Vec v;
  std::memcpy(&v, &b, sizeof v);
  return v;
}

// 1 or 0 in each lane.
INLINE Vec truth(Bits b) { return floats(b & bits(Vec{} + 1.0f)); }

// In each lane, zeros with their sign.
INLINE Vec spread(float x) { return (Vec{} + 1.0f) * x; }

// log(x) = e log(2) + log(m), with m within a factor of sqrt(2) of 1, and the series of
// log(m) = 2 atanh((m - 1) / (m + 1)) to the ninth power: a relative error of 2e-7.
INLINE Vec log(Vec x) {
  const Vec normal = x < 1.17549435e-38f ? x * 33554432.0f : x;  // which is 2^25
  const Bits root = bits(Vec{} + 0.70710678f);
  const Bits power = (bits(normal) - root) >> 23;
  const Vec f = floats(bits(normal) - (power << 23)) - 1.0f;
  const Vec s = f / (f + 2.0f), u = s * s;
  Vec p = u * (2.0f / 9) + 2.0f / 7;
  p = p * u + 2.0f / 5;
  p = p * u + 2.0f / 3;
  // 2 s = f - s f, of which f is exact.
  const Vec rest = s * u * p - s * f;
  Vec e = __builtin_convertvector(power, Vec);
  e = x < 1.17549435e-38f ? e - 25.0f : e;
  const Vec made = e * 0.693145752f + (f + (rest + e * 1.42860677e-06f));
  const Vec none = Vec{} + __builtin_nanf("");
  const Vec edge = x == 0.0f ? Vec{} - kInfinity : x < 0.0f ? none : x;
  return (x > 0.0f) & (x < kInfinity) ? made : edge;
}

// log(u) of u = 1 + x as it is rounded, and what the rounding lost.
INLINE Vec log1p(Vec x) {
  const Vec u = x + 1.0f, lost = (x - (u - 1.0f)) / u;
  return log(u) + ((u > 0.0f) & (u < kInfinity) ? lost : Vec{});
}

// exp(x) - 1, and its series to the ninth power where that would cancel.
INLINE Vec expm1(Vec x) {
  Vec p = x * (1.0f / 362880) + 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  const Vec near = x + x * x * p;
  return (x > -0.7f) & (x < 0.7f) ? near : exp(x) - 1.0f;
}

template <typename F>
INLINE Vec by_lane(Vec v, const F& f) {
  for (int64_t i = 0; i < W; ++i) v[i] = f(v[i]);
  return v;
}

// Where the vectors of a chunk are: rows of the thread, and vectors of a unit.
struct Chunk {
  int64_t rows[kChunk], lanes[kChunk], left[kChunk];
  int count;
};

template <bool Dense>
void run_instructions(const Instruction* code, int64_t count, const Chunk& at,
                      const Memory* memory, int64_t unit, Vec (*registers)[kChunk]) {
  for (int64_t i = 0; i < count; ++i) {
    const Instruction& op = code[i];
    if (op.op == kStore) {
      const Memory& to = memory[op.a];
      const Vec* from = registers[op.to];
      float* base = to.now + op.b * unit;
      if (to.width == 1) {
        for (int c = 0; c < at.count; ++c) {
          if (at.lanes[c] == 0) base[at.rows[c] * to.row] = from[c][0];
        }
      } else if (Dense) {
        float* first = base + at.rows[0] * to.row + at.lanes[0];
        for (int c = 0; c < kChunk; ++c) {
          __builtin_prefetch(first + c * W + to.ahead, 1);
          store(first + c * W, from[c]);
        }
      } else {
        for (int c = 0; c < at.count; ++c) {
          float* first = base + at.rows[c] * to.row + at.lanes[c];
          __builtin_prefetch(first + to.ahead, 1);
          store(first, from[c], at.left[c]);
        }
      }
      continue;
    }
    Vec* to = registers[op.to];
    const Vec *a = nullptr, *b = nullptr, *x = nullptr;
    if (op.op > kStore) a = registers[op.a], b = registers[op.b], x = registers[op.c];
#define EACH(expression)                                        \
  {                                                             \
    _Pragma("GCC unroll 16") for (int c = 0; c < kChunk; ++c) { \
      to[c] = expression;                                       \
    }                                                           \
    break;                                                      \
  }
    switch (op.op) {
      case kLoad: {
        const Memory& from = memory[op.a];
        const float* base = from.now + op.b * unit;
        if (Dense) {
          const float* first = base + at.rows[0] * from.row + at.lanes[0];
          for (int c = 0; c < kChunk; ++c) {
            __builtin_prefetch(first + c * W + from.ahead);
            to[c] = load(first + c * W);
          }
          break;
        }
        for (int c = 0; c < at.count; ++c) {
          const float* first = base + at.rows[c] * from.row + at.lanes[c];
          __builtin_prefetch(first + from.ahead);
          to[c] = load(first, at.left[c]);
        }
        break;
      }
      case kSplat: {
        const Memory& from = memory[op.a];
        if (Dense) EACH(spread(from.now[at.rows[0] * from.row]))
        for (int c = 0; c < at.count; ++c) to[c] = spread(from.now[at.rows[c] * from.row]);
        break;
      }
      case kAdd: EACH(a[c] + b[c])
      case kSub: EACH(a[c] - b[c])
      case kMul: EACH(a[c] * b[c])
      case kDiv: EACH(a[c] / b[c])
      case kMax: EACH((a[c] > b[c]) | (a[c] != a[c]) ? a[c] : b[c])
      case kMin: EACH((a[c] < b[c]) | (a[c] != a[c]) ? a[c] : b[c])
      case kMulAdd: EACH(a[c] * b[c] + x[c])
      case kMulSub: EACH(a[c] * b[c] - x[c])
      case kSubMul: EACH(x[c] - a[c] * b[c])
      case kNeg: EACH(-a[c])
      case kAbs: EACH(floats(bits(a[c]) & 0x7fffffff))
      case kSign: EACH(a[c] == a[c] ? truth(a[c] > 0.0f) - truth(a[c] < 0.0f) : a[c])
      case kSqrt: EACH(by_lane(a[c], [](float v) { return __builtin_sqrtf(v); }))
      case kExp: EACH(exp(a[c]))
      case kTanh: EACH(tanh(a[c]))
      case kLogistic: EACH(sigmoid(a[c]))
      case kLog: EACH(log(a[c]))
      case kLog1p: EACH(log1p(a[c]))
      case kExpm1: EACH(expm1(a[c]))
      case kErf: EACH(by_lane(a[c], [](float v) { return __builtin_erff(v); }))
      case kGreater: EACH(truth(a[c] > b[c]))
      case kGreaterEqual: EACH(truth(a[c] >= b[c]))
      case kEqual: EACH(truth(a[c] == b[c]))
      case kNotEqual: EACH(truth(a[c] != b[c]))
      case kWhere: EACH(x[c] != 0.0f ? a[c] : b[c])
      default: break;
    }
#undef EACH
  }
}

// Runs a phase over so many rows.
void run_phase(const Instruction* code, int64_t count, const Memory* memory,
               int64_t rows, int64_t unit, Vec (*registers)[kChunk]) {
  const int64_t P = vectors(unit), all = rows * P;
  Chunk at{};
  int64_t row = 0, vector = 0;
  for (int64_t first = 0; first < all; first += kChunk) {
    at.count = static_cast<int>(least<int64_t>(kChunk, all - first));
    for (int c = 0; c < at.count; ++c) {
      at.rows[c] = row;
      at.lanes[c] = vector * W;
      at.left[c] = unit - vector * W;
      if (++vector == P) ++row, vector = 0;
    }
    const bool dense = at.count == kChunk && at.rows[0] == at.rows[kChunk - 1] &&
                       at.left[kChunk - 1] >= W;
    (dense ? run_instructions<true> : run_instructions<false>)(code, count, at, memory,
                                                               unit, registers);
  }
}

void run_program(const Program& p, int64_t first, int64_t rows) {
  Scratch<Memory> memory(p.places);
  int64_t floats = 0;
  for (int64_t i = 0; i < p.places; ++i) {
    if (p.memory[i].base == nullptr) floats += (rows * p.memory[i].width + 15) / 16 * 16;
  }
  const Scratch<float> scratch(floats, false);
  float* free = scratch.at(0);
  for (int64_t i = 0; i < p.places; ++i) {
    Memory m = p.memory[i];
    if (m.base == nullptr) {
      m.base = free;
      free += (rows * m.width + 15) / 16 * 16;
    } else {
      m.base += first * m.row;
    }
    memory[i] = m;
  }
  const Scratch<Vec[kChunk]> registers(p.registers, false);
  for (int64_t i = 0; i < p.constants; ++i) {
    for (int c = 0; c < kChunk; ++c) registers[i][c] = spread(p.constant[i]);
  }
  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t t = p.reverse ? p.steps - 1 - step : step;
    for (int64_t i = 0; i < p.places; ++i) memory[i].now = memory[i].base + t * memory[i].step;
    for (int64_t phase = 0, begin = 0; phase < p.phases; ++phase) {
      run_phase(p.code + begin, p.ends[phase] - begin, memory.at(0), rows, p.unit,
                registers.at(0));
      begin = p.ends[phase];
      for (int64_t i = 0; i < p.links; ++i) {
        const Link& link = p.link[i];
        if (link.phase != phase) continue;
        for (int64_t panel = 0; panel < spans(link.matrix.columns()); ++panel) {
          const Span part = span(link.matrix.columns(), panel);
          with_vectors(part, [&](auto n) {
            product_of<decltype(n)::value>(link.matrix, link.packed, part,
                                           memory[link.from].now,
                                           memory[link.from].row, rows,
                                           memory[link.to].now);
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace jlstm
