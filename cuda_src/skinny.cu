// A product of at most 64 positions: y = x @ w + scale * (x2 @ w2 + bias2) + add + bias in one sum, rounded once. For Hopper.
//
//   y[p, n] = sum over k of x[p, k] * w[k, n] + scale * (bias2[n] + sum over k of x2[p, b * width2 + k] * w2[k, n - b * block])
//           + add[p, n] + bias[n]                                                                              b = n / block
//
// The time is that of reading w once. A cluster has a strip of TILE_N columns, none of which leaves its block of w2; each of its
// blocks takes a part of the steps of 64 channels, those of x2 before those of x. So there are blocks enough for all
// multiprocessors, two on each, and all of them ask for all that their shared memory holds at once. The cluster's sums are then
// added through shared memory, in the order of the blocks: no workspace, no second launch, the same bits every time. The input
// gradient is the same product with w turned (B_ROWS=0: rows of channels).
//
// Fewer than 64 positions are 64 all the same: the copy engine writes zeros for those that are not there, and reads nothing.
//
// only sm_90a
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=8 | TILE_N=128 B_ROWS=1 CLUSTER=4 | TILE_N=128 B_ROWS=1 CLUSTER=2
// variants bf16: TILE_N=128 B_ROWS=1 CLUSTER=1 | TILE_N=64 B_ROWS=1 CLUSTER=8 | TILE_N=64 B_ROWS=1 CLUSTER=4
// variants bf16: TILE_N=128 B_ROWS=0 CLUSTER=8 | TILE_N=128 B_ROWS=0 CLUSTER=4 | TILE_N=128 B_ROWS=0 CLUSTER=2
// variants bf16: TILE_N=128 B_ROWS=0 CLUSTER=1 | TILE_N=64 B_ROWS=0 CLUSTER=8 | TILE_N=64 B_ROWS=0 CLUSTER=4
#include "cluster.cuh"
#include "exchange.cuh"
#include "hopper.cuh"

constexpr int TILE_M = 64, TILE_K = 64;
constexpr int A_BYTES = TILE_M * ROW_BYTES, B_BYTES = TILE_N * ROW_BYTES, STAGE = A_BYTES + B_BYTES;
constexpr int B_BOX = TILE_K * ROW_BYTES;  // 64 columns of a step, where the rows of w run along them
constexpr int STAGES = 96 * 1024 / STAGE;  // two blocks share a multiprocessor's 228 KiB
// f32 of a row of sums in shared memory: eight banks from row to row, so that the pairs of a half warp, 4 rows x 8, meet none twice.
constexpr int PITCH = TILE_N + 8;
static_assert(TILE_M * PITCH * 4 <= STAGES * STAGE, "the sums take the place of the stages");

// A place in the ring, and how often it was passed.
struct Stage {
  unsigned memory, barriers;  // of the ring
  int index = 0;
  unsigned parity = 0;

  INLINE unsigned a() const { return memory + index * STAGE; }
  INLINE unsigned b() const { return a() + A_BYTES; }
  INLINE unsigned full() const { return barriers + 8 * index; }
  INLINE unsigned empty() const { return barriers + 8 * (STAGES + index); }
  INLINE void next() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};

// Copies the operands of the steps [from, to) of one of the two sums. b: the block of x. n: the first column of w.
INLINE void fetch(const TensorMap* x, const TensorMap* w, int from, int to, int b, int n, Stage& stage) {
#pragma unroll 1
  for (int k = from * TILE_K; k < to * TILE_K; k += TILE_K) {
    barrier_wait(stage.empty(), stage.parity ^ 1);
    barrier_expect(stage.full(), A_BYTES + B_BYTES);
    if (B_ROWS) {
#pragma unroll
      for (int box = 0; box < TILE_N / 64; ++box)
        copy_box(stage.b() + box * B_BOX, w, stage.full(), n + 64 * box, k, 0);
    } else {
      copy_box(stage.b(), w, stage.full(), k, n, 0);
    }
    copy_box(stage.a(), x, stage.full(), k, b, 0);
    stage.next();
  }
}

