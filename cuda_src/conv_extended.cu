// Convolution of bf16 and a second one in one accumulator, rounded once: the extended product wherever mma.sync is.
//
// conv_extended     y  = x * w + scale * (x2 * w2 + bias2) + add + bias, with x * w as conv.cu's conv
// conv_extended_dx  dx = dy * w^T + scale * dy2 * w2^T + add, as its conv_dx
//
// The second sum takes the same walk over space, or, if other.single, has one tap at the position itself. It has its
// own blocks of channels and columns, in any relation to the groups of the first.
//
// variants bf16: TILE_M=128 TILE_N=128 VEC_A=8 VEC_B=8 | TILE_M=64 TILE_N=64 VEC_A=8 VEC_B=8
// variants bf16: TILE_M=128 TILE_N=32 VEC_A=8 VEC_B=8 | TILE_M=128 TILE_N=32 VEC_A=8 VEC_B=1
// variants bf16: TILE_M=64 TILE_N=64 VEC_A=1 VEC_B=8 | TILE_M=64 TILE_N=64 VEC_A=1 VEC_B=1
#define EXTENDED 1
#include "types.cuh"
#include "conv_gather.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    NAME(conv_extended)(const T* x,      // (N, D, H, W, groups * I)
                        const T* w,      // (taps, I, groups * O), or (taps, I, O) if shared
                        const T* x2,     // (N, D, H, W, blocks * inner); (N, OD, OH, OW, blocks * inner) if single
                        const T* w2,     // (taps, inner, blocks * outer), or (taps, inner, outer) if shared
                        const A* scale,  // (1,)
                        const T* add,    // (N, OD, OH, OW, groups * O)
                        const T* bias,   // (groups * O)
                        const T* bias2,  // (groups * O)
                        T* y,            // (N, OD, OH, OW, groups * O)
                        const Geometry g, const Term other, int positions, int I, int O, int groups, int shared) {
  gather_product<false>({x, w, {I, O, groups, shared}, x2, w2, other}, scale, add, bias, bias2, y, g, positions);
}

#if VEC_A == VEC_B
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    NAME(conv_extended_dx)(const T* dy,     // (N, OD, OH, OW, groups * O)
                           const T* w,      // (taps, I, groups * O), or (taps, I, O) if shared
                           const T* dy2,    // (N, OD, OH, OW, blocks * inner); (N, D, H, W, blocks * inner) if single
                           const T* w2,     // (taps, outer, blocks * inner), or (taps, outer, inner) if shared
                           const A* scale,  // (1,)
                           const T* add,    // (N, D, H, W, groups * I)
                           T* dx,           // (N, D, H, W, groups * I)
                           const Geometry g, const Term other, int positions, int I, int O, int groups, int shared) {
  gather_product<true>({dy, w, {O, I, groups, shared}, dy2, w2, other}, scale, add, nullptr, nullptr, dx, g, positions);
}
#endif
