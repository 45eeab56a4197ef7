// The steps of the extended product: a stage's weights copied for the cluster, and the products of stages in a row.
#pragma once
#include "extended_tile.cuh"

// Copies this block's share of a stage's weights, to every block of the cluster: rows of a box, or columns.
template <int COLUMNS>
INLINE void share(unsigned to, const TensorMap* w, unsigned done, int n, int k, int tap) {
  const int rank = cluster_rank();  // read anew: registers are scarce
  constexpr int COUNT = (B_ROWS ? TILE_K : COLUMNS) / CLUSTER;
  static_assert(CLUSTER == 1 || COUNT % 8 == 0, "the swizzle goes by groups of 8 rows");
#pragma unroll
  for (int box = 0; box < (B_ROWS ? (COLUMNS + 63) / 64 : 1); ++box) {
    const unsigned at = to + box * B_BOX + rank * COUNT * ROW_BYTES;
    const int inner = B_ROWS ? n + 64 * box : k, outer = (B_ROWS ? k : n) + rank * COUNT;
    if (CLUSTER == 1)
      copy_box(at, w, done, inner, outer, tap);
    else
      copy_box_to((1 << CLUSTER) - 1, at, w, done, inner, outer, tap);
  }
}

// The compiler keeps its own uses of the sums before or behind this point.
template <int COUNT>
INLINE void settle(float* sum) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}
INLINE void settle(float (&sum)[ROWS][TILE_N / 2]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) settle<TILE_N / 2>(sum[r]);
}

// A stage may be written again, by every block that copies into it.
INLINE void give_back(unsigned empty) {
#pragma unroll
  for (int rank = 0; rank < CLUSTER; ++rank)
    if (CLUSTER == 1)
      barrier_arrive(empty);
    else
      barrier_arrive_at(empty, rank);
}

// sum += the products of `steps` stages in a row, each of SLICES slices of 16 channels; with PAIR, more += those with
// the other weight, with MAKE, h += those with down.
template <int COLUMNS, int FIRST, int SLICES, bool MAKE = false>
INLINE void multiply(float (&sum)[ROWS][TILE_N / 2], float (&more)[ROWS][TILE_N / 2], int steps, int worker, bool chief,
                     const Ring& ring, Stage& stage, float* h = nullptr) {
  constexpr unsigned leading = B_ROWS ? B_BOX : 16, b_step = B_ROWS ? 16 * ROW_BYTES : 32;
  if (steps <= 0) return;
  settle(sum);
  if (PAIR) settle(more);
  if (MAKE) settle<RANKS / 2>(h);
#pragma unroll 1
  for (; steps > 0; --steps) {
    const unsigned at = ring.memory + stage.index * STAGE;
    const unsigned long long a = operand(at + worker * (TILE_M / WORKERS) * ROW_BYTES, 16);
    const unsigned long long b = operand(at + A_BYTES, leading), down = narrow_operand(at + A_BYTES + B_BYTES);
    barrier_wait(ring.full(stage.index), stage.parity);
    products_begin();
#pragma unroll
    for (int s = 0; s < SLICES; ++s)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const unsigned long long rows = further(a, r * 64 * ROW_BYTES + s * 32);
        wgmma<COLUMNS, B_ROWS>(sum[r] + FIRST, rows, further(b, s * b_step));
        if (PAIR) wgmma<COLUMNS, B_ROWS>(more[r] + FIRST, rows, further(b, B_BYTES + s * b_step));
        if (MAKE) wgmma<RANKS, true>(h, rows, further(down, s * 16 * RANKS * 2));
      }
    products_commit();
    products_wait<0>();  // the other workers multiply meanwhile
    if (chief) give_back(ring.empty(stage.index));
    stage.next();
  }
  settle(sum);
  if (PAIR) settle(more);
  if (MAKE) settle<RANKS / 2>(h);
}
