// softmax(scale q k^T + mask) v without an array of queries by keys, and its gradients; bf16, widths up to 128 (a
// multiple of 8), sums and softmax in f32. Dao et al. 2022, arXiv 2205.14135; the gradients of queries and of keys are
// two kernels, so that every sum has a fixed order. Grid (samples * heads, tiles of ROWS).
// variants bf16: WIDTH=64 | WIDTH=128
#include "attention.cuh"

constexpr int KEYS = 64;     // of a tile, forward
constexpr int COLUMNS = 32;  // of a tile, in the gradients

// The largest and the sum over the four lanes that share a row.
__device__ __forceinline__ float quad_largest(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// out, and of each query log2 of the sum of 2^score: infinity where no key takes part (its row is 0). Keys come a tile
// at a time; what is summed so far is scaled down whenever a larger score appears. Shared: the tiles of q, k and v.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    NAME(attention)(const T* q,  // (samples * heads, queries, width)
                    const T* k,  // (samples * heads, keys, width)
                    const T* v,  // like k
                    const A* added, const unsigned char* allowed,
                    T* out,     // like q
                    A* powers,  // (samples * heads, queries)
                    A scale, int heads, int queries, int keys, int width, long long mask_batch, long long mask_head,
                    long long mask_row, int causal) {
  extern __shared__ __align__(16) bf16 shared[];
  bf16 *tile_q = shared, *tile_k = tile_q + ROWS * STRIDE, *tile_v = tile_k + KEYS * STRIDE;
  const Mask mask(added, allowed, mask_batch, mask_head, mask_row, heads, queries, keys, causal);
  const long long head = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.y * ROWS, row = first + warp * 16 + lane / 4;
  k += head * keys * width;
  v += head * keys * width;
  const int seen = causal && first + ROWS < keys ? first + ROWS : keys;  // keys that any of these queries attends to

  copy_tile<ROWS>(tile_q, q + head * queries * width, first, queries, width);
  copy_tile<KEYS>(tile_k, k, 0, keys, width);
  commit_copies();
  copy_tile<KEYS>(tile_v, v, 0, keys, width);
  commit_copies();

  float sum[WIDTH / 8][4] = {}, largest[2] = {-infinity(), -infinity()}, total[2] = {};
  for (int start = 0; start < seen; start += KEYS) {
    wait_copies<1>();
    __syncthreads();  // q and k are there
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
      unsigned a[4];
      rows_fragment(a, tile_q, warp * 16, d * 16);
      times_rows<KEYS>(s, a, tile_k, d * 16);
    }
    __syncthreads();  // k has been read by all
    if (start + KEYS < seen) copy_tile<KEYS>(tile_k, k, start + KEYS, keys, width);
    commit_copies();

    float high[2] = {largest[0], largest[1]};
    const bool whole = mask.whole(first, ROWS, start, KEYS);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[j][e] = whole ? s[j][e] * (scale * LOG2_E)
                        : mask(s[j][e], scale, row + e / 2 * 8, start + j * 8 + lane % 4 * 2 + e % 2);
        high[e / 2] = fmaxf(high[e / 2], s[j][e]);
      }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      high[half] = quad_largest(high[half]);
      const float shift = high[half] == -infinity() ? 0.f : high[half];
      const float shrink = exp2f(largest[half] - shift);
      largest[half] = high[half];
      total[half] *= shrink;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n++) {
        sum[n][2 * half] *= shrink;
        sum[n][2 * half + 1] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          s[j][e] = exp2f(s[j][e] - shift);
          total[half] += s[j][e];
        }
    }
    wait_copies<1>();
    __syncthreads();  // v is there
    times_tile<KEYS>(sum, s, tile_v);
    __syncthreads();  // v has been read by all
    if (start + KEYS < seen) copy_tile<KEYS>(tile_v, v, start + KEYS, keys, width);
    commit_copies();
  }
  wait_copies<0>();

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    total[half] = quad_sum(total[half]);
    inverse[half] = total[half] > 0.f ? 1.f / total[half] : 0.f;
    if (lane % 4 == 0 && row + 8 * half < queries)
      powers[head * queries + row + 8 * half] = total[half] > 0.f ? largest[half] + log2f(total[half]) : infinity();
  }
  store_rows(out + head * queries * width, sum, inverse[0], inverse[1], row, queries, width);
}

// along[i] = sum of g * out over row i: what a softmax takes off the gradient of its scores. A warp a row.
extern "C" __global__ void __launch_bounds__(256) NAME(attention_along)(const T* g, const T* out,  // (rows, width)
                                                                        A* along,                  // (rows)
                                                                        long long rows, int width) {
  const long long row = blockIdx.x * 8LL + threadIdx.x / 32;
  if (row >= rows) return;
  float sum = 0.f;
  for (int d = threadIdx.x % 32; d < width; d += 32) sum += widen(g[row * width + d]) * widen(out[row * width + d]);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) along[row] = sum;
}

