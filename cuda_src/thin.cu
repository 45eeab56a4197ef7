// Both gradients of a thin product y = x * w from one read of g, and with SCALED=1 also those of c * z beside it:
//
//   dx[p, r] = sum over n of g[p, n] * w[r, n]        dw[r, n] = sum over p of x[p, r] * g[p, n]
//   gc[p, n] = c[n] * g[p, n]                         dc[n]    = sum over p of g[p, n] * z[p, n]
//
// g and z are as wide as a layer and read from memory once; x and w are RANKS wide. A block owns CHUNK columns and a
// strip of rows, which it walks down tile by tile through a ring of stages. It keeps its part of dw in registers and
// adds up its part of dx for each tile; `thin_sum` adds the parts in a fixed order.
//
// variants bf16: RANKS=16 SLICES=5 SCALED=0 | RANKS=16 SLICES=6 SCALED=0
// variants bf16: RANKS=32 SLICES=5 SCALED=0 | RANKS=32 SLICES=6 SCALED=0
// variants bf16: RANKS=16 SLICES=4 SCALED=1 | RANKS=16 SLICES=5 SCALED=1
// variants bf16: RANKS=32 SLICES=4 SCALED=1
#include "types.cuh"
#include "mma.cuh"
#include "exchange.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 32;
constexpr int WIDTH = 16 * SLICES, CHUNK = WARPS * WIDTH;  // columns of a warp, of a block
constexpr int ROW_CHUNKS = CHUNK / 8, X_CHUNKS = RANKS / 8;
constexpr int STAGES = SCALED ? 2 : 3;
constexpr int TILE_BYTES = ROWS * CHUNK * 2, X_BYTES = ROWS * RANKS * 2;
constexpr int STAGE = TILE_BYTES * (SCALED ? 2 : 1) + X_BYTES;
constexpr int NINES = RANKS / 8;  // products of 8 ranks

// Where 16 bytes of a tile lie: the eight rows of a matrix that is loaded at once fall on different banks.
__device__ __forceinline__ unsigned place(int row, int chunk) {
  return (row * ROW_CHUNKS + (chunk ^ (row & 7))) * 16;
}

// One tile of a (rows, columns) matrix, from `row` and `column` on; zeros outside. Eight threads a row, so that
// addresses differ by constants.
__device__ __forceinline__ void copy_tile(unsigned to, const bf16* from, long long row, long long rows, int column,
                                          int columns) {
  constexpr int STEP = THREADS / 8;
  const int r = threadIdx.x / 8, chunk = threadIdx.x % 8, n = column + chunk * 8;
  const bf16* source = from + (row + r) * columns + n;
#pragma unroll
  for (int down = 0; down < ROWS; down += STEP)
#pragma unroll
    for (int right = 0; right < ROW_CHUNKS; right += 8) {
      const bool inside = row + r + down < rows && n + right * 8 < columns;
      copy_async(to + place(r, chunk) + (down * ROW_CHUNKS + right) * 16,
                 inside ? source + (long long)down * columns + right * 8 : from, inside);
    }
}

