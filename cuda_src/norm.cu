// Group normalization of channels-last activations, forward and gradient; layer normalization is one group and one
// position a sample. A block owns one group of one sample: it reads its values three times, which stay in a cache, and
// sums in A.
#include "real.cuh"
#include "types.cuh"

constexpr int THREADS = 256;

// The sum of `value` over the block, in every thread; the order of the sum is fixed.
__device__ A block_sum(A value) {
  __shared__ A warps[THREADS / 32];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  A total = A(0);
  for (int w = 0; w < THREADS / 32; w++) total += warps[w];
  return total;
}

// out = (x - mean) / sqrt(variance + eps) * weight + bias. Grid (samples, groups).
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(group_norm)(const T* x,       // (samples, positions, channels)
                     const A* weight,  // (channels)
                     const A* bias,    // (channels)
                     T* out,           // like x, or null
                     A* stats,         // (samples, groups, 2): mean, 1 / deviation
                     A eps, int positions, int channels, int groups) {
  const int width = channels / groups, first = blockIdx.y * width, count = positions * width;
  const T* from = x + (long long)blockIdx.x * positions * channels + first;
  A sum = A(0);
  for (int i = threadIdx.x; i < count; i += THREADS) sum += widen(from[(long long)(i / width) * channels + i % width]);
  const A mean = block_sum(sum) / count;
  sum = A(0);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const A d = widen(from[(long long)(i / width) * channels + i % width]) - mean;
    sum += d * d;
  }
  const A inverse = A(1) / root(block_sum(sum) / count + eps);
  T* to = out + (long long)blockIdx.x * positions * channels + first;
  for (int i = threadIdx.x; out && i < count; i += THREADS) {
    const int c = i % width;
    const long long at = (long long)(i / width) * channels + c;
    to[at] = narrow((widen(from[at]) - mean) * inverse * weight[first + c] + bias[first + c]);
  }
  if (threadIdx.x == 0) {
    A* mine = stats + 2 * ((long long)blockIdx.x * groups + blockIdx.y);
    mine[0] = mean;
    mine[1] = inverse;
  }
}

// With n = (x - mean) / deviation and h = g * weight: dx = (h - mean(h) - n * mean(h * n)) / deviation, and the terms
// g * n whose column sum is the gradient of the weight. Grid (samples, groups).
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(group_norm_d)(const T* g, const T* x,  // (samples, positions, channels)
                       const A* weight,         // (channels)
                       const A* stats,          // (samples, groups, 2)
                       T* dx, A* terms,         // like x; terms may be null
                       int positions, int channels, int groups) {
  const int width = channels / groups, first = blockIdx.y * width, count = positions * width;
  const long long start = (long long)blockIdx.x * positions * channels + first;
  const A* mine = stats + 2 * ((long long)blockIdx.x * groups + blockIdx.y);
  const A mean = mine[0], inverse = mine[1];
  A sum = A(0), product = A(0);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int c = i % width;
    const long long at = start + (long long)(i / width) * channels + c;
    const A h = widen(g[at]) * weight[first + c];
    sum += h;
    product += h * (widen(x[at]) - mean) * inverse;
  }
  sum = block_sum(sum) / count;
  product = block_sum(product) / count;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int c = i % width;
    const long long at = start + (long long)(i / width) * channels + c;
    const A n = (widen(x[at]) - mean) * inverse, d = widen(g[at]);
    dx[at] = narrow((d * weight[first + c] - sum - n * product) * inverse);
    if (terms) terms[at] = d * n;
  }
}
