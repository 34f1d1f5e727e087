// From stable-ABI tensors to the plain structs of kernels.h, checked on the way. Each error names the argument, what was
// expected and what came; std::invalid_argument reaches Python as ValueError, std::out_of_range as IndexError.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace ptune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Error = std::invalid_argument, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// The message is built only when the check fails.
#define PTUNE_CHECK(condition, ...)    \
  do {                                 \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (0)

inline std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    case ScalarType::Float8_e4m3fn: return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "torch.float8_e5m2";
    default: return c10::toString(dtype);
  }
}

inline std::string device_of(const Tensor& t) {
  const std::string type = t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another type";
  return t.is_cpu() ? type : type + ':' + std::to_string(t.get_device_index());
}

inline DType float_dtype(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    default:
      fail(name, ": expected torch.float32 or torch.float16 or torch.bfloat16 or torch.float64, got ", name_of(dtype));
  }
}

inline void check_dtype(const char* name, ScalarType got, ScalarType expected) {
  PTUNE_CHECK(got == expected, name, ": expected ", name_of(expected), ", got ", name_of(got));
}

inline void check_rank(const char* name, const Tensor& t, int64_t rank, int64_t or_rank = -1) {
  const int64_t dim = t.dim();
  if (dim == rank || dim == or_rank) return;
  if (or_rank < 0) fail(name, ": expected ", rank, " dimensions, got shape ", shape(t));
  fail(name, ": expected ", rank, " or ", or_rank, " dimensions, got shape ", shape(t));
}

inline void check_size(const char* name, const Tensor& t, int64_t dim, int64_t size, const char* reason) {
  PTUNE_CHECK(t.size(dim) == size, name, ": expected size ", size, " in dimension ", dim, " (", reason, "), got ", shape(t));
}

inline void check_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  const bool same = t.is_cpu() == other.is_cpu() && t.is_cuda() == other.is_cuda() &&
                    t.get_device_index() == other.get_device_index();
  PTUNE_CHECK(same, name, ": expected device ", device_of(other), " (that of ", other_name, "), got ", device_of(t));
}

// float64 goes with float64 alone; the other floats go with each other.
inline void check_converts(const char* name, ScalarType got, ScalarType with) {
  float_dtype(name, got);
  if ((got == ScalarType::Double) == (with == ScalarType::Double)) return;
  if (with == ScalarType::Double) fail(name, ": expected torch.float64, got ", name_of(got));
  fail(name, ": expected torch.float32 or torch.float16 or torch.bfloat16, got ", name_of(got));
}

inline void check_prompt_dtype(const Tensor& prompts, const char* text_name, const Tensor& text) {
  float_dtype(text_name, text.scalar_type());
  const bool wide = text.scalar_type() == ScalarType::Double;
  check_dtype("prompts", prompts.scalar_type(), wide ? ScalarType::Double : ScalarType::Float);
}

// `t` as [batch, heads, rows, width]: [batch, rows, width] has one head, and a table [rows, width] neither.
inline View view(const char* name, const Tensor& t, bool written = false) {
  View v{written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()), float_dtype(name, t.scalar_type()), {}};
  const int64_t dim = t.dim();
  v.stride[3] = t.stride(dim - 1);
  v.stride[2] = t.stride(dim - 2);
  if (dim == 4) v.stride[1] = t.stride(1);
  if (dim >= 3) v.stride[0] = t.stride(0);
  return v;
}

// A [heads, rows, width] pool of prompts, or a [rows, width] one.
inline View pool_view(const char* name, const Tensor& t) {
  View v = view(name, t);
  v.stride[1] = v.stride[0];
  v.stride[0] = 0;
  return v;
}

constexpr int64_t kLargeOutput = int64_t{4} << 20;  // bytes

// Memory for a large output comes fresh from the system, which prepares each page of it when it is first written: that takes
// longer than the op itself, unless the pages are large. (numpy asks for them too; torch, with THP_MEM_ALLOC_ENABLE=1.)
inline void ask_for_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t at = reinterpret_cast<uintptr_t>(data), begin = at & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), at + bytes - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor empty_strided(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes, const int64_t* strides) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, like.get_device_index(), &handle));
  const Tensor made(handle);
#ifndef PTUNE_CUDA
  const int64_t bytes = made.numel() * made.element_size();
  if (bytes >= kLargeOutput) ask_for_large_pages(made.mutable_data_ptr(), bytes);
#endif
  return made;
}

inline Tensor empty(const Tensor& like, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return empty_strided(like, dtype, sizes, strides.data());
}

struct PlacementTensors {
  const std::optional<Tensor>&start, &length, &column;
  int64_t max_length;
};

inline Int32s placement_vector(const char* name, const Tensor& t, const Tensor& batch) {
  check_rank(name, t, 1);
  check_size(name, t, 0, batch.size(0), "one for each row of the batch");
  check_device(name, t, "the batch", batch);
  check_dtype(name, t.scalar_type(), ScalarType::Int);
  return {static_cast<const int32_t*>(t.const_data_ptr()), t.stride(0)};
}

// `batch` is the tensor whose first dimension is the batch; without a placement, the whole pool of `pool_rows` is at column 0.
inline Placement placement(const PlacementTensors& p, const Tensor& batch, int64_t pool_rows) {
  if (!p.start && !p.length && !p.column) return {{}, {}, {}, pool_rows};
  PTUNE_CHECK(p.start && p.length && p.column,
              "placement: expected start, length and column together, got only some of them");
  PTUNE_CHECK(p.max_length >= 0, "placement.max_length: expected at least 0, got ", p.max_length);
  return {placement_vector("placement.start", *p.start, batch), placement_vector("placement.length", *p.length, batch),
          placement_vector("placement.column", *p.column, batch), p.max_length};
}

}  // namespace ptune
