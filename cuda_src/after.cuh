// What lets a kernel start while the one before it in the stream still ends: programmatic dependent launch, Hopper
// and later. A kernel whose file includes this is launched so inside a graph, and does what needs no data first:
// barriers, maps, indices.
#pragma once

// Nothing of global memory that a kernel before may write is read, and nothing is written, before this.
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may take the places that this one's leave.
__device__ __forceinline__ void let_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
