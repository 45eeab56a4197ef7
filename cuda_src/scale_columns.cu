// Columns scaled by a vector: an activation's with what stands beside it in one pass, and a small weight's, repeated.
// A thread owns VEC columns and walks down the rows, so that what belongs to a column is read once and nothing is
// divided.
//
// variants bf16: VEC=8 | VEC=1
// variants f32: VEC=4 | VEC=1
// variants f64: VEC=2 | VEC=1
#include "types.cuh"

using Row = Pack<T, VEC>;
constexpr int LANES = 32, ROWS = 8;  // a block: 32 lanes across, 8 rows down

// out = c * (y - bias) + bias + add. Grid (columns / (32 * VEC), shares of the rows).
extern "C" __global__ void __launch_bounds__(LANES* ROWS) NAME(scale_columns)(const T* y,     // (rows, columns)
                                                                              const A* c,     // (columns)
                                                                              const T* bias,  // (columns) or null
                                                                              const T* add,   // (rows, columns) or null
                                                                              T* out, long long rows, int columns) {
  const int first = (blockIdx.x * LANES + threadIdx.x) * VEC;
  if (first >= columns) return;
  A factor[VEC], rest[VEC];
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    factor[v] = c[first + v];
    rest[v] = bias ? (A(1) - factor[v]) * widen(bias[first + v]) : A(0);
  }
  for (long long r = blockIdx.y * (long long)ROWS + threadIdx.y; r < rows; r += (long long)gridDim.y * ROWS) {
    const long long at = r * columns + first;
    const Row value = *reinterpret_cast<const Row*>(y + at);
    Row more, made;
    if (add) more = *reinterpret_cast<const Row*>(add + at);
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      const A sum = factor[v] * widen(value.at[v]) + rest[v];
      made.at[v] = narrow(add ? sum + widen(more.at[v]) : sum);
    }
    *reinterpret_cast<Row*>(out + at) = made;
  }
}

// dy = c * g, and partial[part][column] = sum over the rows of one part of g * (y - bias). Grid (columns / (32 * VEC),
// parts).
extern "C" __global__ void __launch_bounds__(LANES* ROWS) NAME(scale_columns_d)(const T* g,     // (rows, columns)
                                                                                const T* y,     // (rows, columns)
                                                                                const A* c,     // (columns)
                                                                                const T* bias,  // (columns) or null
                                                                                T* dy,
                                                                                A* partial,  // (gridDim.y, columns)
                                                                                long long rows, int columns) {
  __shared__ A lane[ROWS][LANES * VEC];
  const int first = (blockIdx.x * LANES + threadIdx.x) * VEC;
  const bool inside = first < columns;
  A factor[VEC] = {}, centre[VEC] = {}, sum[VEC] = {};
  if (inside) {
#pragma unroll
    for (int v = 0; v < VEC; v++) {
      factor[v] = c[first + v];
      centre[v] = bias ? widen(bias[first + v]) : A(0);
    }
    const long long past = rows * columns, step = (long long)gridDim.y * ROWS * columns;
#if __CUDA_ARCH__ >= 1000  // unrolled, ptxas 13.0 spills a register there
#pragma unroll 1
#endif
    for (long long at = (blockIdx.y * (long long)ROWS + threadIdx.y) * columns + first; at < past; at += step) {
      const Row value = *reinterpret_cast<const Row*>(y + at), flow = *reinterpret_cast<const Row*>(g + at);
      Row made;
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const A d = widen(flow.at[v]);
        sum[v] += d * (widen(value.at[v]) - centre[v]);
        made.at[v] = narrow(factor[v] * d);
      }
      *reinterpret_cast<Row*>(dy + at) = made;
    }
  }
#pragma unroll
  for (int v = 0; v < VEC; v++) lane[threadIdx.y][threadIdx.x * VEC + v] = sum[v];
  for (int half = ROWS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half)
#pragma unroll
      for (int v = 0; v < VEC; v++)
        lane[threadIdx.y][threadIdx.x * VEC + v] += lane[threadIdx.y + half][threadIdx.x * VEC + v];
  }
  if (threadIdx.y == 0 && inside)
#pragma unroll
    for (int v = 0; v < VEC; v++) partial[(long long)blockIdx.y * columns + first + v] = lane[0][threadIdx.x * VEC + v];
}

// out[r][j] = c[j] * w[r][j % K], j < N = L * K. Grid (N / 256, up to 65535 rows).
extern "C" __global__ void __launch_bounds__(256) NAME(spread_columns)(const T* w,  // (rows, K)
                                                                       const A* c,  // (N)
                                                                       T* out,      // (rows, N)
                                                                       long long rows, int K, int N) {
  const int j = blockIdx.x * 256 + threadIdx.x, k = j % K;
  if (j >= N) return;
  const A factor = c[j];
  for (long long r = blockIdx.y; r < rows; r += gridDim.y) out[r * N + j] = narrow(factor * widen(w[r * K + k]));
}

// dw[r][k] = sum over l of g[r][l * K + k] * c[l * K + k]. Grid (K / 256, up to 65535 rows).
extern "C" __global__ void __launch_bounds__(256) NAME(spread_columns_dw)(const A* g,  // (rows, N)
                                                                          const A* c,  // (N)
                                                                          A* dw,       // (rows, K)
                                                                          long long rows, int K, int N) {
  const int k = blockIdx.x * 256 + threadIdx.x;
  if (k >= K) return;
  for (long long r = blockIdx.y; r < rows; r += gridDim.y) {
    A sum = A(0);
    for (int j = k; j < N; j += K) sum += g[r * N + j] * c[j];
    dw[r * K + k] = sum;
  }
}

// partial[part][j] = sum over the rows of one part of g[r][j] * w[r][j % K]. Grid (N / 32, parts).
extern "C" __global__ void __launch_bounds__(LANES* ROWS) NAME(spread_columns_dc)(const A* g,  // (rows, N)
                                                                                  const T* w,  // (rows, K)
                                                                                  A* partial,  // (gridDim.y, N)
                                                                                  long long rows, int K, int N) {
  __shared__ A lane[ROWS][LANES];
  const int j = blockIdx.x * LANES + threadIdx.x, k = j % K;
  A sum = A(0);
  if (j < N)
    for (long long r = blockIdx.y * (long long)ROWS + threadIdx.y; r < rows; r += (long long)gridDim.y * ROWS)
      sum += g[r * N + j] * widen(w[r * K + k]);
  lane[threadIdx.y][threadIdx.x] = sum;
  for (int half = ROWS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) lane[threadIdx.y][threadIdx.x] += lane[threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y == 0 && j < N) partial[(long long)blockIdx.y * N + j] = lane[0][threadIdx.x];
}
