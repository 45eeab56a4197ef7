// What the blocks of a cluster need to add up what each of them has. sm_90 and later.
#pragma once
#include "mma.cuh"

// All threads of the cluster meet; what each wrote to shared memory before is seen by all after. Warps arrive as a whole.
__device__ __forceinline__ void meet() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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
