// The tile of the change of a LoHa of at most 16 ranks, 64 x 64 in the registers of a warpgroup. For Hopper.
//
//   E1 = d1 @ u1, E2 = d2 @ u2, change = scale * E1 * E2 (elementwise), rounded
//
// From boxes of the factors in shared memory, 2 KiB each: of d 64 rows of 16 ranks (32-byte swizzle), of u 16 ranks of
// 64 columns (128-byte swizzle); both have zeros for ranks that are not there. Row i and column j of E are row i of d
// and column j of u, or TURNED column i of u and row j of d. They lie as sums of a product, so that the change in pairs
// is the a of four wgmma_own: no shared memory is written.
#pragma once
#include "hopper.cuh"

constexpr int FACTOR_BOX = 64 * 16 * 2;

// e = d @ u, not waited for, nor committed.
template <bool TURNED>
INLINE void make_tile(float (&e)[32], unsigned d, unsigned u) {
  const unsigned long long left = TURNED ? operand(u, FACTOR_BOX) : narrow_operand(d);
  const unsigned long long right = TURNED ? narrow_operand(d) : operand(u, FACTOR_BOX);
  // The first 0: what e was is not added.
#define NEW4(i) "=f"(e[i]), "=f"(e[i + 1]), "=f"(e[i + 2]), "=f"(e[i + 3])
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" IN32 "}, %32, %33, 0, 1, 1, %34, %35;"
               : NEW4(0), NEW4(4), NEW4(8), NEW4(12), NEW4(16), NEW4(20), NEW4(24), NEW4(28)
               : "l"(left), "l"(right), "n"(TURNED), "n"(!TURNED));
#undef NEW4
}

// Both products of a tile, as a group of their own. Before: products_begin.
template <bool TURNED>
INLINE void make_tiles(float (&e1)[32], float (&e2)[32], unsigned d1, unsigned u1, unsigned d2, unsigned u2) {
  make_tile<TURNED>(e1, d1, u1);
  make_tile<TURNED>(e2, d2, u2);
  products_commit();
}

// The change, once E1 and E2 are there: row s is the a of the inner 16 from 16 * s on.
INLINE void round_change(unsigned (&change)[4][4], const float (&e1)[32], const float (&e2)[32], float factor) {
#pragma unroll
  for (int i = 0; i < 16; ++i)
    change[i / 4][i % 4] = round_pair(factor * e1[2 * i] * e2[2 * i], factor * e1[2 * i + 1] * e2[2 * i + 1]);
}
