// What the last blocks of few_mixed.cu make: 64 rows of ddown each. For Hopper.
//
//   ddown[c, n] = sum over r of source[r, c] * dx[r, n]                                            r = (p, m),  n < 16
//
// Tiles of the source are copied while other blocks make dx, as many as there is room for: nine, where 64 positions of
// eight blocks are eight. All that is left to copy then are 32 bytes of each row of dx.
#pragma once
#include "few.cuh"
#include "flags.cuh"

constexpr int RANKS = 16;
constexpr int NARROW = TILE_K * RANKS * 2;  // bytes of a tile of dx, 64 rows
constexpr int PAIRS = RING / (BOX + NARROW);
using Pair = StageOf<BOX + NARROW, PAIRS>;  // a tile of the source and one of dx
static_assert(PAIRS >= STAGES, "the other blocks' barriers stand where these do");

// All copies, by one thread. parts: blocks that write dx. many: blocks that read it.
INLINE void copy_down(const TensorMap* source, const TensorMap* dx, Pair pair, int column, int steps, Flag* flag,
                      int parts, int many) {
  prefetch_map(dx);
  const auto fetch = [&](const Pair& to, int step) {
    to.claim();
    copy_box(to.a(), source, to.full(), column, step * TILE_K);
  };
  const int ahead = min(steps, PAIRS);
  Pair early = pair;
#pragma unroll 1
  for (int step = 0; step < ahead; ++step) fetch(early, step), early.next();
  await(flag, parts);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step >= ahead) fetch(pair, step);
    copy_box(pair.b(), dx, pair.full(), 0, step * TILE_K);
    pair.next();
  }
  lower(flag, many);
}

// sum += the products of so many steps. Those of a step go on while the next is waited for.
INLINE void multiply_down(float (&sum)[RANKS / 2], int steps, Pair pair) {
  Pair read = pair;
  settle(sum);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    barrier_wait(pair.full(), pair.parity);
    products_begin();
#pragma unroll
    for (int s = 0; s < TILE_K / 16; ++s)
      wgmma_turned<RANKS>(sum, operand(pair.a() + s * 16 * ROW_BYTES, BOX), narrow_operand(pair.b() + s * 16 * 32));
    products_commit();
    pair.next();
    products_wait<1>();
    if (step > 0) read.release(), read.next();
  }
  products_wait<0>();
  settle(sum);
}

// rows: of the source and dx. channels, ranks: of ddown.
INLINE void make_down(const TensorMap* source, const TensorMap* dx, const Pair& pair, int column, Flag* flag, int parts,
                      float* ddown, int rows, int channels, int ranks) {
  if (threadIdx.x == 0) pair.begin();
  __syncthreads();
  const int steps = (rows + TILE_K - 1) / TILE_K;
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) copy_down(source, dx, pair, column, steps, flag, parts, (channels + 63) / 64);
    return;
  }
  float sum[RANKS / 2] = {};
  multiply_down(sum, steps, pair);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int c = column + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8;
    const int n = threadIdx.x % 4 * 2 + i / 2 * 8;
    if (c < channels && n < ranks)
      *reinterpret_cast<float2*>(ddown + (long long)c * ranks + n) = make_float2(sum[2 * i], sum[2 * i + 1]);
  }
}
