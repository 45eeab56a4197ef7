// Flags in memory by which the blocks of one launch tell each other what they have made. All of them have to run at
// once. Hopper.
#pragma once
#include "hopper.cuh"

// How much is there; how many have seen it. Zeros before and after a launch.
struct Flag {
  unsigned made, seen;
};

// So much more is there, of what this thread and those it has met with have written, for copies too.
INLINE void raise(Flag* flag, unsigned more) {
  fence_copies_global();
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(&flag->made), "r"(more) : "memory");
}

// Until all is there.
INLINE void await(Flag* flag, unsigned all) {
  unsigned made;
  do {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(made) : "l"(&flag->made) : "memory");
  } while (made != all);
  __threadfence();
  fence_copies_global();
}

// Of `many` that call this the last one lowers the flag.
INLINE void lower(Flag* flag, int many) {
  if (atomicInc(&flag->seen, many - 1) == many - 1) flag->made = 0;
}
