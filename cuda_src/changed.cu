// A weight with a factored change added, rounded once, in one pass over the weight:
//
//   out[t] = weight[t] + scale * (a1[t] @ b1)                     HADAMARD=0: LoCon
//   out[t] = weight[t] + scale * (a1[t] @ b1) * (a2[t] @ b2)      HADAMARD=1: LoHa
//
// With CORE=1, their Tucker forms, a[t] is down @ core[t]. Its f32 sums are multiplied as two bf16 each, high and low,
// which keeps 16 of their 24 bits.
//
// A warp owns 32 columns and a strip of tiles of 16 rows, with its part of b in registers. The weight passes through
// shared memory, AHEAD tiles under way, where a lane reads only what it has copied itself.
//
// Rows of 16 ranks of a come from L1, where the other warps of the block have brought them, a tile early, and each warp
// holds the core of the tap it is in; no warp waits for another. Longer rows (SHARED) the block copies to shared memory
// too, and meets before each tile: there is room for one tile more than are under way, so that what is overwritten is a
// tile that all warps have left. None of them waits for L2 then, and ldmatrix needs no moves between registers. Each
// warp holds its part of a core's columns, and multiplies by them for the whole block, which meets once more.
//
// A product's inner steps and columns may be named in any order. Lanes' sums lie in eight neighbouring columns, 16
// bytes of the weight; of 16 ranks a lane reads its values of a row of a, and of b, in one piece, and those of a core's
// product are the lane's own values of a.
//
// A multiprocessor holds as many BLOCKS as the registers of their lanes allow, and so has 40 KB or more of the weight
// under way.
//
// variants bf16: RANKS=16 HADAMARD=0 CORE=0 WARPS=4 AHEAD=3 BLOCKS=6
// variants bf16: RANKS=16 HADAMARD=1 CORE=0 WARPS=4 AHEAD=3 BLOCKS=5
// variants bf16: RANKS=32 HADAMARD=0 CORE=0 WARPS=4 AHEAD=4 BLOCKS=5
// variants bf16: RANKS=32 HADAMARD=1 CORE=0 WARPS=4 AHEAD=4 BLOCKS=4
// variants bf16: RANKS=64 HADAMARD=0 CORE=0 WARPS=4 AHEAD=4 BLOCKS=4
// variants bf16: RANKS=64 HADAMARD=1 CORE=0 WARPS=4 AHEAD=4 BLOCKS=3
// variants bf16: RANKS=16 HADAMARD=0 CORE=1 WARPS=4 AHEAD=3 BLOCKS=6
// variants bf16: RANKS=16 HADAMARD=1 CORE=1 WARPS=4 AHEAD=3 BLOCKS=4
// variants bf16: RANKS=32 HADAMARD=0 CORE=1 WARPS=4 AHEAD=3 BLOCKS=5
// variants bf16: RANKS=32 HADAMARD=1 CORE=1 WARPS=4 AHEAD=3 BLOCKS=4
// variants bf16: RANKS=64 HADAMARD=0 CORE=1 WARPS=4 AHEAD=4 BLOCKS=4
// variants bf16: RANKS=64 HADAMARD=1 CORE=1 WARPS=4 AHEAD=4 BLOCKS=2
#include "types.cuh"
#include "mma.cuh"
#include "exchange.cuh"

constexpr int THREADS = 32 * WARPS, COLUMNS = 32 * WARPS, PAIRS = HADAMARD ? 2 : 1;
constexpr bool SHARED = RANKS > 16;                       // the rows of a
constexpr int RUN = RANKS == 16 ? 4 : 8;                  // values of a that a lane reads at a time
constexpr int RUNS = RANKS / (4 * RUN), STEPS = RUN / 4;  // of a row; products of a run
// Of the core's columns that a warp holds: runs, and pieces of eight in each.
constexpr int OWN_RUNS = SHARED ? 1 : RUNS, OWN = SHARED && CORE ? RANKS / 8 / WARPS : RUN / 2;
static_assert(!(SHARED && CORE) || OWN * WARPS * 8 == RANKS, "the warps of a block have equal parts of a core");