// The sum of four lanes that hold the same columns of different rows.
__device__ __forceinline__ float over_rows(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Grid (columns / CHUNK, strips of `span` tiles).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(thin)(const bf16* g,       // (rows, columns)
               const bf16* x,       // (rows, ranks)
               const bf16* w,       // (ranks, columns)
               const float* c,      // (columns), with SCALED
               const bf16* z,       // (rows, columns), with SCALED
               const float* scale,  // (1,), or null for 1: of dx where there is one chunk
               float* dx_parts,     // (gridDim.x, rows, ranks)
               bf16* dx,            // (rows, ranks), written where there is one chunk
               float* dw,           // (gridDim.y, ranks, columns)
               bf16* gc,            // (rows, columns), with SCALED
               float* dc,           // (gridDim.y, columns), with SCALED
               long long rows, int columns, int ranks, int span) {
  extern __shared__ char memory[];
  __shared__ float parts[WARPS][ROWS][RANKS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * CHUNK, own = column + warp * WIDTH;  // the first column of the block, of the warp
  const long long tiles = (rows + ROWS - 1) / ROWS, first = (long long)blockIdx.y * span;
  const int count = int(min((long long)span, tiles - first));
  const unsigned base = shared_address(memory);

  // What the warp needs of w for its columns, as the second operand of g @ w^T, and of c.
  unsigned w_own[SLICES][NINES][2];
  float factor[SCALED ? SLICES : 1][4], dot[SCALED ? SLICES : 1][2] = {};
#pragma unroll
  for (int q = 0; q < SLICES; ++q) {
    const int n = own + q * 16 + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < NINES; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = j * 8 + lane / 4, at = n + half * 8;
        w_own[q][j][half] =
            r < ranks && at < columns ? *reinterpret_cast<const unsigned*>(w + (long long)r * columns + at) : 0;
      }
    if (SCALED)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = n + i / 2 * 8 + i % 2;
        factor[q][i] = at < columns ? c[at] : 0;
      }
  }

  auto load = [&](int t) {
    if (t < count) {
      const long long row = (first + t) * ROWS;
      const unsigned to = base + t % STAGES * STAGE;
      copy_tile(to, g, row, rows, column, columns);
      if (SCALED) copy_tile(to + TILE_BYTES, z, row, rows, column, columns);
      for (int at = threadIdx.x; at < ROWS * X_CHUNKS; at += THREADS) {
        const int r = at / X_CHUNKS, chunk = at % X_CHUNKS;
        const bool inside = row + r < rows && chunk * 8 < ranks;
        copy_async(to + STAGE - X_BYTES + at * 16, x + (inside ? (row + r) * ranks + chunk * 8 : 0), inside);
      }
    }
    commit_copies();  // also an empty group, so that they can be counted
  };

  float sum[SLICES][2][RANKS / 16][4] = {};  // dw: of 16 columns, two of eight; of ranks, sixteen at a time
#pragma unroll
  for (int t = 0; t < STAGES - 1; ++t) load(t);
  for (int t = 0; t < count; ++t) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    load(t + STAGES - 1);
    const long long row = (first + t) * ROWS;
    const unsigned tile = base + t % STAGES * STAGE, x_tile = tile + STAGE - X_BYTES;
#pragma unroll 1
    for (int part = 0; part < ROWS / 16; ++part) {
      unsigned turned[RANKS / 16][4];  // x^T of these rows
#pragma unroll
      for (int k = 0; k < RANKS / 16; ++k) {
        const int r = part * 16 + lane / 16 * 8 + lane % 8, chunk = k * 2 + lane / 8 % 2;
        load_matrices<true>(turned[k], x_tile + (r * X_CHUNKS + chunk) * 16);
      }
      float thin[NINES][4] = {};
#pragma unroll
      for (int q = 0; q < SLICES; ++q) {
        const int r = part * 16 + lane % 16, chunk = warp * (WIDTH / 8) + q * 2 + lane / 16;
        const unsigned at = place(r, chunk);
        unsigned a[4], b[4];
        load_matrices<false>(a, tile + at);  // rows 0 and 8 of columns 0, then of columns 8
        load_matrices<true>(b, tile + at);
#pragma unroll
        for (int j = 0; j < NINES; ++j) mma(thin[j], a, w_own[q][j][0], w_own[q][j][1]);
#pragma unroll
        for (int k = 0; k < RANKS / 16; ++k) {
          mma(sum[q][0][k], turned[k], b[0], b[1]);
          mma(sum[q][1][k], turned[k], b[2], b[3]);
        }
        if (SCALED) {
          unsigned beside[4];
          load_matrices<true>(beside, tile + TILE_BYTES + at);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            dot[q][i / 2] += low_half(b[i]) * low_half(beside[i]) + high_half(b[i]) * high_half(beside[i]);
          // Of a[], 0 and 2 are one row, 1 and 3 another eight further down; 2 and 3 eight columns on.
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[i] = round_pair(factor[q][i / 2 * 2] * low_half(a[i]), factor[q][i / 2 * 2 + 1] * high_half(a[i]));
          exchange(a);
          const int piece = lane % 4, n = own + q * 16 + piece / 2 * 8;
          const long long to = row + part * 16 + piece % 2 * 8 + lane / 4;
          if (to < rows && n < columns)
            *reinterpret_cast<uint4*>(gc + to * columns + n) = make_uint4(a[0], a[1], a[2], a[3]);
        }
      }
#pragma unroll
      for (int j = 0; j < NINES; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          parts[warp][part * 16 + lane / 4 + i / 2 * 8][j * 8 + lane % 4 * 2 + i % 2] = thin[j][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * RANKS; i += THREADS) {
      const int r = i / RANKS, k = i % RANKS;
      float total = 0;
#pragma unroll
      for (int v = 0; v < WARPS; ++v) total += parts[v][r][k];
      if (row + r >= rows || k >= ranks) continue;
      if (gridDim.x == 1)
        dx[(row + r) * ranks + k] = narrow((scale ? *scale : 1.0f) * total);
      else
        dx_parts[((long long)blockIdx.x * rows + row + r) * ranks + k] = total;
    }
  }

#pragma unroll
  for (int q = 0; q < SLICES; ++q)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < RANKS / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int r = k * 16 + lane / 4 + i / 2 * 8, n = own + q * 16 + half * 8 + lane % 4 * 2;
          if (r < ranks && n < columns) {
            const Pack<float, 2> both = {{sum[q][half][k][i], sum[q][half][k][i + 1]}};
            *reinterpret_cast<Pack<float, 2>*>(dw + ((long long)blockIdx.y * ranks + r) * columns + n) = both;
          }
        }
      if (SCALED) {
        const float total = over_rows(dot[q][half]);
        const int n = own + q * 16 + half * 8 + lane / 4;
        if (lane % 4 == 0 && n < columns) dc[(long long)blockIdx.y * columns + n] = total;
      }
    }
}

