// The gradients of a mix of blocks of channels, out[p][l * N + n] = sum over m of w1[l][m] * x[p][m * N + n], by
// tensor cores and from one reading of each array:
//
//   dw1[l][m] = sum over p and n of g[p][l * N + n] * x[p][m * N + n]
//   dx[p][m * N + n] = sum over l of w1[l][m] * g[p][l * N + n], where one block has all of w1
//
// By the items of mix_item.cuh, straight from global memory.
//
// variants bf16: SIDE=8 | SIDE=16
#include "mix_item.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
#if __CUDA_ARCH__ >= 1200
constexpr int BLOCKS = 2;  // on a multiprocessor; three would spill
#else
constexpr int BLOCKS = 3;
#endif

// Grid (parts, l / SIDE, m / SIDE). w1, and dw1 in each part, hold (l, m) at l * l_step + m * m_step. Lanes, then
// warps, then parts are added in a fixed order.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    NAME(mix_gradients)(const T* g,      // (positions, L * N)
                        const T* x,      // (positions, M * N)
                        const T* w1,     // (L, M), or (M, L); null without dx
                        T* dx,           // (positions, M * N), or null; then L and M are SIDE at most
                        A* partial,      // (gridDim.x, L, M), or (gridDim.x, M, L)
                        A* dw1,          // their sum, by the last block of a tile to come; or null
                        unsigned* seen,  // (gridDim.y, gridDim.z), with dw1: zeros before and after
                        unsigned items, int L, int M, int N, int l_step, int m_step) {
  __shared__ float sums[WARPS][SIDE * SIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, q = lane % 4;
  const int l0 = blockIdx.y * SIDE, m0 = blockIdx.z * SIDE;
  const unsigned chunks = (N + 31) / 32, groups = (items + ITEMS - 1) / ITEMS;

  unsigned mix[4];
  if (dx) load_mix(mix, w1, L, M, l_step, m_step);

  float sum[HALVES][4] = {};
  for (unsigned group = blockIdx.x * WARPS + warp; group < groups; group += gridDim.x * WARPS) {
    const unsigned first = group * ITEMS, p0 = first / chunks, c0 = first - p0 * chunks;
    Item v[ITEMS] = {};
    unsigned p = p0, c = c0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int n = c * 32 + q * 8;
      if (first + i < items && n < N) {
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
          const int l = l0 + row + h * 8, m = m0 + row + h * 8;
          if (l < L) v[i].g[h] = *reinterpret_cast<const Chunk*>(g + ((long long)p * L + l) * N + n);
          if (m < M) v[i].x[h] = *reinterpret_cast<const Chunk*>(x + ((long long)p * M + m) * N + n);
        }
      }
      if (++c == chunks) c = 0, ++p;
    }

    p = p0, c = c0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      add_products(sum, v[i]);
      if (dx) {
        unsigned mixed[HALVES][4];
        mix_item(mixed, mix, v[i]);
        const int n = c * 32 + q * 8;
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
          if (first + i < items && n < N && row + h * 8 < M)
            *reinterpret_cast<uint4*>(dx + ((long long)p * M + row + h * 8) * N + n) =
                make_uint4(mixed[h][0], mixed[h][1], mixed[h][2], mixed[h][3]);
      }
      if (++c == chunks) c = 0, ++p;
    }
  }

  spread(sums[warp], sum);
  __syncthreads();
  const int l = l0 + threadIdx.x / SIDE, m = m0 + threadIdx.x % SIDE;
  if (threadIdx.x < SIDE * SIDE && l < L && m < M) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += sums[w][threadIdx.x];
    partial[(long long)blockIdx.x * L * M + (long long)l * l_step + (long long)m * m_step] = total;
  }
  if (!dw1) return;

  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(seen + blockIdx.y * gridDim.z + blockIdx.z, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  constexpr int SHARES = THREADS / (SIDE * SIDE);  // threads of an element
  const int mine = threadIdx.x / SHARES, share = threadIdx.x % SHARES;
  const int to_l = l0 + mine / SIDE, to_m = m0 + mine % SIDE;
  const bool inside = to_l < L && to_m < M;
  const int at = to_l * l_step + to_m * m_step;
  float total = 0;
#pragma unroll 4
  for (int part = share; part < gridDim.x; part += SHARES)
    if (inside) total += __ldcg(partial + (long long)part * L * M + at);
#pragma unroll
  for (int step = 1; step < SHARES; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  if (inside && share == 0) dw1[at] = total;
}
