// How skinny.cu makes the x2 of its second sum itself: the mix of a LoKr, and the inner product of a LoRA or LoKr.
#pragma once
#include "hopper.cuh"
#include "exchange.cuh"
#include "skinny.cuh"

constexpr int MOST_MIXED = 64;  // columns of w1

// mixed += factor * this thread's four chunks of a tile of x: chunk i lies 16 rows below the one before.
INLINE void mix_tile(float (&mixed)[32], unsigned tile, float factor) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned v[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(tile + i * 16 * ROW_BYTES + threadIdx.x * 16)
                 : "memory");
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      mixed[8 * i + 2 * j] += factor * low_half(v[j]);
      mixed[8 * i + 2 * j + 1] += factor * high_half(v[j]);
    }
  }
}

// The rounded mix to the same place of the tile x2, and to `kept`, if not null: what rows and columns there are of it.
INLINE void leave_mix(const float (&mixed)[32], unsigned tile, bf16* kept, int pitch, int rows, int columns) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    unsigned v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = round_pair(mixed[8 * i + 2 * j], mixed[8 * i + 2 * j + 1]);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(tile + i * 16 * ROW_BYTES + threadIdx.x * 16),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
    const int row = i * 16 + threadIdx.x / 8, column = (threadIdx.x % 8 ^ row % 8) * 8;  // the swizzle
    if (kept && row < rows && column < columns)
      *reinterpret_cast<uint4*>(kept + (long long)row * pitch + column) = make_uint4(v[0], v[1], v[2], v[3]);
  }
}

// sum += the products of so many stages with w, and in its last eight values those with 16 ranks of down, whose tiles of
// 64 channels lie at `down`, one behind the other, or, with 0, in the stages.
template <int COUNT>
INLINE void multiply_low_rank(float (&sum)[COUNT], int steps, unsigned down, Stage& stage) {
  settle(sum);
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    barrier_wait(stage.full(), stage.parity);
    const unsigned tile = down ? down + i * DOWN_TILE : stage.b() + W_BYTES;
    products_begin();
#pragma unroll
    for (int s = 0; s < TILE_K / 16; ++s) {
      const unsigned long long a = operand(stage.a() + s * 32, 16);
      wgmma<TILE_N, true>(sum, a, operand(stage.b() + s * 16 * ROW_BYTES, BOX));
      wgmma<16, true>(sum + COUNT - 8, a, narrow_operand(tile + s * 16 * 32));
    }
    products_commit();
    products_wait<0>();
    stage.release();
    stage.next();
  }
  settle(sum);
}

// mixed += factor * inner: 64 x 16 sums as a product leaves them, rounded; they are zeros again. What rows and columns
// there are of inner also goes to `kept`, if not null.
INLINE void mix_inner(float (&mixed)[8], float* inner, float factor, bf16* kept, int pitch, int rows, int columns) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned pair = round_pair(inner[2 * i], inner[2 * i + 1]);
    mixed[2 * i] += factor * low_half(pair);
    mixed[2 * i + 1] += factor * high_half(pair);
    inner[2 * i] = inner[2 * i + 1] = 0;
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i % 2 * 8, column = threadIdx.x % 4 * 2 + i / 2 * 8;
    if (kept && row < rows && column < columns)
      *reinterpret_cast<unsigned*>(kept + (long long)row * pitch + column) = pair;
  }
}

// sum += factor * (inner @ up): inner is 64 x 16 sums as a product leaves them, up 16 rows of a tile in shared memory.
// Each value is two of bf16, so that next to nothing of it is lost: the blocks of a cluster have parts of inner, and
// rounding each would be as many errors. The whole is rounded by who writes it.
INLINE void multiply_inner(float* sum, const float* inner, float factor, unsigned up) {
  unsigned high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = factor * inner[2 * i], b = factor * inner[2 * i + 1];
    high[i] = round_pair(a, b);
    low[i] = round_pair(a - low_half(high[i]), b - high_half(high[i]));
  }
  products_begin();
  wgmma_own<TILE_N>(sum, high, operand(up, BOX));
  wgmma_own<TILE_N>(sum, low, operand(up, BOX));
  products_commit();
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" ::"r"(high[i]), "r"(low[i]));  // they are read until here
}
