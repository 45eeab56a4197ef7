// Convolutions of f32 and f64: the same walks as on tensor cores, with one plain fused multiply-add after the other.
//
// One block of 16 x 16 threads makes a TILE_M x TILE_N tile, 4 x 4 sums a thread, strided by 16 so that neighbours read
// neighbouring words. For checking, not for speed.
#pragma once
#include "conv_term.cuh"

constexpr int TILE_K = 16, THREADS = 256, SIDE = 16;
constexpr int PER_M = TILE_M / SIDE, PER_N = TILE_N / SIDE;

using Tile = A[TILE_K][TILE_M + 1];  // [k][m] or [k][n]; one more, for the banks
static_assert(TILE_M == TILE_N && TILE_M * TILE_K == 4 * THREADS, "the staging below moves 4 elements a thread");

using Sums = A[PER_M][PER_N];

INLINE void clear(Sums& sums) {
#pragma unroll
  for (int i = 0; i < PER_M; ++i)
#pragma unroll
    for (int j = 0; j < PER_N; ++j) sums[i][j] = 0;
}

INLINE void multiply(Sums& sums, const Tile& a, const Tile& b) {
  const int m = threadIdx.x / SIDE, n = threadIdx.x % SIDE;
#pragma unroll
  for (int k = 0; k < TILE_K; ++k)
#pragma unroll
    for (int i = 0; i < PER_M; ++i)
#pragma unroll
      for (int j = 0; j < PER_N; ++j) sums[i][j] += a[k][m + i * SIDE] * b[k][n + j * SIDE];
}

// The axes of the arguments as in conv_gather.cuh.
template <bool BACK>
INLINE void gather_product(const Sources& from, const A* scale, const T* add, const T* bias, const T*, T* out,
                           const Geometry& g, int positions) {
  const auto [inner, outer, groups, shared, single] = from.own;
  const T *in = from.in, *w = from.w;
  __shared__ Tile a_tile, b_tile;
  const int m_tiles = (positions - 1) / TILE_M + 1, n_tiles = (outer - 1) / TILE_N + 1;
  const int n0 = blockIdx.x % n_tiles * TILE_N, m0 = blockIdx.x / n_tiles % m_tiles * TILE_M;
  const int group = blockIdx.x / n_tiles / m_tiles;
  const int w_columns = BACK ? inner : outer, w_row = shared ? w_columns : groups * w_columns;
  const int taps = g.kernel[0] * g.kernel[1] * g.kernel[2], in_row = groups * inner;
  in += group * inner;
  if (!shared) w += group * w_columns;

  const int k = threadIdx.x % TILE_K, line = threadIdx.x / TILE_K;        // A, and w's rows if BACK: 4 lines 16 apart
  const int column = threadIdx.x % TILE_N, depth = threadIdx.x / TILE_N;  // w's columns: 4 depths 4 apart
  Tap tap = Tap::of(k, inner, g);
  Rows<4, BACK> rows;
#pragma unroll
  for (int r = 0; r < 4; ++r) rows.start(r, m0 + line + r * 16, positions, g);

  Sums sums;
  clear(sums);
  for (int step = 0; step < taps * inner; step += TILE_K) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int pixel = rows.pixel(r, tap, g);
      a_tile[k][line + r * 16] = pixel < 0 ? A(0) : widen(in[(long long)pixel * in_row + tap.channel]);
      if (BACK) {
        const int n = n0 + line + r * 16;
        const bool valid = n < outer && !tap.past(g);
        b_tile[k][line + r * 16] = valid ? widen(w[(long long)(tap.index * outer + n) * w_row + tap.channel]) : A(0);
      } else {
        const int row = step + depth + r * 4, n = n0 + column;
        const bool valid = n < outer && row < taps * inner;
        b_tile[depth + r * 4][column] = valid ? widen(w[(long long)row * w_row + n]) : A(0);
      }
    }
    tap.forward(TILE_K, inner, g);
    __syncthreads();
    multiply(sums, a_tile, b_tile);
    __syncthreads();
  }

  const A factor = scale ? *scale : A(1);
#pragma unroll
  for (int i = 0; i < PER_M; ++i)
#pragma unroll
    for (int j = 0; j < PER_N; ++j) {
      const int p = m0 + threadIdx.x / SIDE + i * SIDE, n = n0 + threadIdx.x % SIDE + j * SIDE;
      if (p >= positions || n >= outer) continue;
      const long long at = (long long)p * (groups * outer) + group * outer + n;
      A sum = sums[i][j] * factor;
      if (add) sum += widen(add[at]);
      if (bias) sum += widen(bias[group * outer + n]);
      out[at] = narrow(sum);
    }
}

INLINE void outer_product(const T* x, const T* dy, const A* scale, A* dw, const Geometry& g, int positions, int inner,
                          int outer, int groups, int shared, int span) {
  __shared__ Tile a_tile, b_tile;
  const int taps_inner = g.kernel[0] * g.kernel[1] * g.kernel[2] * inner;
  const int m_tiles = (taps_inner - 1) / TILE_M + 1, n_tiles = (outer - 1) / TILE_N + 1, own = shared ? 1 : groups;
  int index = blockIdx.x;
  const int n0 = index % n_tiles * TILE_N, m0 = (index /= n_tiles) % m_tiles * TILE_M;
  const int group = (index /= m_tiles) % own, split = index / own;
  const int first = split * span, past = min(positions, first + span);
  x += group * inner, dy += group * outer;

  const int column = threadIdx.x % TILE_N, depth = threadIdx.x / TILE_N;  // of both tiles: 4 positions 4 apart
  const Tap tap = Tap::of(m0 + column, inner, g);
  const Place pass = Place::of(4, g);

  Sums sums;
  clear(sums);
  for (int q = 0; q < (shared ? groups : 1); ++q) {
    Place place = Place::of(first + depth, g);
    for (int step = first; step < past; step += TILE_K) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int p = step + depth + r * 4, n = n0 + column;
        const int pixel = p < past ? pixel_read(place, tap, g) : -1;
        a_tile[depth + r * 4][column] =
            pixel < 0 ? A(0) : widen(x[(long long)pixel * (groups * inner) + q * inner + tap.channel]);
        const bool valid = p < past && n < outer;
        b_tile[depth + r * 4][column] = valid ? widen(dy[(long long)p * (groups * outer) + q * outer + n]) : A(0);
        place.add(pass, g);
      }
      __syncthreads();
      multiply(sums, a_tile, b_tile);
      __syncthreads();
    }
  }

  const A factor = scale ? *scale : A(1);
  dw += (long long)split * taps_inner * (own * outer) + group * outer;
#pragma unroll
  for (int i = 0; i < PER_M; ++i)
#pragma unroll
    for (int j = 0; j < PER_N; ++j) {
      const int m = m0 + threadIdx.x / SIDE + i * SIDE, n = n0 + threadIdx.x % SIDE + j * SIDE;
      if (m < taps_inner && n < outer) dw[(long long)m * (own * outer) + n] = sums[i][j] * factor;
    }
}
