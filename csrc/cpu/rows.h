// What is done to one row of numbers, compiled once for each instruction set (rows.cpp) and chosen when the library is loaded.
// Strides count elements. Every conversion rounds once, to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace ptune::cpu {

struct RowFunctions {
  const char* isa;
  // to[i] = from[i]; indexed by [DType of from][DType of to]. float64 pairs with itself alone.
  void (*convert[4][4])(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t n);
  // `rows` rows of `bytes` bytes, so many bytes apart, copied past the caches: the memory that is written is not read first. Other
  // threads see it after a store fence.
  void (*stream)(void* to, int64_t to_step, const void* from, int64_t from_step, int64_t rows, int64_t bytes);
  // to[i] = from[i] * scale, in one dtype.
  void (*scale[4])(void* to, const void* from, int64_t from_stride, double scale, int64_t n);
  // to[i] = from[i] + prompt[i]; prompt is float32 (float64 where the dtype is).
  void (*add[4])(void* to, int64_t to_stride, const void* from, int64_t from_stride, const void* prompt,
                 int64_t prompt_stride, int64_t n);
  // Adds row[i] to the running sum total[i], and the rounding error of doing so to lost[i]. Both are float32 (float64 where
  // the row is); the sum is total + lost.
  void (*accumulate[4])(void* total, void* lost, const void* row, int64_t row_stride, int64_t n);
};

extern const RowFunctions rows_plain, rows_avx2, rows_avx512;

}  // namespace ptune::cpu
