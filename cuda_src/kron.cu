// The Kronecker product of LoKr. w1: (L, M), the slow factor on both sides; w2: (taps, N, K); the weight is
// (taps, M * N, L * K) with [t][m * N + n][l * K + k] = w1[l][m] * w2[t][n][k].
//
// variants bf16: VEC=8 | VEC=1
// variants f32: VEC=4 | VEC=1
// variants f64: VEC=2 | VEC=1
#include "types.cuh"

// Grid (columns of the weight / 256, up to 65535 of its rows, taps): one element a thread and row, writes coalesced.
extern "C" __global__ void NAME(kron_weight)(const T* w1,     // (L, M)
                                             const T* w2,     // (taps, N, K)
                                             const A* scale,  // (1,) or null
                                             A* out,          // (taps, M * N, L * K)
                                             int L, int M, int N, int K) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x, l = column / K, k = column - l * K;
  const long long t = blockIdx.z;
  if (column >= L * K) return;
  const A s = scale ? scale[0] : A(1);
  for (int row = blockIdx.y; row < M * N; row += gridDim.y) {
    const int m = row / N, n = row - m * N;
    out[(t * M * N + row) * L * K + column] = s * widen(w1[l * M + m]) * widen(w2[(t * N + n) * K + k]);
  }
}

// The weight with this product added, rounded once. Of each factor one pointer is null: it is T or wide. A thread
// does VEC columns, which lie in one l, of ROWS rows that share an n, so that it reads w2 once for all of them; all
// are under way at a time. Grid (columns / VEC / blockDim, N * (M / ROWS), up to 65535, taps).
extern "C" __global__ void __launch_bounds__(256, 3) NAME(kron_changed)(const T* weight,  // (taps, M * N, L * K)
                                                                        const T* w1, const A* w1_wide,  // (L, M)
                                                                        const T* w2, const A* w2_wide,  // (taps, N, K)
                                                                        const A* scale,                 // (1,)
                                                                        T* out,  // (taps, M * N, L * K)
                                                                        int L, int M, int N, int K) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * VEC, l = column / K, k = column - l * K;
  const long long t = blockIdx.z;
  if (column >= L * K) return;
  constexpr int ROWS = 4;
  const A factor = scale[0];
  const long long step = (long long)N * L * K;  // from row to row of a thread
  for (int at = blockIdx.y; at < N * ((M + ROWS - 1) / ROWS); at += gridDim.y) {
    const int first = at / N * ROWS, n = at % N;  // neighbours in the grid are so in the weight
    const long long own = (t * M + first) * step + (long long)n * L * K + column, from = (t * N + n) * K + k;
    Pack<T, VEC> v[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (first + r < M) v[r] = *reinterpret_cast<const Pack<T, VEC>*>(weight + own + r * step);
    Pack<A, VEC> right;
    if (w2) {
      const auto narrow_right = *reinterpret_cast<const Pack<T, VEC>*>(w2 + from);
#pragma unroll
      for (int j = 0; j < VEC; ++j) right.at[j] = widen(narrow_right.at[j]);
    } else {
      right = *reinterpret_cast<const Pack<A, VEC>*>(w2_wide + from);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r >= M) break;
      const int i = l * M + first + r;
      const A left = factor * (w1 ? widen(w1[i]) : w1_wide[i]);
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[r].at[j] = narrow(widen(v[r].at[j]) + left * right.at[j]);
      *reinterpret_cast<Pack<T, VEC>*>(out + own + r * step) = v[r];
    }
  }
}

// dw1[l][m] = scale * sum over t, n, k of g[t][m * N + n][l * K + k] * w2[t][n][k]. One block (256) an element (l, m).
extern "C" __global__ void NAME(kron_weight_dw1)(const A* g,      // (taps, M * N, L * K)
                                                 const T* w2,     // (taps, N, K)
                                                 const A* scale,  // (1,) or null
                                                 A* dw1,          // (L, M)
                                                 int L, int M, int taps, int N, int K) {
  __shared__ A lane[256];
  const int l = blockIdx.x, m = blockIdx.y;
  A sum = A(0);
  const long long count = (long long)taps * N * K;
  for (long long i = threadIdx.x; i < count; i += 256) {
    const int k = i % K;
    const long long tn = i / K;
    const int n = tn % N;
    const long long t = tn / N;
    sum += g[((t * M + m) * N + n) * L * K + (long long)l * K + k] * widen(w2[i]);
  }
  lane[threadIdx.x] = sum;
  for (int half = 128; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lane[threadIdx.x] += lane[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dw1[l * M + m] = (scale ? scale[0] : A(1)) * lane[0];
}

// dw2[t][n][k] = scale * sum over l, m of g[t][m * N + n][l * K + k] * w1[l][m]. One element a thread.
extern "C" __global__ void NAME(kron_weight_dw2)(const A* g,      // (taps, M * N, L * K)
                                                 const T* w1,     // (L, M)
                                                 const A* scale,  // (1,) or null
                                                 A* dw2,          // (taps, N, K)
                                                 int L, int M, int taps, int N, int K) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= (long long)taps * N * K) return;
  const int k = i % K;
  const long long tn = i / K;
  const int n = tn % N;
  const long long t = tn / N;
  A sum = A(0);
  for (int m = 0; m < M; m++)
    for (int l = 0; l < L; l++) sum += g[((t * M + m) * N + n) * L * K + (long long)l * K + k] * widen(w1[l * M + m]);
  dw2[i] = (scale ? scale[0] : A(1)) * sum;
}

