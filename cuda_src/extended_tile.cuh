// What a block of the extended product works on: its sizes, the tiles it goes through, the ring of stages between
// those who copy and those who multiply.
#pragma once
#include "cluster.cuh"
#include "hopper.cuh"

#ifndef EXT_N
#define EXT_N TILE_N
#endif
#ifndef SCALED
#define SCALED 0
#endif
#ifndef PAIR
#define PAIR 0
#endif
#ifndef TILE_M
#define TILE_M 256
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef LOW_RANK
#define LOW_RANK 0
#endif

constexpr int TILE_K = 64,
              WORKERS = TILE_M == 192 ? 3 : 2;  // warpgroups that multiply, each an equal share of the rows
constexpr int ROWS = TILE_M / WORKERS / 64;     // products of 64 rows a worker
constexpr int A_BYTES = TILE_M * ROW_BYTES;
// Along N a box is 64 columns wide, so the last one may hold columns that nobody reads.
__device__ constexpr int box_bytes(int columns) {
  return B_ROWS ? (columns + 63) / 64 * TILE_K * ROW_BYTES : columns * ROW_BYTES;
}
constexpr int B_BOX = TILE_K * ROW_BYTES;
constexpr int B_BYTES = (box_bytes(TILE_N) + 1023) / 1024 * 1024;
constexpr int RANKS = 16, DOWN_BYTES = LOW_RANK ? TILE_K * RANKS * 2 : 0;  // of a step of down, behind w's
constexpr int STAGE = A_BYTES + (PAIR ? 2 : 1) * B_BYTES + DOWN_BYTES;
constexpr int MEMORY = 227 * 1024 - 2048;  // 2048: the barriers, and what the alignment may cost
// Where four stages stand beside them, two boxes of a warp's 16 rows by 32 columns wait in shared memory at a time: the
// copy engine writes a finished tile while the next one is multiplied.
constexpr int BOX_COLUMNS = 32, BOX_BYTES = 16 * BOX_COLUMNS * 2, SLOT_BYTES = 2 * BOX_BYTES * 4 * WORKERS;
constexpr bool STAGED = TILE_N % BOX_COLUMNS == 0 && MEMORY - SLOT_BYTES >= 4 * STAGE;
constexpr int STAGES = (STAGED ? MEMORY - SLOT_BYTES : MEMORY) / STAGE;

// One of the two sums.
struct Term {
  int taps, width;  // width: channels a tap, of one block
  int axes;         // of space: 0 for a matrix, 2 or 3 for an image
  int block;        // columns that share one block of channels
  int flip;         // taps of w in reverse
};

struct Tile {
  int row, column;
  Place at;  // of the first row, as the start of its window

  // tile, tiles_m: count clusters, whose blocks have rows one after the other.
  INLINE Tile(int tile, int tiles_m, int tiles_n, int band, const Geometry& g, bool image) {
    const int size = band * tiles_n, first = tile / size * band;
    const int height = min(tiles_m - first, band), inside = tile % size;
    row = ((first + inside % height) * CLUSTER + cluster_rank()) * TILE_M;
    column = inside / height * TILE_N;
    if (image) {
      at = Place::of(row, g);
      at.z = at.z * g.stride[0] - g.padding[0];
      at.y = at.y * g.stride[1] - g.padding[1];
      at.x = at.x * g.stride[2] - g.padding[2];
    }
  }
};

// A place in the ring, and how often it was passed.
struct Stage {
  int index = 0;
  unsigned parity = 0;

  INLINE void next() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};

// The stages in shared memory, and their barriers: the stage is full, and may be written again.
struct Ring {
  unsigned memory, barriers;

  INLINE unsigned full(int stage) const { return barriers + 8 * stage; }
  INLINE unsigned empty(int stage) const { return barriers + 8 * (STAGES + stage); }
};