// Place k of step s of run c is (c * 4 + quad) * RUN + s * 4 and the next three, on both sides of a product. Of a left
// side that is in shared memory it is (c * STEPS + s) * 16 + quad * 2, the next, and those eight further on.
using Left = unsigned[2][RUNS][RUN / 2];  // of rows 0 to 7 and 8 to 15, a lane's values in pairs
template <int PIECES>
using Right = unsigned[RUNS][STEPS][PIECES][2];  // of pieces of eight columns

// Up to 16 rows of the weight, all of one tap.
struct Tile {
  int row, end;  // the first, and where the tap ends

  __device__ __forceinline__ void next(int inputs) {
    row = min(row + 16, end);
    if (row == end) end += inputs;
  }
};

// Not __restrict__: what may be read at any time is read where it is multiplied, and waited for there.
__device__ __forceinline__ void load_left(Left& to, const bf16* a, Tile tile, int inputs, int pitch) {
  const int quad = threadIdx.x % 4, first = tile.row - tile.end + inputs;  // of the tap's rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(first + half * 8 + int(threadIdx.x % 32 / 4), inputs - 1);  // past the last: not written
#pragma unroll
    for (int c = 0; c < RUNS; ++c) {
      const int k = (c * 4 + quad) * RUN;
      Pack<unsigned, RUN / 2> v{};
      if (k < pitch) v = *reinterpret_cast<const Pack<unsigned, RUN / 2>*>(a + (long long)row * pitch + k);
#pragma unroll
      for (int i = 0; i < RUN / 2; ++i) to[half][c][i] = v.at[i];
    }
  }
}

// Where eight values from k on of a row in shared memory lie, in pieces of 16 bytes: eight rows' in banks of their
// own.
__device__ __forceinline__ int held_at(int row, int k) {
  constexpr int PIECES = RANKS / 8;
  return row * PIECES + (k / 8 ^ row * PIECES / 8 % PIECES);
}

__device__ __forceinline__ void take_left(Left& to, const uint4* rows) {
#pragma unroll
  for (int c = 0; c < RUNS; ++c)
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int lane = threadIdx.x % 32;
      unsigned a[4];
      load_matrices<false>(a, shared_address(rows + held_at(lane % 16, (c * STEPS + s) * 16 + lane / 16 * 8)));
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i % 2][c][s * 2 + i / 2] = a[i];
    }
}

// A lane's own column of piece j is n + j * 2, one more for every other row of lanes: it reads those of all pieces at
// once, and the neighbour's with them.
template <bool HELD, int PIECES>
__device__ __forceinline__ void load_right(Right<PIECES>& to, const bf16* __restrict__ b, int n, int ranks,
                                           int columns) {
  const int quad = threadIdx.x % 4;
  const unsigned own = threadIdx.x / 4 % 2 ? 0x7632 : 0x5410;  // the upper or the lower halves of two registers
#pragma unroll
  for (int c = 0; c < RUNS; ++c)
#pragma unroll
    for (int pair = 0; pair < RUN / 2; ++pair) {
      const int k = HELD ? (c * STEPS * 2 + pair) * 8 + quad * 2 : (c * 4 + quad) * RUN + pair * 2;
      Pack<unsigned, PIECES> rows[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (k + i < ranks && n < columns)
          rows[i] = *reinterpret_cast<const Pack<unsigned, PIECES>*>(b + unsigned((k + i) * columns + n));
#pragma unroll
      for (int j = 0; j < PIECES; ++j) to[c][pair / 2][j][pair % 2] = __byte_perm(rows[0].at[j], rows[1].at[j], own);
    }
}

template <int PIECES>
__device__ __forceinline__ void multiply(float (&sum)[PIECES][4], const Left& left, const Right<PIECES>& right) {
#pragma unroll
  for (int c = 0; c < RUNS; ++c)
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const unsigned a[4] = {left[0][c][s * 2], left[1][c][s * 2], left[0][c][s * 2 + 1], left[1][c][s * 2 + 1]};
#pragma unroll
      for (int j = 0; j < PIECES; ++j) mma(sum[j], a, right[c][s][j][0], right[c][s][j][1]);
    }
}