// The compiler keeps its own uses of the sums before or behind this point.
INLINE void settle(float (&sum)[TILE_N / 2]) {
#pragma unroll
  for (int i = 0; i < TILE_N / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// sum += the products of so many steps.
INLINE void multiply(float (&sum)[TILE_N / 2], int steps, Stage& stage) {
  constexpr unsigned leading = B_ROWS ? B_BOX : 16, b_step = B_ROWS ? 16 * ROW_BYTES : 32;
  if (steps <= 0) return;
  settle(sum);
#pragma unroll 1
  for (; steps > 0; --steps) {
    barrier_wait(stage.full(), stage.parity);
    products_begin();
#pragma unroll
    for (int s = 0; s < TILE_K / 16; ++s)
      wgmma<TILE_N, B_ROWS>(sum, operand(stage.a() + s * 32, 16), operand(stage.b() + s * b_step, leading));
    products_commit();
    products_wait<0>();  // the copies go on meanwhile
    if (threadIdx.x == 0) barrier_arrive(stage.empty());
    stage.next();
  }
  settle(sum);
}

INLINE void prefetch(const bf16* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// total += factor * eight values.
INLINE void add_chunk(float (&total)[8], const bf16* from, float factor) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    total[2 * i] += factor * low_half(pairs[i]);
    total[2 * i + 1] += factor * high_half(pairs[i]);
  }
}

// Grid: CLUSTER blocks for each strip, ceil(block / TILE_N) of them for each of columns / block blocks.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(GROUP + 32, 2)
    NAME(skinny)(const __grid_constant__ TensorMap x,   // (positions, 1, width)
                 const __grid_constant__ TensorMap w,   // (1, width, columns), or (1, columns, width)
                 const __grid_constant__ TensorMap x2,  // (positions, columns / block, width2)
                 const __grid_constant__ TensorMap w2,  // (1, width2, block), or (1, block, width2)
                 const float* scale,                    // (1,), or null for 1
                 const bf16* add,                       // (positions, columns), or null
                 const bf16* bias,                      // (columns), or null
                 const bf16* bias2,                     // (columns), or null
                 bf16* y,                               // (positions, columns)
                 int positions, int columns, int width, int width2, int block) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  Stage stage = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  const unsigned sums = stage.memory;

  const int rank = cluster_rank(), strips = (block + TILE_N - 1) / TILE_N, strip = blockIdx.x / CLUSTER;
  const int b = strip / strips, column = b * block + strip % strips * TILE_N;
  const int past = min(column + TILE_N, (b + 1) * block);
  const int steps2 = (width2 + TILE_K - 1) / TILE_K, steps = steps2 + (width + TILE_K - 1) / TILE_K;
  const int first = rank * steps / CLUSTER, last = (rank + 1) * steps / CLUSTER;

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * STAGES; ++i) barrier_init(stage.barriers + 8 * i, 1);
    barrier_init_done();
  }
  __syncthreads();

  // At the end an item is eight columns of a row, and the rows go round the blocks of the cluster.
  constexpr int CHUNKS = TILE_N / 8, ITEMS = TILE_M / CLUSTER * CHUNKS;
  const float factor = scale ? *scale : 1.0f;
  if (threadIdx.x >= GROUP) {
    if (threadIdx.x == GROUP) {
      prefetch_map(&w), prefetch_map(&x);
      fetch(&x2, &w2, first, min(last, steps2), b, column - b * block, stage);
      fetch(&x, &w, max(first, steps2) - steps2, last - steps2, 0, column, stage);
    }
    __syncwarp();
  } else {
    for (int i = threadIdx.x; i < ITEMS; i += GROUP) {
      const int row = i / CHUNKS * CLUSTER + rank, n = column + i % CHUNKS * 8;
      if (row >= positions || n >= past) continue;
      if (add) prefetch(add + (long long)row * columns + n);
      if (bias) prefetch(bias + n);
      if (bias2) prefetch(bias2 + n);
    }
    float sum[TILE_N / 2] = {};
    const int before = min(last, steps2) - first;
    multiply(sum, before, stage);
    if (before > 0)
#pragma unroll
      for (int i = 0; i < TILE_N / 2; ++i) sum[i] *= factor;
    multiply(sum, last - max(first, steps2), stage);
    group_barrier(0);  // the last stage is read by all warps

    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    const unsigned to = sums + (row * PITCH + lane % 4 * 2) * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (row + 8 * half < positions)
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j)
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + (8 * half * PITCH + 8 * j) * 4),
                       "f"(sum[4 * j + 2 * half]), "f"(sum[4 * j + 2 * half + 1])
                       : "memory");
  }
  meet();

  if (threadIdx.x < GROUP)
    for (int i = threadIdx.x; i < ITEMS; i += GROUP) {
      const int row = i / CHUNKS * CLUSTER + rank, n = column + i % CHUNKS * 8;
      if (row >= positions || n >= past) continue;
      const unsigned from = sums + (row * PITCH + i % CHUNKS * 8) * 4;
      float total[8] = {};
#pragma unroll
      for (int part = 0; part < CLUSTER; ++part) {
        const unsigned there = place_in(from, part);
        const float4 low = read4_there(there), high = read4_there(there + 16);
        total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
        total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
      }
      const long long at = (long long)row * columns + n;
      if (bias2) add_chunk(total, bias2 + n, factor);
      if (bias) add_chunk(total, bias + n, 1);
      if (add) add_chunk(total, add + at, 1);
      unsigned out[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) out[v] = round_pair(total[2 * v], total[2 * v + 1]);
      *reinterpret_cast<uint4*>(y + at) = make_uint4(out[0], out[1], out[2], out[3]);
    }
  __syncwarp();
  meet();  // no block ends before it has been read
}
