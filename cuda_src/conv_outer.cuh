// The gradient of a convolution's weight as an implicit GEMM of bf16, over the positions of a split.
//
// VEC_A, VEC_B as in conv_gather.cuh.
#pragma once
#include "conv_mma.cuh"

// Stages the tiles of conv_dw: both operands lie across, A [position][tap, channel], B [position][column].
struct Outer {
  static constexpr int A_CHUNKS = TILE_M / 8, A_PASS = THREADS / A_CHUNKS, A_COUNT = TILE_K / A_PASS;
  static constexpr int B_CHUNKS = TILE_N / 8, B_PASS = THREADS / B_CHUNKS, B_COUNT = TILE_K / B_PASS;

  const Geometry& g;
  const bf16 *x, *dy;  // at the group's first channel
  int channels, columns, x_row, dy_row, n, first, past, a_at, b_at;
  Tap tap;
  Place place, start, pass;  // of a_at; where the split begins; A_PASS positions

  INLINE Outer(const Geometry& g, const bf16* x, const bf16* dy, int channels, int columns, int x_row, int dy_row,
               int m0, int n0, int first, int past)
      : g(g), x(x), dy(dy), channels(channels), columns(columns), x_row(x_row), dy_row(dy_row), first(first),
        past(past) {
    tap = Tap::of(m0 + threadIdx.x % A_CHUNKS * 8, channels, g);
    n = n0 + threadIdx.x % B_CHUNKS * 8;
    start = Place::of(first + threadIdx.x / A_CHUNKS, g);
    pass = Place::of(A_PASS, g);
    begin();
  }

  INLINE void begin() {
    place = start;
    a_at = first + threadIdx.x / A_CHUNKS, b_at = first + threadIdx.x / B_CHUNKS;
  }

  INLINE void operator()(unsigned a_tile, unsigned b_tile) {
    if (a_at - int(threadIdx.x / A_CHUNKS) >= past) {  // the next group of a shared weight; the same for all threads
      x += channels, dy += columns;
      begin();
    }
#pragma unroll
    for (int r = 0; r < A_COUNT; ++r) {
      const unsigned dst = a_tile + swizzled<A_CHUNKS>(threadIdx.x / A_CHUNKS + r * A_PASS, threadIdx.x % A_CHUNKS);
      if (VEC_A == 8) {
        const int pixel = a_at < past ? pixel_read(place, tap, g) : -1;
        copy_async(dst, pixel < 0 ? x : x + (long long)pixel * x_row + tap.channel, pixel >= 0);
      } else {
        Chunk v;
        Tap t = tap;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int pixel = a_at < past ? pixel_read(place, t, g) : -1;
          v.at[e] = pixel < 0 ? bf16{0} : x[(long long)pixel * x_row + t.channel];
          t.forward(1, channels, g);
        }
        store_chunk(dst, v);
      }
      a_at += A_PASS;
      place.add(pass, g);
    }
#pragma unroll
    for (int r = 0; r < B_COUNT; ++r) {
      const unsigned dst = b_tile + swizzled<B_CHUNKS>(threadIdx.x / B_CHUNKS + r * B_PASS, threadIdx.x % B_CHUNKS);
      const bf16* src = dy + (long long)b_at * dy_row + n;
      if (VEC_B == 8) {
        const bool valid = b_at < past && n < columns;
        copy_async(dst, valid ? src : dy, valid);
      } else {
        Chunk v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.at[e] = b_at < past && n + e < columns ? src[e] : bf16{0};
        store_chunk(dst, v);
      }
      b_at += B_PASS;
    }
  }
};

INLINE void outer_product(const bf16* x, const bf16* dy, const float* scale, float* dw, const Geometry& g,
                          int positions, int inner, int outer, int groups, int shared, int span) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int rows = g.kernel[0] * g.kernel[1] * g.kernel[2] * inner;
  const int m_tiles = (rows - 1) / TILE_M + 1, n_tiles = (outer - 1) / TILE_N + 1, own = shared ? 1 : groups;
  int index = blockIdx.x;  // the tiles of one split run side by side: they read the same positions
  const int n0 = index % n_tiles * TILE_N, m0 = (index /= n_tiles) % m_tiles * TILE_M;
  const int group = (index /= m_tiles) % own, split = index / own;
  const int first = split * span, past = min(positions, first + span);

  Sums sums;
  Outer load(g, x + group * inner, dy + group * outer, inner, outer, groups * inner, groups * outer, m0, n0, first,
             past);
  const int steps = (past - first - 1) / TILE_K + 1;
  pipeline<true, true>(sums, load, shared ? steps * groups : steps, shared_address(memory));

  const float factor = scale ? *scale : 1;
  const int row_length = own * outer;
  const bool pair = outer % 2 == 0;
  dw += (long long)split * rows * row_length + group * outer;
  for_pairs(sums, [&](int row, int column, float a, float b) {
    const int m = m0 + row, j = n0 + column;
    if (m >= rows || j >= outer) return;
    put(dw + (long long)m * row_length + j, a * factor, b * factor, j + 1 < outer, pair);
  });
}
