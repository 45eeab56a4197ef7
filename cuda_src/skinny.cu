// A product of few positions: y = x @ w + scale * (x2 @ w2 + bias2) + add + bias in one sum, rounded once. For Hopper.
//
//   y[p, n] = sum over k of x[p, k] * w[k, n] + scale * (bias2[n] + sum over k of x2[p, b * width2 + k] * w2[k, n - b * block])
//           + add[p, n] + bias[n]                                                                              b = n / block
//
// The time is that of reading w once. A cluster has a strip of TILE_N columns, none of which leaves its block of w2;
// each of its blocks takes a part of the steps of 64 channels, those of x2 before those of x. So there are blocks
// enough for all multiprocessors, two on each, and all of them ask for all that their shared memory holds at once.
// The cluster's sums are then added through shared memory, in the order of the blocks: no workspace, no second
// launch, the same bits every time. The input gradient is the same product with w turned (B_ROWS=0: rows of
// channels).
//
// Positions go by 64, and each 64 read w again, from L2. Fewer are 64 all the same: the copy engine writes zeros for
// those that are not there, and reads nothing.
//
// only sm_90a
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=8 | TILE_N=128 B_ROWS=1 CLUSTER=4 | TILE_N=128 B_ROWS=1 CLUSTER=2
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=1 | TILE_N=64 B_ROWS=1 CLUSTER=8 | TILE_N=64 B_ROWS=1 CLUSTER=4
// variants bf16: TILE_N=128 B_ROWS=0 CLUSTER=8 | TILE_N=128 B_ROWS=0 CLUSTER=4 | TILE_N=128 B_ROWS=0 CLUSTER=2
// variants bf16: TILE_N=128 B_ROWS=0 CLUSTER=1 | TILE_N=64 B_ROWS=0 CLUSTER=8 | TILE_N=64 B_ROWS=0 CLUSTER=4
#include "skinny.cuh"

// Copies the operands of the steps [from, to) of one of the two sums. p: the first position. b: the block of x. n: the
// first column of w.
INLINE void fetch(const TensorMap* x, const TensorMap* w, int from, int to, int p, int b, int n, Stage& stage) {
#pragma unroll 1
  for (int k = from * TILE_K; k < to * TILE_K; k += TILE_K) {
    stage.claim();
    if (B_ROWS) {
#pragma unroll
      for (int box = 0; box < TILE_N / 64; ++box) copy_box(stage.b() + box * BOX, w, stage.full(), n + 64 * box, k, 0);
    } else {
      copy_box(stage.b(), w, stage.full(), k, n, 0);
    }
    copy_box(stage.a(), x, stage.full(), k, b, p);
    stage.next();
  }
}

INLINE void prefetch(const bf16* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// total += factor * eight values.
INLINE void add_chunk(float (&total)[8], const bf16* from, float factor) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    total[2 * i] += factor * low_half(pairs[i]);
    total[2 * i + 1] += factor * high_half(pairs[i]);
  }
}

// Grid (CLUSTER blocks for each strip, ceil(block / TILE_N) of them for each of columns / block blocks; positions /
// 64).
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, 2)
    NAME(skinny)(const __grid_constant__ TensorMap x,   // (positions, 1, width)
                 const __grid_constant__ TensorMap w,   // (1, width, columns), or (1, columns, width)
                 const __grid_constant__ TensorMap x2,  // (positions, columns / block, width2)
                 const __grid_constant__ TensorMap w2,  // (1, width2, block), or (1, block, width2)
                 const float* scale,                    // (1,), or null for 1
                 const bf16* add,                       // (positions, columns), or null
                 const bf16* bias,                      // (columns), or null
                 const bf16* bias2,                     // (columns), or null
                 bf16* y,                               // (positions, columns)
                 int positions, int columns, int width, int width2, int block) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const unsigned sums = stage.memory;

  const int rank = cluster_rank(), strips = (block + TILE_N - 1) / TILE_N, strip = blockIdx.x / CLUSTER;
  const int b = strip / strips, column = b * block + strip % strips * TILE_N;
  const int past = min(column + TILE_N, (b + 1) * block);
  const int start = blockIdx.y * TILE_M, rows = min(positions - start, TILE_M);
  const int steps2 = (width2 + TILE_K - 1) / TILE_K, steps = steps2 + (width + TILE_K - 1) / TILE_K;
  const int first = rank * steps / CLUSTER, last = (rank + 1) * steps / CLUSTER;

  if (threadIdx.x == 0) stage.begin();
  __syncthreads();

  // At the end an item is eight columns of a row, and the rows go round the blocks of the cluster.
  constexpr int ITEMS = TILE_M / CLUSTER * CHUNKS;
  const float factor = scale ? *scale : 1.0f;
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) {
      prefetch_map(&w), prefetch_map(&x), prefetch_map(&x2), prefetch_map(&w2);
      fetch(&x2, &w2, first, min(last, steps2), start, b, column - b * block, stage);
      fetch(&x, &w, max(first, steps2) - steps2, last - steps2, start, 0, column, stage);
    }
    __syncwarp();
  } else {
    for (int i = threadIdx.x; i < ITEMS; i += GROUP) {
      const int row = i / CHUNKS * CLUSTER + rank, n = column + i % CHUNKS * 8;
      if (row >= rows || n >= past) continue;
      if (add) prefetch(add + (long long)(start + row) * columns + n);
      if (bias) prefetch(bias + n);
      if (bias2) prefetch(bias2 + n);
    }
    float sum[TILE_N / 2] = {};
    const int before = min(last, steps2) - first;
    multiply<false, B_ROWS>(sum, before, stage);
    if (before > 0)
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) sum[i] *= factor;
    multiply<false, B_ROWS>(sum, last - max(first, steps2), stage);
    leave(sum, sums, rows);
  }
  meet();

  if (threadIdx.x < GROUP)
    for (int i = threadIdx.x; i < ITEMS; i += GROUP) {
      const int row = i / CHUNKS * CLUSTER + rank, n = column + i % CHUNKS * 8;
      if (row >= rows || n >= past) continue;
      float total[8];
      collect(total, sums, row, i % CHUNKS);
      const long long at = (long long)(start + row) * columns + n;
      if (bias2) add_chunk(total, bias2 + n, factor);
      if (bias) add_chunk(total, bias + n, 1);
      if (add) add_chunk(total, add + at, 1);
      store_rounded(y + at, total);
    }
  meet_relaxed();  // no block ends before it has been read
}
