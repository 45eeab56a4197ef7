// The steps of the extended product: the copies of a term into the ring, and the products of what is there.
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

// Copies the operands of a term for COLUMNS columns from `column` on, all taps and channels; with PAIR those of
// `pair`, the other weight, beside them.
template <int COLUMNS>
INLINE void fetch(const TensorMap* x, const TensorMap* w, const TensorMap* pair, const Term& term, const Tile& tile,
                  int column, const Geometry& g, const Ring& ring, Stage& stage) {
  const int b = column / term.block, first = b * term.width;
  const int n = column - b * term.block;
  int tz = 0, ty = 0, tx = 0;
  for (int tap = 0; tap < term.taps; ++tap) {
    const int w_tap = term.flip ? term.taps - 1 - tap : tap;
    const int dx = tx * g.dilation[2], dy = ty * g.dilation[1], dz = tz * g.dilation[0];
#pragma unroll 1
    for (int k = 0; k < term.width; k += TILE_K) {
      const unsigned done = ring.full(stage.index);
      const unsigned a_to = ring.memory + stage.index * STAGE, b_to = a_to + A_BYTES;
      barrier_wait(ring.empty(stage.index), stage.parity ^ 1);
      barrier_expect(done, A_BYTES + (PAIR ? 2 : 1) * box_bytes(COLUMNS));
      if (term.axes == 0)
        copy_box(a_to, x, done, first + k, tile.row);
      else if (term.axes == 2)
        copy_pixels(a_to, x, done, first + k, tile.at.x, tile.at.y, tile.at.n, dx, dy);
      else
        copy_voxels(a_to, x, done, first + k, tile.at.x, tile.at.y, tile.at.z, tile.at.n, dx, dy, dz);
      share<COLUMNS>(b_to, w, done, n, k, w_tap);
      if (PAIR) share<COLUMNS>(b_to + B_BYTES, pair, done, n, k, w_tap);
      stage.next();
    }
    if (++tx == g.kernel[2]) {
      tx = 0;
      if (++ty == g.kernel[1]) ty = 0, ++tz;
    }
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
    const unsigned long long b = operand(at + A_BYTES, leading);
    const unsigned long long down =
        B_ROWS ? narrow_operand(at + A_BYTES + B_BYTES) : operand(at + A_BYTES + B_BYTES, 16);
    barrier_wait(ring.full(stage.index), stage.parity);
    products_begin();
#pragma unroll
    for (int s = 0; s < SLICES; ++s)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const unsigned long long rows = further(a, r * 64 * ROW_BYTES + s * 32);
        wgmma<COLUMNS, B_ROWS>(sum[r] + FIRST, rows, further(b, s * b_step));
        if (PAIR) wgmma<COLUMNS, B_ROWS>(more[r] + FIRST, rows, further(b, B_BYTES + s * b_step));
        if (MAKE) wgmma<RANKS, B_ROWS>(h, rows, further(down, s * (B_ROWS ? 16 * RANKS * 2 : 32)));
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

// sum += a term for COLUMNS columns, held from sum[.][FIRST] on. Of a tap's last step only the slices that hold
// channels are multiplied.
template <int COLUMNS, int FIRST>
INLINE void accumulate(float (&sum)[ROWS][TILE_N / 2], float (&more)[ROWS][TILE_N / 2], const Term& term, int worker,
                       bool chief, const Ring& ring, Stage& stage) {
  const int whole = term.width / TILE_K, slices = (term.width % TILE_K + 15) / 16;
  if (!slices) {
    multiply<COLUMNS, FIRST, 4>(sum, more, term.taps * whole, worker, chief, ring, stage);
    return;
  }
  for (int tap = 0; tap < term.taps; ++tap) {
    multiply<COLUMNS, FIRST, 4>(sum, more, whole, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 1>(sum, more, slices == 1, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 2>(sum, more, slices == 2, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 3>(sum, more, slices == 3, worker, chief, ring, stage);
    multiply<COLUMNS, FIRST, 4>(sum, more, slices == 4, worker, chief, ring, stage);
  }
}

// x2 * w2, block by block of the tile's columns; a block past the last column is skipped by both sides.
template <int SUB = 0>
INLINE void fetch_other(const TensorMap* x, const TensorMap* w, const Term& term, const Tile& tile, int columns,
                        const Geometry& g, const Ring& ring, Stage& stage) {
  if constexpr (SUB * EXT_N < TILE_N) {
    if (tile.column + SUB * EXT_N < columns)
      fetch<EXT_N>(x, w, nullptr, term, tile, tile.column + SUB * EXT_N, g, ring, stage);
    fetch_other<SUB + 1>(x, w, term, tile, columns, g, ring, stage);
  }
}

template <int SUB = 0>
INLINE void accumulate_other(float (&sum)[ROWS][TILE_N / 2], const Term& term, const Tile& tile, int columns,
                             int worker, bool chief, const Ring& ring, Stage& stage) {
  if constexpr (SUB * EXT_N < TILE_N) {
    if (tile.column + SUB * EXT_N < columns)
      accumulate<EXT_N, SUB * EXT_N / 2>(sum, sum, term, worker, chief, ring, stage);
    accumulate_other<SUB + 1>(sum, term, tile, columns, worker, chief, ring, stage);
  }
}
