// What the blocks of a cluster need to work together. sm_90 and later.
#pragma once
#include "mma.cuh"

// All threads of the cluster meet; what each wrote to shared memory before is seen by all after. Warps arrive as a
// whole.
__device__ __forceinline__ void meet() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same for barriers alone: what was written otherwise need not be seen. Does not wait for stores to global memory.
__device__ __forceinline__ void meet_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address, in the shared memory of a block of the cluster, of the place of `own` in this block's.
__device__ __forceinline__ unsigned address_in(const void* own, int block) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(block));
  return there;
}

// The values at the place of `own` in the shared memory of a block of the cluster.
__device__ __forceinline__ float read_of(const float* own, int block) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address_in(own, block)) : "memory");
  return value;
}

__device__ __forceinline__ float4 read_of(const float4* own, int block) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address_in(own, block))
               : "memory");
  return v;
}

// Arrives at the barrier that stands at this address in a block of the cluster. Without a release over the cluster,
// which is a fence of the whole GPU: it says that products have read their operands, and orders no writes.
__device__ __forceinline__ void barrier_arrive_at(unsigned barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}