// What a pair of bf16 leaves out of two values.
__device__ __forceinline__ unsigned rest(float one, float other, unsigned pair) {
  return round_pair(one - low_half(pair), other - high_half(pair));
}

// down @ core, `low` what `high` leaves out. The core's columns are named as the places k of the product that follows.
__device__ __forceinline__ void fold(Left& high, Left& low, const Left& down, const Right<OWN> (&core)[OWN_RUNS]) {
#pragma unroll
  for (int c = 0; c < OWN_RUNS; ++c) {
    float sum[OWN][4] = {};
    multiply(sum, down, core[c]);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float one = sum[i][half * 2], other = sum[i][half * 2 + 1];
        const unsigned both = round_pair(one, other);
        high[half][c][i] = both;
        low[half][c][i] = rest(one, other, both);
      }
  }
}

// The same of the columns of the core that the warp holds, to shared memory.
__device__ __forceinline__ void fold(uint4* high, uint4* low, const Left& down, const Right<OWN>& core) {
  const int lane = threadIdx.x % 32, k = (threadIdx.x / 32 * 4 + lane % 4) * OWN * 2;
  float sum[OWN][4] = {};
  multiply(sum, down, core);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Pack<unsigned, OWN> both, left;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float one = sum[i][half * 2], other = sum[i][half * 2 + 1];
      both.at[i] = round_pair(one, other);
      left.at[i] = rest(one, other, both.at[i]);
    }
    const int at = held_at(half * 8 + lane / 4, k) * 8 + k % 8;
    *reinterpret_cast<Pack<unsigned, OWN>*>(reinterpret_cast<bf16*>(high) + at) = both;
    *reinterpret_cast<Pack<unsigned, OWN>*>(reinterpret_cast<bf16*>(low) + at) = left;
  }
}

