// Losses with their gradients: mean squared, absolute and Charbonnier differences, and cross-entropy. Sums are kept in
// A and added in an order that the sizes alone decide. `target` has the type of y, or is wide: the other pointer is
// then null.
#include "real.cuh"
#include "types.cuh"

// The sum over the block (whole warps, at most 32), valid in every thread; the order is fixed.
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A warps[32];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, count = blockDim.x * blockDim.y / 32;
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();  // the sum before this one has been read
  if (thread % 32 == 0) warps[thread / 32] = value;
  __syncthreads();
  value = A(0);
  for (int w = 0; w < count; w++) value += warps[w];
  return value;
}

struct Square {
  static __device__ __forceinline__ A value(A d, A) { return d * d; }
  static __device__ __forceinline__ A slope(A d, A) { return A(2) * d; }
};
struct Absolute {
  static __device__ __forceinline__ A value(A d, A) { return d < A(0) ? -d : d; }
  static __device__ __forceinline__ A slope(A d, A) {
    return d < A(0) ? A(-1) : d > A(0) ? A(1) : d;  // 0 at 0, NaN at NaN
  }
};
struct Charbonnier {
  static __device__ __forceinline__ A value(A d, A eps) { return root(d * d + eps * eps); }
  static __device__ __forceinline__ A slope(A d, A eps) { return d / root(d * d + eps * eps); }
};

// dy = w f'(y - target) * share, and partial[block] = this block's sum of w f(y - target) * share.
template <class F>
__device__ __forceinline__ void difference(const T* y, const T* target, const A* wide_target, const A* weights, T* dy,
                                           A* partial, A eps, A share, long long n, long long sample) {
  A sum = A(0);
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const A d = widen(y[i]) - (target ? widen(target[i]) : wide_target[i]);
    const A w = weights ? weights[i / sample] * share : share;
    dy[i] = narrow(F::slope(d, eps) * w);
    sum += F::value(d, eps) * w;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256, 4)
    NAME(square)(const T* y, const T* target, const A* wide_target,  // (n)
                 const A* weights,                                   // (n / sample), or null
                 T* dy, A* partial, A eps, A share, long long n, long long sample) {
  difference<Square>(y, target, wide_target, weights, dy, partial, eps, share, n, sample);
}
extern "C" __global__ void __launch_bounds__(256, 4)
    NAME(absolute)(const T* y, const T* target, const A* wide_target, const A* weights, T* dy, A* partial, A eps,
                   A share, long long n, long long sample) {
  difference<Absolute>(y, target, wide_target, weights, dy, partial, eps, share, n, sample);
}
extern "C" __global__ void __launch_bounds__(256, 4)
    NAME(charbonnier)(const T* y, const T* target, const A* wide_target, const A* weights, T* dy, A* partial, A eps,
                      A share, long long n, long long sample) {
  difference<Charbonnier>(y, target, wide_target, weights, dy, partial, eps, share, n, sample);
}

// total[0] = the sum of n parts. One block.
extern "C" __global__ void __launch_bounds__(1024) NAME(total)(const A* partial, A* total, long long n) {
  A sum = A(0);
  for (long long i = threadIdx.x; i < n; i += 1024) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) total[0] = sum;
}

// share[0] = 1 / the number of targets that are not ignored, 0 if there are none. One block.
extern "C" __global__ void __launch_bounds__(1024)
    NAME(counted_share)(const int* targets, A* share, long long rows, int ignored) {
  __shared__ int warps[32];
  int count = 0;
  for (long long r = threadIdx.x; r < rows; r += 1024) count += targets[r] != ignored;
  for (int step = 16; step; step /= 2) count += __shfl_xor_sync(~0u, count, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x) return;
  count = 0;
  for (int w = 0; w < 32; w++) count += warps[w];
  share[0] = count ? A(1) / A(count) : A(0);
}

// With p the softmax of a row, t its target and w its weight:
// loss = w share (log sum exp(y) - (1 - s) y[t] - s mean(y)), dy[c] = w share (p[c] - (1 - s) [c = t] - s / classes).
// 0 for an ignored target, NaN for one that is no class. A block a row: classes are few (a warp would do) or many. Grid
// (rows).
extern "C" __global__ void __launch_bounds__(256)
    NAME(cross_entropy)(const T* y,          // (rows, classes)
                        const int* targets,  // (rows)
                        const A* weights,    // (rows / sample), or null
                        const A* share,      // (1)
                        T* dy, A* losses,    // (rows)
                        A smoothing, int classes, int ignored, long long sample) {
  const long long row = blockIdx.x;
  const T* from = y + row * classes;
  T* to = dy + row * classes;
  const int target = targets[row];
  if (target == ignored) {
    for (int c = threadIdx.x; c < classes; c += blockDim.x) to[c] = narrow(A(0));
    if (threadIdx.x == 0) losses[row] = A(0);
    return;
  }
  // The largest by a maximum of maxima: every thread reads those of all warps.
  __shared__ A largest_of[8];
  A largest = widen(from[0]);
  for (int c = threadIdx.x; c < classes; c += blockDim.x) largest = max(largest, widen(from[c]));
  for (int step = 16; step; step /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, step));
  if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < int(blockDim.x / 32); w++) largest = max(largest, largest_of[w]);
  A sum = A(0), plain = A(0);
  for (int c = threadIdx.x; c < classes; c += blockDim.x) {
    const A shifted = widen(from[c]) - largest;
    sum += exponential(shifted);
    plain += shifted;
  }
  sum = block_sum(sum);
  plain = block_sum(plain);
  const bool known = target >= 0 && target < classes;
  A w = share[0] * (weights ? weights[row / sample] : A(1));
  if (!known) w = A(__int_as_float(0x7fc00000));
  const A even = smoothing / classes, kept = A(1) - smoothing;
  for (int c = threadIdx.x; c < classes; c += blockDim.x) {
    const A p = exponential(widen(from[c]) - largest) / sum;
    to[c] = narrow((p - even - (c == target ? kept : A(0))) * w);
  }
  if (threadIdx.x == 0) {
    const A own = known ? widen(from[target]) - largest : A(0);
    losses[row] = w * (logarithm(sum) - kept * own - even * plain);
  }
}
