// The device entry points and their parameters: plain data, no framework types.
//
// One launcher source (ops.cpp) checks the tensors, fills these structs and calls the entry points; each device library
// (cpu/, cuda/) implements them. Sizes, strides and offsets are int64 and count elements. A size may be 0.
#pragma once

#include <cstdint>

namespace ptune {

enum class DType : int32_t { f32, f16, bf16, f64 };

inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A strided [batch, heads, rows, width] view. A 3-D tensor has heads = 1; a pool of prompts has batch stride 0.
struct View {
  void* data;
  DType dtype;
  int64_t stride[4];
};

inline void* after(const View& v, int64_t elements) { return static_cast<char*>(v.data) + elements * size_of(v.dtype); }

// An int32 vector [batch].
struct Int32s {
  const int32_t* data;
  int64_t stride;
};

// Row i uses rows start[i] : start[i] + length[i] of the pool, at column[i]. start.data == nullptr: the whole pool at column
// 0 for every row (then max_length is the pool's size).
struct Placement {
  Int32s start, length, column;
  int64_t max_length;
};

// int32 or int64 indices [batch, rows] into a table; data == nullptr: the text is not looked up.
struct Ids {
  const void* data;
  bool wide;  // int64
  int64_t stride[2];
};

// out[i, h] = [zeros(max_length - length) ; text[i, h, :column] ; prompts[h, start : start + length] ; text[i, h, column:]],
// each element converted once, to nearest even. With ids, text row r is scale * table[ids[i, r]] (`text` is the table: its
// stride[2] steps over the vocabulary, and heads = 1).
struct Assemble {
  View out;      // [batch, heads, max_length + text_rows, width], contiguous; without ids and placement, heads may lie anywhere
  View prompts;  // [heads, pool_rows, width]
  View text;     // [batch, heads, text_rows, width], or the table [vocabulary, width]
  Ids ids;
  int64_t vocabulary;
  double scale;  // already rounded to the table's dtype
  Placement placement;
  int64_t batch, heads, text_rows, pool_rows, width;
};

// out[i, h] = hidden[i, h] without its prompt rows (and without the zeros): the inverse of Assemble.
struct Strip {
  View out;     // [batch, heads, text_rows, width], contiguous
  View hidden;  // [batch, heads, max_length + text_rows, width]
  Placement placement;
  int64_t batch, heads, text_rows, width;
};

// Rows column : column + length of hidden[i] become prompts[start : start + length], or have it added (in fp32, rounded
// once). out.data == hidden.data: in place, only those rows are touched.
struct Overwrite {
  View out;      // [batch, 1, rows, width]
  View hidden;   // the same shape
  View prompts;  // [1, pool_rows, width]
  bool add;
  Placement placement;
  int64_t batch, rows, pool_rows, width;
};

// out[h, j] = the sum over i, ascending, in fp32 (fp64 for fp64), of the row of grad[i, h] that holds pool row j. The rounding
// error of every addition is kept, and added at the end (Neumaier's summation, with Knuth's TwoSum). `prepended`: the prompt of
// row i begins at max_length - length[i] + column[i], else at column[i].
struct SumPrompts {
  View out;   // [heads, pool_rows, width]
  View grad;  // [batch, heads, rows, width]
  View last;  // [heads, pool_rows, width], added after the batch; data == nullptr: nothing is
  bool prepended;
  Placement placement;
  int64_t batch, heads, rows, pool_rows, width;
};

// out = in, converted, for a [batch, heads, rows, width] view.
struct Cast {
  View out;
  View in;
  int64_t batch, heads, rows, width;
};

// The CUDA entry points launch on `stream` of the current device and return its launch status (0 is success); the CPU ones
// run to the end, ignore `stream` and return 0. count <= 3; the launches of one call are one kernel,
// whose outputs, or for sum_prompts whose gradients, have one dtype.
int assemble(const Assemble* params, int count, void* stream);
int strip(const Strip& params, void* stream);
int overwrite(const Overwrite& params, void* stream);
int sum_prompts(const SumPrompts* params, int count, void* stream);
int cast(const Cast* params, int count, void* stream);

}  // namespace ptune

// What the library was compiled for, in words: the instruction set in use, or the GPU architectures.
extern "C" __attribute__((visibility("default"))) const char* ptune_build();
