// A 64 x 64 tile of down @ up summed in registers by 256 threads, 4 x 4 elements each. The factors are thin (R up to a
// few hundred), so their tiles are staged 16 ranks at a time and the tile of the result never leaves the registers.
#pragma once
#include "types.cuh"

constexpr int TILE = 64, DEPTH = 16;

// Adds to sum[4][4] the product of rows i0.. of down (inputs, R) and columns o0.. of up (R, outputs). Thread (ty, tx)
// holds rows i0 + ty * 4 + a and columns o0 + tx + 16 * b (strided by 16, so that a warp writes neighbours).
__device__ inline void low_rank_tile(const T* down, const T* up, int inputs, int R, int outputs, int i0, int o0,
                                     A (*left)[TILE + 1],  // shared (DEPTH, TILE)
                                     A (*right)[TILE],     // shared (DEPTH, TILE)
                                     A sum[4][4]) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (int r0 = 0; r0 < R; r0 += DEPTH) {
    __syncthreads();
    for (int e = threadIdx.x; e < TILE * DEPTH; e += 256) {
      const int r = e % DEPTH, i = e / DEPTH;  // down is read along its ranks
      left[r][i] = i0 + i < inputs && r0 + r < R ? widen(down[(long long)(i0 + i) * R + r0 + r]) : A(0);
      const int o = e % TILE, q = e / TILE;  // up along its outputs
      right[q][o] = o0 + o < outputs && r0 + q < R ? widen(up[(long long)(r0 + q) * outputs + o0 + o]) : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int r = 0; r < DEPTH; r++) {
      A rows[4], columns[4];
#pragma unroll
      for (int a = 0; a < 4; a++) rows[a] = left[r][ty * 4 + a], columns[a] = right[r][tx + 16 * a];
#pragma unroll
      for (int a = 0; a < 4; a++)
#pragma unroll
        for (int b = 0; b < 4; b++) sum[a][b] += rows[a] * columns[b];
    }
  }
}

// Calls use(row, column, a, b) for each element of the tile that lies inside the weight.
template <typename Use>
__device__ inline void each_element(int inputs, int outputs, int i0, int o0, Use use) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int a = 0; a < 4; a++)
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const int i = i0 + ty * 4 + a, o = o0 + tx + 16 * b;
      if (i < inputs && o < outputs) use(i, o, a, b);
    }
}
