// What the blocks of a cluster need to work together. sm_90 and later.
#pragma once
#include "mma.cuh"

// All threads of the cluster meet; what each wrote to shared memory before is seen by all after. Warps arrive as a
// whole.
__device__ __forceinline__ void meet() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Its two halves, for work between them; in both, warps as a whole.
__device__ __forceinline__ void arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void await() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
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

// The place in a block of the cluster of what stands at this address in the own shared memory.
__device__ __forceinline__ unsigned place_in(unsigned address, int block) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

__device__ __forceinline__ float read_there(unsigned there) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
}

// Four values at a multiple of 16 bytes.
__device__ __forceinline__ float4 read4_there(unsigned there) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
  return v;
}

// Arrives at the barrier that stands at this address in a block of the cluster. Without a release over the cluster,
// which is a fence of the whole GPU: it says that products have read their operands, and orders no writes.
__device__ __forceinline__ void barrier_arrive_at(unsigned barrier, int block) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(place_in(barrier, block)) : "memory");
}
