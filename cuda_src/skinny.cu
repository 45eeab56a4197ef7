// A product of few positions: y = x @ w + scale * (x2 @ w2 + bias2) + add + bias in one sum, rounded once. For Hopper.
//
//   y[p, n] = sum over k of x[p, k] * w[k, n] + scale * (bias2[n] + sum over k of x2[p, b * width2 + k] * w2[k, n - b * block])
//           + add[p, n] + bias[n]                                                                              b = n / block
//
// and with MIXED=1 x2 is made here, rounded as if it had been written and read again:
//
//   x2[p, l * width2 + k] = sum over m of w1[l, m] * x[p, m * width2 + k]
//
// and with RANKS=16 likewise, but for the last bits, as x2[p, r] = sum over k of x[p, k] * down[k, r], width2 <= 16, and
// with both, where inner is rounded:
//
//   x2[p, l * width2 + r] = sum over m of w1[l, m] * inner[p, m * width2 + r]
//   inner[p, m * width2 + r] = sum over n of x[p, m * N + n] * down[n, r]                         N = width / blocks
//
// The time is that of reading w once. A cluster has a strip of TILE_N columns, none of which leaves its block of w2;
// each of its blocks takes a part of the steps of 64 channels, those of x2 before those of x. Strips read x again, from
// L2, and the blocks of a cluster send each other their sums (cluster_sums.cuh): wide strips and small clusters make
// both cheap, and more blocks than multiprocessors are not needed, as each asks at once for all that its shared
// memory holds. No workspace, no second launch, the same bits every time. The input gradient is the same product with
// w turned (B_ROWS=0: rows of channels).
//
// With MIXED a block takes slices of 64 channels of x2, and of x all that is mixed to these: tiles of x that the first
// sum has fetched anyway. Their mix is a sum in registers beside the products, element by element in the order of m.
//
// With RANKS down stands beside the columns of w, as 16 more of them: each block has its part of x2, multiplies that with
// w2 (which is linear), and only one cluster adds up x2 itself, where it is wanted.
//
// With both a step is a whole block of x: what stands in the 16 columns after it is that block of inner, complete, so
// that it can be rounded, and written by the first strip. Times its factor of w1 it is added to this block's part of x2,
// eight more registers; the rest is as with RANKS. All of down stays in shared memory, and the blocks of a cluster copy
// a part of it each, for all: were it copied step by step, hundreds of blocks would ask L2 for the same few lines.
//
// Positions go by 64, and each 64 read w again, from L2. Fewer are 64 all the same: the copy engine writes zeros for
// those that are not there, and reads nothing.
//
// EACH: blocks that share a multiprocessor; one alone has twice the stages.
//
// only sm_90a
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=4 EACH=2 MIXED=0 | TILE_N=64 B_ROWS=0 CLUSTER=4 EACH=2 MIXED=0
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=3 EACH=2 MIXED=0 | TILE_N=64 B_ROWS=0 CLUSTER=3 EACH=2 MIXED=0
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=8 EACH=2 MIXED=0 | TILE_N=64 B_ROWS=0 CLUSTER=8 EACH=2 MIXED=0
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=6 EACH=2 MIXED=0 | TILE_N=128 B_ROWS=0 CLUSTER=6 EACH=2 MIXED=0
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=4 EACH=2 MIXED=0 | TILE_N=128 B_ROWS=0 CLUSTER=4 EACH=2 MIXED=0
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=8 EACH=2 MIXED=0 | TILE_N=128 B_ROWS=0 CLUSTER=8 EACH=2 MIXED=0
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=2 EACH=2 MIXED=0 | TILE_N=128 B_ROWS=0 CLUSTER=2 EACH=2 MIXED=0
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=2 MIXED=0 | TILE_N=128 B_ROWS=0 CLUSTER=1 EACH=2 MIXED=0
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=2 EACH=2 MIXED=1 | TILE_N=64 B_ROWS=1 CLUSTER=3 EACH=2 MIXED=1
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=6 EACH=2 MIXED=1 | TILE_N=128 B_ROWS=1 CLUSTER=8 EACH=2 MIXED=1
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=4 EACH=2 MIXED=1 | TILE_N=128 B_ROWS=1 CLUSTER=3 EACH=2 MIXED=1
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=2 EACH=2 MIXED=1 | TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=2 MIXED=1
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=4 EACH=2 MIXED=0 RANKS=16 | TILE_N=128 B_ROWS=1 CLUSTER=3 EACH=1 MIXED=0 RANKS=16
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=4 EACH=1 MIXED=0 RANKS=16 | TILE_N=128 B_ROWS=1 CLUSTER=2 EACH=1 MIXED=0 RANKS=16
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=1 MIXED=0 RANKS=16 | TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=2 MIXED=0 RANKS=16
// variants bf16: TILE_N=64 B_ROWS=1 CLUSTER=4 EACH=2 MIXED=1 RANKS=16 | TILE_N=128 B_ROWS=1 CLUSTER=3 EACH=1 MIXED=1 RANKS=16
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=4 EACH=1 MIXED=1 RANKS=16 | TILE_N=128 B_ROWS=1 CLUSTER=2 EACH=1 MIXED=1 RANKS=16
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=1 MIXED=1 RANKS=16 | TILE_N=128 B_ROWS=1 CLUSTER=1 EACH=2 MIXED=1 RANKS=16
#define ALL_BYTES ((EACH == 1 ? 226 : 112) * 1024)  // of shared memory, but for barriers and the factors of a mix
#define SLICED (MIXED && !RANKS)                    // x2 is made in slices of 64 channels
#define DOWN_TILE (64 * 32)                         // 64 channels by 16 ranks
#define BESIDE (RANKS && !MIXED ? DOWN_TILE : 0)
#define ALL_OF_DOWN (RANKS && MIXED ? 8 * DOWN_TILE : 0)
#define RING (ALL_BYTES - 1024 - PARTS_BYTES - SLICED * 64 * 128 - ALL_OF_DOWN)
#include "cluster_sums.cuh"
#include "skinny.cuh"
#include "skinny_fetch.cuh"
#include "skinny_terms.cuh"

