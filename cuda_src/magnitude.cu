// The magnitudes of DoRA: vectors as long as a side of a layer, one element a thread.
//
// variants f32: none
// variants f64: none
#include "types.cuh"

__device__ __forceinline__ A root(A square) {
  return square > A(0) ? sqrt(square) : A(0);
}

// out = strength * m / (sqrt(square) + eps).
extern "C" __global__ void NAME(magnitude)(const A* m, const A* square, const A* strength, A* out, A eps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = strength[0] * m[i] / (root(square[i]) + eps);
}

// Its gradients; a norm of zero passes nothing on.
extern "C" __global__ void NAME(magnitude_d)(const A* g, const A* m, const A* square, const A* strength, A* dm,
                                             A* dsquare, A eps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const A norm = root(square[i]), flow = strength[0] * g[i] / (norm + eps);
  dm[i] = flow;
  dsquare[i] = norm > A(0) ? -flow * m[i] / (A(2) * norm * (norm + eps)) : A(0);
}

// out = (total or 1) + (k - strength).
extern "C" __global__ void NAME(shifted)(const A* k, const A* strength, const A* total, A* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = (total ? total[i] : A(1)) + (k[i] - strength[0]);
}
