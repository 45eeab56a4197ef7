// A weight with a factored change added, rounded once, in one pass over the weight:
//
//   out = weight + scale * (a1 @ b1)                      HADAMARD=0: LoCon, also with a Tucker core, folded into a1
//   out = weight + scale * (a1 @ b1) * (a2 @ b2)          HADAMARD=1: LoHa
//
// In the `wide` kernel a1 and a2 are f32 and multiplied as two bf16 each, high and low, which keeps 16 of their 24
// bits.
//
// A warp owns 32 columns and a strip of rows, with its part of b in registers; the weight passes through, AHEAD tiles
// of 16 rows under way before the one that is added to, and a comes from L1, where the other warps of the block have
// brought it. No warp waits for another. A product's inner steps and columns may be named in any order: in the one
// chosen here a lane reads a row of a in one piece, and its sums lie in eight neighbouring columns, 16 bytes of the
// weight.
//
// variants bf16: RANKS=16 HADAMARD=0 | RANKS=32 HADAMARD=0 | RANKS=64 HADAMARD=0
// variants bf16: RANKS=16 HADAMARD=1 | RANKS=32 HADAMARD=1 | RANKS=64 HADAMARD=1
#include "types.cuh"
#include "mma.cuh"
#include "exchange.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, COLUMNS = 32 * WARPS, AHEAD = 2;
constexpr int PAIRS = HADAMARD ? 2 : 1;
constexpr int BLOCKS = (RANKS == 16   ? 6
                        : RANKS == 32 ? 5
                                      : 4) -
                       HADAMARD;                          // on a multiprocessor: the grid counts on it
constexpr int RUN = RANKS == 16 ? 4 : 8;                  // values of a that a lane reads at a time
constexpr int RUNS = RANKS / (4 * RUN), STEPS = RUN / 4;  // of a row; products of a run

// RUN values of a row of a as pairs, in `high` and, if they are f32, what that leaves out in `low`.
__device__ __forceinline__ void split_run(const bf16* from, unsigned (&high)[RUN / 2], unsigned (&)[RUN / 2]) {
  const auto v = *reinterpret_cast<const Pack<unsigned, RUN / 2>*>(from);
#pragma unroll
  for (int i = 0; i < RUN / 2; ++i) high[i] = v.at[i];
}
__device__ __forceinline__ void split_run(const float* from, unsigned (&high)[RUN / 2], unsigned (&low)[RUN / 2]) {
#pragma unroll
  for (int q = 0; q < RUN / 4; ++q) {
    const float4 v = reinterpret_cast<const float4*>(from)[q];
    const float pairs[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned both = round_pair(pairs[i][0], pairs[i][1]);
      high[q * 2 + i] = both;
      low[q * 2 + i] = round_pair(pairs[i][0] - low_half(both), pairs[i][1] - high_half(both));
    }
  }
}

// Two values of a column, k and k + 1, as an operand.
__device__ __forceinline__ unsigned load_right(const bf16* b, int k, int n, int ranks, int columns) {
  const unsigned low = n < columns && k < ranks ? b[(long long)k * columns + n].bits : 0;
  const unsigned high = n < columns && k + 1 < ranks ? b[(long long)(k + 1) * columns + n].bits : 0;
  return low | high << 16;
}

