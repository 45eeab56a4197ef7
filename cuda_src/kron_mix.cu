// Both gradients of a mix of blocks of channels: see kron_mix.cuh. The parts of dw1 are added by a second kernel.
//
// variants bf16: SIDE=8 | SIDE=16
#include "after.cuh"
#include "kron_mix.cuh"

// Grid (parts, l / SIDE, m / SIDE). w1, and dw1 in each part, hold (l, m) at l * l_step + m * m_step.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    NAME(mix_gradients)(const T* g,   // (positions, L * N)
                        const T* x,   // (positions, M * N)
                        const T* w1,  // (L, M), or (M, L); null without dx
                        T* dx,        // (positions, M * N), or null; then L and M are SIDE at most
                        A* partial,   // (gridDim.x, L, M), or (gridDim.x, M, L)
                        unsigned items, int L, int M, int N, int l_step, int m_step) {
  await_previous();
  let_next();
  const float total = mix_part(g, x, w1, dx, items, L, M, N, l_step, m_step);
  const int place = mix_place(L, M, l_step, m_step);
  if (place >= 0) partial[(long long)blockIdx.x * L * M + place] = total;
}
