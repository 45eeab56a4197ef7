// Blocks of columns turned: each row of y, block by block, times a small matrix of that block.
//
// A thread owns one column of ROWS rows at a time: an entry of the matrices is read once for all of them, and the rows
// wait in shared memory. Columns of a thread block are whole blocks (several where they are narrow), or a part of one
// wide block, whose inputs then pass in chunks.
//
// variants bf16 f32: ROWS=16 NEAR=16
// variants f64: ROWS=4 NEAR=8
#include "types.cuh"

constexpr int LANES = 256;

// Columns of one thread block: `tile` of them, from `first`. tile is a multiple of B, or less than B and within one
// block.
struct Tile {
  int first, column, start, n;  // start: of the block that `column` lies in; n: B
  bool inside;

  __device__ Tile(int columns, int B, int tile) {
    const int parts = tile < B ? (B + tile - 1) / tile : 1;
    first = tile < B ? int(blockIdx.x) / parts * B + int(blockIdx.x) % parts * tile : int(blockIdx.x) * tile;
    column = first + threadIdx.x;
    start = column / B * B;
    n = B;
    const int end = tile < B ? first / B * B + B : columns;
    inside = int(threadIdx.x) < tile && column < end;
  }
};

// out = add + scale * (y - bias) F of each block, F[n][k * B + m] its entry (n, m); or F^T when turned. Grid (tiles,
// shares of the rows).
extern "C" __global__ void __launch_bounds__(LANES)
    NAME(turn_blocks)(const T* y,         // (rows, columns)
                      const A* matrices,  // (B, columns)
                      const T* bias,      // (columns) or null
                      const T* add,       // (rows, columns) or null
                      const A* scale,     // (1) or null
                      T* out, long long rows, int columns, int B, int tile, int turned) {
  __shared__ A seen[ROWS][LANES];
  const Tile at(columns, B, tile);
  const A s = scale ? scale[0] : A(1);
  for (long long r0 = blockIdx.y * (long long)ROWS; r0 < rows; r0 += gridDim.y * (long long)ROWS) {
    const int count = rows - r0 < ROWS ? int(rows - r0) : ROWS;
    A sum[ROWS] = {};
    const int low = tile < B ? at.first / B * B : at.first, high = tile < B ? low + B : min(at.first + tile, columns);
    for (int from = low; from < high; from += LANES) {
      const int here = from + threadIdx.x, past = min(from + LANES, high);
      __syncthreads();
      for (int r = 0; r < count; r++)
        if (here < past) seen[r][threadIdx.x] = widen(y[(r0 + r) * columns + here]) - (bias ? widen(bias[here]) : A(0));
      __syncthreads();
      if (!at.inside) continue;
      const int begin = max(at.start, from), end = min(at.start + B, past);
      for (int c = begin; c < end; c++) {
        const int n = c - at.start, m = at.column - at.start;
        const A entry = turned ? matrices[(long long)m * columns + c] : matrices[(long long)n * columns + at.column];
#pragma unroll
        for (int r = 0; r < ROWS; r++) sum[r] += seen[r][c - from] * entry;
      }
    }
    if (!at.inside) continue;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= count) continue;
      const long long to = (r0 + r) * columns + at.column;
      out[to] = narrow((add ? widen(add[to]) : A(0)) + s * sum[r]);
    }
  }
}

// partial[part][n][k * B + m] = sum over the rows r of one part of (y - bias)[r][k * B + n] * g[r][k * B + m], for NEAR
// rows n of each matrix. Grid (tiles, parts, B / NEAR).
extern "C" __global__ void __launch_bounds__(LANES) NAME(turn_blocks_d)(const T* g, const T* y,  // (rows, columns)
                                                                        const T* bias,           // (columns) or null
                                                                        const A* scale,          // (1) or null
                                                                        A* partial,  // (gridDim.y, B, columns)
                                                                        long long rows, int columns, int B, int tile) {
  __shared__ A seen[ROWS][LANES];
  const Tile at(columns, B, tile);
  const int n0 = blockIdx.z * NEAR, low = tile < B ? at.first / B * B + n0 : at.first;
  const int width = tile < B ? min(NEAR, B - n0) : min(tile, columns - at.first);
  const int offset = tile < B ? 0 : at.start - at.first + n0;  // of this thread's n0 in `seen`
  A sum[NEAR] = {};
  for (long long r0 = blockIdx.y * (long long)ROWS; r0 < rows; r0 += gridDim.y * (long long)ROWS) {
    const int count = rows - r0 < ROWS ? int(rows - r0) : ROWS;
    const int here = low + threadIdx.x;
    __syncthreads();
    for (int r = 0; r < count; r++)
      if (int(threadIdx.x) < width)
        seen[r][threadIdx.x] = widen(y[(r0 + r) * columns + here]) - (bias ? widen(bias[here]) : A(0));
    __syncthreads();
    if (!at.inside) continue;
#if __CUDA_ARCH__ >= 1000  // unrolled, ptxas 13.0 spills a register there
#pragma unroll 1
#endif
    for (int r = 0; r < count; r++) {
      const A flow = widen(g[(r0 + r) * columns + at.column]);
#pragma unroll
      for (int j = 0; j < NEAR; j++)
        if (n0 + j < B) sum[j] += seen[r][offset + j] * flow;
    }
  }
  if (!at.inside) return;
  const A s = scale ? scale[0] : A(1);
#pragma unroll
  for (int j = 0; j < NEAR; j++)
    if (n0 + j < B) partial[((long long)blockIdx.y * B + n0 + j) * columns + at.column] = s * sum[j];
}
