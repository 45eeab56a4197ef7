// Both gradients of a product of a few rows, y = x @ w, in one launch. For Hopper.
//
//   dx[r, k] = scale * sum over n of g[r, n] * w[k, n]          dw[k, n] = scale * sum over r of x[r, k] * g[r, n]
//
// Each is less than a launch takes, and both read g. The first clusters have a tile of dx each, whose steps along n
// their blocks share; the blocks behind them have a tile of dw each.
//
// only sm_90a
// variants bf16: CLUSTER=1 | CLUSTER=8
#define TILE_N 64
#include "skinny.cuh"

// Grid: CLUSTER blocks for each tile of dx, and one for each tile of dw, up to whole clusters; tiles are 64 x 64.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, 2)
    NAME(few)(const __grid_constant__ TensorMap x,  // (rows, inner)
              const __grid_constant__ TensorMap w,  // (inner, outer)
              const __grid_constant__ TensorMap g,  // (rows, outer)
              const float* scale,                   // (1,), or null for 1
              bf16* dx,                             // (rows, inner)
              float* dw,                            // (inner, outer)
              int rows, int inner, int outer) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const unsigned sums = stage.memory;

  const int tiles_r = (rows + 63) / 64, tiles_i = (inner + 63) / 64, tiles_o = (outer + 63) / 64;
  const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
  const bool back = cluster < tiles_r * tiles_i;  // of dx
  // Of dw there may be a tile too many: it lies below the last row.
  const int tile = back ? cluster : (cluster - tiles_r * tiles_i) * CLUSTER + rank, across = back ? tiles_i : tiles_o;
  const int row = tile / across * 64, column = tile % across * 64;
  const int first = back ? rank * tiles_o / CLUSTER : 0;
  const int last = back ? (rank + 1) * tiles_o / CLUSTER : row < inner ? tiles_r : 0;

  if (threadIdx.x == 0) stage.begin();
  __syncthreads();
  const float factor = scale ? *scale : 1.0f;
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP)
#pragma unroll 1
      for (int k = first * TILE_K; k < last * TILE_K; k += TILE_K) {
        stage.claim();
        if (back) {
          copy_box(stage.a(), &g, stage.full(), k, row);
          copy_box(stage.b(), &w, stage.full(), k, column);
        } else {
          copy_box(stage.a(), &x, stage.full(), row, k);
          copy_box(stage.b(), &g, stage.full(), column, k);
        }
        stage.next();
      }
    __syncwarp();
  } else {
    float sum[TILE_N / 2] = {};
    if (back) {
      multiply<false, false>(sum, last - first, stage);
      leave(sum, sums, rows - row);
    } else {
      multiply<true, true>(sum, last, stage);
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
          const int o = column + j * 8 + lane % 4 * 2;
          if (i < inner && o < outer)
            *reinterpret_cast<float2*>(dw + (long long)i * outer + o) =
                make_float2(factor * sum[4 * j + 2 * half], factor * sum[4 * j + 2 * half + 1]);
        }
      }
    }
  }
  meet();

  if (back && threadIdx.x < GROUP)
    for (int i = threadIdx.x; i < TILE_M / CLUSTER * CHUNKS; i += GROUP) {
      const int r = i / CHUNKS * CLUSTER + rank, c = column + i % CHUNKS * 8;
      if (row + r >= rows || c >= inner) continue;
      float total[8];
      collect(total, sums, r, i % CHUNKS);
#pragma unroll
      for (int v = 0; v < 8; ++v) total[v] *= factor;
      store_rounded(dx + (long long)(row + r) * inner + c, total);
    }
  meet_relaxed();  // no block ends before it has been read
}
