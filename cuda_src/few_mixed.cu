// few.cu, and behind it the gradients of the mix that made x2, in one launch. For Hopper.
//
//   x2[p, l * N + n] = sum over m of w1[l, m] * x[p, m * N + n]
//   y[p, l * K + k] = scale * sum over n of x2[p, l * N + n] * w2[n, k]
//
//   flow[p, l * N + n] = scale * sum over k of g[p, l * K + k] * w2[n, k]
//   dw2[n, k] = scale * sum over p and l of x2[p, l * N + n] * g[p, l * K + k]
//   dx[p, m * N + n] = sum over l of w1[l, m] * flow[p, l * N + n]
//   dw1[l, m] = sum over p and n of flow[p, l * N + n] * x[p, m * N + n]
//
// A row is one block l of one position, and L divides 64: a tile of flow has all the blocks of its positions. It is
// rounded, and goes to no memory but the registers of the warps that mix it, by items of mix_item.cuh: dx is that of
// few.cu and kron_mix.cu to the bit.
//
// Where x is a product too, as in a LoKr with a factored w2, further blocks make the gradient of its factor:
//
//   x[p, m * N + n] = sum over c of source[p, m * C + c] * down[c, n]                                    N <= 16
//   ddown[c, n] = sum over p and m of source[p, m * C + c] * dx[p, m * N + n]
//
// They are the last, and wait only for the first, which write dx and wait for nobody: see few_down.cuh.
//
// only sm_90a
// variants bf16: CLUSTER=1 SIDE=8 | CLUSTER=1 SIDE=16 | CLUSTER=8 SIDE=8 | CLUSTER=8 SIDE=16
#include "few.cuh"
#include "few_down.cuh"
#include "mix_item.cuh"

constexpr int WARPS = GROUP / 32, STRIDE = CLUSTER * WARPS;  // warps that share the items of a tile
constexpr int VECTORS = SIDE * SIDE / 4;                     // of a part of dw1

// The sum of so many parts of dw1, in a fixed order, by a warpgroup.
INLINE void add_parts(float* dw1, const float4* partial, int parts, int L, int M) {
  constexpr int SHARES = GROUP / VECTORS, BATCH = 8;  // threads of a vector; loads that each has under way
  const int mine = threadIdx.x / SHARES, share = threadIdx.x % SHARES;
  float4 total = {};
#pragma unroll 1
  for (int first = share; first < parts; first += BATCH * SHARES) {
    float4 v[BATCH] = {};
#pragma unroll
    for (int j = 0; j < BATCH; ++j)
      if (first + j * SHARES < parts) v[j] = __ldcg(partial + (first + j * SHARES) * VECTORS + mine);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) total += v[j];
  }
#pragma unroll
  for (int step = 1; step < SHARES; step *= 2)
    total += make_float4(__shfl_xor_sync(~0u, total.x, step), __shfl_xor_sync(~0u, total.y, step),
                         __shfl_xor_sync(~0u, total.z, step), __shfl_xor_sync(~0u, total.w, step));
  const float of[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int l = mine * 4 / SIDE, m = mine * 4 % SIDE + e;
    if (share == 0 && l < L && m < M) dw1[l * M + m] = of[e];
  }
}

