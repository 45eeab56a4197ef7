// The gradients of a mix of blocks of channels, out[p][l * N + n] = sum over m of w1[l][m] * x[p][m * N + n], by
// tensor cores and from one reading of each array:
//
//   dw1[l][m] = sum over p and n of g[p][l * N + n] * x[p][m * N + n]
//   dx[p][m * N + n] = sum over l of w1[l][m] * g[p][l * N + n], where one block has all of w1
//
// An item is 32 neighbouring n of one position. Lane (row, q) = (lane / 4, lane % 4) brings n = 8 q to 8 q + 7 of
// rows l = row and row + 8 of g, and likewise of x, straight from global memory. The order of a summed axis is free
// as long as both sides agree: the registers of these 16-byte loads are operands over n as they are. Over l they are
// after movmatrix has turned them, and the lane's sums are then those of the very n that it brought, 16 bytes of dx.
//
// variants bf16: SIDE=8 | SIDE=16
#include "mma.cuh"

constexpr int HALVES = SIDE / 8, ITEMS = 4 / HALVES;  // items in flight: 8 loads of 16 bytes a lane
constexpr int THREADS = 256, WARPS = THREADS / 32;
#if __CUDA_ARCH__ >= 1200
constexpr int BLOCKS = 2;  // on a multiprocessor; three would spill
#else
constexpr int BLOCKS = 3;
#endif

struct Item {
  Chunk g[HALVES], x[HALVES];
};

__device__ __forceinline__ const unsigned* words(const Chunk& v) {
  return reinterpret_cast<const unsigned*>(&v);
}

// An 8 x 8 matrix of which lane l holds row l / 4, columns 2 * (l % 4) and the next, turned.
__device__ __forceinline__ unsigned turned(unsigned v) {
  unsigned out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

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

  // w1 turned, as the first operand: rows m = row and row + 8, columns l = 2 q, 2 q + 1 and those behind 8.
  unsigned mix[4] = {};
  if (dx)
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int m = row + e / 2 % 2 * 8, l = q * 2 + e / 4 * 8 + e % 2;
      if (l < L && m < M) mix[e / 2] |= unsigned(w1[l * l_step + m * m_step].bits) << e % 2 * 16;
    }

  float sum[HALVES][4] = {};  // of a half of m each: l = row and row + 8, m = 2 q and 2 q + 1
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
      const unsigned *low = words(v[i].g[0]), *high = words(v[i].g[HALVES - 1]);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const unsigned left[4] = {low[k], HALVES > 1 ? high[k] : 0, low[k + 1], HALVES > 1 ? high[k + 1] : 0};
#pragma unroll
        for (int h = 0; h < HALVES; ++h) mma(sum[h], left, words(v[i].x[h])[k], words(v[i].x[h])[k + 1]);
      }
      if (dx) {
        unsigned mixed[HALVES][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float to[4] = {};
          mma(to, mix, turned(low[k]), HALVES > 1 ? turned(high[k]) : 0);
#pragma unroll
          for (int h = 0; h < HALVES; ++h) mixed[h][k] = round_pair(to[h * 2], to[h * 2 + 1]);
        }
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

#pragma unroll
  for (int h = 0; h < HALVES; ++h)
#pragma unroll
    for (int e = 0; e < HALVES * 2; ++e) sums[warp][(row + e / 2 * 8) * SIDE + h * 8 + q * 2 + e % 2] = sum[h][e];
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