// 16 bytes that are read once, past L1. The 256 of a block's row come from memory together: its warps read 64 each, at
// times of their own.
__device__ __forceinline__ uint4 read_once(const bf16* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

template <class Left>
__device__ __forceinline__ void add_change(const bf16* __restrict__ weight, const Left* __restrict__ a1,
                                           const bf16* __restrict__ b1, const Left* __restrict__ a2,
                                           const bf16* __restrict__ b2, const float* scale, bf16* __restrict__ out,
                                           long long rows, int columns, int ranks, int pitch, int span) {
  constexpr int PARTS = sizeof(Left) == 4 ? 2 : 1;
  const int lane = threadIdx.x % 32, quad = lane % 4, row_of = lane / 4;
  const int column = blockIdx.x * COLUMNS + threadIdx.x / 32 * 32;
  if (column >= columns) return;
  const int own = column + quad * 8;  // the first of eight columns that the lane reads and writes
  const long long first = (long long)blockIdx.y * span * 16;
  const int tiles = int(min((long long)span, (rows - first + 15) / 16));

  uint4 v[AHEAD + 1][2];
  auto read = [&](int tile, uint4(&to)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long long row = first + tile * 16 + half * 8 + row_of;
      to[half] = uint4{};
      if (tile < tiles && row < rows && own < columns) to[half] = read_once(weight + row * columns + own);
    }
  };
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) read(i, v[i]);

  // Place k of step s of run c, and place n of piece j: see above.
  unsigned right[PAIRS][RUNS][STEPS][4][2];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
#pragma unroll
    for (int c = 0; c < RUNS; ++c)
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int k = (c * 4 + quad) * RUN + s * 4 + half * 2, n = column + row_of / 2 * 8 + j * 2 + row_of % 2;
            right[p][c][s][j][half] = load_right(p ? b2 : b1, k, n, ranks, columns);
          }
  const float factor = *scale;

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    read(tile + AHEAD, v[AHEAD]);
    float sum[PAIRS][4][4] = {};
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
#pragma unroll
      for (int c = 0; c < RUNS; ++c) {
        unsigned left[2][2][RUN / 2] = {};  // of rows 0 to 7 and 8 to 15; high and low
        const int k = (c * 4 + quad) * RUN;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const long long row = min(first + tile * 16 + half * 8 + row_of, rows - 1);  // past the last: not written
          if (k < pitch) split_run((p ? a2 : a1) + row * pitch + k, left[half][0], left[half][1]);
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
          for (int part = 0; part < PARTS; ++part) {
            const unsigned a[4] = {left[0][part][s * 2], left[1][part][s * 2], left[0][part][s * 2 + 1],
                                   left[1][part][s * 2 + 1]};
#pragma unroll
            for (int j = 0; j < 4; ++j) mma(sum[p][j], a, right[p][c][s][j][0], right[p][c][s][j][1]);
          }
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned before[4] = {v[0][half].x, v[0][half].y, v[0][half].z, v[0][half].w};
      unsigned after[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float change[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = half * 2 + i;
          change[i] = factor * (HADAMARD ? sum[0][j][at] * sum[PAIRS - 1][j][at] : sum[0][j][at]);
        }
        after[j] = round_pair(low_half(before[j]) + change[0], high_half(before[j]) + change[1]);
      }
      const long long row = first + tile * 16 + half * 8 + row_of;
      if (row < rows && own < columns)
        *reinterpret_cast<uint4*>(out + row * columns + own) = make_uint4(after[0], after[1], after[2], after[3]);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) v[i][0] = v[i + 1][0], v[i][1] = v[i + 1][1];
  }
}

// Grid (columns / 128, strips of `span` tiles of 16 rows).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    NAME(factored_changed)(const bf16* weight,  // (rows, columns); rows are those of all taps, columns a multiple of 8
                           const bf16* a1,      // (rows, pitch), a multiple of 8: ranks, then zeros
                           const bf16* b1,      // (ranks, columns)
                           const bf16* a2,      // like a1, with HADAMARD
                           const bf16* b2,      // like b1, with HADAMARD
                           const float* scale,  // (1,)
                           bf16* out, long long rows, int columns, int ranks, int pitch, int span) {
  add_change(weight, a1, b1, a2, b2, scale, out, rows, columns, ranks, pitch, span);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    NAME(factored_changed_wide)(const bf16* weight, const float* a1, const bf16* b1, const float* a2, const bf16* b2,
                                const float* scale, bf16* out, long long rows, int columns, int ranks, int pitch,
                                int span) {
  add_change(weight, a1, b1, a2, b2, scale, out, rows, columns, ranks, pitch, span);
}
