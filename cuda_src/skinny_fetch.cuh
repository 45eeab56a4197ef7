// The copies that one thread of a block of skinny.cu asks for, stage by stage.
#pragma once
#include "skinny.cuh"

// Copies the columns from n on of 64 channels from k on, of w or of its block m.
INLINE void fetch_w(const TensorMap* w, int k, int m, int n, const Stage& stage) {
  if (B_ROWS) {
#pragma unroll
    for (int box = 0; box < TILE_N / 64; ++box) copy_box(stage.b() + box * BOX, w, stage.full(), n + 64 * box, k, m);
  } else {
    copy_box(stage.b(), w, stage.full(), k, n, 0);
  }
}

// Copies the operands of the steps [from, to) of one of the two sums. p: the first position. b: the block of x. m: that
// of w. n: the first column of w. down: with RANKS, but not MIXED.
INLINE void fetch(const TensorMap* x, const TensorMap* w, const TensorMap* down, int from, int to, int p, int b, int m,
                  int n, Stage& stage) {
#pragma unroll 1
  for (int k = from * TILE_K; k < to * TILE_K; k += TILE_K) {
    stage.claim();
    fetch_w(w, k, m, n, stage);
    if (BESIDE) copy_box(stage.b() + W_BYTES, down, stage.full(), 0, k, 0);
    copy_box(stage.a(), x, stage.full(), k, b, p);
    stage.next();
  }
}

// The same for slices: of each the tiles of all blocks of x, then that of w2 by itself.
INLINE void fetch_slices(const TensorMap* x, const TensorMap* w, const TensorMap* w2, int from, int to, int blocks,
                         int p, int n, int n2, Stage& stage) {
#pragma unroll 1
  for (int k = from * TILE_K; k < to * TILE_K; k += TILE_K) {
#pragma unroll 1
    for (int m = 0; m < blocks; ++m) {
      stage.claim();
      fetch_w(w, k, m, n, stage);
      copy_box(stage.a(), x, stage.full(), k, m, p);
      stage.next();
    }
    stage.claim(W_BYTES);
    fetch_w(w2, k, 0, n2, stage);
    stage.next();
  }
}
