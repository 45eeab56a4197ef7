// What the kernels of attention.cu share: tiles in shared memory, products of tiles by fragments, and masks.
//
// A tile is rows of WIDTH values, each row 16 bytes longer than that: eight rows that ldmatrix reads then start in
// eight different groups of banks, because WIDTH / 8 + 1 is odd. Values past the arrays' width or length are zeros.
#pragma once
#include "mma.cuh"

constexpr int WARPS = 4;                       // of a block, 16 rows each
constexpr int ROWS = 16 * WARPS;               // that a block owns
constexpr int STRIDE = WIDTH + 8;              // of a tile's row, in values
constexpr int STEPS = WIDTH / 16;              // of 16 values along the width
constexpr float LOG2_E = 1.4426950408889634f;  // scores are kept times this, so that powers are those of 2

__device__ __forceinline__ float infinity() {
  return __int_as_float(0x7f800000);
}

// Starts to copy rows first to first + COUNT - 1 of from (length, width) into a tile; zeros where it has none.
template <int COUNT>
__device__ __forceinline__ void copy_tile(bf16* tile, const bf16* from, int first, int length, int width) {
  for (int i = threadIdx.x; i < COUNT * (WIDTH / 8); i += 32 * WARPS) {
    const int row = i / (WIDTH / 8), d = i % (WIDTH / 8) * 8;
    const bool valid = first + row < length && d < width;
    copy_async(shared_address(tile + row * STRIDE + d), valid ? from + (long long)(first + row) * width + d : from,
               valid);
  }
}

// The A operand: 16 rows of a tile from `row` on, 16 values from d on.
__device__ __forceinline__ void rows_fragment(unsigned (&f)[4], const bf16* tile, int row, int d) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  load_matrices<false>(f, shared_address(tile + (row + matrix % 2 * 8 + lane % 8) * STRIDE + d + matrix / 2 * 8));
}

// c[j] += the 16 rows in `a`, for a width that a whole tile has, against rows 8 j to 8 j + 7 of `tile`: sums over the
// width.
template <int COLUMNS>
__device__ __forceinline__ void times_rows(float (&c)[COLUMNS / 8][4], const unsigned (&a)[4], const bf16* tile,
                                           int d) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int j = 0; j < COLUMNS / 16; j++) {
    unsigned b[4];
    const int row = j * 16 + matrix / 2 * 8 + lane % 8;
    load_matrices<false>(b, shared_address(tile + row * STRIDE + d + matrix % 2 * 8));
    mma(c[2 * j], a, b[0], b[1]);
    mma(c[2 * j + 1], a, b[2], b[3]);
  }
}

// sum += p @ tile: p (16, COLUMNS) as products leave it, rounded here; the tile has COLUMNS rows.
template <int COLUMNS>
__device__ __forceinline__ void times_tile(float (&sum)[WIDTH / 8][4], const float (&p)[COLUMNS / 8][4],
                                           const bf16* tile) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; k++) {
    const unsigned a[4] = {round_pair(p[2 * k][0], p[2 * k][1]), round_pair(p[2 * k][2], p[2 * k][3]),
                           round_pair(p[2 * k + 1][0], p[2 * k + 1][1]), round_pair(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < STEPS; n++) {
      unsigned b[4];
      const int row = k * 16 + matrix % 2 * 8 + lane % 8;
      load_matrices<true>(b, shared_address(tile + row * STRIDE + n * 16 + matrix / 2 * 8));
      mma(sum[2 * n], a, b[0], b[1]);
      mma(sum[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Rows `row` and row + 8 of to (length, width): sum times the factor of each, rounded.
__device__ __forceinline__ void store_rows(bf16* to, const float (&sum)[WIDTH / 8][4], float low, float high, int row,
                                           int length, int width) {
#pragma unroll
  for (int n = 0; n < WIDTH / 8; n++) {
    const int d = n * 8 + threadIdx.x % 4 * 2;
    if (d >= width) continue;
    unsigned* at = reinterpret_cast<unsigned*>(to + (long long)row * width + d);
    if (row < length) at[0] = round_pair(sum[n][0] * low, sum[n][1] * low);
    if (row + 8 < length) at[8 * width / 2] = round_pair(sum[n][2] * high, sum[n][3] * high);
  }
}

// Which keys a query attends to, and what is added to its scores. The strides are in elements, 0 along an axis that the
// mask does not have; its last axis is that of the keys.
struct Mask {
  const float* added;            // or null
  const unsigned char* allowed;  // or null
  long long start, row;          // of this head of this sample; of a query
  int queries, keys, causal;

  __device__ __forceinline__ Mask(const float* added, const unsigned char* allowed, long long batch_stride,
                                  long long head_stride, long long row, int heads, int queries, int keys, int causal)
      : added(added), allowed(allowed), start(blockIdx.x / heads * batch_stride + blockIdx.x % heads * head_stride),
        row(row), queries(queries), keys(keys), causal(causal) {}

  // Whether all of these pairs take part as they are, so that a tile of them needs no look at each.
  __device__ __forceinline__ bool whole(int query, int query_count, int key, int key_count) const {
    return !added && !allowed && query + query_count <= queries && key + key_count <= keys &&
           (!causal || key + key_count - 1 <= query);
  }

  // The score in powers of 2 with the mask applied; minus infinity for a pair that does not take part.
  __device__ __forceinline__ float operator()(float product, float scale, int query, int key) const {
    if (query >= queries || key >= keys || (causal && key > query)) return -infinity();
    float score = product * (scale * LOG2_E);
    const long long at = start + query * row + key;
    if (allowed && !allowed[at]) return -infinity();
    return added ? score + added[at] * LOG2_E : score;
  }
};
