// Where the rows of an output come from: index arithmetic alone, on either side.
#pragma once

#include <cstdint>

#include "../kernels.h"

#define PTUNE_BOTH __host__ __device__ __forceinline__

namespace ptune::cuda {

// One batch row's placement. Out of range (nothing has checked it on a GPU) it is empty and not valid, so that whoever goes on
// with it reads nothing out of bounds.
struct Span {
  int64_t start, length, column;
  bool valid;
};

// `column`, or with `ends_within` column + length, may be at most `last`.
PTUNE_BOTH Span span(const Placement& p, int64_t i, int64_t pool_rows, int64_t last, bool ends_within) {
  if (!p.start.data) return {0, p.max_length, 0, true};
  const int64_t start = p.start.data[i * p.start.stride];
  const int64_t length = p.length.data[i * p.length.stride];
  const int64_t column = p.column.data[i * p.column.stride];
  const bool valid = start >= 0 && length >= 0 && column >= 0 && length <= p.max_length && start + length <= pool_rows &&
                     (ends_within ? column + length : column) <= last;
  return valid ? Span{start, length, column, true} : Span{0, 0, 0, false};
}

enum class Origin { zeros, text, prompt };

struct Source {
  Origin origin;
  int64_t row;  // of the text, or of the pool
};

// Row r of [zeros(max_length - length) ; text[:column] ; prompts[start : start + length] ; text[column:]].
PTUNE_BOTH Source assembled(const Span& s, int64_t max_length, int64_t r) {
  const int64_t place = r - (max_length - s.length);
  if (place < 0) return {Origin::zeros, 0};
  if (place < s.column) return {Origin::text, place};
  if (place < s.column + s.length) return {Origin::prompt, s.start + place - s.column};
  return {Origin::text, place - s.length};
}

// The row, in what `assembled` describes, of text row t.
PTUNE_BOTH int64_t text_row(const Span& s, int64_t max_length, int64_t t) {
  return t + max_length - (t < s.column ? s.length : 0);
}

}  // namespace ptune::cuda
