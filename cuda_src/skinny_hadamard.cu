// A product of few positions with a LoHa: y = x @ w + x @ change + add + bias in one sum, rounded once. For Hopper.
//
//   change[k, n] = scale * (sum over r of d1[k, r] * u1[r, n]) * (sum over r of d2[k, r] * u2[r, n]), rounded, r < 16
//   y[p, n] = sum over k of x[p, k] * w[k, n] + sum over k of x[p, k] * change[k, n] + add[p, n] + bias[n]
//
// The input gradient is the same with w and the change turned: B_ROWS=0, rows of channels.
//
// As skinny.cu: a cluster has a strip of TILE_N columns, its blocks share the steps of 64 channels and send each other
// their sums (cluster_sums.cuh). But the sums lie turned, columns by positions. So w and the change are the left
// operand, and the change, 64 x 64 of it at a time, goes from the sums of d @ u to that operand inside registers
// (hadamard_tile.cuh): no barrier between the warps, and none with the copy engine. The way from turned sums to rows of
// y is a turn of 8 x 8 values inside a warp.
//
// A step takes w, x and one side of the factors; the other side, the columns', is copied once. The tensor cores make
// d @ u while the rest waits, then multiply w while the threads round the change.
//
// EACH: blocks that share a multiprocessor; one alone has twice the stages.
//
// only sm_90a
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=4 EACH=2 | TILE_N=64 B_ROWS=0 CLUSTER=4 EACH=2
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=8 EACH=2 | TILE_N=128 B_ROWS=0 CLUSTER=8 EACH=2
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=4 EACH=2 | TILE_N=128 B_ROWS=0 CLUSTER=4 EACH=2
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=2 EACH=1 | TILE_N=128 B_ROWS=0 CLUSTER=2 EACH=1
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=1 | TILE_N=128 B_ROWS=0 CLUSTER=1 EACH=1
#define ALL_BYTES ((EACH == 1 ? 226 : 112) * 1024)  // of shared memory, but for barriers
#define BESIDE (2 * FACTOR_BOX)                     // the factors of a step: d1 and d2, turned u1 and u2
#define TILES (TILE_N / 64)
#define FIXED (TILES * BESIDE)  // those of the columns: of each tile u1 and u2, turned d1 and d2
#define RING (ALL_BYTES - 1024 - PARTS_BYTES - FIXED)
#include "cluster_sums.cuh"
#include "hadamard_tile.cuh"
#include "skinny.cuh"

struct Maps {
  const TensorMap *x, *w, *d1, *u1, *d2, *u2;
};

// Copies the operands of the steps [from, to), and before them what all steps share. p: the first position. n: the
// first column.
INLINE void fetch(const Maps& maps, int from, int to, int p, int n, unsigned fixed, Stage& stage) {
  // Of columns from n on are u and rows of d turned.
  const auto columns = [&](unsigned at, const TensorMap* d, const TensorMap* u, int n) {
    if (B_ROWS)
      copy_box(at, u, stage.full(), n, 0, 0);
    else
      copy_box(at, d, stage.full(), 0, n, 0);
  };
  const auto channels = [&](unsigned at, const TensorMap* d, const TensorMap* u, int k) {
    if (B_ROWS)
      copy_box(at, d, stage.full(), 0, k, 0);
    else
      copy_box(at, u, stage.full(), k, 0, 0);
  };
#pragma unroll 1
  for (int step = from; step < to; ++step) {
    const int k = step * TILE_K;
    stage.claim(STAGE + (step == from ? FIXED : 0));
    if (step == from)
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        columns(fixed + m * BESIDE, maps.d1, maps.u1, n + m * 64);
        columns(fixed + m * BESIDE + FACTOR_BOX, maps.d2, maps.u2, n + m * 64);
      }
    channels(stage.b() + W_BYTES, maps.d1, maps.u1, k);
    channels(stage.b() + W_BYTES + FACTOR_BOX, maps.d2, maps.u2, k);
    if (B_ROWS) {
#pragma unroll
      for (int m = 0; m < TILES; ++m) copy_box(stage.b() + m * BOX, maps.w, stage.full(), n + m * 64, k, 0);
    } else {
      copy_box(stage.b(), maps.w, stage.full(), k, n, 0);
    }
    copy_box(stage.a(), maps.x, stage.full(), k, 0, p);
    stage.next();
  }
}

// Both products of a tile of the change; of: the columns' factors, by: those of the step.
INLINE void make(float (&e1)[32], float (&e2)[32], unsigned of, unsigned by) {
  const unsigned d = B_ROWS ? by : of, u = B_ROWS ? of : by;
  make_tiles<B_ROWS>(e1, e2, d, u, d + FACTOR_BOX, u + FACTOR_BOX);
}

