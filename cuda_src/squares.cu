// Squared norms of a weight (rows, columns) with a change beside it, per column or per row, their gradient, and what is
// left of a low-rank norm after its products: a dot product a column or a row.
#include "types.cuh"

constexpr int LANES = 32, ROWS = 8;

__device__ __forceinline__ A changed(const T* weight, const A* delta, long long at) {
  return delta ? widen(weight[at]) + delta[at] : widen(weight[at]);
}

// partial[part][c] = sum over the rows of one part of (weight + delta)^2. Grid (columns / 32, parts).
extern "C" __global__ void __launch_bounds__(LANES* ROWS) NAME(square_columns)(const T* weight,  // (rows, columns)
                                                                               const A* delta,   // the same, or null
                                                                               A* partial,       // (gridDim.y, columns)
                                                                               long long rows, int columns) {
  __shared__ A lane[ROWS][LANES];
  const int c = blockIdx.x * LANES + threadIdx.x;
  A sum = A(0);
  if (c < columns)
    for (long long r = blockIdx.y * (long long)ROWS + threadIdx.y; r < rows; r += (long long)gridDim.y * ROWS) {
      const A v = changed(weight, delta, r * columns + c);
      sum += v * v;
    }
  lane[threadIdx.y][threadIdx.x] = sum;
  for (int half = ROWS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) lane[threadIdx.y][threadIdx.x] += lane[threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y == 0 && c < columns) partial[(long long)blockIdx.y * columns + c] = lane[0][threadIdx.x];
}

// out[r] = sum over the columns of (weight + delta)^2: a warp a row. Grid (rows / 8).
extern "C" __global__ void __launch_bounds__(LANES* ROWS) NAME(square_rows)(const T* weight,  // (rows, columns)
                                                                            const A* delta,   // the same, or null
                                                                            A* out,           // (rows)
                                                                            long long rows, int columns) {
  const long long r = blockIdx.x * (long long)ROWS + threadIdx.y;
  if (r >= rows) return;
  A sum = A(0);
  for (int c = threadIdx.x; c < columns; c += LANES) {
    const A v = changed(weight, delta, r * columns + c);
    sum += v * v;
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x == 0) out[r] = sum;
}

// out = 2 * g * (weight + delta), g by column or, by_row, by row. Grid (columns / 256, up to 65535 rows).
extern "C" __global__ void __launch_bounds__(256)
    NAME(square_d)(const A* g, const T* weight, const A* delta, A* out, long long rows, int columns, int by_row) {
  const int c = blockIdx.x * 256 + threadIdx.x;
  if (c >= columns) return;
  for (long long r = blockIdx.y; r < rows; r += gridDim.y)
    out[r * columns + c] = A(2) * g[by_row ? r : c] * changed(weight, delta, r * columns + c);
}

// One term of |W + s D|^2 beyond |W|^2, where D is low rank: own is one factor, cross the other one against W, through
// the other one's Gram matrix against own.
__device__ __forceinline__ A term(const T* own, const A* cross, const A* through, A s, long long at) {
  return widen(own[at]) * s * (A(2) * cross[at] + s * through[at]);
}

// out[c] = sum of the terms of a column: rows are ranks, a few hundred at most. Grid (columns / 128).
extern "C" __global__ void __launch_bounds__(128) NAME(dot_columns)(const T* own,      // (rows, columns)
                                                                    const A* cross,    // (rows, columns)
                                                                    const A* through,  // (rows, columns)
                                                                    const A* scale,    // (1,)
                                                                    A* out,            // (columns)
                                                                    long long rows, int columns) {
  const int c = blockIdx.x * 128 + threadIdx.x;
  if (c >= columns) return;
  const A s = scale[0];
  A sum = A(0);
  for (long long r = 0; r < rows; r++) sum += term(own, cross, through, s, r * columns + c);
  out[c] = sum;
}

// out[r] = sum of the terms of a row: columns are ranks. Grid (rows / 128).
extern "C" __global__ void __launch_bounds__(128)
    NAME(dot_rows)(const T* own, const A* cross, const A* through, const A* scale,
                   A* out,  // (rows)
                   long long rows, int columns) {
  const long long r = blockIdx.x * 128LL + threadIdx.x;
  if (r >= rows) return;
  const A s = scale[0];
  A sum = A(0);
  for (int c = 0; c < columns; c++) sum += term(own, cross, through, s, r * columns + c);
  out[r] = sum;
}

// d_own = 2 q s (cross + s through) and flow = 2 q s own, q being g by column or by row. Grid as square_d.
extern "C" __global__ void __launch_bounds__(256)
    NAME(dot_d)(const A* g, const T* own, const A* cross, const A* through, const A* scale, A* d_own, A* flow,
                long long rows, int columns, int by_row) {
  const int c = blockIdx.x * 256 + threadIdx.x;
  if (c >= columns) return;
  const A s = scale[0];
  for (long long r = blockIdx.y; r < rows; r += gridDim.y) {
    const long long at = r * columns + c;
    const A q = A(2) * s * g[by_row ? r : c];
    d_own[at] = q * (cross[at] + s * through[at]);
    flow[at] = q * widen(own[at]);
  }
}
