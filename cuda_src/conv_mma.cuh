// The product of a convolution of bf16 on tensor cores: tiles that a loader stages, STAGES of them in flight.
//
// One block of 4 warps makes a TILE_M x TILE_N tile of sums. Tiles lie in shared memory in rows of 16-byte chunks, each
// chunk XORed with its row so that neither the copies nor ldmatrix meet a bank twice.
// EXTENDED: another sum over taps and channels is scaled and goes on in the same accumulators.
#pragma once
#include "conv_walk.cuh"
#include "mma.cuh"

#ifndef EXTENDED
#define EXTENDED 0
#endif

constexpr int TILE_K = 32, STAGES = 4, THREADS = 128;
constexpr int WARPS_N = TILE_N >= 64 ? 2 : 1, WARPS_M = THREADS / 32 / WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;  // 64 x 64, 32 x 32
constexpr int A_BYTES = TILE_M * TILE_K * 2, B_BYTES = TILE_N * TILE_K * 2;
constexpr int RESIDENT = EXTENDED && TILE_M * TILE_N <= 64 * 64 ? 4 : 2;  // blocks a multiprocessor, as registers allow
constexpr int BAND = 8;  // column tiles that run side by side share the rows they gather in L2

// Bytes from the start of a tile to a chunk, for rows of CHUNKS chunks.
template <int CHUNKS>
INLINE int swizzled(int row, int chunk) {
  const int flip = CHUNKS >= 8 ? row & 7 : row >> 1 & 3;
  return (row * CHUNKS + (chunk ^ flip)) * 16;
}

using Sums = float[WARP_M / 16][WARP_N / 8][4];

// sums += one step. A lies as [k][m] if A_ACROSS, else [m][k]; B as [k][n] if B_ACROSS, else [n][k].
template <bool A_ACROSS, bool B_ACROSS>
INLINE void multiply(Sums& sums, unsigned a_tile, unsigned b_tile, int m, int n, int lane) {
  const int matrix = lane / 8, low = matrix % 2 * 8, high = matrix / 2 * 8, row = lane % 8;
#pragma unroll
  for (int k = 0; k < TILE_K; k += 16) {
    unsigned a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)  // fragment order: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8)
      load_matrices<A_ACROSS>(a[i], a_tile + (A_ACROSS ? swizzled<TILE_M / 8>(k + high + row, (m + i * 16 + low) / 8)
                                                       : swizzled<TILE_K / 8>(m + i * 16 + low + row, (k + high) / 8)));
#pragma unroll
    for (int j = 0; j < WARP_N / 16; ++j)  // (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
      load_matrices<B_ACROSS>(b[j], b_tile + (B_ACROSS ? swizzled<TILE_N / 8>(k + low + row, (n + j * 16 + high) / 8)
                                                       : swizzled<TILE_K / 8>(n + j * 16 + high + row, (k + low) / 8)));
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j) mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// sums = the product over `steps` steps of TILE_K. load(a_tile, b_tile) stages the next step. EXTENDED: what the steps
// before `turn` gave counts `factor` times.
template <bool A_ACROSS, bool B_ACROSS, class Loader>
INLINE void pipeline(Sums& sums, Loader& load, int steps, unsigned memory, int turn = 0, float factor = 1) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m = warp / WARPS_N * WARP_M, n = warp % WARPS_N * WARP_N;
  const unsigned b_memory = memory + STAGES * A_BYTES;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) load(memory + s * A_BYTES, b_memory + s * B_BYTES);
    commit_copies();  // an empty group keeps the count right
  }
  int now = 0, next = STAGES - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the stage that is filled next
    if (step + STAGES - 1 < steps) load(memory + next * A_BYTES, b_memory + next * B_BYTES);
    commit_copies();
    if (EXTENDED && step == turn) {
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] *= factor;
    }
    multiply<A_ACROSS, B_ACROSS>(sums, memory + now * A_BYTES, b_memory + now * B_BYTES, m, n, lane);
    now = now + 1 == STAGES ? 0 : now + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
}

// Calls use(row, column, first, second) for each pair of neighbouring columns that this thread holds.
template <class Use>
INLINE void for_pairs(const Sums& sums, Use use) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j)
        use(warp / WARPS_N * WARP_M + i * 16 + half * 8 + lane / 4, warp % WARPS_N * WARP_N + j * 8 + lane % 4 * 2,
            sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
}