// With p = 2^(score - powers) and h = p (g v^T - along): dq = scale h k, dk = scale h^T q, dv = p^T g. A block owns
// ROWS queries (or keys) and walks over tiles of the other; the transposed products are those of the transposed
// operands:
//   OF_KEYS 0   rows x = q, y = g; columns c = k, e = v: h = p (y e^T - along), dx = scale h c
//   OF_KEYS 1   rows x = k, y = v; columns c = q, e = g: the same h and p transposed, and dy = p e as well
template <int OF_KEYS>
__device__ __forceinline__ void gradients(const bf16* x, const bf16* y, const bf16* c, const bf16* e,
                                          const float* powers, const float* along, bf16* dx, bf16* dy, const Mask& mask,
                                          float scale, int width, bf16* shared) {
  constexpr int TILE = COLUMNS * STRIDE;
  bf16 *tile_x = shared, *tile_y = tile_x + ROWS * STRIDE, *tiles = tile_y + ROWS * STRIDE;  // tiles: 2 stages of c, e
  const int rows = OF_KEYS ? mask.keys : mask.queries, columns = OF_KEYS ? mask.queries : mask.keys;
  const long long head = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.y * ROWS, row = first + warp * 16 + lane / 4;
  c += head * columns * width;
  e += head * columns * width;
  powers += head * mask.queries;
  along += head * mask.queries;
  // Under a causal mask a query sees no later key: its last one, or a key's first query, bounds the walk.
  const int begin = mask.causal && OF_KEYS ? first / COLUMNS * COLUMNS : 0;
  const int end = mask.causal && !OF_KEYS && first + ROWS < columns ? first + ROWS : columns;

  auto copy = [&](int start) {
    bf16* stage = tiles + start / COLUMNS % 2 * 2 * TILE;
    if (start < end) {
      copy_tile<COLUMNS>(stage, c, start, columns, width);
      copy_tile<COLUMNS>(stage + TILE, e, start, columns, width);
    }
    commit_copies();
  };
  copy_tile<ROWS>(tile_x, x + head * rows * width, first, rows, width);
  copy_tile<ROWS>(tile_y, y + head * rows * width, first, rows, width);
  copy(begin);

  float of_x[WIDTH / 8][4] = {}, of_y[OF_KEYS ? WIDTH / 8 : 1][4] = {};
  for (int start = begin; start < end; start += COLUMNS) {
    copy(start + COLUMNS);
    wait_copies<1>();
    __syncthreads();
    const bf16 *tile_c = tiles + start / COLUMNS % 2 * 2 * TILE, *tile_e = tile_c + TILE;
    float s[COLUMNS / 8][4] = {}, h[COLUMNS / 8][4] = {};
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
      unsigned a[4];
      rows_fragment(a, tile_x, warp * 16, d * 16);
      times_rows<COLUMNS>(s, a, tile_c, d * 16);
      rows_fragment(a, tile_y, warp * 16, d * 16);
      times_rows<COLUMNS>(h, a, tile_e, d * 16);
    }
    const bool whole = OF_KEYS ? mask.whole(start, COLUMNS, first, ROWS) : mask.whole(first, ROWS, start, COLUMNS);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = row + i / 2 * 8, column = start + j * 8 + lane % 4 * 2 + i % 2;
        const int query = OF_KEYS ? column : r, key = OF_KEYS ? r : column;
        // A query that does not exist scores minus infinity: any other's numbers will do for it.
        const int at = min(query, mask.queries - 1);
        const float score = whole ? s[j][i] * (scale * LOG2_E) : mask(s[j][i], scale, query, key);
        s[j][i] = exp2f(score - powers[at]);
        h[j][i] = s[j][i] * (h[j][i] - along[at]);
      }
    if constexpr (OF_KEYS) times_tile<COLUMNS>(of_y, s, tile_e);
    times_tile<COLUMNS>(of_x, h, tile_c);
    __syncthreads();  // this stage has been read by all
  }
  wait_copies<0>();
  store_rows(dx + head * rows * width, of_x, scale, scale, row, rows, width);
  if constexpr (OF_KEYS) store_rows(dy + head * rows * width, of_y, 1.f, 1.f, row, rows, width);
}

// Shared: two tiles of ROWS, and four of COLUMNS.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    NAME(attention_dq)(const T* q, const T* k, const T* v, const T* g,  // g like q
                       const A* added, const unsigned char* allowed, const A* powers, const A* along, T* dq, A scale,
                       int heads, int queries, int keys, int width, long long mask_batch, long long mask_head,
                       long long mask_row, int causal) {
  extern __shared__ __align__(16) bf16 shared[];
  const Mask mask(added, allowed, mask_batch, mask_head, mask_row, heads, queries, keys, causal);
  gradients<0>(q, g, k, v, powers, along, dq, nullptr, mask, scale, width, shared);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    NAME(attention_dkv)(const T* q, const T* k, const T* v, const T* g, const A* added, const unsigned char* allowed,
                        const A* powers, const A* along, T* dk, T* dv, A scale, int heads, int queries, int keys,
                        int width, long long mask_batch, long long mask_head, long long mask_row, int causal) {
  extern __shared__ __align__(16) bf16 shared[];
  const Mask mask(added, allowed, mask_batch, mask_head, mask_row, heads, queries, keys, causal);
  gradients<1>(k, v, q, g, powers, along, dk, dv, mask, scale, width, shared);
}
