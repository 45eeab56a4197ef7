// A weight with a factored change added, rounded once, in one pass over the weight:
//
//   out = weight + scale * (a1 @ b1)                      HADAMARD=0: LoCon with a Tucker core, folded into a1
//   out = weight + scale * (a1 @ b1) * (a2 @ b2)          HADAMARD=1: LoHa
//
// In the `wide` kernel a1 and a2 are f32 and multiplied as two bf16 each, high and low, which keeps 16 of their 24 bits. A
// block makes 128 rows of 256 columns: a lies in shared memory, the b of a warp's 32 columns in registers, the weight passes
// through.
//
// variants bf16: RANKS=16 HADAMARD=0 | RANKS=32 HADAMARD=0 | RANKS=64 HADAMARD=0
// variants bf16: RANKS=16 HADAMARD=1 | RANKS=32 HADAMARD=1 | RANKS=64 HADAMARD=1
#include "types.cuh"
#include "mma.cuh"
#include "exchange.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 128, COLUMNS = 32 * WARPS;
constexpr int STEPS = RANKS / 16, PAIRS = HADAMARD ? 2 : 1;
constexpr int PITCH = RANKS * 2 + 16;  // bytes of a row: eight rows one after the other fall on different banks
constexpr int PLANE = ROWS * PITCH;

// One factor's rows into shared memory, as high and low parts if it is wide; zeros outside.
template <bool WIDE, class Left>
__device__ __forceinline__ void load_left(char* to, const Left* a, long long row, long long rows, int ranks) {
  for (int at = threadIdx.x; at < ROWS * RANKS; at += THREADS) {
    const int r = at / RANKS, k = at % RANKS;
    const bool inside = row + r < rows && k < ranks;
    const float value = inside ? widen(a[(row + r) * ranks + k]) : 0;
    const bf16 high = round<bf16>(value);
    *reinterpret_cast<bf16*>(to + r * PITCH + k * 2) = high;
    if (WIDE) *reinterpret_cast<bf16*>(to + PLANE + r * PITCH + k * 2) = round<bf16>(value - widen(high));
  }
}

// Two values of a column, k and k + 1, as an operand.
__device__ __forceinline__ unsigned load_right(const bf16* b, int k, int n, int ranks, int columns) {
  const unsigned low = n < columns && k < ranks ? b[(long long)k * columns + n].bits : 0;
  const unsigned high = n < columns && k + 1 < ranks ? b[(long long)(k + 1) * columns + n].bits : 0;
  return low | high << 16;
}

template <class Left>
__device__ __forceinline__ void add_change(const bf16* __restrict__ weight, const Left* a1, const bf16* b1, const Left* a2,
                                           const bf16* b2, const float* scale, bf16* __restrict__ out, long long rows,
                                           int columns, int ranks) {
  constexpr bool WIDE = sizeof(Left) == 4;
  constexpr int PARTS = WIDE ? 2 : 1;
  extern __shared__ char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * COLUMNS + warp * 32;
  const long long first = blockIdx.y * (long long)ROWS;
  load_left<WIDE>(memory, a1, first, rows, ranks);
  if (HADAMARD) load_left<WIDE>(memory + PARTS * PLANE, a2, first, rows, ranks);

  unsigned right[PAIRS][STEPS][4][2];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          right[p][k][n][half] = load_right(p ? b2 : b1, k * 16 + half * 8 + lane % 4 * 2, column + n * 8 + lane / 4, ranks, columns);
  const float factor = *scale;
  __syncthreads();

  const int own = column + lane % 4 * 8;  // the first of eight columns that the lane reads and writes
  uint4 now[2], next[2];
  auto read = [&](int tile, uint4(&v)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long long row = first + tile * 16 + half * 8 + lane / 4;
      v[half] = row < rows && own < columns ? *reinterpret_cast<const uint4*>(weight + row * columns + own) : uint4{};
    }
  };
  read(0, now);
#pragma unroll 1
  for (int tile = 0; tile < ROWS / 16; ++tile) {
    if (tile + 1 < ROWS / 16) read(tile + 1, next);
    float sum[PAIRS][4][4] = {};
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          unsigned a[4];
          const char* plane = memory + (p * PARTS + part) * PLANE;
          load_matrices<false>(a, shared_address(plane) + (tile * 16 + lane % 16) * PITCH + (k * 2 + lane / 16) * 16);
#pragma unroll
          for (int n = 0; n < 4; ++n) mma(sum[p][n], a, right[p][k][n][0], right[p][k][n][1]);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned v[4] = {now[half].x, now[half].y, now[half].z, now[half].w};
      exchange(v);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float change[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = half * 2 + i;
          change[i] = factor * (HADAMARD ? sum[0][n][at] * sum[PAIRS - 1][n][at] : sum[0][n][at]);
        }
        v[n] = round_pair(low_half(v[n]) + change[0], high_half(v[n]) + change[1]);
      }
      exchange(v);
      const long long row = first + tile * 16 + half * 8 + lane / 4;
      if (row < rows && own < columns)
        *reinterpret_cast<uint4*>(out + row * columns + own) = make_uint4(v[0], v[1], v[2], v[3]);
    }
    now[0] = next[0], now[1] = next[1];
  }
}

// Grid (columns / 256, rows / 128).
extern "C" __global__ void __launch_bounds__(THREADS, RANKS == 64 ? 1 : 2)
    NAME(factored_changed)(const bf16* weight,  // (rows, columns); rows are those of all taps
                           const bf16* a1,      // (rows, ranks)
                           const bf16* b1,      // (ranks, columns)
                           const bf16* a2,      // like a1, with HADAMARD
                           const bf16* b2,      // like b1, with HADAMARD
                           const float* scale,  // (1,)
                           bf16* out, long long rows, int columns, int ranks) {
  add_change(weight, a1, b1, a2, b2, scale, out, rows, columns, ranks);
}

extern "C" __global__ void __launch_bounds__(THREADS, RANKS == 64 ? 1 : 2)
    NAME(factored_changed_wide)(const bf16* weight, const float* a1, const bf16* b1, const float* a2, const bf16* b2,
                                const float* scale, bf16* out, long long rows, int columns, int ranks) {
  add_change(weight, a1, b1, a2, b2, scale, out, rows, columns, ranks);
}
