// Both gradients of a mix of blocks of channels in one launch, for a few positions: see kron_mix.cuh. The blocks of a
// cluster have the parts, and the first adds them, in their order. For Hopper and later.
//
// only sm_90a sm_100a sm_120
// variants bf16: SIDE=8 | SIDE=16
#define THREADS 512
#include "after.cuh"
#include "cluster.cuh"
#include "kron_mix.cuh"

constexpr int CLUSTER = 8;

// Grid (CLUSTER, l / SIDE, m / SIDE). w1 and dw1 hold (l, m) at l * l_step + m * m_step.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
    NAME(mix_gradients_once)(const T* g,   // (positions, L * N)
                             const T* x,   // (positions, M * N)
                             const T* w1,  // (L, M), or (M, L); null without dx
                             T* dx,        // (positions, M * N), or null; then L and M are SIDE at most
                             A* dw1,       // (L, M), or (M, L)
                             unsigned items, int L, int M, int N, int l_step, int m_step) {
  __shared__ float parts[SIDE * SIDE];
  await_previous();
  let_next();
  const float part = mix_part(g, x, w1, dx, items, L, M, N, l_step, m_step);
  if (threadIdx.x < SIDE * SIDE) parts[threadIdx.x] = part;
  __syncwarp();
  meet();
  const int place = mix_place(L, M, l_step, m_step);
  if (blockIdx.x == 0 && place >= 0) {
    float total = 0;
#pragma unroll
    for (int b = 0; b < CLUSTER; ++b) total += read_there(place_in(shared_address(parts + threadIdx.x), b));
    dw1[place] = total;
  }
  __syncwarp();
  meet();  // no block ends before it has been read
}
