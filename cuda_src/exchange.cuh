// Between the pieces of a product that lanes hold and rows of 16 bytes: pairs of bf16 in one register.
#pragma once

// Lane t of four holds values t of four pieces; afterwards it holds all four values of piece t. Its own inverse.
__device__ __forceinline__ void exchange(unsigned (&v)[4]) {
  const int lane = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned other = __shfl_xor_sync(~0u, lane & 1 ? v[i] : v[i + 1], 1);
    (lane & 1 ? v[i] : v[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned other = __shfl_xor_sync(~0u, lane & 2 ? v[i] : v[i + 2], 2);
    (lane & 2 ? v[i] : v[i + 2]) = other;
  }
}

__device__ __forceinline__ float low_half(unsigned pair) {
  return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_half(unsigned pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}
