// Blocks of channels through one narrow factor, and mixed by w1, for few positions in one launch. For Hopper.
//
//   inner[p, m * R + r] = sum over n of x[p, m * N + n] * w[n, r]          z[p, l * R + r] = sum over m of w1[l, m] * inner[p, m * R + r]
//
// A row of x is one block of one position. A thread block has as many whole positions as 64 rows hold, and so all
// that it mixes. Both results are rounded, z from the rounded inner.
//
// only sm_90a
// variants bf16: none
#define TILE_N 64
#define CLUSTER 1
#include "skinny.cuh"

// Grid (positions / (64 / M), R / 64).
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, 2)
    NAME(mixed)(const __grid_constant__ TensorMap x,  // (positions * M, N)
                const __grid_constant__ TensorMap w,  // (N, R)
                const bf16* w1,                       // (L, M)
                bf16* inner,                          // (positions, M * R), or null
                bf16* z,                              // (positions, L * R)
                int positions, int L, int M, int N, int R) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const unsigned sums = stage.memory;
  const int each = TILE_M / M, first = blockIdx.x * each, count = min(each, positions - first);
  const int column = blockIdx.y * TILE_N, chunks = min(CHUNKS, (R - column) / 8), steps = (N + TILE_K - 1) / TILE_K;

  if (threadIdx.x == 0) stage.begin();
  __syncthreads();
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP)
#pragma unroll 1
      for (int k = 0; k < steps * TILE_K; k += TILE_K) {
        stage.claim();
        copy_box(stage.a(), &x, stage.full(), k, first * M);
        copy_box(stage.b(), &w, stage.full(), column, k);
        stage.next();
      }
    __syncwarp();
  } else {
    float sum[TILE_N / 2] = {};
    multiply<false, true>(sum, steps, stage);
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) sum[i] = widen(round<bf16>(sum[i]));
    leave(sum, sums, count * M);
  }
  meet();  // a cluster of one: the block

  if (inner)
    for (int i = threadIdx.x; i < count * M * chunks; i += GROUP + 32) {
      const int row = i / chunks, chunk = i % chunks;
      float total[8];
      collect(total, sums, row, chunk);
      store_rounded(inner + ((long long)first * M + row) * R + column + chunk * 8, total);
    }
  for (int i = threadIdx.x; i < count * L * chunks; i += GROUP + 32) {
    const int p = i / (L * chunks), l = i / chunks % L, chunk = i % chunks;
    float total[8] = {}, of[8];
    for (int m = 0; m < M; ++m) {
      const float factor = widen(w1[l * M + m]);
      collect(of, sums, p * M + m, chunk);
#pragma unroll
      for (int v = 0; v < 8; ++v) total[v] += factor * of[v];
    }
    store_rounded(z + (((long long)first + p) * L + l) * R + column + chunk * 8, total);
  }
}
