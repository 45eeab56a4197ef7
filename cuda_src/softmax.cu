// Softmax over the last axis, its gradient, and the softmax of attention's scores; sums in A. A team of threads owns a
// row: blockDim.x of them (a warp, or 256), blockDim.y rows a block. Grid (rows / blockDim.y).
#include "real.cuh"
#include "types.cuh"

struct Largest {
  static __device__ __forceinline__ A of(A a, A b) {
    return b > a || b != b ? b : a;  // NaN wins, so that it is seen
  }
};
struct Sum {
  static __device__ __forceinline__ A of(A a, A b) { return a + b; }
};

// The team's values combined, in every thread of it; the order is fixed. All threads of the block call it.
template <class Op>
__device__ __forceinline__ A together(A value) {
  __shared__ A warps[8];
  for (int step = 16; step; step /= 2) value = Op::of(value, __shfl_xor_sync(~0u, value, step));
  if (blockDim.x == 32) return value;
  __syncthreads();  // the values before these have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (int w = 1; w < 8; w++) value = Op::of(value, warps[w]);
  return value;
}

__device__ __forceinline__ A least() {
  return A(__int_as_float(0xff800000));
}

// out[row] = exp(score - largest) / sum; a row without any score above minus infinity is 0.
template <class Score>
__device__ __forceinline__ void softmax_of(Score score, T* out, bool owned, int columns) {
  A largest = least();
  for (int c = threadIdx.x; owned && c < columns; c += blockDim.x) largest = Largest::of(largest, score(c));
  largest = together<Largest>(largest);
  const A shift = largest == least() ? A(0) : largest;
  A sum = A(0);
  for (int c = threadIdx.x; owned && c < columns; c += blockDim.x) sum += exponential(score(c) - shift);
  sum = together<Sum>(sum);
  const A inverse = sum == A(0) ? A(0) : A(1) / sum;
  for (int c = threadIdx.x; owned && c < columns; c += blockDim.x)
    out[c] = narrow(exponential(score(c) - shift) * inverse);
}

extern "C" __global__ void __launch_bounds__(256) NAME(softmax)(const T* x,  // (rows, columns)
                                                                T* out, long long rows, int columns) {
  const long long row = blockIdx.x * (long long)blockDim.y + threadIdx.y;
  const T* from = x + row * columns;
  softmax_of([=](int c) { return widen(from[c]); }, out + row * columns, row < rows, columns);
}

// dx = y (g - sum of g y) * scale. As dx, `g` may be wide: gw is then given and g null.
extern "C" __global__ void __launch_bounds__(256)
    NAME(softmax_d)(const T* g, const A* gw, const T* y, T* dx, A scale, long long rows, int columns) {
  const long long row = blockIdx.x * (long long)blockDim.y + threadIdx.y, at = row * columns;
  const bool owned = row < rows;
  A sum = A(0);
  for (int c = threadIdx.x; owned && c < columns; c += blockDim.x)
    sum += (g ? widen(g[at + c]) : gw[at + c]) * widen(y[at + c]);
  sum = together<Sum>(sum);
  for (int c = threadIdx.x; owned && c < columns; c += blockDim.x)
    dx[at + c] = narrow(widen(y[at + c]) * ((g ? widen(g[at + c]) : gw[at + c]) - sum) * scale);
}

// The softmax over keys of scale * products + mask: rows are the queries of each head of each sample. See Mask in
// attention.cuh for the strides.
extern "C" __global__ void __launch_bounds__(256)
    NAME(softmax_scores)(const A* products,  // (samples * heads, queries, keys)
                         const A* added, const unsigned char* allowed, T* out, A scale, int heads, int queries,
                         int keys, long long mask_batch, long long mask_head, long long mask_row, int causal,
                         long long rows) {
  const long long row = blockIdx.x * (long long)blockDim.y + threadIdx.y;
  const int query = int(row % queries);
  const long long head = row / queries;
  const A* from = products + row * keys;
  const long long at = head / heads * mask_batch + head % heads * mask_head + query * mask_row;
  const auto score = [=](int key) {
    if ((causal && key > query) || (allowed && !allowed[at + key])) return least();
    return from[key] * scale + (added ? added[at + key] : A(0));
  };
  softmax_of(score, out + row * keys, row < rows, keys);
}
