// An item of the gradients of a mix of blocks of channels, out[p][l * N + n] = sum over m of w1[l][m] * x[p][m * N + n]:
// 32 neighbouring n of one position, for the tensor cores of one warp. L and M are SIDE at most.
//
// Lane (row, q) = (lane / 4, lane % 4) brings n = 8 q to 8 q + 7 of rows l = row and row + 8 of g, and likewise of x,
// 16 bytes each. The order of a summed axis is free as long as both sides agree: these registers are operands over n as
// they are. Over l they are after movmatrix has turned them, and the lane's sums are then those of the very n that it
// brought, 16 bytes of dx.
#pragma once
#include "mma.cuh"

constexpr int HALVES = SIDE / 8, ITEMS = 4 / HALVES;  // items in flight: 8 loads of 16 bytes a lane

struct Item {
  Chunk g[HALVES], x[HALVES];
};

__device__ __forceinline__ const unsigned* words(const Chunk& v) {
  return reinterpret_cast<const unsigned*>(&v);
}

// w1 turned, as the first operand: rows m = row and row + 8, columns l = 2 q, 2 q + 1 and those behind 8. w1 holds
// (l, m) at l * l_step + m * m_step.
__device__ __forceinline__ void load_mix(unsigned (&mix)[4], const bf16* w1, int L, int M, int l_step, int m_step) {
  const int row = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (unsigned& pair : mix) pair = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int m = row + e / 2 % 2 * 8, l = q * 2 + e / 4 * 8 + e % 2;
    if (l < L && m < M) mix[e / 2] |= unsigned(w1[l * l_step + m * m_step].bits) << e % 2 * 16;
  }
}

// sum += dw1 of an item: of a half of m each, l = row and row + 8, m = 2 q and 2 q + 1.
__device__ __forceinline__ void add_products(float (&sum)[HALVES][4], const Item& v) {
  const unsigned *low = words(v.g[0]), *high = words(v.g[HALVES - 1]);
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    const unsigned left[4] = {low[k], HALVES > 1 ? high[k] : 0, low[k + 1], HALVES > 1 ? high[k + 1] : 0};
#pragma unroll
    for (int h = 0; h < HALVES; ++h) mma(sum[h], left, words(v.x[h])[k], words(v.x[h])[k + 1]);
  }
}

// The item's dx: the lane's 16 bytes of rows m = row and row + 8.
__device__ __forceinline__ void mix_item(unsigned (&mixed)[HALVES][4], const unsigned (&mix)[4], const Item& v) {
  const unsigned *low = words(v.g[0]), *high = words(v.g[HALVES - 1]);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float to[4] = {};
    mma(to, mix, turned(low[k]), HALVES > 1 ? turned(high[k]) : 0);
#pragma unroll
    for (int h = 0; h < HALVES; ++h) mixed[h][k] = round_pair(to[h * 2], to[h * 2 + 1]);
  }
}

// A lane's sums to their places in a row of SIDE * SIDE, (l, m).
__device__ __forceinline__ void spread(float* to, const float (&sum)[HALVES][4]) {
  const int row = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < HALVES; ++h)
#pragma unroll
    for (int e = 0; e < HALVES * 2; ++e) to[(row + e / 2 * 8) * SIDE + h * 8 + q * 2 + e % 2] = sum[h][e];
}
