// What the products of a few rows share: 64 x TILE_N sums of one warpgroup, a ring of stages that one thread fills by
// the copy engine, and sums that the blocks of a cluster add through shared memory, in the order of the blocks. For
// Hopper.
#pragma once
#include "cluster.cuh"
#include "exchange.cuh"
#include "hopper.cuh"

constexpr int TILE_M = 64, TILE_K = 64;
constexpr int BOX = TILE_K * ROW_BYTES;  // 64 rows of 64 values
#ifndef BESIDE
#define BESIDE 0  // bytes of a stage behind the tile of w
#endif
constexpr int A_BYTES = BOX, W_BYTES = TILE_N * ROW_BYTES;
constexpr int STAGE = A_BYTES + W_BYTES + BESIDE;
#ifndef RING
#define RING (96 * 1024)  // bytes of all stages: two blocks share a multiprocessor's 228 KiB
#endif
constexpr int STAGES = (RING) / STAGE;
// f32 of a row of sums in shared memory: eight banks from row to row, so that the pairs of a half warp, 4 rows x 8,
// meet none twice.
constexpr int PITCH = TILE_N + 8;
constexpr int CHUNKS = TILE_N / 8;  // of eight columns

// A place in a ring of COUNT stages of so many bytes, and how often it was passed. A stage has a barrier that it is full,
// and one that it may be written again.
template <int BYTES, int COUNT>
struct StageOf {
  unsigned memory, barriers;  // of the ring
  int index = 0;
  unsigned parity = 0;

  INLINE unsigned a() const { return memory + index * BYTES; }
  INLINE unsigned b() const { return a() + A_BYTES; }
  INLINE unsigned full() const { return barriers + 8 * index; }
  INLINE unsigned empty() const { return barriers + 8 * (COUNT + index); }

  // Before the first use, by one thread; then all threads of the block meet.
  INLINE void begin() const {
    for (int i = 0; i < 2 * COUNT; ++i) barrier_init(barriers + 8 * i, i < COUNT ? 1 : GROUP / 32);
    barrier_init_done();
  }
  // The next copies go here: the stage is free, and full after so many bytes.
  INLINE void claim(int bytes = BYTES) const {
    barrier_wait(empty(), parity ^ 1);
    barrier_expect(full(), bytes);
  }
  // This warp has read it; by all four.
  INLINE void release() const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty());
  }
  INLINE void next() {
    if (++index == COUNT) index = 0, parity ^= 1;
  }
};
using Stage = StageOf<STAGE, STAGES>;

// Into L2, ahead of the read.
INLINE void prefetch(const bf16* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// The compiler keeps its own uses of the sums before or behind this point.
template <int COUNT>
INLINE void settle(float (&sum)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// sum += the products of 64 channels, not waited for. A_ALONG_M, B_ALONG_N: the rows of 64 values of an operand run
// along the side of the sums, not along their inner axis.
template <bool A_ALONG_M, bool B_ALONG_N, int COUNT>
INLINE void multiply_tiles(float (&sum)[COUNT], unsigned a, unsigned b) {
  products_begin();
#pragma unroll
  for (int s = 0; s < TILE_K / 16; ++s) {
    const auto at = [s](unsigned from, bool along) {
      return along ? operand(from + s * 16 * ROW_BYTES, BOX) : operand(from + s * 32, 16);
    };
    if constexpr (A_ALONG_M)
      wgmma_turned<2 * COUNT>(sum, at(a, true), at(b, B_ALONG_N));
    else
      wgmma<2 * COUNT, B_ALONG_N>(sum, at(a, false), at(b, B_ALONG_N));
  }
  products_commit();
}

// sum += the products of so many stages.
template <bool A_ALONG_M, bool B_ALONG_N>
INLINE void multiply(float (&sum)[TILE_N / 2], int steps, Stage& stage) {
  if (steps <= 0) return;
  settle(sum);
#pragma unroll 1
  for (; steps > 0; --steps) {
    barrier_wait(stage.full(), stage.parity);
    multiply_tiles<A_ALONG_M, B_ALONG_N>(sum, stage.a(), stage.b());
    products_wait<0>();  // the copies go on meanwhile
    stage.release();
    stage.next();
  }
  settle(sum);
}

// The sums of the warpgroup's first `rows` rows, into shared memory at `sums`: the stages, which nobody reads any more.
INLINE void leave(const float (&sum)[TILE_N / 2], unsigned sums, int rows) {
  static_assert(TILE_M * PITCH * 4 <= STAGES * STAGE, "the sums take the place of the stages");
  group_barrier(0);  // the last stage is read by all warps
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  const unsigned to = sums + (row * PITCH + lane % 4 * 2) * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (row + 8 * half < rows)
#pragma unroll
      for (int j = 0; j < CHUNKS; ++j)
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + (8 * half * PITCH + 8 * j) * 4),
                     "f"(sum[4 * j + 2 * half]), "f"(sum[4 * j + 2 * half + 1])
                     : "memory");
}

// What all blocks of the cluster have left for eight columns of a row.
INLINE void collect(float (&total)[8], unsigned sums, int row, int chunk) {
  const unsigned from = sums + (row * PITCH + chunk * 8) * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) total[i] = 0;
#pragma unroll
  for (int part = 0; part < CLUSTER; ++part) {
    const unsigned there = place_in(from, part);
    const float4 low = read4_there(there), high = read4_there(there + 16);
    total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
    total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
  }
}

INLINE uint4 rounded(const float (&total)[8]) {
  unsigned out[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) out[v] = round_pair(total[2 * v], total[2 * v + 1]);
  return make_uint4(out[0], out[1], out[2], out[3]);
}

INLINE void store_rounded(bf16* to, const float (&total)[8]) {
  *reinterpret_cast<uint4*>(to) = rounded(total);
}
