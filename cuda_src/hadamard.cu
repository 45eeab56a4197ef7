// The Hadamard product of two low-rank weights (LoHa), its gradient's terms, and the face-splitting product.
#include "low_rank.cuh"

// Grid (outputs / 64, inputs / 64, taps), 256 threads.
extern "C" __global__ void __launch_bounds__(256) NAME(hadamard_weight)(const T* down1,  // (taps, inputs, r1)
                                                                        const T* up1,    // (r1, outputs)
                                                                        const T* down2,  // (taps, inputs, r2)
                                                                        const T* up2,    // (r2, outputs)
                                                                        const A* scale,  // (1,) or null
                                                                        A* out,          // (taps, inputs, outputs)
                                                                        int inputs, int r1, int r2, int outputs) {
  __shared__ A left[DEPTH][TILE + 1], right[DEPTH][TILE];
  const int o0 = blockIdx.x * TILE, i0 = blockIdx.y * TILE;
  const long long t = blockIdx.z;
  A p[4][4] = {}, q[4][4] = {};
  low_rank_tile(down1 + t * inputs * r1, up1, inputs, r1, outputs, i0, o0, left, right, p);
  low_rank_tile(down2 + t * inputs * r2, up2, inputs, r2, outputs, i0, o0, left, right, q);
  const A s = scale ? scale[0] : A(1);
  each_element(inputs, outputs, i0, o0,
               [&](int i, int o, int a, int b) { out[(t * inputs + i) * outputs + o] = s * p[a][b] * q[a][b]; });
}

// first = scale * g * Q and second = scale * g * P, where P and Q are the two products: what flows back into each of
// them.
extern "C" __global__ void __launch_bounds__(256)
    NAME(hadamard_terms)(const A* g,  // (taps, inputs, outputs)
                         const T* down1, const T* up1, const T* down2, const T* up2, const A* scale, A* first,
                         A* second, int inputs, int r1, int r2, int outputs) {
  __shared__ A left[DEPTH][TILE + 1], right[DEPTH][TILE];
  const int o0 = blockIdx.x * TILE, i0 = blockIdx.y * TILE;
  const long long t = blockIdx.z;
  A p[4][4] = {}, q[4][4] = {};
  low_rank_tile(down1 + t * inputs * r1, up1, inputs, r1, outputs, i0, o0, left, right, p);
  low_rank_tile(down2 + t * inputs * r2, up2, inputs, r2, outputs, i0, o0, left, right, q);
  const A s = scale ? scale[0] : A(1);
  each_element(inputs, outputs, i0, o0, [&](int i, int o, int a, int b) {
    const long long at = (t * inputs + i) * outputs + o;
    const A v = s * g[at];
    first[at] = v * q[a][b];
    second[at] = v * p[a][b];
  });
}

// The face-splitting kernels turn one index into four. INDEX is unsigned where the array allows it: a 64-bit division
// costs as much as the rest of the kernel.
template <typename INDEX>
__device__ inline void split(const T* a, const T* b, T* out, INDEX n, INDEX P, INDEX Q, INDEX inner) {
  for (INDEX i = blockIdx.x * INDEX(256) + threadIdx.x; i < n; i += gridDim.x * INDEX(256)) {
    const INDEX rest = i / inner, v = i - rest * inner, left = rest / Q, q = rest - left * Q, u = left / P;
    out[i] = narrow(widen(a[left * inner + v]) * widen(b[(u * Q + q) * inner + v]));
  }
}

// out[u][p * Q + q][v] = a[u][p][v] * b[u][q][v]: outer, split and inner axes.
extern "C" __global__ void __launch_bounds__(256) NAME(face_split)(const T* a,  // (outer, P, inner)
                                                                   const T* b,  // (outer, Q, inner)
                                                                   T* out,      // (outer, P * Q, inner)
                                                                   long long outer, int P, int Q, int inner) {
  const long long n = outer * P * Q * inner;
  if (n < 1LL << 31)
    split<unsigned>(a, b, out, n, P, Q, inner);
  else
    split<long long>(a, b, out, n, P, Q, inner);
}

// out[u][k][v] = sum over s of g[u][k * k_step + s * s_step][v] * other[u][s][v].
template <typename INDEX>
__device__ inline void unsplit(const A* g, const T* other, A* out, INDEX n, INDEX kept, INDEX summed, INDEX k_step,
                               INDEX s_step, INDEX inner) {
  for (INDEX i = blockIdx.x * INDEX(256) + threadIdx.x; i < n; i += gridDim.x * INDEX(256)) {
    const INDEX rest = i / inner, v = i - rest * inner, u = rest / kept, k = rest - u * kept;
    const A* from = g + (u * kept * summed + k * k_step) * inner + v;
    const T* with = other + u * summed * inner + v;
    A sum = A(0);
#pragma unroll 8
    for (INDEX s = 0; s < summed; s++) sum += from[s * s_step * inner] * widen(with[s * inner]);
    out[i] = sum;
  }
}

// The gradients of both sides at once: blockIdx.y = 0 gives da[u][p][v] = sum over q of g[u][p * Q + q][v] * b[u][q][v]
// and 1 gives db[u][q][v] = sum over p of g[u][p * Q + q][v] * a[u][p][v].
extern "C" __global__ void __launch_bounds__(256)
    NAME(face_split_d)(const A* g,  // (outer, P * Q, inner)
                       const T* a,  // (outer, P, inner)
                       const T* b,  // (outer, Q, inner)
                       A* da, A* db, long long outer, int P, int Q, int inner) {
  const bool first = blockIdx.y == 0;
  const T* other = first ? b : a;
  A* out = first ? da : db;
  const int kept = first ? P : Q, summed = first ? Q : P, k_step = first ? Q : 1, s_step = first ? 1 : Q;
  const long long n = outer * kept * inner;
  if (n * summed < 1LL << 31)
    unsplit<unsigned>(g, other, out, n, kept, summed, k_step, s_step, inner);
  else
    unsplit<long long>(g, other, out, n, kept, summed, k_step, s_step, inner);
}
