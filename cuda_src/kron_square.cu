// Squared norms of W + s * (w1 kron w2) in closed form. W: (taps, M * N, L * K), read as it lies; w1 (L, M) and w2
// (taps, N, K) are small and wide. "cross" is W against w2: (M, L * K) for a norm per output, (L, M * N) for one per
// input.
#include "types.cuh"

// partial[part][m][l * K + k] = sum over a share of (t, n) of W[t][m * N + n][l * K + k] * w2[t][n][k].
// Grid (L * K / 256, M, parts): a thread walks down a column, a warp reads neighbours.
extern "C" __global__ void __launch_bounds__(256) NAME(kron_cross_out)(const A* w2,      // (taps, N, K)
                                                                       const T* weight,  // (taps, M * N, L * K)
                                                                       A* partial,       // (gridDim.z, M, L * K)
                                                                       int L, int M, int taps, int N, int K) {
  const int column = blockIdx.x * 256 + threadIdx.x, k = column % K, m = blockIdx.y;
  if (column >= L * K) return;
  A sum = A(0);
#pragma unroll 4
  for (int tn = blockIdx.z; tn < taps * N; tn += gridDim.z) {
    const long long row = (long long)(tn / N * M + m) * N + tn % N;
    sum += widen(weight[row * L * K + column]) * w2[(long long)tn * K + k];
  }
  partial[((long long)blockIdx.z * M + m) * L * K + column] = sum;
}

// out[l][m * N + n] = sum over t and k of W[t][m * N + n][l * K + k] * w2[t][n][k]: a warp an element. Grid (M * N /
// 8, L).
extern "C" __global__ void __launch_bounds__(256) NAME(kron_cross_in)(const A* w2, const T* weight,
                                                                      A* out,  // (L, M * N)
                                                                      int L, int M, int taps, int N, int K) {
  const int row = blockIdx.x * 8 + threadIdx.y, l = blockIdx.y, n = row % N;
  if (row >= M * N) return;
  A sum = A(0);
  const T* from = weight + (long long)row * L * K + (long long)l * K;
  const A* with = w2 + (long long)n * K;
  const long long from_step = (long long)M * N * L * K, with_step = (long long)N * K;
  for (int t = 0; t < taps; t++, from += from_step, with += with_step)
#pragma unroll 1
    for (int k = threadIdx.x; k < K; k += 32) sum += widen(from[k]) * with[k];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x == 0) out[(long long)l * M * N + row] = sum;
}

// partial[part][t][n][k] = sum over m and a share of l of W[t][m * N + n][l * K + k] * g, g being [m][l * K + k] or,
// by_row, [l][m * N + n]. Grid (taps * N * K / 256, parts).
extern "C" __global__ void __launch_bounds__(256) NAME(kron_cross_d)(const A* g, const T* weight,
                                                                     A* partial,  // (gridDim.y, taps * N * K)
                                                                     int L, int M, int taps, int N, int K, int by_row) {
  const long long i = blockIdx.x * 256LL + threadIdx.x, size = (long long)taps * N * K;
  if (i >= size) return;
  const int k = i % K, tn = i / K, n = tn % N, t = tn / N;
  A sum = A(0);
  for (int l = blockIdx.y; l < L; l += gridDim.y) {
    const long long column = (long long)l * K + k;
#pragma unroll 4
    for (int m = 0; m < M; m++) {
      const long long row = (long long)m * N + n;
      const A flow = by_row ? g[(long long)l * M * N + row] : g[(long long)m * L * K + column];
      sum += widen(weight[((long long)t * M * N + row) * L * K + column]) * flow;
    }
  }
  partial[blockIdx.y * size + i] = sum;
}

// Element j of the result is (outer, inner); w1 is read at outer * outer_step + loop * loop_step, so that both axes
// share the code. out[j] = 2 s sum over loop of w1 * cross[loop][j] + s^2 |w1[outer]|^2 * inner_square[inner]. Grid
// (length / 128).
extern "C" __global__ void __launch_bounds__(128)
    NAME(kron_norm)(const A* w1,
                    const A* inner_square,  // (inner)
                    const A* cross,         // (loops, outer * inner)
                    const A* scale,         // (1,)
                    A* out,                 // (outer * inner)
                    int outer, int loops, int inner, int outer_step, int loop_step) {
  const int j = blockIdx.x * 128 + threadIdx.x, length = outer * inner;
  if (j >= length) return;
  const A* w = w1 + (long long)(j / inner) * outer_step;
  const A s = scale[0];
  A dot = A(0), square = A(0);
  for (int e = 0; e < loops; e++) {
    const A v = w[(long long)e * loop_step];
    dot += v * cross[(long long)e * length + j];
    square += v * v;
  }
  out[j] = s * (A(2) * dot + s * square * inner_square[j % inner]);
}

// dw1[outer][loop] = 2 s sum over inner of g * (cross[loop] + s * w1 * inner_square). Grid (outer, loops), 4 warps.
extern "C" __global__ void __launch_bounds__(128)
    NAME(kron_norm_dw1)(const A* g, const A* w1, const A* inner_square, const A* cross, const A* scale, A* dw1,
                        int outer, int loops, int inner, int outer_step, int loop_step) {
  __shared__ A warps[4];
  const int o = blockIdx.x, e = blockIdx.y;
  const long long at = (long long)o * outer_step + (long long)e * loop_step;
  const A s = scale[0], v = s * w1[at];
  A sum = A(0);
  for (int i = threadIdx.x; i < inner; i += 128)
    sum += g[o * inner + i] * (cross[(long long)e * outer * inner + o * inner + i] + v * inner_square[i]);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) dw1[at] = A(2) * s * (warps[0] + warps[1] + warps[2] + warps[3]);
}

// dcross[loop][j] = 2 s g[j] w1, and terms[j] = s^2 g[j] |w1[outer]|^2, whose sum over outer is the gradient of
// inner_square. Grid (length / 128).
extern "C" __global__ void __launch_bounds__(128)
    NAME(kron_norm_d)(const A* g, const A* w1, const A* scale,
                      A* terms,   // (outer, inner)
                      A* dcross,  // (loops, outer * inner)
                      int outer, int loops, int inner, int outer_step, int loop_step) {
  const int j = blockIdx.x * 128 + threadIdx.x, length = outer * inner;
  if (j >= length) return;
  const A* w = w1 + (long long)(j / inner) * outer_step;
  const A s = scale[0], q = s * g[j];
  A square = A(0);
  for (int e = 0; e < loops; e++) {
    const A v = w[(long long)e * loop_step];
    square += v * v;
    dcross[(long long)e * length + j] = A(2) * q * v;
  }
  terms[j] = s * q * square;
}
