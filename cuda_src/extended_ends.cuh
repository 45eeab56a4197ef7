// How the sums of a tile of the extended product begin, are scaled between its two terms, and are written.
#pragma once
#include "extended_tile.cuh"
#include "exchange.cuh"

// The sums times `factor`, or times that of each column, plus the bias of their columns; sums that are not there yet
// (FRESH) are zeros.
template <bool FRESH>
INLINE void begin(float (&sum)[ROWS][TILE_N / 2], float factor, const float* factors, const bf16* bias,
                  const Tile& tile, int columns) {
#pragma unroll
  for (int piece = 0; piece < TILE_N / 8; ++piece) {
    const int n = tile.column + piece * 8 + threadIdx.x % 4 * 2;
    float both[2] = {0, 0}, by[2] = {factor, factor};
    if (factors && n < columns) by[0] = factors[n], by[1] = factors[n + 1];
    if (bias && n < columns) {
      const Pack<bf16, 2> b = *reinterpret_cast<const Pack<bf16, 2>*>(bias + n);
      both[0] = widen(b.at[0]), both[1] = widen(b.at[1]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = sum[r][piece * 4 + i];
        s = FRESH ? both[i % 2] : s * by[i % 2] + both[i % 2];
      }
  }
}

// Rounds, and has the copy engine write, 32 columns of 16 rows at a time through the two slots of the warp at `slots`,
// whose rows of 64 bytes are swizzled as the map of y says.
INLINE void finish_staged(const float (&sum)[ROWS][TILE_N / 2], const Tile& tile, int worker, const TensorMap* map,
                          unsigned slots, int positions) {
  const int lane = threadIdx.x % 32, warp = worker * 4 + threadIdx.x / 32 % 4;
  const int first = tile.row + worker * (TILE_M / WORKERS) + warp % 4 * 16, chunk = lane / 8 ^ lane / 2 % 4;
  const unsigned own = slots + warp * 2 * BOX_BYTES, to = own + lane % 8 * BOX_COLUMNS * 2 + chunk * 16;
  if (lane == 0) stores_read<0>();  // of the tile before
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (first + r * 64 >= positions) break;
#pragma unroll
    for (int box = 0; box < TILE_N / BOX_COLUMNS; ++box) {
      const unsigned slot = (r * (TILE_N / BOX_COLUMNS) + box) % 2 * BOX_BYTES;
      if (lane == 0) stores_read<1>();  // the other slot's may be under way
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* values = &sum[r][(box * 4 + i) * 4 + half * 2];
          v[i] = round_pair(values[0], values[1]);
        }
        store_matrices(to + slot + half * 8 * BOX_COLUMNS * 2, v);
      }
      fence_copies();
      __syncwarp();
      if (lane == 0) {
        store_box(map, own + slot, tile.column + box * BOX_COLUMNS, first + r * 64);
        stores_commit();
      }
    }
  }
}

// Adds `add` (ADD), rounds, and writes: 16 bytes a lane. What is added to a row is read while the row before is written,
// where there are registers for it.
template <bool ADD>
INLINE void finish(const float (&sum)[ROWS][TILE_N / 2], const Tile& tile, int worker, const bf16* add, bf16* y,
                   const TensorMap* map, unsigned slots, int positions, int columns) {
  if constexpr (STAGED && !ADD) {
    finish_staged(sum, tile, worker, map, slots, positions);
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  constexpr int FOURS = TILE_N / 32, AHEAD = ADD && WORKERS == 2 && TILE_N < 160;
  const int first = tile.row + worker * (TILE_M / WORKERS) + warp * 16 + lane / 4;
  uint4 rows[AHEAD + 1][ADD ? FOURS : 1];
  auto read = [&](int q) {  // rows in pairs, eight apart
    const int row = first + q / 2 * 64 + q % 2 * 8;
    const bf16* from = add + (long long)row * columns + tile.column + lane % 4 * 8;
#pragma unroll
    for (int four = 0; four < FOURS; ++four) {
      const bool inside = row < positions && tile.column + four * 32 + lane % 4 * 8 < columns;
      rows[q % (AHEAD + 1)][four] = inside ? *reinterpret_cast<const uint4*>(from + four * 32) : make_uint4(0, 0, 0, 0);
    }
  };
  if (AHEAD) read(0);
#pragma unroll
  for (int q = 0; q < 2 * ROWS; ++q) {
    const int row = first + q / 2 * 64 + q % 2 * 8;
    if (row - lane / 4 >= positions) break;  // of the whole warp
    if (ADD && q + AHEAD < 2 * ROWS) read(q + AHEAD);
    const int left = row < positions ? columns - tile.column : 0;
    const long long start = (long long)row * columns + tile.column;
    const float* values = &sum[q / 2][q % 2 * 2];
#pragma unroll
    for (int four = 0; four < FOURS; ++four) {
      const int n = four * 32 + lane % 4 * 8;
      unsigned added[4] = {0, 0, 0, 0}, v[4];
      if (ADD) {
        const uint4 a = rows[q % (AHEAD + 1)][four];
        added[0] = a.x, added[1] = a.y, added[2] = a.z, added[3] = a.w;
        exchange(added);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (four * 4 + i) * 4;
        v[i] =
            round_pair(values[at] + (ADD ? low_half(added[i]) : 0), values[at + 1] + (ADD ? high_half(added[i]) : 0));
      }
      exchange(v);
      if (n < left) *reinterpret_cast<uint4*>(y + start + n) = make_uint4(v[0], v[1], v[2], v[3]);
    }
#pragma unroll
    for (int piece = FOURS * 4; piece < TILE_N / 8; ++piece) {
      const int n = piece * 8 + lane % 4 * 2;
      const unsigned added = ADD && n < left ? *reinterpret_cast<const unsigned*>(add + start + n) : 0;
      const unsigned v = round_pair(values[piece * 4] + (ADD ? low_half(added) : 0),
                                    values[piece * 4 + 1] + (ADD ? high_half(added) : 0));
      if (n < left) *reinterpret_cast<unsigned*>(y + start + n) = v;
    }
  }
}
