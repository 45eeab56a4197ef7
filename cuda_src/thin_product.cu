// out[p, r] = scale * sum over k of x[p, k] * w[k, r], rounded once: a wide x with up to 16 columns, x @ down. For
// Hopper.
//
// It costs what reading x costs, and what decides is how many bytes are under way on every multiprocessor: a block
// has 128 rows and a share of the inner axis, one warp copies boxes of 64 of its steps into a ring of stages, four
// multiply. Where there are too few tiles for all multiprocessors, the SPLITS blocks of a cluster share the inner
// axis, and add up what they have from each other's shared memory, always in the same order. What lies outside x and
// w is copied as zeros.
//
// only sm_90a
// variants bf16: SPLITS=1 | SPLITS=2 | SPLITS=4 | SPLITS=8
#include "cluster.cuh"
#include "hopper.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "the sizes of stages and the planner's rates are Hopper's"
#endif

constexpr int TILE_M = 128, TILE_K = 64, STAGES = 4, RANKS = 16;
constexpr int WORKERS = 4, THREADS = 32 * (WORKERS + 1);  // warps that multiply, 32 rows each, and the one that copies
constexpr int X_BYTES = TILE_M * TILE_K * 2, W_BYTES = TILE_K * RANKS * 2, STAGE = X_BYTES + W_BYTES;
constexpr int PITCH = RANKS + 8;        // floats of a row of sums: what 16 lanes write falls on different banks
constexpr int SHARE = TILE_M / SPLITS;  // rows that a block of the cluster adds up and writes

// Where a lane finds its row of the four 8 x 8 matrices of x that make an operand: rows `m` to `m` + 15, steps `k` to
// `k` + 15.
INLINE unsigned x_place(int m, int k, int lane) {
  const int row = m + lane % 16;
  return row * ROW_BYTES + (k / 8 + lane / 16 ^ row % 8) * 16;
}

// The same for w: steps `k` to `k` + 15, all columns. Its rows are 32 bytes wide and swizzled as such.
INLINE unsigned w_place(int k, int lane) {
  const unsigned at = (k + lane % 16) * (RANKS * 2) + lane / 16 * 16;
  return at ^ at / 128 % 2 * 16;
}

// Grid (tiles * SPLITS). ranks: a multiple of 8.
extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS)
    NAME(thin_product)(const __grid_constant__ TensorMap x,  // (rows, inner), boxes of 128 by 64
                       const __grid_constant__ TensorMap w,  // (inner, ranks), boxes of 64 by RANKS
                       const float* scale,                   // (1,), or null for 1
                       bf16* out,                            // (rows, ranks)
                       int rows, int inner, int ranks) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  const unsigned skip = -shared_address(memory) % 1024, ring = shared_address(memory) + skip;
  const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
  const int split = blockIdx.x % SPLITS, row = blockIdx.x / SPLITS * TILE_M;
  const int steps = (inner + TILE_K - 1) / TILE_K;
  const int count =
      (steps - split + SPLITS - 1) / SPLITS;  // the blocks' steps alternate: together they read whole rows
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  auto copy = [&](int i) {
    const unsigned done = full + 8 * (i % STAGES), to = ring + i % STAGES * STAGE;
    const int k = (split + i * SPLITS) * TILE_K;
    barrier_expect(done, STAGE);
    copy_box(to, &x, done, k, row);
    copy_box(to + X_BYTES, &w, done, 0, k);
  };
  const bool copies = threadIdx.x == 32 * WORKERS;
  if (copies) {
    for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WORKERS);
    barrier_init_done();
    for (int i = 0; i < min(count, STAGES); ++i) copy(i);
  }
  __syncwarp();
  __syncthreads();  // the barriers are there

  float sum[2][RANKS / 8][4] = {};  // of 16 rows; of 8 columns
  if (copies) {
    for (int i = STAGES; i < count; ++i) {
      barrier_wait(empty + 8 * (i % STAGES), (i / STAGES - 1) & 1);
      copy(i);
    }
  } else if (warp < WORKERS) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const unsigned x_at = ring + i % STAGES * STAGE, w_at = x_at + X_BYTES;
      barrier_wait(full + 8 * (i % STAGES), (i / STAGES) & 1);
#pragma unroll
      for (int k = 0; k < TILE_K; k += 16) {
        unsigned a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) load_matrices<false>(a[m], x_at + x_place(warp * 32 + m * 16, k, lane));
        unsigned b[4];
        load_matrices<true>(b, w_at + w_place(k, lane));
#pragma unroll
        for (int m = 0; m < 2; ++m) mma(sum[m][0], a[m], b[0], b[1]), mma(sum[m][1], a[m], b[2], b[3]);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * (i % STAGES));
    }
  }
  __syncwarp();
  __syncthreads();  // all stages have been read: the sums take their place
  float* sums = reinterpret_cast<float*>(memory + skip);
  if (warp < WORKERS)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < RANKS / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* to = sums + (warp * 32 + m * 16 + half * 8 + lane / 4) * PITCH + n * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(to) = make_float2(sum[m][n][half * 2], sum[m][n][half * 2 + 1]);
        }
  meet();
  const float factor = scale ? *scale : 1.0f;
  for (int at = threadIdx.x; at < SHARE * (RANKS / 4); at += THREADS) {
    const int m = split * SHARE + at / (RANKS / 4), r = at % (RANKS / 4) * 4;
    float4 total = {};
#pragma unroll
    for (int s = 0; s < SPLITS; ++s) {
      const float4 v = read4_there(place_in(shared_address(sums + m * PITCH + r), s));
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    if (row + m < rows && r < ranks)
      *reinterpret_cast<uint2*>(out + (long long)(row + m) * ranks + r) =
          make_uint2(round_pair(factor * total.x, factor * total.y), round_pair(factor * total.z, factor * total.w));
  }
  meet_relaxed();  // no block ends before it has been read
}
