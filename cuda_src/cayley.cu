// The Cayley transform of a batch of small skew blocks, forward and gradient, and the block weights that rotate
// columns.
//
// Everything is computed in the accumulator type. A thread block owns one block of the batch. I - Q is inverted in
// place by Gauss-Jordan elimination without pivoting: Q is skew, so every Schur complement of I - Q has a symmetric
// part of at least I, and every pivot is at least 1.
#include "types.cuh"

constexpr int THREADS = 256, WIDE = 1024;

__device__ __forceinline__ float root(float value) {
  return sqrtf(value);
}
__device__ __forceinline__ double root(double value) {
  return sqrt(value);
}

// The sum of `value` over a block of WIDE threads, in every thread; the order of the sum is fixed.
__device__ A wide_sum(A value) {
  __shared__ A warps[WIDE / 32];
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  A total = A(0);
  for (int w = 0; w < WIDE / 32; w++) total += warps[w];
  return total;
}

// The entry (i, j) of factor * (a - a^T).
__device__ __forceinline__ A skew_at(const T* a, A factor, int i, int j, int B) {
  return factor * (widen(a[i * B + j]) - widen(a[j * B + i]));
}

// norm[0] = min(1, limit / (|Q| + 1e-8)), norm[1] = |Q|, with |Q| the Frobenius norm over all blocks. One block.
extern "C" __global__ void __launch_bounds__(WIDE) NAME(skew_norm)(const T* a,  // (batch, B, B)
                                                                   A* norm,     // (2)
                                                                   A factor, A limit, int batch, int B) {
  A sum = A(0);
  const long long count = (long long)batch * B * B;
  for (long long at = threadIdx.x; at < count; at += WIDE) {
    const int inside = at % (B * B);
    const A q = skew_at(a + (at - inside), factor, inside / B, inside % B, B);
    sum += q * q;
  }
  sum = root(wide_sum(sum));
  if (threadIdx.x == 0) {
    const A share = limit / (sum + A(1e-8));
    norm[0] = share < A(1) ? share : A(1);
    norm[1] = sum;
  }
}

// e = (I + Q) (I - Q)^-1 - I = 2 (I - Q)^-1 Q, Q = norm[0] * factor * (a - a^T). Grid (batch). Dynamic shared memory:
// two rows, and the matrix unless there is a `scratch` for it.
extern "C" __global__ void __launch_bounds__(THREADS) NAME(cayley)(const T* a,     // (batch, B, B)
                                                                   const A* norm,  // (2) or null
                                                                   A* e,           // (batch, B, B)
                                                                   A* scratch,     // (batch, B, B) or null
                                                                   A factor, int B) {
  extern __shared__ double memory[];
  A *row = reinterpret_cast<A*>(memory), *column = row + B;
  const long long start = (long long)blockIdx.x * B * B;
  A* m = scratch ? scratch + start : column + B;
  a += start;
  e += start;
  if (norm) factor *= norm[0];
  for (int at = threadIdx.x; at < B * B; at += THREADS) {
    const int i = at / B, j = at % B;
    m[at] = A(i == j) - skew_at(a, factor, i, j, B);
  }
  for (int k = 0; k < B; k++) {
    __syncthreads();
    for (int j = threadIdx.x; j < B; j += THREADS) {
      row[j] = m[k * B + j];
      column[j] = m[j * B + k];
    }
    __syncthreads();
    const A inverse = A(1) / row[k];
    for (int at = threadIdx.x; at < B * B; at += THREADS) {
      const int i = at / B, j = at % B;
      const A step = row[j] * inverse;
      if (i == k)
        m[at] = j == k ? inverse : step;
      else
        m[at] = j == k ? -column[i] * inverse : m[at] - column[i] * step;
    }
  }
  __syncthreads();
  // 2 (P - I) is the same, but loses the digits of a small Q.
  for (int at = threadIdx.x; at < B * B; at += THREADS) {
    const int i = at / B, j = at % B;
    A sum = A(0);
    for (int k = 0; k < B; k++) sum += m[i * B + k] * skew_at(a, factor, k, j, B);
    e[at] = A(2) * sum;
  }
}

// With P = (I - Q)^-1 = I + e / 2 and h = 2 P^T g P^T, the gradient of Q: da = h - h^T. Grid (batch).
extern "C" __global__ void __launch_bounds__(THREADS) NAME(cayley_d)(const A* g,  // (batch, B, B)
                                                                     const A* e,  // (batch, B, B)
                                                                     A* scratch,  // (2, batch, B, B)
                                                                     A* da,       // (batch, B, B)
                                                                     A factor, int batch, int B) {
  const long long start = (long long)blockIdx.x * B * B;
  A *left = scratch + start, *both = left + (long long)batch * B * B;
  g += start;
  e += start;
  for (int at = threadIdx.x; at < B * B; at += THREADS) {
    const int i = at / B, j = at % B;
    A sum = A(0);
    for (int k = 0; k < B; k++) sum += e[k * B + i] * g[k * B + j];
    left[at] = g[at] + sum / 2;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < B * B; at += THREADS) {
    const int i = at / B, j = at % B;
    A sum = A(0);
    for (int k = 0; k < B; k++) sum += left[i * B + k] * e[j * B + k];
    both[at] = left[at] + sum / 2;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < B * B; at += THREADS) {
    const int i = at / B, j = at % B;
    da[start + at] = A(2) * factor * (both[at] - both[j * B + i]);
  }
}

