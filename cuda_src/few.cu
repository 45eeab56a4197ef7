// Both gradients of a product of a few rows, y = x @ w, in one launch. For Hopper.
//
//   dx[r, k] = scale * sum over n of g[r, n] * w[k, n]          dw[k, n] = scale * sum over r of x[r, k] * g[r, n]
//
// Each is less than a launch takes, and both read g. The first clusters have a tile of dx each, whose steps along n
// their blocks share; the blocks behind them have a tile of dw each.
//
// only sm_90a
// variants bf16: CLUSTER=1 | CLUSTER=8
#include "few.cuh"

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
  const Task task(rows, inner, outer);

  if (threadIdx.x == 0) stage.begin();
  __syncthreads();
  const float factor = scale ? *scale : 1.0f;
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) task.copy(&x, &w, &g, stage);
    __syncwarp();
  } else {
    task.make(stage, sums, factor, dw, rows, inner, outer);
  }
  meet();

  if (task.back && threadIdx.x < GROUP)
    for (int i = threadIdx.x; i < TILE_M / CLUSTER * CHUNKS; i += GROUP) {
      const int r = i / CHUNKS * CLUSTER + cluster_rank(), c = task.column + i % CHUNKS * 8;
      if (task.row + r >= rows || c >= inner) continue;
      float total[8];
      collect_scaled(total, sums, r, i % CHUNKS, factor);
      store_rounded(dx + (long long)(task.row + r) * inner + c, total);
    }
  meet_relaxed();  // no block ends before it has been read
}