// The sums of the parts, in a fixed order: dx = scale * sum, rounded; dw = scale * sum; dc = sum. The first
// `thin_blocks` blocks do dx, an element a thread (none where it has one part: then it is written already); the others
// dw and dc, whose elements are shared by `shares` threads each, for they may be few and have many parts.
extern "C" __global__ void __launch_bounds__(256)
    NAME(thin_sum)(const float* dx_parts, const float* dw_parts, const float* dc_parts,  // dc_parts: null without c
                   const float* scale,                                                   // (1,), or null for 1
                   bf16* dx, float* dw, float* dc, long long rows, int columns, int ranks, int chunks, int strips,
                   int thin_blocks, int shares) {
  __shared__ float all[256];
  const bool thin = blockIdx.x < thin_blocks;
  const int across = thin ? 256 : 256 / shares, share = threadIdx.x / across;
  const long long i = (long long)(blockIdx.x - (thin ? 0 : thin_blocks)) * across + threadIdx.x % across;
  const long long wide = (long long)ranks * columns, own = thin ? rows * ranks : wide;
  const bool scales = !thin && i >= own;  // an element of dc
  const float* from = thin ? dx_parts + i : scales ? dc_parts + (i - wide) : dw_parts + i;
  const long long step = scales ? columns : own;
  const bool inside = i < own || (scales && dc_parts && i < wide + columns);
  const int count = !inside ? 0 : thin ? chunks : strips;
  float total = 0;
  for (int s = share; s < count; s += 8 * (256 / across)) {  // eight loads under way at a time
    float next[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int at = s + j * (256 / across);
      next[j] = at < count ? from[at * step] : 0;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) total += next[j];
  }
  if (!thin && shares > 1) {
    all[threadIdx.x] = total;
    __syncthreads();
    for (int s = 1; s < shares && !share; ++s) total += all[s * across + threadIdx.x];
  }
  if (share || !inside) return;
  const float factor = scale ? *scale : 1.0f;
  if (thin)
    dx[i] = narrow(factor * total);
  else if (scales)
    dc[i - wide] = total;
  else
    dw[i] = factor * total;
}
