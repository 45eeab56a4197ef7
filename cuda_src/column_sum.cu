// The sum over the rows of a matrix of a few million values, in one launch: the gradient of a bias. For Hopper and
// later.
//
//   out[c] = scale * sum over r of x[r, c]
//
// Eight blocks of a cluster share the rows of eight columns (16 bytes) and the first adds what the others have left
// in their shared memory. The order of the sum depends on the sizes alone. Two launches, the second for a few hundred
// values, take longer than the reading.
//
// only sm_90a sm_100a sm_120
// variants bf16: none
#include "cluster.cuh"
#include "exchange.cuh"

constexpr int CLUSTER = 8, THREADS = 256, COLUMNS = 8, LOADS = 4;

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
    NAME(column_sum_once)(const bf16* x,       // (rows, columns), columns a multiple of 8
                          const float* scale,  // (1,), or null for 1
                          float* out,          // (columns)
                          int rows, int columns) {
  __shared__ float shares[THREADS / 32][COLUMNS], totals[COLUMNS];
  const int block = blockIdx.x % CLUSTER, column = blockIdx.x / CLUSTER * COLUMNS;
  const int span = (rows + CLUSTER - 1) / CLUSTER, end = min(block * span + span, rows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum[COLUMNS] = {};
  for (int r = block * span + threadIdx.x; r < end; r += LOADS * THREADS) {
    uint4 next[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      const int row = r + j * THREADS;
      next[j] = make_uint4(0, 0, 0, 0);
      if (row < end) next[j] = *reinterpret_cast<const uint4*>(x + (long long)row * columns + column);
    }
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      const unsigned pairs[4] = {next[j].x, next[j].y, next[j].z, next[j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[2 * i] += low_half(pairs[i]), sum[2 * i + 1] += high_half(pairs[i]);
    }
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
    for (int half = 16; half; half /= 2) sum[c] += __shfl_xor_sync(~0u, sum[c], half);
    if (lane == 0) shares[warp][c] = sum[c];
  }
  __syncthreads();
  if (threadIdx.x < COLUMNS) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) total += shares[w][threadIdx.x];
    totals[threadIdx.x] = total;
  }
  meet();
  if (block == 0 && threadIdx.x < COLUMNS) {
    float total = 0;
#pragma unroll
    for (int b = 0; b < CLUSTER; ++b) total += read_there(place_in(shared_address(totals + threadIdx.x), b));
    out[column + threadIdx.x] = total * (scale ? *scale : 1.0f);
  }
  meet_relaxed();  // no block ends before it has been read
}