// The gradient through Q -> f Q, f = limit / (|Q| + 1e-8), where it is active, in place:
// da = f (da - Q <da, Q> / (|Q| (|Q| + 1e-8))). One block.
extern "C" __global__ void __launch_bounds__(WIDE) NAME(skew_norm_d)(const T* a,     // (batch, B, B)
                                                                     const A* norm,  // (2)
                                                                     A* da,          // (batch, B, B)
                                                                     A factor, int batch, int B) {
  const A share = norm[0], size = norm[1];
  if (share >= A(1)) return;
  const long long count = (long long)batch * B * B;
  A sum = A(0);
  for (long long at = threadIdx.x; at < count; at += WIDE) {
    const int inside = at % (B * B);
    sum += da[at] * skew_at(a + (at - inside), factor, inside / B, inside % B, B);
  }
  sum = wide_sum(sum);
  const A along = size > A(0) ? sum / (size * (size + A(1e-8))) : A(0);
  for (long long at = threadIdx.x; at < count; at += WIDE) {
    const int inside = at % (B * B);
    da[at] = share * (da[at] - along * skew_at(a + (at - inside), factor, inside / B, inside % B, B));
  }
}

// q = U - U^T of each block, U strictly above the diagonal and given row by row. One element a thread.
extern "C" __global__ void NAME(skew_blocks)(const T* v,  // (batch, B (B - 1) / 2)
                                             A* q,        // (batch, B, B)
                                             int batch, int B) {
  const long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (at >= (long long)batch * B * B) return;
  const int i = at / B % B, j = at % B, low = i < j ? i : j, high = i < j ? j : i;
  const long long from = at / (B * B) * (B * (B - 1) / 2) + low * (2 * B - low - 1) / 2 + high - low - 1;
  q[at] = i == j ? A(0) : i < j ? widen(v[from]) : -widen(v[from]);
}

// The gradient: dv of the entry (i, j), i < j, is g[i][j] - g[j][i].
extern "C" __global__ void NAME(skew_blocks_d)(const A* g,  // (batch, B, B)
                                               A* dv,       // (batch, B (B - 1) / 2)
                                               int batch, int B) {
  const long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (at >= (long long)batch * B * B) return;
  const int i = at / B % B, j = at % B;
  if (i >= j) return;
  const long long block = at / (B * B);
  const A* mine = g + block * B * B;
  dv[block * (B * (B - 1) / 2) + i * (2 * B - i - 1) / 2 + j - i - 1] = mine[i * B + j] - mine[j * B + i];
}

// out[n][k * B + m] = s c e[k][n][m] + (n == m) (c - 1), c = rescale[k * B + m] or 1, s = scale[0] or 1; with
// e[k][m][n] when turned. One element a thread.
extern "C" __global__ void NAME(rotation_columns)(const A* e,        // (batch, B, B)
                                                  const A* rescale,  // (batch * B) or null
                                                  const A* scale,    // (1) or null
                                                  A* out,            // (B, batch * B)
                                                  int batch, int B, int turned) {
  const long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x, columns = (long long)batch * B;
  if (at >= columns * B) return;
  const int n = at / columns, m = at % columns % B;
  const long long column = at % columns, block = column / B;
  const A entry = e[(block * B + (turned ? m : n)) * B + (turned ? n : m)] * (scale ? scale[0] : A(1));
  const A c = rescale ? rescale[column] : A(1);
  out[at] = c * entry + (n == m ? c - A(1) : A(0));
}

// The gradients: de = s c g, and terms[n][k * B + m] = g * (s e + (n == m)), whose column sum is that of the rescale.
extern "C" __global__ void NAME(rotation_columns_d)(const A* g,        // (B, batch * B)
                                                    const A* e,        // (batch, B, B)
                                                    const A* rescale,  // (batch * B) or null
                                                    const A* scale,    // (1) or null
                                                    A* de,             // (batch, B, B)
                                                    A* terms,          // (B, batch * B) or null
                                                    int batch, int B, int turned) {
  const long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x, columns = (long long)batch * B;
  if (at >= columns * B) return;
  const int n = at / columns, m = at % columns % B;
  const long long column = at % columns, block = column / B;
  const long long from = (block * B + (turned ? m : n)) * B + (turned ? n : m);
  const A s = scale ? scale[0] : A(1), c = rescale ? rescale[column] : A(1);
  de[from] = s * c * g[at];
  if (terms) terms[at] = g[at] * (s * e[from] + A(n == m));
}
