// The storage type T and the accumulator A of a module, and the two doors between them.
//
// A module is compiled for one storage dtype: -DT_BF16, -DT_F32 or -DT_F64. Nothing of CUDA's headers is included, so
// that NVRTC alone builds every kernel. Every value is read through `widen` and written through `narrow`.
#pragma once

struct bf16 {
  unsigned short bits;
};

__device__ __forceinline__ float widen(bf16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}
__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}

// round<O>(a): a in the type O, nearest, ties to even; NaN stays NaN. sm_80 and later do bf16 in one instruction.
template <class O>
__device__ __forceinline__ O round(float value);
template <>
__device__ __forceinline__ float round<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 round<bf16>(float value) {
  bf16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
  return out;
}
template <class O>
__device__ __forceinline__ O round(double value);
template <>
__device__ __forceinline__ double round<double>(double value) {
  return value;
}

// Two sums as two bf16 in one register, `low` at the lower address.
__device__ __forceinline__ unsigned round_pair(float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

#if defined(T_BF16)
using T = bf16;
using A = float;
#define NAME(op) op##_bf16
#elif defined(T_F32)
using T = float;
using A = float;
#define NAME(op) op##_f32
#elif defined(T_F64)
using T = double;
using A = double;
#define NAME(op) op##_f64
#else
#error "compile with -DT_BF16, -DT_F32 or -DT_F64"
#endif

__device__ __forceinline__ T narrow(A value) {
  return round<T>(value);
}

// N values that move as one access; a pointer to it needs N * sizeof(E) bytes of alignment (at most 16 are one access).
template <class E, int N>
struct alignas(N * sizeof(E)) Pack {
  E at[N];
};

__device__ __forceinline__ void operator+=(float4& a, const float4& b) {
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}
