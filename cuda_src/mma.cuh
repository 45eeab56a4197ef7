// Tensor-core pieces for bf16: asynchronous copies, swizzled tiles, fragments, m16n8k16 products. sm_80 and later.
#pragma once
#include "types.cuh"

using Chunk = Pack<bf16, 8>;  // 16 bytes, the unit of copies, of the swizzle and of a row of ldmatrix

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return unsigned(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory without passing registers; zeros unless valid (then src is not read).
__device__ __forceinline__ void copy_async(unsigned dst, const bf16* src, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most PENDING of the latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void store_chunk(unsigned dst, const Chunk& v) {
  const unsigned* u = reinterpret_cast<const unsigned*>(&v);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(u[0]), "r"(u[1]), "r"(u[2]), "r"(u[3])
               : "memory");
}

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8. TRANSPOSE: as stored [k][m] or [k][n].
template <bool TRANSPOSE>
__device__ __forceinline__ void load_matrices(unsigned (&f)[4], unsigned address) {
  if (TRANSPOSE)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                 : "r"(address)
                 : "memory");
}

// An 8 x 8 matrix of which lane l holds row l / 4, columns 2 * (l % 4) and the next, turned.
__device__ __forceinline__ unsigned turned(unsigned v) {
  unsigned out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

// c (16x8 f32) += a (16x16) @ b (16x8). Lane l holds rows l/4 and l/4 + 8, columns 2 * (l%4) and the next.
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
