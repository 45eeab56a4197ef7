// Elementwise work that moves 16 bytes at a time where every array is aligned to that, and one value at a time elsewhere.
#pragma once
#include "types.cuh"

constexpr int PACK = 16 / sizeof(T);

__device__ __forceinline__ bool aligned(const void* p) {
  return (unsigned long long)p % 16 == 0;
}

// y[i] = f(x[i]) for n values, by the whole grid; f maps A to A.
template <class F>
__device__ __forceinline__ void each(const T* x, T* y, long long n, F f) {
  const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
  const long long packs = aligned(x) && aligned(y) ? n / PACK : 0;
  for (long long i = first; i < packs; i += step) {
    Pack<T, PACK> v = reinterpret_cast<const Pack<T, PACK>*>(x)[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) v.at[j] = narrow(f(widen(v.at[j])));
    reinterpret_cast<Pack<T, PACK>*>(y)[i] = v;
  }
  for (long long i = packs * PACK + first; i < n; i += step) y[i] = narrow(f(widen(x[i])));
}

// y[i] = f(a[i], b[i]).
template <class F>
__device__ __forceinline__ void each(const T* a, const T* b, T* y, long long n, F f) {
  const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
  const long long packs = aligned(a) && aligned(b) && aligned(y) ? n / PACK : 0;
  for (long long i = first; i < packs; i += step) {
    Pack<T, PACK> v = reinterpret_cast<const Pack<T, PACK>*>(a)[i];
    const Pack<T, PACK> w = reinterpret_cast<const Pack<T, PACK>*>(b)[i];
#pragma unroll
    for (int j = 0; j < PACK; j++) v.at[j] = narrow(f(widen(v.at[j]), widen(w.at[j])));
    reinterpret_cast<Pack<T, PACK>*>(y)[i] = v;
  }
  for (long long i = packs * PACK + first; i < n; i += step) y[i] = narrow(f(widen(a[i]), widen(b[i])));
}
