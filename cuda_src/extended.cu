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

// Copies the operands of a term for COLUMNS columns from `column` on, all taps and channels; with PAIR those of
// `pair`, the other weight, beside them.
template <int COLUMNS>
INLINE void fetch(const TensorMap* x, const TensorMap* w, const TensorMap* pair, const Term& term, const Tile& tile,
                  int column, const Geometry& g, const Ring& ring, Stage& stage) {
  const int b = column / term.block, first = b * term.width;
  const int n = column - b * term.block;
  int tz = 0, ty = 0, tx = 0;
  for (int tap = 0; tap < term.taps; ++tap) {
    const int w_tap = term.flip ? term.taps - 1 - tap : tap;
    const int dx = tx * g.dilation[2], dy = ty * g.dilation[1], dz = tz * g.dilation[0];
#pragma unroll 1
    for (int k = 0; k < term.width; k += TILE_K) {
      const unsigned done = ring.full(stage.index);
      const unsigned a_to = ring.memory + stage.index * STAGE, b_to = a_to + A_BYTES;
      barrier_wait(ring.empty(stage.index), stage.parity ^ 1);
      barrier_expect(done, A_BYTES + (PAIR ? 2 : 1) * box_bytes(COLUMNS));
      if (term.axes == 0)
        copy_box(a_to, x, done, first + k, tile.row);
      else if (term.axes == 2)
        copy_pixels(a_to, x, done, first + k, tile.at.x, tile.at.y, tile.at.n, dx, dy);
      else
        copy_voxels(a_to, x, done, first + k, tile.at.x, tile.at.y, tile.at.z, tile.at.n, dx, dy, dz);
      share<COLUMNS>(b_to, w, done, n, k, w_tap);
      if (PAIR) share<COLUMNS>(b_to + B_BYTES, pair, done, n, k, w_tap);
      stage.next();
    }
    if (++tx == g.kernel[2]) {
      tx = 0;
      if (++ty == g.kernel[1]) ty = 0, ++tz;
    }
  }
}

// sum += a term for COLUMNS columns, held from sum[.][FIRST] on. Of a tap's last step only the slices that hold
// channels are multiplied.
template <int COLUMNS, int FIRST>
INLINE void accumulate(float (&sum)[ROWS][TILE_N / 2], float (&more)[ROWS][TILE_N / 2], const Term& term, int worker,
                       bool chief, const Ring& ring, Stage& stage) {
  const int whole = term.width / TILE_K, slices = (term.width % TILE_K + 15) / 16;
  if (!slices) {
    multiply<COLUMNS, FIRST, 4>(sum, more, term.taps * whole, worker, chief, ring, stage);
    return;
  }
  for (int tap = 0; tap < term.taps; ++tap) {
    multiply<COLUMNS, FIRST, 4>(sum, more, whole, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 1>(sum, more, slices == 1, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 2>(sum, more, slices == 2, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 3>(sum, more, slices == 3, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 4>(sum, more, slices == 4, worker, chief, ring, stage);
  }
}

// x2 * w2, block by block of the tile's columns; a block past the last column is skipped by both sides.
template <int SUB = 0>
INLINE void fetch_other(const TensorMap* x, const TensorMap* w, const Term& term, const Tile& tile, int columns,
                        const Geometry& g, const Ring& ring, Stage& stage) {
  if constexpr (SUB * EXT_N < TILE_N) {
    if (tile.column + SUB * EXT_N < columns)
      fetch<EXT_N>(x, w, nullptr, term, tile, tile.column + SUB * EXT_N, g, ring, stage);
    fetch_other<SUB + 1>(x, w, term, tile, columns, g, ring, stage);
  }
}

template <int SUB = 0>
INLINE void accumulate_other(float (&sum)[ROWS][TILE_N / 2], const Term& term, const Tile& tile, int columns,
                             int worker, bool chief, const Ring& ring, Stage& stage) {
  if constexpr (SUB * EXT_N < TILE_N) {
    if (tile.column + SUB * EXT_N < columns)
      accumulate<EXT_N, SUB * EXT_N / 2>(sum, sum, term, worker, chief, ring, stage);
    accumulate_other<SUB + 1>(sum, term, tile, columns, worker, chief, ring, stage);
  }
}

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
