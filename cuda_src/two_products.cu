// Two small products in one launch: out1[t] = a1[t] @ b1[t] and out2[t] = a2[t] @ b2[t]. What a weight's change is
// made of is so small that launching takes longer than multiplying.
#include "low_rank.cuh"

// What a product is of: `a_taps` and `b_taps` are the taps or 1, which serves all.
struct Sizes {
  int taps, a_taps, b_taps, rows, ranks, columns;
};

// Grid (tiles of both, 64 x 64), 256 threads; the first `tiles` blocks do the first product.
extern "C" __global__ void __launch_bounds__(256, 2)
    NAME(two_products)(const T* a1, const T* b1,  // (a_taps, rows, ranks), (b_taps, ranks, columns)
                       const T* a2, const T* b2,  // likewise
                       A* out1, A* out2,          // (taps, rows, columns)
                       const __grid_constant__ Sizes first, const __grid_constant__ Sizes second, int tiles) {
  __shared__ A left[DEPTH][TILE + 1], right[DEPTH][TILE];
  const bool one = blockIdx.x < tiles;
  const Sizes s = one ? first : second;
  const int tile = blockIdx.x - (one ? 0 : tiles);
  const int down = (s.rows + TILE - 1) / TILE, across = (s.columns + TILE - 1) / TILE;
  const int t = tile / (down * across), i0 = tile / across % down * TILE, o0 = tile % across * TILE;
  const T* a = (one ? a1 : a2) + (s.a_taps > 1 ? (long long)t * s.rows * s.ranks : 0);
  const T* b = (one ? b1 : b2) + (s.b_taps > 1 ? (long long)t * s.ranks * s.columns : 0);
  A* out = (one ? out1 : out2) + (long long)t * s.rows * s.columns;
  A sum[4][4] = {};
  low_rank_tile(a, b, s.rows, s.ranks, s.columns, i0, o0, left, right, sum);
  each_element(s.rows, s.columns, i0, o0,
               [&](int i, int o, int p, int q) { out[(long long)i * s.columns + o] = sum[p][q]; });
}
