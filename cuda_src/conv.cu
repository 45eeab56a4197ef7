// Convolution over channels-last arrays: forward, gradient of the input, gradient of the weight. Gathered, no atomics.
//
// conv     y[n, o, q*O + j]  = scale * sum over t, i of x[n, seen(o, t), q*I + i] * w[t, i, q*O + j]
// conv_dx  dx[n, p, q*I + i] = scale * sum over t, j of dy[n, o, q*O + j] * w[t, i, q*O + j] where seen(o, t) = p
// conv_dw  dw[t, i, q*O + j] = scale * sum over n, o of x[n, seen(o, t), q*I + i] * dy[n, o, q*O + j]
//
// seen(o, t) = o * stride - padding + t * dilation, with zeros outside of x. Group q has I channels in and O out.
// shared: all groups use one w (taps, I, O), and dw is summed over q as well. positions: N * OD * OH * OW of y (conv,
// conv_dw) or N * D * H * W of x (conv_dx); positions and pixels are below 2^31, offsets are 64 bits wide. scale, add
// and bias may be null.
//
// variants bf16: TILE_M=128 TILE_N=128 VEC_A=8 VEC_B=8 | TILE_M=64 TILE_N=64 VEC_A=8 VEC_B=8
// variants bf16: TILE_M=128 TILE_N=32 VEC_A=8 VEC_B=8 | TILE_M=128 TILE_N=32 VEC_A=8 VEC_B=1
// variants bf16: TILE_M=64 TILE_N=64 VEC_A=1 VEC_B=8 | TILE_M=64 TILE_N=64 VEC_A=1 VEC_B=1 | DIRECT=1
// variants f32 f64: TILE_M=64 TILE_N=64 | DIRECT=1
#include "types.cuh"

#ifndef DIRECT
#ifdef T_BF16
#include "conv_gather.cuh"
#include "conv_outer.cuh"
#else
#include "conv_simt.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(conv)(const T* x,      // (N, D, H, W, groups * I)
               const T* w,      // (taps, I, groups * O), or (taps, I, O) if shared
               const A* scale,  // (1,)
               const T* add,    // (N, OD, OH, OW, groups * O)
               const T* bias,   // (groups * O)
               T* y,            // (N, OD, OH, OW, groups * O)
               const Geometry g, int positions, int I, int O, int groups, int shared) {
  gather_product<false>({x, w, {I, O, groups, shared}}, scale, add, bias, nullptr, y, g, positions);
}

#if !defined(T_BF16) || VEC_A == VEC_B  // both operands of conv_dx lie along the same channels
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(conv_dx)(const T* dy,     // (N, OD, OH, OW, groups * O)
                  const T* w,      // (taps, I, groups * O), or (taps, I, O) if shared
                  const A* scale,  // (1,)
                  const T* add,    // (N, D, H, W, groups * I)
                  T* dx,           // (N, D, H, W, groups * I)
                  const Geometry g, int positions, int I, int O, int groups, int shared) {
  gather_product<true>({dy, w, {O, I, groups, shared}}, scale, add, nullptr, nullptr, dx, g, positions);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(conv_dw)(const T* x,      // (N, D, H, W, groups * I)
                  const T* dy,     // (N, OD, OH, OW, groups * O)
                  const A* scale,  // (1,)
                  A* dw,           // (splits, taps, I, groups * O), or (splits, taps, I, O) if shared
                  const Geometry g, int positions, int I, int O, int groups, int shared,
                  int span) {  // positions a split; split s takes those from s * span on
  outer_product(x, dy, scale, dw, g, positions, I, O, groups, shared, span);
}

#else
#include "conv_direct.cuh"

constexpr int WIDE = 16 / sizeof(T);  // channels of one access

extern "C" __global__ void __launch_bounds__(256)
    NAME(conv_narrow)(const T* x,      // (N, D, H, W, groups * I)
                      const T* w,      // (taps, I, groups * O), or (taps, I, O) if shared
                      const A* scale,  // (1,)
                      const T* add,    // (N, OD, OH, OW, groups * O)
                      const T* bias,   // (groups * O)
                      T* y,            // (N, OD, OH, OW, groups * O)
                      const Geometry g, int positions, int I, int O, int groups, int shared) {
  direct<1, false>(x, w, scale, add, bias, y, g, positions, I, O, groups, shared);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(conv_depthwise)(const T* x,      // (N, D, H, W, groups)
                         const T* w,      // (taps, 1, groups)
                         const A* scale,  // (1,)
                         const T* add,    // (N, OD, OH, OW, groups)
                         const T* bias,   // (groups)
                         T* y,            // (N, OD, OH, OW, groups)
                         const Geometry g, int positions, int I, int O, int groups, int shared) {
  direct<WIDE, false>(x, w, scale, add, bias, y, g, positions, 1, 1, groups, 0);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    NAME(conv_narrow_dx)(const T* dy,     // (N, OD, OH, OW, groups * O)
                         const T* w,      // (taps, I, groups * O), or (taps, I, O) if shared
                         const A* scale,  // (1,)
                         const T* add,    // (N, D, H, W, groups * I)
                         T* dx,           // (N, D, H, W, groups * I)
                         const Geometry g, int positions, int I, int O, int groups, int shared) {
  direct<1, true>(dy, w, scale, add, nullptr, dx, g, positions, O, I, groups, shared);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(conv_depthwise_dx)(const T* dy,     // (N, OD, OH, OW, groups)
                            const T* w,      // (taps, 1, groups)
                            const A* scale,  // (1,)
                            const T* add,    // (N, D, H, W, groups)
                            T* dx,           // (N, D, H, W, groups)
                            const Geometry g, int positions, int I, int O, int groups, int shared) {
  direct<WIDE, true>(dy, w, scale, add, nullptr, dx, g, positions, 1, 1, groups, 0);
}

extern "C" __global__ void __launch_bounds__(256)
    NAME(conv_narrow_dw)(const T* x,   // (N, D, H, W, groups * I)
                         const T* dy,  // (N, OD, OH, OW, groups * O)
                         A* partials,  // (splits, taps, I, groups * O)
                         const Geometry g, int positions, int I, int O, int groups,
                         int span) {  // positions a split
  direct_outer(x, dy, partials, g, positions, I, O, groups, span);
}

// dw = scale * the sum over splits, and over the groups of a shared weight, in an order that depends on the sizes
// alone. The terms of an element are shared by blockDim.y threads, a power of two; each has eight loads under way.
extern "C" __global__ void __launch_bounds__(1024)
    NAME(conv_dw_sum)(const A* partials,  // (splits, rows, repeats * columns)
                      const A* scale,     // (1,)
                      A* dw,              // (rows, columns)
                      int splits, int rows, int repeats, int columns) {
  constexpr int LOADS = 8;
  __shared__ A shares[1024];
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x, size = (long long)rows * columns;
  const A* from = partials + at / columns * ((long long)repeats * columns) + at % columns;
  const int terms = at < size ? splits * repeats : 0;
  A sum = 0;
  for (int t = threadIdx.y; t < terms; t += LOADS * blockDim.y) {
    A next[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      const int term = t + j * blockDim.y;
      next[j] = term < terms ? from[term / repeats * (size * repeats) + term % repeats * columns] : A(0);
    }
#pragma unroll
    for (int j = 0; j < LOADS; ++j) sum += next[j];
  }
  A* own = shares + threadIdx.y * blockDim.x + threadIdx.x;
  *own = sum;
  for (int half = blockDim.y / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) *own += own[half * blockDim.x];
  }
  if (threadIdx.y == 0 && at < size) dw[at] = *own * (scale ? *scale : A(1));
}
#endif