// total += factor * two values.
INLINE void add_pair(float* total, const bf16* from, float factor) {
  const unsigned pair = *reinterpret_cast<const unsigned*>(from);
  total[0] += factor * low_half(pair), total[1] += factor * high_half(pair);
}

// Grid (CLUSTER blocks for each strip, ceil(block / TILE_N) of them for each of columns / block blocks; positions /
// 64).
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, EACH)
    NAME(skinny)(const __grid_constant__ TensorMap x,  // (positions, 1, width); MIXED: (positions, blocks, N)
                 const __grid_constant__ TensorMap w,  // (1, width, columns), or (1, columns, width); MIXED: (blocks,
                                                       // N, columns)
                 const __grid_constant__ TensorMap
                     x2,  // (positions, columns / block, width2); RANKS: down, (1, N, width2); not if SLICED
                 const __grid_constant__ TensorMap w2,  // (1, width2, block), or (1, block, width2)
                 const float* scale,                    // (1,), or null for 1
                 const bf16* add,                       // (positions, columns), or null
                 const bf16* bias,                      // (columns), or null
                 const bf16* bias2,                     // (columns), or null
                 const bf16* w1,                        // (columns / block, blocks), with MIXED
                 bf16* kept,                            // (positions, columns / block, width2), x2 made here; or null
                 bf16* inner,                           // (positions, blocks, width2), or null
                 bf16* y,                               // (positions, columns)
                 int positions, int columns, int width, int width2, int block, int blocks) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES + 2];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const unsigned tile2 = stage.memory + STAGES * STAGE;  // of x2, if SLICED; all tiles of down, if there are any
  const unsigned down_full = shared_address(barriers + 2 * STAGES + 1);
  const int rank = cluster_rank();
  const int strips = (block + TILE_N - 1) / TILE_N, strip = blockIdx.x / CLUSTER;
  const int pieces = RANKS && (!kept || strip % strips) ? TILE_N / 8 : PIECES;
  const Parts parts = {tile2 + SLICED * BOX + ALL_OF_DOWN, shared_address(barriers + 2 * STAGES), rank, pieces};

  const int b = strip / strips, column = b * block + strip % strips * TILE_N;
  const int past = min(column + TILE_N, (b + 1) * block);
  const int start = blockIdx.y * TILE_M, rows = min(positions - start, TILE_M);
  // With MIXED a step is a slice of 64 channels of x2, and of every block of x; with RANKS too, a block of x.
  const int steps2 = RANKS ? 0 : (width2 + TILE_K - 1) / TILE_K;
  const int slices = (width / (MIXED ? blocks : 1) + TILE_K - 1) / TILE_K;
  const int steps = SLICED ? steps2 : MIXED ? blocks : steps2 + slices;
  const int first = rank * steps / CLUSTER, last = (rank + 1) * steps / CLUSTER;

  if (threadIdx.x == 0) {
    if (ALL_OF_DOWN) barrier_init(down_full, 1), barrier_expect(down_full, slices * DOWN_TILE);
    parts.begin((rows + 15) / 16), stage.begin();
  }
  __syncthreads();
  arrive();

  const float factor = scale ? *scale : 1.0f;
  if (threadIdx.x >= GROUP) {
    const bool copies = threadIdx.x == GROUP;
    const auto fetch_up = [&] {
      stage.claim(W_BYTES);
      fetch_w(&w2, 0, 0, column - b * block, stage);
    };
    const int head = first < last ? min(slices, STAGES) : 0;  // steps of a block of x, before down is copied
    if (copies) {
      prefetch_map(&w), prefetch_map(&x), prefetch_map(&w2), prefetch_map(&x2);
      if constexpr (SLICED) {
        fetch_slices(&x, &w, &w2, first, last, blocks, start, column, column - b * block, stage);
      } else if constexpr (MIXED) {
        fetch(&x, &w, nullptr, 0, head, start, first, first, column, stage);
      } else {
        fetch(&x2, &w2, nullptr, first, min(last, steps2), start, b, 0, column - b * block, stage);
        fetch(&x, &w, &x2, max(first, steps2) - steps2, last - steps2, start, 0, 0, column, stage);
        if constexpr (RANKS) fetch_up();
      }
    }
    await();
    if constexpr (ALL_OF_DOWN) {
      if (!copies) return;
#pragma unroll 1
      for (int i = rank; i < slices; i += CLUSTER)
        if (CLUSTER == 1)
          copy_box(tile2 + i * DOWN_TILE, &x2, down_full, 0, i * TILE_K, 0);
        else
          copy_box_to((1 << CLUSTER) - 1, tile2 + i * DOWN_TILE, &x2, down_full, 0, i * TILE_K, 0);
#pragma unroll 1
      for (int m = first; m < last; ++m)
        fetch(&x, &w, nullptr, m == first ? head : 0, slices, start, m, m, column, stage);
      fetch_up();
    }
    return;
  }

  // This thread's place in the sums: two columns of a row and of the one eight below it, of each piece.
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4,
            own_column = column + first_of(rank) * 8 + threadIdx.x % 4 * 2;
  if (threadIdx.x % 4 == 0)
