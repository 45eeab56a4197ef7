// Elementwise work that moves 16 bytes at a time where every array is aligned to that, and one value at a time
// elsewhere.
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

// y[i] = f(x[i], c[i % columns]): a row c for all rows of n / columns. The first element of a thread, and its step, are
// below 2^32 (the grid has at most 65535 blocks); the column is counted on, since a 64-bit remainder takes longer than
// the rest.
template <class F>
__device__ __forceinline__ void each_row(const T* x, const T* c, T* y, long long n, int columns, F f) {
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const bool packed = columns % PACK == 0 && aligned(x) && aligned(c) && aligned(y);
  const unsigned width = packed ? columns / PACK : columns, hop = step % width;
  unsigned column = first % width;
  if (packed) {
    for (long long i = first; i < n / PACK; i += step) {
      Pack<T, PACK> v = reinterpret_cast<const Pack<T, PACK>*>(x)[i];
      const Pack<T, PACK> w = reinterpret_cast<const Pack<T, PACK>*>(c)[column];
#pragma unroll
      for (int j = 0; j < PACK; j++) v.at[j] = narrow(f(widen(v.at[j]), widen(w.at[j])));
      reinterpret_cast<Pack<T, PACK>*>(y)[i] = v;
      column += hop;
      if (column >= width) column -= width;
    }
    return;
  }
  for (long long i = first; i < n; i += step) {
    y[i] = narrow(f(widen(x[i]), widen(c[column])));
    column += hop;
    if (column >= width) column -= width;
  }
}

// y[i] = f(a[i], b[i], c[i % columns]).
template <class F>
__device__ __forceinline__ void each_row(const T* a, const T* b, const T* c, T* y, long long n, int columns, F f) {
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const bool packed = columns % PACK == 0 && aligned(a) && aligned(b) && aligned(c) && aligned(y);
  const unsigned width = packed ? columns / PACK : columns, hop = step % width;
  unsigned column = first % width;
  if (packed) {
    for (long long i = first; i < n / PACK; i += step) {
      Pack<T, PACK> v = reinterpret_cast<const Pack<T, PACK>*>(a)[i];
      const Pack<T, PACK> u = reinterpret_cast<const Pack<T, PACK>*>(b)[i];
      const Pack<T, PACK> w = reinterpret_cast<const Pack<T, PACK>*>(c)[column];
#pragma unroll
      for (int j = 0; j < PACK; j++) v.at[j] = narrow(f(widen(v.at[j]), widen(u.at[j]), widen(w.at[j])));
      reinterpret_cast<Pack<T, PACK>*>(y)[i] = v;
      column += hop;
      if (column >= width) column -= width;
    }
    return;
  }
  for (long long i = first; i < n; i += step) {
    y[i] = narrow(f(widen(a[i]), widen(b[i]), widen(c[column])));
    column += hop;
    if (column >= width) column -= width;
  }
}