// 16 bytes to shared memory. The row of a block comes from memory in whole 256 bytes: its warps read 64 each, at times
// of their own.
__device__ __forceinline__ void copy(uint4& to, const bf16* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(&to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Grid (columns / COLUMNS, strips of `span` tiles). Without a core all rows may be those of one tap.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    NAME(factored_changed)(const bf16* __restrict__ weight,  // (taps, inputs, columns), columns a multiple of 8
                           const bf16* a1,                   // (taps, inputs, pitch), with CORE (inputs, pitch): a
                                                             // multiple of 8, zeros from the rank on
                           const bf16* __restrict__ core1,   // (taps, core_rows, core_pitch), likewise, with CORE
                           const bf16* __restrict__ b1,      // (ranks, columns)
                           const bf16* a2,                   // like a1, with HADAMARD
                           const bf16* __restrict__ core2,   // like core1, with HADAMARD and CORE
                           const bf16* __restrict__ b2,      // like b1, with HADAMARD
                           const float* scale,               // (1,)
                           bf16* __restrict__ out, int taps, int inputs, int columns, int ranks, int pitch,
                           int core_rows, int core_pitch, int span) {
  __shared__ uint4 held[AHEAD][2][THREADS];
  __shared__ uint4 rows[AHEAD + 1][PAIRS][16 * RANKS / 8];  // of a, with SHARED
  __shared__ uint4 folded[2][PAIRS][16 * RANKS / 8];        // down @ core, high and low
  const int lane = threadIdx.x % 32, quad = lane % 4, row_of = lane / 4;
  const int column = blockIdx.x * COLUMNS + threadIdx.x / 32 * 32;
  if (!SHARED && column >= columns) return;
  const int own = column + quad * 8;  // the first of eight columns that the lane reads and writes
  const int tap_tiles = (inputs + 15) / 16, first = blockIdx.y * span;
  const int tiles = min(span, taps * tap_tiles - first), tap = first / tap_tiles;
  Tile now{tap * inputs + first % tap_tiles * 16, (tap + 1) * inputs}, ahead = now;

  auto read = [&](int tile, int slot, int rows_slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = ahead.row + half * 8 + row_of;
      const bool valid = tile < tiles && row < ahead.end && own < columns;
      copy(held[slot][half][threadIdx.x], weight + (valid ? (long long)row * columns + own : 0), valid);
    }
    constexpr int ALL = SHARED ? PAIRS * 2 * RANKS : 0;  // pieces of 16 bytes
#pragma unroll
    for (int j = 0; j < (ALL + THREADS - 1) / THREADS; ++j) {
      const int i = j * THREADS + threadIdx.x, p = i / (2 * RANKS), row = i / (RANKS / 8) % 16, k = i % (RANKS / 8) * 8;
      const long long from = (long long)min(ahead.row - ahead.end + inputs + row, inputs - 1) * pitch + k;
      const bool valid = tile < tiles && k < pitch;
      if (ALL % THREADS == 0 || i < ALL)
        copy_async(shared_address(&rows[rows_slot][p][held_at(row, k)]), (p ? a2 : a1) + (valid ? from : 0), valid);
    }
    commit_copies();
    ahead.next(inputs);
  };
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) read(i, i, i);

  Left left[PAIRS];
  Right<4> right[PAIRS];
  Right<OWN> core[PAIRS][OWN_RUNS];
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) load_right<SHARED>(right[p], p ? b2 : b1, column + row_of / 2 * 8, ranks, columns);
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
    if (!SHARED) load_left(left[p], p ? a2 : a1, now, inputs, pitch);
  const float factor = *scale;

  int slot = 0, rows_slot = 0;
  int core_end = 0;  // where the tap ends whose core is loaded
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (SHARED) {
      wait_copies<AHEAD - 1>();
      __syncthreads();
    }
    if (CORE && now.end != core_end) {
      core_end = now.end;
      const long long from = (long long)(now.end / inputs - 1) * core_rows * core_pitch;
#pragma unroll
      for (int p = 0; p < PAIRS; ++p)
#pragma unroll
        for (int c = 0; c < OWN_RUNS; ++c)
          load_right<SHARED>(core[p][c], (p ? core2 : core1) + from,
                             ((SHARED ? threadIdx.x / 32 : c) * 4 + row_of / 2) * OWN * 2, core_rows, core_pitch);
    }
    if (SHARED && CORE) {
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) {
        take_left(left[p], rows[rows_slot][p]);
        fold(folded[0][p], folded[1][p], left[p], core[p][0]);
      }
      __syncthreads();
    }
    float sum[PAIRS][4][4] = {};
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      if (SHARED) {
#pragma unroll
        for (int part = 0; part < 1 + CORE; ++part) {
          take_left(left[p], CORE ? folded[part][p] : rows[rows_slot][p]);
          multiply(sum[p], left[p], right[p]);
        }
      } else if (CORE) {
        Left high, low;
        fold(high, low, left[p], core[p]);
        multiply(sum[p], high, right[p]);
        multiply(sum[p], low, right[p]);
      } else {
        multiply(sum[p], left[p], right[p]);
      }
    }
    Tile then = now;
    then.next(inputs);
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
      if (!SHARED) load_left(left[p], p ? a2 : a1, then, inputs, pitch);

    if (!SHARED) wait_copies<AHEAD - 1>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = held[slot][half][threadIdx.x];
      const unsigned before[4] = {v.x, v.y, v.z, v.w};
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
      const int row = now.row + half * 8 + row_of;
      if (row < now.end && own < columns)
        *reinterpret_cast<uint4*>(out + (long long)row * columns + own) =
            make_uint4(after[0], after[1], after[2], after[3]);
    }
    read(tile + AHEAD, slot, rows_slot ? rows_slot - 1 : AHEAD);
    slot = slot + 1 == AHEAD ? 0 : slot + 1;
    rows_slot = rows_slot == AHEAD ? 0 : rows_slot + 1;
    now = then;
  }
}
