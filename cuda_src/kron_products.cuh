// The products of kron_conv.cu: w2 in shared memory, and a piece's part of the channels of every block times it.
#pragma once
#include "kron_conv.cuh"

constexpr int GROUPS = 2, THREADS = 128 * GROUPS, WARPS = THREADS / 32, OF_GROUP = THREADS / GROUPS;
constexpr int COLUMNS = 8 * TILES;
constexpr int AHEAD = 3;  // blocks whose first operand is on its way

// All threads of one group meet.
INLINE void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(OF_GROUP) : "memory");
}

// Where the chunks of w2 start: of eight channels at a tap; -1 for what an odd number of them leaves of a pair.
INLINE void list_weight(int* list, int taps, int IN, int OUT, int part) {
  const int chunks = part / 8, count = taps * chunks;
  for (int i = threadIdx.x; i < count + count % 2; i += THREADS) {
    const int tap = i / chunks, channel = i % chunks * 8;
    list[i] = i == count ? -1 : TURNED ? (taps - 1 - tap) * OUT * IN + channel : (tap * IN + channel) * OUT;
  }
}

// w2 from `from` on, as the second operand: rows of COLUMNS columns, a row a channel and tap; or, TURNED, rows of
// channels and taps, a row a column.
INLINE void copy_weight(unsigned to, const bf16* from, const int* list, int whole, int IN, int OUT) {
  if (TURNED) {
    for (int c = threadIdx.x / 32; c < COLUMNS; c += WARPS)
      for (int at = threadIdx.x % 32; at < whole; at += 32)
        copy_async(to + c * odd_row(whole) + at * 16, list[at] < 0 ? from : from + list[at] + c * IN, list[at] >= 0);
  } else {
    for (int i = threadIdx.x; i < whole * 8 * TILES; i += THREADS) {
      const int row = i / TILES, tile = i % TILES, start = list[row / 8];
      copy_async(to + row * odd_row(TILES) + tile * 16, start < 0 ? from : from + start + row % 8 * OUT + tile * 8,
                 start >= 0);
    }
  }
}

// The second operand for a pair of chunks: its 16 rows of two tiles at a time.
INLINE void load_weight(unsigned (&b)[TILES][2], unsigned weight, int pair, unsigned row_bytes) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < TILES; tile += 2) {
    const int own = min(tile + lane / 16, TILES - 1);
    unsigned v[4];
    if (TURNED)
      load_matrices<false>(v, weight + (own * 8 + lane % 8) * row_bytes + (pair * 2 + lane / 8 % 2) * 16);
    else
      load_matrices<true>(v, weight + (pair * 16 + lane % 16) * row_bytes + own * 16);
    b[tile][0] = v[0], b[tile][1] = v[1];
    if (tile + 1 < TILES) b[tile + 1][0] = v[2], b[tile + 1][1] = v[3];
  }
}

// Adds a part's products to the sums.
INLINE void multiply(float (&sum)[BLOCKS][TILES][4], unsigned own, const unsigned* places, unsigned weight,
                     unsigned weight_row, int pairs, unsigned block_bytes) {
  const unsigned* place = places + threadIdx.x % 32 / 16;
  unsigned from = own + place[0], a[AHEAD + 1][4], b[TILES][2];
  load_weight(b, weight, 0, weight_row);
#pragma unroll
  for (int block = 0; block < AHEAD; ++block) load_matrices<false>(a[block], from + block * block_bytes);
#pragma unroll 1
  for (int pair = 0; pair < pairs; ++pair) {
    const int next = min(pair + 1, pairs - 1);
    const unsigned then = own + place[next * 2];
    unsigned after[TILES][2];
    load_weight(after, weight, next, weight_row);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const int ahead = block + AHEAD;
      load_matrices<false>(a[ahead % (AHEAD + 1)],
                           ahead < BLOCKS ? from + ahead * block_bytes : then + (ahead - BLOCKS) * block_bytes);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) mma(sum[block][tile], a[block % (AHEAD + 1)], b[tile][0], b[tile][1]);
    }
    from = then;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) b[tile][0] = after[tile][0], b[tile][1] = after[tile][1];
  }
}
