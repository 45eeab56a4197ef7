// The gradients of all four factors of a LoHa on a linear layer of few positions, in one launch. For Hopper.
//
//   y = x @ w,  w = scale * (d1 @ u1) * (d2 @ u2)          elementwise;  x (positions, K), d (K, R), u (R, N), R <= 16
//
// What flows back to w is x^T @ g, (K, N). With few positions it need not be made: the same sums in another order are
//
//   h[p, r, s] = sum over k of x[p, k] * (d1[k, r] * d2[k, s])                   rounded, and so is d1 * d2
//   c[r, s, n] = sum over p of h[p, r, s] * g[p, n]
//   du1[r, n] = scale * sum over s of u2[s, n] * c[r, s, n]
//   du2[s, n] = scale * sum over r of u1[r, n] * c[r, s, n]
//
// and with (x, d) and (g, u) exchanged dd1 and dd2: 2 * positions * R^2 products for each k and each n, where all K * N
// values of x^T @ g, and what is made of them, take positions + 6 * R each.
//
// The first clusters make h, of both sides. A cluster has four r and 32 positions; each of its warps has a part of the
// steps of 16 channels, which it copies for itself. d1 * d2 is made in registers, where a product wants it. Warps add up
// in shared memory, blocks by sending: each owns one of the cluster's eight pieces of h, and writes it as the lanes of
// the blocks behind hold it. Those have TILE_N columns each, and fetch all else that they need while h is made. They
// wait for blocks before them only, which wait for nobody and begin first.
//
// only sm_90a sm_100a sm_120
// variants bf16: none
#include "few_hadamard.cuh"

constexpr int TILES_N = TILE_N / 8;
constexpr int V_PITCH = TILE_N * 2 + 16;  // bytes: rows of matrices meet no bank twice
constexpr int F_PITCH = TILE_N + 8;       // f32: nor do pairs of four rows

// Values of lanes that differ in a bit are added; the lane that has it keeps the later half of the sums.
template <int COUNT>
INLINE void fold(float* v, int bit) {
  const bool later = threadIdx.x & bit;
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    const float away = later ? v[i] : v[i + COUNT / 2];
    v[i] = (later ? v[i + COUNT / 2] : v[i]) + __shfl_xor_sync(~0u, away, bit);
  }
}

constexpr int GROUP_ROWS = 64;  // positions of h that are multiplied at a time

// The gradients of both factors of a side for TILE_N columns, from the h of the other side. made: times ROWS positions.
// all: pieces of h. many: blocks that take it.
INLINE void take(const Side& side, float4* memory, int column, int positions, int made, const uint4* h, Flag* flag,
                 int all, int many, const float* scale, float* df1, float* df2) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ranks = side.ranks;
  float4* parts = memory;  // of df2, by warps
  float (*factors)[RANKS_MOST][F_PITCH] =
      reinterpret_cast<float (*)[RANKS_MOST][F_PITCH]>(parts + WARPS * TILES_N * 32);
  float (*sums)[TILE_N] = reinterpret_cast<float (*)[TILE_N]>(factors + 2);  // df1
  const unsigned tile = shared_address(sums + RANKS_MOST);
  const int groups = (made + 1) / 2;
  for (int i = threadIdx.x; i < groups * GROUP_ROWS * TILES_N; i += THREADS) {
    const int p = i / TILES_N, l = column + i % TILES_N * 8;
    copy_async(tile + p * V_PITCH + i % TILES_N * 16, side.v + p * side.width + l, p < positions && l < side.width);
  }
  commit_copies();
  constexpr int F_CHUNKS = RANKS_MOST * TILES_N;  // of a factor
  static_assert(2 * F_CHUNKS <= THREADS, "a chunk a thread");
  if (threadIdx.x < 2 * F_CHUNKS) {
    const int f = threadIdx.x / F_CHUNKS, i = threadIdx.x % F_CHUNKS;
    const int r = side.turned ? i / TILES_N : i % 2 * 8, n = side.turned ? i % TILES_N * 8 : i / 2;
    Chunk v = {};
    if (r < ranks && column + n < side.width)
      v = *reinterpret_cast<const Chunk*>((f ? side.f2 : side.f1) + side.at(r, column + n));
#pragma unroll
    for (int e = 0; e < 8; ++e) factors[f][side.turned ? r : r + e][side.turned ? n + e : n] = widen(v.at[e]);
  }
  const float factor = scale ? *scale : 1.0f;
  wait_copies<0>();
  if (threadIdx.x == 0) await(flag, all);
  __syncthreads();

  float c[2][TILES_N][4] = {};  // of two r: s by columns
  const int first = warp * 2;
  if (first < ranks)
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      uint4 a[2][GROUP_ROWS / 16];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int q = 0; q < GROUP_ROWS / 16; ++q)
          a[i][q] = group * 2 + q / 2 < made ? __ldcg(h + ((group * ranks + first + i) * 4 + q) * 32 + lane) : uint4{};
#pragma unroll
      for (int q = 0; q < GROUP_ROWS / 16; ++q)