// The mixes: a thread owns VEC neighbouring values n of one position, and 8 rows l (and columns m) at a time.
constexpr int SIDE = 8;

template <int WIDTH>
struct Lanes {
  A at[WIDTH];

  __device__ void load(const T* from) {
    const auto packed = *reinterpret_cast<const Pack<T, WIDTH>*>(from);
#pragma unroll
    for (int v = 0; v < WIDTH; v++) at[v] = widen(packed.at[v]);
  }

  __device__ void store(T* to) const {
    Pack<T, WIDTH> packed;
#pragma unroll
    for (int v = 0; v < WIDTH; v++) packed.at[v] = narrow(at[v]);
    *reinterpret_cast<Pack<T, WIDTH>*>(to) = packed;
  }
};

// out[p][l * N + n] = sum over m of w1[l][m] * x[p][m * N + n], w1[l][m] lying at l * l_step + m * m_step. Grid
// (positions * N / VEC / blockDim.x, L / 8): one reading of x serves 8 rows l. 8 rows of w1, 128 columns at a time,
// wait in shared memory, read by all threads at once. (Tensor cores with a warp to 64 values of n were no faster at N
// = 384, and slower at N = 80: the bytes decide, not the products.)
extern "C" __global__ void __launch_bounds__(256)
    NAME(mix_blocks)(const T* x,   // (positions, M * N)
                     const T* w1,  // (L, M), or (M, L) turned
                     T* out,       // (positions, L * N)
                     long long positions, int L, int M, int N, int l_step, int m_step) {
  constexpr int CHUNK = 128;
  __shared__ A rows[CHUNK][SIDE];
  const int first = blockIdx.y * SIDE, chunks = N / VEC;
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x, p = i / chunks;
  const int n = (i - p * chunks) * VEC;
  Lanes<VEC> sum[SIDE] = {};
  for (int m0 = 0; m0 < M; m0 += CHUNK) {
    const int past = min(M, m0 + CHUNK);
    __syncthreads();
    for (int e = threadIdx.x; e < (past - m0) * SIDE; e += blockDim.x) {
      const int l = first + e % SIDE, m = m0 + e / SIDE;
      rows[e / SIDE][e % SIDE] = l < L ? widen(w1[(long long)l * l_step + (long long)m * m_step]) : A(0);
    }
    __syncthreads();
    if (p >= positions) continue;
#pragma unroll(sizeof(T) == 2 ? 4 : 1)
    for (int m = m0; m < past; m++) {
      Lanes<VEC> v;
      v.load(x + (p * M + m) * N + n);
#pragma unroll
      for (int j = 0; j < SIDE; j++) {
        const A factor = rows[m - m0][j];
#pragma unroll
        for (int k = 0; k < VEC; k++) sum[j].at[k] += factor * v.at[k];
      }
    }
  }
  if (p >= positions) return;
#pragma unroll
  for (int j = 0; j < SIDE; j++)
    if (first + j < L) sum[j].store(out + (p * L + first + j) * N + n);
}

// partial[part][l][m] = sum over a share of (positions, n) of g[p][l * N + n] * x[p][m * N + n], parts being
// gridDim.z. Lanes, then warps, then (outside) parts are added in a fixed order. bf16 that moves 16 bytes at a time
// has kron_mix.cu.
#if !defined(T_BF16) || VEC == 1
// Grid (m / 8, l / 16, parts), 4 warps: a thread sums its share of an 8 x 8 tile in registers; two tiles after each
// other.
constexpr int TILE_L = 16, THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS) NAME(mix_blocks_dw1)(const T* g,  // (positions, L * N)
                                                                           const T* x,  // (positions, M * N)
                                                                           A* partial,  // (gridDim.z, L, M)
                                                                           long long positions, int L, int M, int N) {
  __shared__ A warps[4][SIDE * SIDE];
  const int m0 = blockIdx.x * SIDE, chunks = N / VEC;
  for (int l0 = blockIdx.y * TILE_L; l0 < L && l0 < (blockIdx.y + 1) * TILE_L; l0 += SIDE) {
    A sum[SIDE][SIDE] = {};
    for (long long i = blockIdx.z * (long long)THREADS + threadIdx.x; i < positions * chunks;
         i += gridDim.z * (long long)THREADS) {
      const long long p = i / chunks;
      const int n = (i - p * chunks) * VEC;
      Lanes<VEC> right[SIDE] = {};
#pragma unroll
      for (int m = 0; m < SIDE; m++)
        if (m0 + m < M) right[m].load(x + (p * M + m0 + m) * N + n);
#pragma unroll
      for (int l = 0; l < SIDE; l++) {
        if (l0 + l >= L) continue;
        Lanes<VEC> left;
        left.load(g + (p * L + l0 + l) * N + n);
#pragma unroll
        for (int m = 0; m < SIDE; m++)
#pragma unroll
          for (int k = 0; k < VEC; k++) sum[l][m] += left.at[k] * right[m].at[k];
      }
    }
    __syncthreads();
#pragma unroll
    for (int l = 0; l < SIDE; l++)
#pragma unroll
      for (int m = 0; m < SIDE; m++) {
        A total = sum[l][m];
        for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][l * SIDE + m] = total;
      }
    __syncthreads();
    const int l = l0 + threadIdx.x / SIDE, m = m0 + threadIdx.x % SIDE;
    if (threadIdx.x < SIDE * SIDE && l < L && m < M) {
      A total = A(0);
      for (int w = 0; w < 4; w++) total += warps[w][threadIdx.x];
      partial[((long long)blockIdx.z * L + l) * M + m] = total;
    }
  }
}
#endif
