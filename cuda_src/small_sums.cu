// Up to three sums of products of small arrays in one launch, each
//
//   out[i] = scale * sum over k of a[i, k] * b[i, k]        i: three axes, k: two; an array has each by its own stride, or 0
//
// What a weight's factors get of its gradient, and what a weight is made of, is so small that a launch takes longer than
// the sums. A lane has an element, or eight of them where there is more to add up, always in the same order.
#include "types.cuh"

constexpr int THREADS = 256;

struct Job {
  int size[3], a[3], b[3];               // of the result: its axes, and the strides of a and b along them
  int inner[2], a_inner[2], b_inner[2];  // likewise what is summed over
  int lanes;                             // of an element: 1 or 8
  int blocks;                            // that do this one
};

template <class Left>
__device__ __forceinline__ void sums(const Left* a, const T* b, A factor, A* out, const Job& job, int block) {
  const int i = (block * THREADS + threadIdx.x) / job.lanes, lane = threadIdx.x % job.lanes;
  const bool inside = i < job.size[0] * job.size[1] * job.size[2];
  const int z = i % job.size[2], y = i / job.size[2] % job.size[1], x = i / job.size[2] / job.size[1];
  a += x * job.a[0] + y * job.a[1] + z * job.a[2];
  b += x * job.b[0] + y * job.b[1] + z * job.b[2];
  A sum = 0;
  for (int k = lane; inside && k < job.inner[0] * job.inner[1]; k += job.lanes) {
    const int outer = k / job.inner[1], own = k % job.inner[1];
    sum += A(widen(a[outer * job.a_inner[0] + own * job.a_inner[1]])) *
           A(widen(b[outer * job.b_inner[0] + own * job.b_inner[1]]));
  }
  for (int step = job.lanes / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (inside && lane == 0) out[i] = factor * sum;
}

template <class Left>
__device__ __forceinline__ void all_sums(const Left* a1, const T* b1, A* out1, const Left* a2, const T* b2, A* out2,
                                         const Left* a3, const T* b3, A* out3, const A* scale, const Job& first,
                                         const Job& second, const Job& third) {
  const A factor = scale ? *scale : A(1);
  const int block = blockIdx.x;
  if (block < first.blocks)
    sums(a1, b1, factor, out1, first, block);
  else if (block < first.blocks + second.blocks)
    sums(a2, b2, factor, out2, second, block - first.blocks);
  else
    sums(a3, b3, factor, out3, third, block - first.blocks - second.blocks);
}

// Grid (the blocks of all jobs).
extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(small_sums)(const A* a1, const T* b1, A* out1, const A* a2, const T* b2, A* out2, const A* a3, const T* b3,
                     A* out3,
                     const A* scale,  // (1,), or null for 1
                     const __grid_constant__ Job first, const __grid_constant__ Job second,
                     const __grid_constant__ Job third) {
  all_sums(a1, b1, out1, a2, b2, out2, a3, b3, out3, scale, first, second, third);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    NAME(small_sums_narrow)(const T* a1, const T* b1, A* out1, const T* a2, const T* b2, A* out2, const T* a3,
                            const T* b3, A* out3, const A* scale, const __grid_constant__ Job first,
                            const __grid_constant__ Job second, const __grid_constant__ Job third) {
  all_sums(a1, b1, out1, a2, b2, out2, a3, b3, out3, scale, first, second, third);
}
