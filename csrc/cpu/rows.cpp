// Compiled three times, with PTUNE_ISA = plain, avx2 or avx512 and that instruction set's flags.
#include "rows.h"

#include <algorithm>
#include <type_traits>

#include "vector.h"

#define PTUNE_JOIN_(a, b) a##b
#define PTUNE_JOIN(a, b) PTUNE_JOIN_(a, b)
#define PTUNE_STRING_(a) #a
#define PTUNE_STRING(a) PTUNE_STRING_(a)

namespace ptune::cpu {
namespace {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls `vectors(i)` for each whole vector of a row of unit strides, then `scalar(i)` for the rest. float64 has scalars alone:
// it is there for gradcheck.
template <class T, class Vectors, class Scalar>
inline void for_row(bool unit_strides, int64_t n, Vectors vectors, Scalar scalar) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, double>)
    if (unit_strides)
      for (; i + Floats::width <= n; i += Floats::width) vectors(i);
  for (; i < n; ++i) scalar(i);
}

// What the C library does for a long copy takes up to a tenth longer where the memory comes fresh from the system.
inline void copy(char* to, const char* from, int64_t bytes) {
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) copy_line(to + i, from + i);
  std::memcpy(to + i, from + i, bytes - i);
}

template <class From, class To>
void convert(void* to_, int64_t to_stride, const void* from_, int64_t from_stride, int64_t n) {
  auto* to = static_cast<To*>(to_);
  auto* from = static_cast<const From*>(from_);
  const bool unit = to_stride == 1 && from_stride == 1;
  if constexpr (std::is_same_v<From, To>) {
    if (unit) {
      copy(static_cast<char*>(to_), static_cast<const char*>(from_), n * sizeof(To));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
    }
  } else {
    for_row<From>(
        unit, n, [&](int64_t i) { store_vector(to + i, load_vector(from + i)); },
        [&](int64_t i) { store(to + i * to_stride, load(from + i * from_stride)); });
  }
}

void stream(void* to_, int64_t to_step, const void* from_, int64_t from_step, int64_t rows, int64_t bytes) {
  for (int64_t r = 0; r < rows; ++r) {
    auto* to = static_cast<char*>(to_) + r * to_step;
    auto* from = static_cast<const char*>(from_) + r * from_step;
    const int64_t start = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (kLine - 1));
    std::memcpy(to, from, start);
    int64_t i = start;
    for (; i + kLine <= bytes; i += kLine) stream_line(to + i, from + i);
    std::memcpy(to + i, from + i, bytes - i);
  }
}

template <class T>
void scale(void* to_, const void* from_, int64_t from_stride, double factor, int64_t n) {
  auto* to = static_cast<T*>(to_);
  auto* from = static_cast<const T*>(from_);
  const auto by = static_cast<Sum<T>>(factor);
  for_row<T>(
      from_stride == 1, n,
      [&](int64_t i) {
        if constexpr (!std::is_same_v<T, double>) store_vector(to + i, load_vector(from + i) * splat(by));
      },
      [&](int64_t i) { store(to + i, load(from + i * from_stride) * by); });
}

template <class T>
void add(void* to_, int64_t to_stride, const void* from_, int64_t from_stride, const void* prompt_, int64_t prompt_stride,
         int64_t n) {
  auto* to = static_cast<T*>(to_);
  auto* from = static_cast<const T*>(from_);
  auto* prompt = static_cast<const Sum<T>*>(prompt_);
  for_row<T>(
      to_stride == 1 && from_stride == 1 && prompt_stride == 1, n,
      [&](int64_t i) {
        if constexpr (!std::is_same_v<T, double>) store_vector(to + i, load_vector(from + i) + load_vector(prompt + i));
      },
      [&](int64_t i) { store(to + i * to_stride, load(from + i * from_stride) + prompt[i * prompt_stride]); });
}

// Knuth's TwoSum: after = before + term, and the exact error of that addition, whichever of the two is larger. Where a sum is
// infinite the error is inf - inf; it counts as 0, so that the sum stays infinite.
template <class V>
inline void add_exactly(V& total, V& lost, V term) {
  const V after = total + term, added = after - total;
  lost = lost + zero_if_nan((total - (after - added)) + (term - added));
  total = after;
}

template <class T>
void accumulate(void* total_, void* lost_, const void* row_, int64_t row_stride, int64_t n) {
  auto* total = static_cast<Sum<T>*>(total_);
  auto* lost = static_cast<Sum<T>*>(lost_);
  auto* row = static_cast<const T*>(row_);
  for_row<T>(
      row_stride == 1, n,
      [&](int64_t i) {
        if constexpr (!std::is_same_v<T, double>) {
          Floats sum = load_vector(total + i), error = load_vector(lost + i);
          add_exactly(sum, error, load_vector(row + i));
          store_vector(total + i, sum);
          store_vector(lost + i, error);
        }
      },
      [&](int64_t i) { add_exactly(total[i], lost[i], load(row + i * row_stride)); });
}

}  // namespace

extern const RowFunctions PTUNE_JOIN(rows_, PTUNE_ISA) = {
    PTUNE_STRING(PTUNE_ISA),
    {{convert<float, float>, convert<float, Half>, convert<float, BFloat16>, nullptr},
     {convert<Half, float>, convert<Half, Half>, convert<Half, BFloat16>, nullptr},
     {convert<BFloat16, float>, convert<BFloat16, Half>, convert<BFloat16, BFloat16>, nullptr},
     {nullptr, nullptr, nullptr, convert<double, double>}},
    stream,
    {scale<float>, scale<Half>, scale<BFloat16>, scale<double>},
    {add<float>, add<Half>, add<BFloat16>, add<double>},
    {accumulate<float>, accumulate<Half>, accumulate<BFloat16>, accumulate<double>},
};

}  // namespace ptune::cpu
