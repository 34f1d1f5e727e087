// One name for the widest float vector of the instruction set this file is compiled for: Floats, with loads and stores that
// convert. Half and bfloat16 are the uint16 patterns below.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ptune::cpu {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) { return float_of(uint32_t{p->bits} << 16); }
inline float load(const Half* p) {
  const uint32_t sign = uint32_t{p->bits & 0x8000u} << 16, exponent = (p->bits >> 10) & 31u, fraction = p->bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(fraction) * 0x1p-24f));
  return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline void store(float* p, float x) { *p = x; }
inline void store(double* p, double x) { *p = x; }
inline void store(BFloat16* p, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : rounded);
}
inline void store(Half* p, float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    result = 0x7c00u;  // 2^16 and above: infinity (what rounds up to it is below, by carry)
  } else if (magnitude < 0x38800000u) {
    // Below the least normal half, 2^-14: adding 1/2 leaves a multiple of 2^-24 in the low bits, rounded by the addition itself.
    result = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | result);
}

#if defined(__AVX512F__)

struct Floats {
  static constexpr int64_t width = 16;
  __m512 v;
};
inline Floats load_vector(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load_vector(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats load_vector(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void copy_line(void* to, const void* from) { _mm512_storeu_si512(to, _mm512_loadu_si512(from)); }
inline void stream_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
inline void store_vector(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void store_vector(Half* p, Floats x) {
  const __m256i half = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline void store_vector(BFloat16* p, Floats x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i top = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats zero_if_nan(Floats x) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), x.v)}; }

#elif defined(__AVX2__)

struct Floats {
  static constexpr int64_t width = 8;
  __m256 v;
};
inline Floats load_vector(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Floats load_vector(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Floats load_vector(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline void copy_line(void* to, const void* from) {
  const auto* in = static_cast<const __m256i*>(from);
  auto* out = static_cast<__m256i*>(to);
  const __m256i low = _mm256_loadu_si256(in), high = _mm256_loadu_si256(in + 1);
  _mm256_storeu_si256(out, low);
  _mm256_storeu_si256(out + 1, high);
}
inline void stream_line(void* to, const void* from) {
  const auto* in = static_cast<const __m256i*>(from);
  auto* out = static_cast<__m256i*>(to);
  const __m256i low = _mm256_loadu_si256(in), high = _mm256_loadu_si256(in + 1);
  _mm256_stream_si256(out, low);
  _mm256_stream_si256(out + 1, high);
}
inline void store_vector(float* p, Floats x) { _mm256_storeu_ps(p, x.v); }
inline void store_vector(Half* p, Floats x) {
  const __m128i half = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
inline void store_vector(BFloat16* p, Floats x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  // Packing works within 128-bit lanes; the permutation puts the two halves side by side.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Floats splat(float x) { return {_mm256_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats zero_if_nan(Floats x) { return {_mm256_and_ps(x.v, _mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q))}; }

#else

struct Floats {
  static constexpr int64_t width = 1;
  float v;
};
template <class T>
inline Floats load_vector(const T* p) { return {load(p)}; }
template <class T>
inline void store_vector(T* p, Floats x) { store(p, x.v); }
inline void copy_line(void* to, const void* from) { std::memcpy(to, from, kLine); }
inline void stream_line(void* to, const void* from) { copy_line(to, from); }
inline Floats splat(float x) { return {x}; }
inline Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
inline Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
inline Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
inline Floats zero_if_nan(Floats x) { return {x.v == x.v ? x.v : 0.0f}; }

#endif

inline double zero_if_nan(double x) { return x == x ? x : 0.0; }
inline float zero_if_nan(float x) { return x == x ? x : 0.0f; }

}  // namespace
}  // namespace ptune::cpu