// sum += the products of so many stages, columns by positions.
INLINE void multiply_both(float (&sum)[TILES][32], int steps, float factor, unsigned fixed, Stage& stage) {
#pragma unroll 1
  for (; steps > 0; --steps) {
    barrier_wait(stage.full(), stage.parity);
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
      const unsigned w = stage.b() + m * BOX;
      float e1[32], e2[32];
      unsigned change[4][4];
      products_begin();
      make(e1, e2, fixed + m * BESIDE, stage.b() + W_BYTES);
#pragma unroll
      for (int s = 0; s < TILE_K / 16; ++s) {
        const unsigned long long x = operand(stage.a() + s * 32, 16);
        if constexpr (B_ROWS)
          wgmma_turned<64, false>(sum[m], operand(w + s * 16 * ROW_BYTES, BOX), x);
        else
          wgmma<64, false>(sum[m], operand(w + s * 32, 16), x);
      }
      products_commit();
      products_wait<1>();  // for E alone
      settle(e1), settle(e2);
      round_change(change, e1, e2, factor);
      products_begin();
#pragma unroll
      for (int s = 0; s < TILE_K / 16; ++s) wgmma_own<64, false>(sum[m], change[s], operand(stage.a() + s * 32, 16));
      products_commit();
      products_wait<0>();
#pragma unroll
      for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(change[i / 4][i % 4]));  // they are read until here
    }
    stage.release();
    stage.next();
  }
}

// Grid (CLUSTER blocks for each of ceil(columns / TILE_N) strips; positions / 64).
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, EACH)
    NAME(skinny_hadamard)(const __grid_constant__ TensorMap x,   // (positions, 1, width)
                          const __grid_constant__ TensorMap w,   // (1, width, columns), or (1, columns, width)
                          const __grid_constant__ TensorMap d1,  // (1, width, R), or (1, columns, R)
                          const __grid_constant__ TensorMap u1,  // (1, R, columns), or (1, R, width)
                          const __grid_constant__ TensorMap d2,  // as d1
                          const __grid_constant__ TensorMap u2,  // as u1
                          const float* scale,                    // (1,), or null for 1
                          const bf16* add,                       // (positions, columns), or null
                          const bf16* bias,                      // (columns), or null
                          bf16* y,                               // (positions, columns)
                          int positions, int columns, int width) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES + 1];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const unsigned fixed = stage.memory + STAGES * STAGE;
  const int rank = cluster_rank(), column = blockIdx.x / CLUSTER * TILE_N;
  const int start = blockIdx.y * TILE_M, rows = min(positions - start, TILE_M);
  // A piece is eight positions of a tile.
  const Parts parts = {fixed + FIXED, shared_address(barriers + 2 * STAGES), rank, (rows + 7) / 8 * TILES};
  const int steps = (width + TILE_K - 1) / TILE_K;
  const int first = rank * steps / CLUSTER, last = (rank + 1) * steps / CLUSTER;

  if (threadIdx.x == 0) parts.begin(GROUP / 32), stage.begin();
  __syncthreads();
  arrive();

  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) {
      const Maps maps = {&x, &w, &d1, &u1, &d2, &u2};
      prefetch_map(&w), prefetch_map(&x);
      prefetch_map(&d1), prefetch_map(&u1), prefetch_map(&d2), prefetch_map(&u2);
      fetch(maps, first, last, start, column, fixed, stage);
    }
    await();
    return;
  }

  // Of a piece a thread has the sums of two columns, eight apart, for two positions; turned, of two positions' columns
  // for one: those of `lane / 4`.
  const int lane = threadIdx.x % 32, at = lane / 4;
  const auto position = [&](int slot) { return (first_of(rank) + slot) / TILES * 8 + at; };
  const auto column_of = [&](int slot, int half) {
    return column + (first_of(rank) + slot) % TILES * 64 + threadIdx.x / 32 * 16 + half * 8;
  };
  const auto place = [&](int slot, int half) {
    return (long long)(start + position(slot)) * columns + column_of(slot, half) + lane % 4 * 2;
  };
#pragma unroll
  for (int slot = 0; slot < MOST; ++slot) {
    if (lane % 4 || slot >= parts.count() || column_of(slot, 0) >= columns) continue;
    if (bias) prefetch(bias + column_of(slot, 0));
    if (add && position(slot) < rows) prefetch(add + place(slot, 0));
  }

  float sum[TILES][32] = {};
#pragma unroll
  for (int m = 0; m < TILES; ++m) settle(sum[m]);
  multiply_both(sum, last - first, scale ? *scale : 1.0f, fixed, stage);
#pragma unroll
  for (int m = 0; m < TILES; ++m) settle(sum[m]);

  await();  // until all blocks of the cluster have begun, long ago
  float pieces[TILES * 32], own[MOST][4];
#pragma unroll
  for (int i = 0; i < TILES * 32; ++i) pieces[i] = sum[i / 4 % TILES][i / 4 / TILES * 4 + i % 4];
  parts.send(pieces, own);
  // What is added is read while the sums are under way.
#pragma unroll
  for (int i = 0; i < MOST * 2; ++i) {
    const int slot = i / 2, half = i % 2, n = column_of(slot, half);
    if (slot >= parts.count() || n >= columns) continue;
    float* to = own[slot] + half * 2;
    const float more = bias ? widen(bias[n + at]) : 0;
    const bool there = add && position(slot) < rows;
    const unsigned pair = turned(there ? *reinterpret_cast<const unsigned*>(add + place(slot, half)) : 0);
    to[0] += more + low_half(pair), to[1] += more + high_half(pair);
  }
  parts.receive(own);
#pragma unroll
  for (int i = 0; i < MOST * 2; ++i) {
    const int slot = i / 2, half = i % 2;
    if (slot >= parts.count() || column_of(slot, half) >= columns) continue;
    const unsigned pair = turned(round_pair(own[slot][half * 2], own[slot][half * 2 + 1]));
    if (position(slot) < rows) *reinterpret_cast<unsigned*>(y + place(slot, half)) = pair;
  }
}