#pragma unroll
    for (int slot = 0; slot < MOST; ++slot) {
      const int n = own_column + slot * 8;
      if (slot >= parts.count() || n >= past) continue;
      if (bias) prefetch(bias + n);
      if (bias2) prefetch(bias2 + n);
      if (add && row < rows) prefetch(add + (long long)(start + row) * columns + n);
      if (add && row + 8 < rows) prefetch(add + (long long)(start + row + 8) * columns + n);
    }

  float sum[PIECES * 4] = {};
  float (&own_sum)[TILE_N / 2] = reinterpret_cast<float (&)[TILE_N / 2]>(sum);
  __shared__ float factors[MOST_MIXED];
  if constexpr (MIXED) {
    if (threadIdx.x < blocks) factors[threadIdx.x] = widen(w1[b * blocks + threadIdx.x]);
    group_barrier(0);
  }
  if constexpr (SLICED) {
    settle(sum);
#pragma unroll 1
    for (int slice = first; slice < last; ++slice) {
      float mixed[32] = {};
#pragma unroll 1
      for (int m = 0; m < blocks; ++m) {
        barrier_wait(stage.full(), stage.parity);
        multiply_tiles<false, B_ROWS>(own_sum, stage.a(), stage.b());
        mix_tile(mixed, stage.a(), factors[m]);  // beside the products
        products_wait<0>();
        stage.release();
        stage.next();
      }
      bf16* to = strip % strips ? nullptr : kept;  // of the strips that share a slice the first writes it
      if (to) to += ((long long)start * (columns / block) + b) * width2 + slice * TILE_K;
      group_barrier(0);  // the slice before is multiplied
      leave_mix(mixed, tile2, to, columns / block * width2, rows, width2 - slice * TILE_K);
      fence_copies();  // products read by the same proxy as copies write
      group_barrier(0);
      float second[TILE_N / 2] = {};
      settle(second);
      barrier_wait(stage.full(), stage.parity);
      multiply_tiles<false, B_ROWS>(second, tile2, stage.b());
      products_wait<0>();
      stage.release();
      stage.next();
      settle(second);
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) sum[i] += factor * second[i];
      settle(sum);
    }
  } else if constexpr (MIXED) {
    float mixed[8] = {};  // of x2, as the 16 columns lie
    bf16* to = blockIdx.x < CLUSTER ? inner : nullptr;
    if (to) to += (long long)start * blocks * width2;
    barrier_wait(down_full, 0);
#pragma unroll 1
    for (int m = first; m < last; ++m) {
      multiply_low_rank(sum, slices, tile2, stage);
      mix_inner(mixed, sum + TILE_N / 2, factors[m], to ? to + m * width2 : nullptr, blocks * width2, rows, width2);
    }
#pragma unroll
    for (int i = 0; i < RANKS / 2; ++i) sum[TILE_N / 2 + i] = mixed[i];
  } else if constexpr (RANKS) {
    multiply_low_rank(sum, last - first, 0, stage);
  } else {
    const int before = min(last, steps2) - first;
    multiply<false, B_ROWS>(own_sum, before, stage);
    if (before > 0)
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) sum[i] *= factor;
    multiply<false, B_ROWS>(own_sum, last - max(first, steps2), stage);
  }
  if constexpr (RANKS) {
    barrier_wait(stage.full(), stage.parity);
    settle(sum);
    multiply_inner(sum, sum + TILE_N / 2, factor, stage.b());
    settle(sum);
  }

  await();  // until all blocks of the cluster have begun, long ago
  if (row / 16 * 16 >= rows) return;
  float own[MOST][4];
  parts.send(sum, own);
  // What is added is read while the sums are under way.
