// Elements, and packs of them that move 128 bits at a time. Every conversion rounds once, to nearest even; NaN stays NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "layout.cuh"

namespace ptune::cuda {

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // what arithmetic is done in

PTUNE_BOTH double widen(double x) { return x; }
PTUNE_BOTH float widen(float x) { return x; }
PTUNE_BOTH float widen(__half x) { return __half2float(x); }
PTUNE_BOTH float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class To, class From>
PTUNE_BOTH To convert(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(widen(x));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(widen(x));
  } else {
    return widen(x);
  }
}

constexpr int kBytes = 16;  // of one access

// Elements in a pack that goes from one type to another: then each side moves in whole accesses.
template <class A, class B>
constexpr int kPack = kBytes / std::min(sizeof(A), sizeof(B));

// Rows of a wide view begin at multiples of 16 bytes and have no gaps between their elements: packs can be taken from it.
inline bool is_wide(const View& v) {
  const int64_t size = size_of(v.dtype);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(v.data) | v.stride[0] * size | v.stride[1] * size | v.stride[2] * size;
  return v.stride[3] == 1 && misaligned % kBytes == 0;
}

template <class T, int N>
struct alignas(N == 1 ? sizeof(T) : kBytes) Pack {
  T value[N];
};

// What a pack is moved by: 128 bits, or 64 where it holds no more (a sum that is rounded to half).
template <class T, int N>
using Access = std::conditional_t<N * sizeof(T) % kBytes == 0, uint4, uint2>;

// N > 1 only in rows of a wide view, at multiples of N.
template <int N, class T>
PTUNE_BOTH Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.value[0] = *from;
  } else {
    using A = Access<T, N>;
#pragma unroll
    for (int k = 0; k < int(N * sizeof(T) / sizeof(A)); ++k)
      reinterpret_cast<A*>(&pack)[k] = reinterpret_cast<const A*>(from)[k];
  }
  return pack;
}

PTUNE_BOTH void put(uint2* to, uint2 bits) { *to = bits; }

PTUNE_BOTH void put(uint4* to, uint4 bits) {
#ifdef __CUDA_ARCH__
  // The compiler may split an assignment into narrower stores, of the parts that `bits` was made from.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  *to = bits;
#endif
}

template <int N, class T>
PTUNE_BOTH void store(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *to = pack.value[0];
  } else {
    using A = Access<T, N>;
#pragma unroll
    for (int k = 0; k < int(N * sizeof(T) / sizeof(A)); ++k)
      put(reinterpret_cast<A*>(to) + k, reinterpret_cast<const A*>(&pack)[k]);
  }
}

template <class T>
PTUNE_BOTH T* row_at(const View& v, int64_t i, int64_t h, int64_t r) {
  return static_cast<T*>(v.data) + i * v.stride[0] + h * v.stride[1] + r * v.stride[2];
}

// Calls f with an element of the type that `dtype` names; float64 goes with float64 alone.
template <class With, class F>
PTUNE_BOTH void with_type(DType dtype, F f) {
  if constexpr (std::is_same_v<With, double>) {
    f(double{});
  } else {
    switch (dtype) {
      case DType::f16: return f(__half{});
      case DType::bf16: return f(__nv_bfloat16{});
      default: return f(float{});
    }
  }
}

}  // namespace ptune::cuda
