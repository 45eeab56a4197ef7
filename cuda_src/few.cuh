// The tiles of both gradients of a product of a few rows: see few.cu. For Hopper.
#pragma once
#define TILE_N 64
#include "skinny.cuh"

// What a block makes: a tile of dx, of whose steps along n the blocks of a cluster have a share each, or a tile of dw.
struct Task {
  bool back;  // of dx
  int row, column;
  int first, last;  // steps

  INLINE Task(int rows, int inner, int outer) {
    const int tiles_r = (rows + 63) / 64, tiles_i = (inner + 63) / 64, tiles_o = (outer + 63) / 64;
    const int rank = cluster_rank(), cluster = blockIdx.x / CLUSTER;
    back = cluster < tiles_r * tiles_i;
    // Of dw there may be a tile too many: it lies below the last row.
    const int tile = back ? cluster : (cluster - tiles_r * tiles_i) * CLUSTER + rank, across = back ? tiles_i : tiles_o;
    row = tile / across * 64, column = tile % across * 64;
    first = back ? rank * tiles_o / CLUSTER : 0;
    last = back ? (rank + 1) * tiles_o / CLUSTER : row < inner ? tiles_r : 0;
  }

  // The copies of all steps, by one thread.
  INLINE void copy(const TensorMap* x, const TensorMap* w, const TensorMap* g, Stage& stage) const {
#pragma unroll 1
    for (int k = first * TILE_K; k < last * TILE_K; k += TILE_K) {
      stage.claim();
      if (back) {
        copy_box(stage.a(), g, stage.full(), k, row);
        copy_box(stage.b(), w, stage.full(), k, column);
      } else {
        copy_box(stage.a(), x, stage.full(), row, k);
        copy_box(stage.b(), g, stage.full(), column, k);
      }
      stage.next();
    }
  }

  // By the warpgroup. Of dx the share of the sums is left in shared memory, for `collect`; a tile of dw is written.
  INLINE void make(Stage& stage, unsigned sums, float factor, float* dw, int rows, int inner, int outer) const {
    float sum[TILE_N / 2] = {};
    if (back) {
      multiply<false, false>(sum, last - first, stage);
      leave(sum, sums, rows - row);
      return;
    }
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
};

// scale * the sums of eight columns of a row of dx.
INLINE void collect_scaled(float (&total)[8], unsigned sums, int row, int chunk, float factor) {
  collect(total, sums, row, chunk);
#pragma unroll
  for (int v = 0; v < 8; ++v) total[v] *= factor;
}