#pragma unroll
        for (int j = 0; j < TILES_N / 2; ++j) {
          unsigned v[4];
          load_matrices<true>(v, tile + (group * GROUP_ROWS + q * 16 + lane % 16) * V_PITCH + (j * 2 + lane / 16) * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const unsigned own[4] = {a[i][q].x, a[i][q].y, a[i][q].z, a[i][q].w};
              mma(c[i][2 * j + n], own, v[2 * n], v[2 * n + 1]);
            }
        }
    }

  const int s = lane / 4, pair = lane % 4 * 2;
  float own[2 * TILES_N * 2];
#pragma unroll
  for (int j = 0; j < TILES_N; ++j) {
    const auto two = [&](int f, int r) { return *reinterpret_cast<const float2*>(&factors[f][r][j * 8 + pair]); };
    const float2 low = two(1, s), high = two(1, s + 8), one = two(0, first), next = two(0, first + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[(i * TILES_N + j) * 2] = low.x * c[i][j][0] + high.x * c[i][j][2];
      own[(i * TILES_N + j) * 2 + 1] = low.y * c[i][j][1] + high.y * c[i][j][3];
    }
    parts[(warp * TILES_N + j) * 32 + lane] =
        make_float4(one.x * c[0][j][0] + next.x * c[1][j][0], one.y * c[0][j][1] + next.y * c[1][j][1],
                    one.x * c[0][j][2] + next.x * c[1][j][2], one.y * c[0][j][3] + next.y * c[1][j][3]);
  }
  fold<24>(own, 16), fold<12>(own, 8), fold<6>(own, 4);
  static_assert(TILES_N == 6, "what fold leaves");
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int of = lane / 4 % 4 % 2 * 3 + lane / 8 % 2 * 6 + i;
    sums[first + lane / 16][of / 2 * 8 + pair + of % 2] = own[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ranks * TILE_N; i += THREADS) {
    const int r = side.turned ? i / TILE_N : i % ranks, n = side.turned ? i % TILE_N : i / ranks;
    if (column + n < side.width) df1[side.at(r, column + n)] = factor * sums[r][n];
  }
  if (threadIdx.x < TILES_N * 32) {
    float4 total = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += parts[w * TILES_N * 32 + threadIdx.x];
    const float of[4] = {total.x, total.y, total.z, total.w};
    const int n = column + warp * 8 + pair;
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (n < side.width && s + e / 2 * 8 < ranks) df2[side.at(s + e / 2 * 8, n + e % 2)] = factor * of[e];
  }
  if (threadIdx.x == 0) lower(flag, many);
}

// Grid: a cluster for each four ranks of each 32 positions of each side, then a block for each TILE_N columns of u and
// each of d, up to whole clusters. K, N: multiples of 8. ranks: 8 or 16.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 2)
    NAME(few_hadamard)(const bf16* x,       // (positions, K)
                       const bf16* g,       // (positions, N)
                       const bf16* d1,      // (K, ranks)
                       const bf16* u1,      // (ranks, N)
                       const bf16* d2,      // (K, ranks)
                       const bf16* u2,      // (ranks, N)
                       const float* scale,  // (1,), or null for 1
                       bf16* h,             // (2 sides, positions by 64, ranks, 64, 16)
                       unsigned* flags,     // two for a side; zeros before and after
                       float* dd1,          // (K, ranks)
                       float* du1,          // (ranks, N)
                       float* dd2,          // (K, ranks)
                       float* du2,          // (ranks, N)
                       int positions, int K, int N, int ranks) {
  extern __shared__ float4 memory[];
  __shared__ unsigned long long barrier;
  const auto side_of = [&](bool outputs) -> Side {
    return {outputs ? g : x, outputs ? u1 : d1, outputs ? u2 : d2, outputs ? N : K, ranks, outputs};
  };
  const int groups = (positions + ROWS - 1) / ROWS, quads = ranks / QUAD, all = groups * quads * CLUSTER;
  uint4* pieces = reinterpret_cast<uint4*>(h);
  const int a_group = ranks * 4 * 32, a_side = (groups + 1) / 2 * a_group;  // 64 positions; a side
  const int begun = int(blockIdx.x) - 2 * all;
  if (begun < 0) {
    const int cluster = blockIdx.x / CLUSTER, side = cluster % 2, group = cluster / 2 / quads;
    make(side_of(side), memory, shared_address(&barrier), group * ROWS, positions, cluster / 2 % quads * QUAD,
         pieces + side * a_side + group / 2 * a_group + group % 2 * 2 * 32, reinterpret_cast<Flag*>(flags) + side);
    return;
  }
  const int tiles_n = (N + TILE_N - 1) / TILE_N, tiles_k = (K + TILE_N - 1) / TILE_N;
  if (begun >= tiles_n + tiles_k) return;
  const int side = begun >= tiles_n, column = (side ? begun - tiles_n : begun) * TILE_N;
  take(side_of(!side), memory, column, positions, groups, pieces + side * a_side, reinterpret_cast<Flag*>(flags) + side,
       all, side ? tiles_k : tiles_n, scale, side ? dd1 : du1, side ? dd2 : du2);
}
