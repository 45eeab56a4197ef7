// The Tucker-2 product of a convolution weight: out[t] = scale * down @ mid[t] @ up, one rounding, nothing in between
// written to memory.
#include "low_rank.cuh"

// Grid (outputs / 64, inputs / 64, taps), 256 threads. The rows of down @ mid[t] that the tile needs are made 16 ranks
// at a time in shared memory and multiplied at once: Q / 64 of the tile's own work is done again by each tile of a row.
extern "C" __global__ void __launch_bounds__(256) NAME(tucker_weight)(const T* down,   // (inputs, Q)
                                                                      const T* mid,    // (taps, Q, P)
                                                                      const T* up,     // (P, outputs)
                                                                      const A* scale,  // (1,) or null
                                                                      A* out,          // (taps, inputs, outputs)
                                                                      int inputs, int Q, int P, int outputs) {
  __shared__ A left[DEPTH][TILE + 1], right[DEPTH][TILE];
  __shared__ A core[DEPTH][DEPTH + 1], rows[DEPTH][TILE + 1];
  const int o0 = blockIdx.x * TILE, i0 = blockIdx.y * TILE, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const T* slice = mid + (long long)blockIdx.z * Q * P;
  A sum[4][4] = {};
  for (int p0 = 0; p0 < P; p0 += DEPTH) {
    // rows[p][i] = (down @ mid[t])[i0 + i][p0 + p]; this thread makes p = ty, i = tx + 16 * a.
    A made[4] = {};
    for (int q0 = 0; q0 < Q; q0 += DEPTH) {
      __syncthreads();
      for (int e = threadIdx.x; e < TILE * DEPTH; e += 256) {
        const int q = e % DEPTH, i = e / DEPTH;
        left[q][i] = i0 + i < inputs && q0 + q < Q ? widen(down[(long long)(i0 + i) * Q + q0 + q]) : A(0);
      }
      core[ty][tx] = q0 + ty < Q && p0 + tx < P ? widen(slice[(long long)(q0 + ty) * P + p0 + tx]) : A(0);
      __syncthreads();
      for (int q = 0; q < DEPTH; q++)
#pragma unroll
        for (int a = 0; a < 4; a++) made[a] += left[q][tx + 16 * a] * core[q][ty];
    }
    __syncthreads();
#pragma unroll
    for (int a = 0; a < 4; a++) rows[ty][tx + 16 * a] = made[a];
    for (int e = threadIdx.x; e < TILE * DEPTH; e += 256) {
      const int o = e % TILE, p = e / TILE;
      right[p][o] = o0 + o < outputs && p0 + p < P ? widen(up[(long long)(p0 + p) * outputs + o0 + o]) : A(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int p = 0; p < DEPTH; p++)
#pragma unroll
      for (int a = 0; a < 4; a++)
#pragma unroll
        for (int b = 0; b < 4; b++) sum[a][b] += rows[p][ty * 4 + a] * right[p][tx + 16 * b];
  }
  const A s = scale ? scale[0] : A(1);
  each_element(inputs, outputs, i0, o0, [&](int i, int o, int a, int b) {
    out[((long long)blockIdx.z * inputs + i) * outputs + o] = s * sum[a][b];
  });
}
