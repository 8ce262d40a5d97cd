// The loops of an LSTM and of a GRU over a batch of sequences, forward and backward.
//
// Arrays are dense and batch-major: B rows, T steps, D features, H hidden units. Gates
// are in the order i, f, g, o of an LSTM (G = 4) and r, z, n of a GRU (G = 3), whose
// reset gate comes after the recurrent product.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jlstm {

// Memory on the boundary of a cache line. What is given back is kept for later calls,
// up to a limit: fresh pages cost more than the work that is done in them.
void* take(size_t bytes);
void give(void* block, size_t bytes);

enum class Cell : int32_t { kLstm = 0, kGru = 1 };

struct Shape {
  int64_t B, T, D, H;
  // How many steps a row of xs, dys, dxs, dz, mask and resets has, which may be more
  // than the T that are taken.
  int64_t stride;
  // How many steps a row of ys, gates and before_c has: as many in a block that is
  // shorter than the others, since another thread may still be in one of those.
  int64_t kept;
};

// What is true of steps; null where there is none.
struct Flags {
  const bool* mask;    // [B, T], at valid steps
  const bool* resets;  // [B, T], where the fresh carry comes before the step
  bool reverse;        // steps are taken from the last to the first
};

struct Forward {
  const float* xs;      // [B, T, D], or, where projected, xs W_ih, [B, T, G H]
  bool projected;
  const float* bias;    // [G H]
  const float* bias_n;  // [H], inside r * (.) of a GRU
  const float *h0, *c0, *fresh_h, *fresh_c;  // [B, H]
  float* ys;                                 // [B, T, H]
  float *h, *c;                              // [B, H]
  // For the backward loop; null where no gradient is wanted.
  float* gates;     // [B, T, 4 H]; of a GRU r, z, h W_n + b_n and n
  float* before_c;  // [B, T, H], c before each step
};

struct Backward {
  const float *xs, *ys;              // [B, T, D], [B, T, H]
  const float *h0, *fresh_h;         // [B, H]
  const float *gates, *before_c;     // as above
  const float* dys;                  // [B, T, H]
  const float *dh, *dc;              // [B, H]
  float* dxs;                        // [B, T, D], or null for the next:
  float* dz;                         // [B, T, G H], by x W_ih, else null
  float *dh0, *dc0;                  // [B, H]
  float *dfresh_h, *dfresh_c;        // [B, H], written where there are resets
};

// Sums over the rows that one thread takes.
struct Sums {
  float *dw_ih, *dw_hh;  // [D, G H], [H, G H]
  float* dbias;          // [4 H]; of a GRU the last H are those of bias_n
  bool add;              // to what is there, as to dfresh_h and dfresh_c
};

// Weights of a product of their own.
struct Matrix {
  const float* data;       // [height, width]
  int64_t height, width;
  bool transposed;         // rows have width elements, results height

  int64_t inner() const { return transposed ? width : height; }
  int64_t columns() const { return transposed ? height : width; }
};

// The cross-entropy of the logits x W + b of valid rows.
struct CrossEntropy {
  int64_t N, D, V;
  const float *x, *w, *b;  // [N, D], [D, V], [V]
  const int32_t* labels;   // [N], in range
  const bool* valid;       // [N]
  float smoothing;
};

// Of the logits of some classes, for each row.
struct LogitSums {
  float *most, *exponentials, *total;  // the largest, sum of exp(z - largest), sum of z
  float* scores;                       // z of the label, where it is among them
};

// A step as a program, and the memory that it works on.
struct Instruction {
  int32_t op, to, a, b, c;
};

struct Memory {
  float* base;  // null where a thread has its own, else of the first row and step
  int64_t width, row, step;  // how far a row and a step are from the next
  float* now;
  int64_t ahead;  // how far what the next step takes is
};

struct Link {
  int64_t phase, from, to;
  Matrix matrix;
  const float* packed;
};

struct Program {
  int64_t steps, rows, unit;
  bool reverse;
  const Instruction* code;
  const int64_t* ends;  // of phases
  int64_t phases;
  const Memory* memory;
  int64_t places;
  const Link* link;
  int64_t links;
  const float* constant;  // the first registers
  int64_t constants, registers;
};

// Runs work(data, 0) .. work(data, count - 1), on several threads if some are free.
struct Each {
  const void* threads;
  void (*run)(const void* threads, int64_t count, void (*work)(void*, int64_t), void* data);
};

// The loops for one set of instructions. Rows are those that one thread takes.
struct Loops {
  // Weights in the order in which a loop reads them, in panels that do not depend on
  // each other. w_ih is null where the loop does not read it.
  int64_t (*panels)(const Shape&, bool backward, bool projected);
  int64_t (*packed_size)(Cell, const Shape&, bool backward, bool projected);
  void (*pack)(Cell, const Shape&, bool backward, const float* w_ih, const float* w_hh,
               int64_t panel, float* packed);
  void (*forward)(Cell, const Shape&, const Flags&, const Forward&, const float* packed,
                  const int64_t* rows, int64_t count);
  void (*backward)(Cell, const Shape&, const Flags&, const Backward&, const Sums&,
                   const Each&, const float* packed, const int64_t* rows,
                   int64_t count);

  // One forward step of all rows, for a panel of hidden units; T is 1.
  int64_t (*step_panels)(const Shape&);
  void (*step)(Cell, const Shape&, const Flags&, const Forward&, const float* w_ih,
               const float* w_hh, int64_t panel);

  // The product of rows with weights [height, width], or with their transpose, for a
  // panel of columns of the result.
  int64_t (*product_panels)(int64_t columns);
  void (*pack_product)(const Matrix&, int64_t panel, float* packed);
  void (*product)(const Matrix&, const float* packed, int64_t panel, const float* rows,
                  int64_t count, float* out);

  // All steps of a program, for some rows.
  void (*program)(const Program&, int64_t first, int64_t rows);

  // The logits of some rows and panels of classes, kept in z [rows * V, in vectors]; and
  // their gradients. Those of x are written, those of W and b added to after the first
  // block of rows.
  void (*logits)(const CrossEntropy&, int64_t first_row, int64_t rows, int64_t begin,
                 int64_t end, float* z, const LogitSums& sums);
  void (*slopes)(const CrossEntropy&, int64_t first_row, int64_t rows, int64_t begin,
                 int64_t end, float* z, const float* log_sums, bool first_block,
                 float* dx, float* dw, float* db);
};

}  // namespace jlstm
