// Elementwise work in bf16 (f32, f64): values are widened, computed in the accumulator type and rounded once.
// Every kernel strides over n elements with the whole grid; `columns` is the extent of the last axis.
#include "each.cuh"

#define EACH(i, n) \
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < (n); i += (long long)gridDim.x * blockDim.x)

extern "C" __global__ void NAME(widen)(const T* x, A* y, long long n) {
  EACH(i, n) y[i] = widen(x[i]);
}

extern "C" __global__ void NAME(narrow)(const A* x, T* y, long long n) {
  EACH(i, n) y[i] = narrow(x[i]);
}

extern "C" __global__ void NAME(add)(const T* a, const T* b, T* out, long long n) {
  each(a, b, out, n, [](A v, A w) { return v + w; });
}

extern "C" __global__ void NAME(add_wide)(const T* a, const A* b, T* out, long long n) {
  EACH(i, n) out[i] = narrow(widen(a[i]) + b[i]);
}

// a + factor * b
extern "C" __global__ void NAME(add_scaled)(const T* a, const T* b,
                                            const A* factor,  // (1,)
                                            T* out, long long n) {
  const A s = factor[0];
  each(a, b, out, n, [s](A v, A w) { return v + s * w; });
}

extern "C" __global__ void NAME(multiply)(const T* a, const T* b, T* out, long long n) {
  each(a, b, out, n, [](A v, A w) { return v * w; });
}

extern "C" __global__ void NAME(scale)(const T* x,
                                       const A* factor,  // (1,)
                                       T* y, long long n) {
  const A s = factor[0];
  each(x, y, n, [s](A v) { return v * s; });
}

extern "C" __global__ void NAME(prelu)(const T* x, const T* slope,  // (columns)
                                       T* y, long long n, int columns) {
  each_row(x, slope, y, n, columns, [](A v, A s) { return v < A(0) ? v * s : v; });
}

// The gradient of x.
extern "C" __global__ void NAME(prelu_dx)(const T* x, const T* slope,  // (columns)
                                          const T* g, T* dx, long long n, int columns) {
  each_row(x, g, slope, dx, n, columns, [](A v, A d, A s) { return v < A(0) ? d * s : d; });
}

// The terms whose column sum is the gradient of the slope.
extern "C" __global__ void NAME(prelu_terms)(const T* x, const T* g, A* terms, long long n) {
  EACH(i, n) {
    const A v = widen(x[i]);
    terms[i] = v < A(0) ? widen(g[i]) * v : A(0);
  }
}

// partial[part, c] = scale * the sum of x[r, c] over the rows r of one part. Block (32, 32): 32 columns, 32 rows at a
// time; the order of the sum depends on the sizes alone.
extern "C" __global__ void __launch_bounds__(1024) NAME(column_sum)(const T* x,      // (rows, columns)
                                                                    const A* scale,  // (1,), or null for 1
                                                                    A* partial,      // (gridDim.y, columns)
                                                                    long long rows, int columns) {
  __shared__ A lane[32][33];
  const int column = blockIdx.x * 32 + threadIdx.x;
  const long long share = (rows + gridDim.y - 1) / gridDim.y;
  const long long first = blockIdx.y * share, last = first + share < rows ? first + share : rows;
  A sum = A(0);
  if (column < columns)
    for (long long r = first + threadIdx.y; r < last; r += 32) sum += widen(x[r * columns + column]);
  lane[threadIdx.y][threadIdx.x] = sum;
  for (int half = 16; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) lane[threadIdx.y][threadIdx.x] += lane[threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y == 0 && column < columns)
    partial[(long long)blockIdx.y * columns + column] = lane[0][threadIdx.x] * (scale ? *scale : A(1));
}
