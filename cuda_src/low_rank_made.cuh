// What the extended products share whose second term's x2, x @ down, is made in their first tiles: the order of the
// tiles, and how x2 is written. For Hopper.
#pragma once
#include "extended_ends.cuh"
#include "extended_steps.cuh"
#include "flags.cuh"

// Tile t: those of the first `makers` columns of tiles, which make x2, come first, all rows of them; the others by bands.
INLINE Tile making_first(int t, int makers, int tiles_m, int tiles_n, int band) {
  const int before = makers * tiles_m;
  if (t < before) return Tile(t, tiles_m, makers, tiles_m, Geometry{}, false);
  Tile tile(t - before, tiles_m, tiles_n - makers, band, Geometry{}, false);
  tile.column += makers * TILE_N;
  return tile;
}

// Rounds factor * h, a worker's, and writes what lies inside. first, rank: its first row and rank.
INLINE void leave(const float (&h)[RANKS / 2], float factor, bf16* to, int first, int rank, int positions, int ranks) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < RANKS / 8; ++n) {
      const int row = first + threadIdx.x % GROUP / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
      const int r = rank + n * 8 + threadIdx.x % 4 * 2, at = n * 4 + half * 2;
      if (row < positions && r < ranks)
        *reinterpret_cast<unsigned*>(to + (long long)row * ranks + r) = round_pair(factor * h[at], factor * h[at + 1]);
    }
}