#pragma unroll
  for (int i = 0; i < MOST * 2; ++i) {
    const int n = own_column + i / 2 * 8, r = row + i % 2 * 8;
    if (i / 2 >= parts.count() || n >= past || r >= rows) continue;
    float* to = own[i / 2] + i % 2 * 2;
    if (bias2) add_pair(to, bias2 + n, factor);
    if (bias) add_pair(to, bias + n, 1);
    if (add) add_pair(to, add + (long long)(start + r) * columns + n, 1);
  }
  parts.receive(own);
#pragma unroll
  for (int i = 0; i < MOST * 2; ++i) {
    const int n = own_column + i / 2 * 8, r = row + i % 2 * 8;
    if (i / 2 >= parts.count() || r >= rows) continue;
    const unsigned pair = round_pair(own[i / 2][i % 2 * 2], own[i / 2][i % 2 * 2 + 1]);
    if (n < past) *reinterpret_cast<unsigned*>(y + (long long)(start + r) * columns + n) = pair;
    const int of = n - column - TILE_N;  // a column of x2
    if (RANKS && of >= 0 && of < width2)
      *reinterpret_cast<unsigned*>(kept + ((long long)(start + r) * (MIXED ? columns / block : 1) + b) * width2 + of) =
          pair;
  }
}