// Grid as of few, and behind it a block for each 64 rows of ddown, up to whole clusters. rows = positions * L, inner = N,
// outer = K.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, 2)
    NAME(few_mixed)(const __grid_constant__ TensorMap x2,      // (rows, inner)
                    const __grid_constant__ TensorMap w2,      // (inner, outer)
                    const __grid_constant__ TensorMap g,       // (rows, outer)
                    const __grid_constant__ TensorMap source,  // (positions * M, channels)
                    const __grid_constant__ TensorMap narrow,  // dx, (positions * M, inner)
                    const float* scale,                        // (1,), or null for 1
                    const bf16* x,                             // (positions, M * inner)
                    const bf16* w1,                            // (L, M)
                    bf16* dx,                                  // (positions, M * inner)
                    float* dw2,                                // (inner, outer)
                    float* partial,                            // (parts, SIDE, SIDE)
                    float* dw1,                                // (L, M)
                    float* ddown,                              // (channels, inner), or null
                    unsigned* seen,  // (3,), zeros before and after; the last two: a flag of dx
                    int rows, int inner, int outer,
                    int parts,  // blocks that have tiles of flow
                    int L, int M,
                    int before,  // blocks before those of ddown
                    int channels) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * PAIRS];
  __shared__ float4 shares[WARPS][VECTORS];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  Flag* flag = reinterpret_cast<Flag*>(seen + 1);
  const int column = (int(blockIdx.x) - before) * 64;  // of a block of ddown
  if (column >= 0) {
    if (column < channels)
      make_down(&source, &narrow, {stage.memory, stage.barriers}, column, flag, parts, ddown, rows / L * M, channels,
                inner);
    return;
  }
  const unsigned sums = stage.memory;
  const Task task(rows, inner, outer);
  const bool mixes = task.back && threadIdx.x < GROUP;

  // The items of a tile: each position's 64 columns, or 32 where the tile has no more. Of those from `first` on that
  // this warp has, item i: its position in the tile, this lane's n, and whether they lie inside.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = lane / 4;
  const int more = inner - task.column > 32, items = TILE_M / L << more;
  const int start = cluster_rank() + warp * CLUSTER;
  const auto find = [&](int first, int i, int& p, int& n) {
    const int item = first + i * STRIDE;
    p = item >> more, n = task.column + (item & more) * 32 + lane % 4 * 8;
    return item < items && task.row + p * L < rows && n < inner;
  };
  const auto place = [&](int p, int m, int n) { return ((long long)(task.row / L + p) * M + m) * inner + n; };
  Item v[ITEMS];
  const auto fetch = [&](int first) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      int p, n;
      const bool inside = find(first, i, p, n);
      v[i] = {};
#pragma unroll
      for (int h = 0; h < HALVES; ++h)
        if (inside && at + h * 8 < M) v[i].x[h] = *reinterpret_cast<const Chunk*>(x + place(p, at + h * 8, n));
    }
  };

  if (threadIdx.x == 0) stage.begin();
  __syncthreads();
  const float factor = scale ? *scale : 1.0f;
  unsigned mix[4];
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) task.copy(&x2, &w2, &g, stage);
    __syncwarp();
  } else {
    if (mixes) load_mix(mix, w1, L, M, M, 1), fetch(start);  // they come while the products are made
    task.make(stage, sums, factor, dw2, rows, inner, outer);
  }
  if (CLUSTER > 1)  // a fence of the whole GPU
    meet();
  else
    __syncthreads();

  if (mixes) {
    float sum[HALVES][4] = {};
#pragma unroll 1
    for (int first = start; first < items; first += ITEMS * STRIDE) {
      if (first > start) fetch(first);
      // For one block without a branch, so that all reads are under way: what lies outside is read somewhere else.
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        int p, n;
        const bool inside = find(first, i, p, n);
        if (CLUSTER > 1 && !inside) continue;
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
          float total[8];
          collect_scaled(total, sums, min(p * L + at + h * 8, TILE_M - 1), n / 8 % CHUNKS, factor);
          const unsigned kept = inside && at + h * 8 < L ? ~0u : 0;
          const uint4 of = rounded(total);
          *reinterpret_cast<uint4*>(&v[i].g[h]) = make_uint4(of.x & kept, of.y & kept, of.z & kept, of.w & kept);
        }
      }
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        int p, n;
        const bool inside = find(first, i, p, n);
        add_products(sum, v[i]);
        unsigned mixed[HALVES][4];
        mix_item(mixed, mix, v[i]);
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
          if (inside && at + h * 8 < M)
            *reinterpret_cast<uint4*>(dx + place(p, at + h * 8, n)) =
                make_uint4(mixed[h][0], mixed[h][1], mixed[h][2], mixed[h][3]);
      }
    }
    spread(reinterpret_cast<float*>(shares[warp]), sum);
  }
  if (CLUSTER > 1) meet_relaxed();  // no block ends before it has been read
  if (!task.back) return;

  // dx is written. The copying warp says so while the others go on: it takes a fence of the whole GPU.
  __syncwarp();
  __syncthreads();
  if (threadIdx.x >= GROUP) {
    if (ddown && threadIdx.x == GROUP) raise(flag, 1);
    return;
  }

  // Warps, then parts are added in a fixed order, the parts by the block that comes last.
  __shared__ bool last;
  if (threadIdx.x < VECTORS) {
    float4 total = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += shares[w][threadIdx.x];
    reinterpret_cast<float4*>(partial)[blockIdx.x * VECTORS + threadIdx.x] = total;
  }
  __threadfence();
  group_barrier(0);
  if (threadIdx.x == 0) last = atomicInc(seen, parts - 1) == parts - 1;
  group_barrier(0);
  if (!last) return;
  __threadfence();
  add_parts(dw1, reinterpret_cast<const float4*>(partial), parts, L, M);
}
