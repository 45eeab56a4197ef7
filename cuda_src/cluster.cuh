// Blocks of a cluster that read each other's shared memory. For Hopper and later.
#pragma once

// All threads of the cluster meet; what each wrote to shared memory before is seen by all after.
__device__ __forceinline__ void meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place in block `rank` of the cluster of what stands at this address in the own shared memory.
__device__ __forceinline__ unsigned place_in(unsigned address, int rank) {
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
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
