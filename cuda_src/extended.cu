// The extended product: y = c * (x * w) + scale * (x2 * w2 + bias2) + add + bias in one accumulator, rounded once.
// For Hopper.
//
//   y[p, n] = c[n] * sum over taps t and channels k of x[pixel(p, t), k] * w[t, k, n]
//           + scale * (bias2[n] + sum over t, k of x2[pixel(p, t), b * K2 + k] * w2[t, k, n - b * block])     b = n / block
//           + add[p, n] + bias[n]
//
// An adapter is the second term: a few more steps along the inner axis, before the first term's, or, with SCALED=1,
// behind them: c (1 without) scales the columns of the first alone, which can be kept by itself for the gradient of
// c, and there is no scale. A linear layer is a convolution with one tap; the gradient of the input is the same
// product with w turned (B_ROWS=0: rows of K values) and the taps in reverse.
//
// With PAIR=1 both terms read the same x by the same walk: a step copies it once, beside both weights, and multiplies
// into two sums, which are added at the end.
//
// A block is persistent: one warpgroup copies tiles (a matrix by boxes, an image by im2col boxes) into a ring of
// stages, the others multiply: two, 128 or 64 rows of the tile each, or three, 64 rows each. Tiles go by bands of
// `band` row tiles, so that what runs at the same time shares its operands in L2. EXT_N: columns that x2 * w2 does at
// a time, so that narrow blocks fit a wide tile.
//
// only sm_90a
// variants bf16: TILE_N=64 B_ROWS=0 | TILE_N=96 B_ROWS=0 | TILE_N=128 B_ROWS=0 CLUSTER=2 | TILE_N=144 B_ROWS=0 CLUSTER=2
// variants bf16: TILE_N=160 B_ROWS=0 CLUSTER=2
// variants bf16: TILE_N=64 B_ROWS=1 | TILE_N=96 B_ROWS=1 | TILE_N=128 B_ROWS=1 CLUSTER=2 | TILE_N=160 B_ROWS=1 CLUSTER=2
// variants bf16: TILE_N=64 B_ROWS=1 SCALED=1 | TILE_N=96 B_ROWS=1 SCALED=1 | TILE_N=128 B_ROWS=1 SCALED=1 CLUSTER=2
// variants bf16: TILE_N=160 B_ROWS=1 SCALED=1
// variants bf16: TILE_M=192 TILE_N=192 B_ROWS=0 | TILE_M=192 TILE_N=192 B_ROWS=1
// variants bf16: TILE_M=192 TILE_N=192 B_ROWS=1 SCALED=1
// variants bf16: TILE_M=128 TILE_N=64 B_ROWS=0 | TILE_M=128 TILE_N=128 B_ROWS=0 CLUSTER=2 | TILE_M=128 TILE_N=160 B_ROWS=0 CLUSTER=2
// variants bf16: TILE_M=128 TILE_N=64 B_ROWS=1 | TILE_M=128 TILE_N=128 B_ROWS=1 CLUSTER=2 | TILE_M=128 TILE_N=160 B_ROWS=1 CLUSTER=2
// variants bf16: TILE_M=128 TILE_N=64 B_ROWS=1 SCALED=1 | TILE_M=128 TILE_N=128 B_ROWS=1 SCALED=1 CLUSTER=2
// variants bf16: TILE_M=128 TILE_N=160 B_ROWS=1 SCALED=1 CLUSTER=2
// variants bf16: TILE_N=64 B_ROWS=0 PAIR=1 | TILE_M=128 TILE_N=64 B_ROWS=0 PAIR=1
// variants bf16: TILE_M=128 TILE_N=128 B_ROWS=0 PAIR=1
// variants bf16: TILE_N=64 B_ROWS=1 PAIR=1 | TILE_M=128 TILE_N=64 B_ROWS=1 PAIR=1
// variants bf16: TILE_M=128 TILE_N=128 B_ROWS=1 PAIR=1
// variants bf16: TILE_N=160 B_ROWS=1 EXT_N=40 | TILE_N=160 B_ROWS=1 EXT_N=80
// variants bf16: TILE_N=160 B_ROWS=0 EXT_N=40 | TILE_N=160 B_ROWS=0 EXT_N=80
#include "extended_ends.cuh"
#include "extended_steps.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__((WORKERS + 1) * GROUP, 1)
    NAME(extended)(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                   const __grid_constant__ TensorMap x2, const __grid_constant__ TensorMap w2,
                   const __grid_constant__ TensorMap kept_map, const __grid_constant__ TensorMap y_map,
                   const float* scale,  // (1,), or null for 1
                   const float* c,      // (columns), with SCALED
                   const bf16* add,     // (positions, columns), or null
                   const bf16* bias,    // (columns), or null
                   const bf16* bias2,   // (columns), or null; without SCALED
                   bf16* kept,          // (positions, columns): x * w, with SCALED; or null
                   bf16* y,             // (positions, columns)
                   const __grid_constant__ Geometry g, const Term own, const Term other, int positions, int columns,
                   int band) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  Ring ring = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  asm volatile("" : "+r"(ring.memory), "+r"(ring.barriers));  // kept, not found anew at each step
  const unsigned slots = ring.memory + STAGES * STAGE;
  const int tiles_m = (positions + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M),
            tiles_n = (columns + TILE_N - 1) / TILE_N;
  const bool image = own.axes || other.axes;
  const int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0);  // one for a warp, as the compiler shall see
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(ring.full(i), 1), barrier_init(ring.empty(i), CLUSTER * WORKERS);
    barrier_init_done();
  }
  __syncthreads();
  if (CLUSTER > 1) meet_relaxed();
  Stage stage;
  if (group == WORKERS) {
    registers_fewer<WORKERS == 2 ? 40 : 32>();
    if (threadIdx.x == WORKERS * GROUP) {
      prefetch_map(&x), prefetch_map(&w), prefetch_map(&x2), prefetch_map(&w2);
      if (STAGED) prefetch_map(&y_map);
      for (int t = blockIdx.x / CLUSTER; t < tiles_m * tiles_n; t += gridDim.x / CLUSTER) {
        const Tile tile(t, tiles_m, tiles_n, band, g, image);
        if (!SCALED && !PAIR) fetch_other(&x2, &w2, other, tile, columns, g, ring, stage);
        fetch<TILE_N>(&x, &w, &w2, own, tile, tile.column, g, ring, stage);
        if (SCALED) fetch_other(&x2, &w2, other, tile, columns, g, ring, stage);
      }
    }
  } else {
    registers_more<WORKERS == 2 ? 232 : 160>();
    const bool chief = threadIdx.x % GROUP == 0;
    const float factor = scale ? *scale : 1.0f;
    for (int t = blockIdx.x / CLUSTER; t < tiles_m * tiles_n; t += gridDim.x / CLUSTER) {
      const Tile tile(t, tiles_m, tiles_n, band, g, false);
      float sum[ROWS][TILE_N / 2];
      if constexpr (SCALED) {
        begin<true>(sum, 0, nullptr, nullptr, tile, columns);
        accumulate<TILE_N, 0>(sum, sum, own, group, chief, ring, stage);
        if (kept) finish<false>(sum, tile, group, nullptr, kept, &kept_map, slots, positions, columns);
        begin<false>(sum, 0, c, bias, tile, columns);
        accumulate_other(sum, other, tile, columns, group, chief, ring, stage);
      } else if constexpr (PAIR) {
        float more[ROWS][TILE_N / 2];
        begin<true>(sum, 0, nullptr, bias, tile, columns);
        begin<true>(more, 0, nullptr, bias2, tile, columns);
        accumulate<TILE_N, 0>(sum, more, own, group, chief, ring, stage);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
          for (int i = 0; i < TILE_N / 2; ++i) sum[r][i] += factor * more[r][i];
      } else {
        if (other.taps) {
          begin<true>(sum, 0, nullptr, bias2, tile, columns);
          accumulate_other(sum, other, tile, columns, group, chief, ring, stage);
          begin<false>(sum, factor, nullptr, bias, tile, columns);
        } else {
          begin<true>(sum, 0, nullptr, bias, tile, columns);
        }
        accumulate<TILE_N, 0>(sum, sum, own, group, chief, ring, stage);
      }
      if (add)
        finish<true>(sum, tile, group, add, y, &y_map, slots, positions, columns);
      else
        finish<false>(sum, tile, group, add, y, &y_map, slots, positions, columns);
    }
    if (STAGED && threadIdx.x % 32 == 0) stores_read<0>();  // shared memory ends with the block
  }
  if (CLUSTER > 1) meet_relaxed();  // the other block may still copy into this one, or give stages back to it
}
