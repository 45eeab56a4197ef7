// A linear layer and a LoKr with a full w2 in one launch and one accumulator, rounded once. For Hopper.
//
//   x2[p, l * N + n] = sum over m of w1[l, m] * x[p, m * N + n]                    rounded
//   y[p, c] = sum over k of x[p, k] * w[k, c] + sum over n of (scale * x2)[p, b * N + n] * w2[n, c - b * block] + bias[c]
//
// with b = c / block, and scale * x2 rounded by itself. It is the extended product (extended.cu) with its second term
// behind the first. Mixing by itself costs what moving x and x2 costs; here three warps beside the thread that copies,
// which have no other work, mix while tiles are multiplied, and count what they have done on the flag of a row of tiles.
// The copying thread waits for it before the second term of a tile. Beside products of tensor cores, which take their
// sums from the registers too, a warp issues every four to five cycles: all that has to be there when the first tiles
// end is the band of rows that these belong to, so the blocks mix band after band, a share of each.
//
// Blocks wait for each other's flags, so all of them have to run at once: a cooperative launch. Nobody that makes x2
// waits for anybody.
//
// only sm_90a
// variants bf16: TILE_M=192 TILE_N=192 B_ROWS=1
#include "extended_ends.cuh"
#include "extended_steps.cuh"
#include "flags.cuh"

constexpr int SIDE = 8, MOST_ROWS = 16;  // columns of w1, and rows, at most
constexpr int MIXERS = 96;               // threads
static_assert(STAGED && CLUSTER == 1 && EXT_N == TILE_N, "what the workers count on");

// Four channels of a position, of all blocks.
struct Quads {
  uint2 of[SIDE];

  INLINE void read(const bf16* x, int at, int blocks, int width) {
#pragma unroll
    for (int m = 0; m < SIDE; ++m) of[m] = m < blocks ? *reinterpret_cast<const uint2*>(x + (at + m * width)) : uint2{};
  }
};

// This thread's of `items` quads of channels from position `first` on; the next one is on its way meanwhile.
INLINE void mix(const bf16* x, const float* factors, float scale, bf16* x2, bf16* scaled, int first, int items,
                int rows, int blocks, int width) {
  const int quads = width / 4;
  const auto place = [&](int i, int count) {  // fewer than 2^31 values
    return (first + i / quads) * count * width + i % quads * 4;
  };
  int i = threadIdx.x % GROUP;
  Quads next;
  if (i < items) next.read(x, place(i, blocks), blocks, width);
#pragma unroll 1
  for (; i < items; i += MIXERS) {
    float v[SIDE][4];
#pragma unroll
    for (int m = 0; m < SIDE; ++m) {
      const uint2 quad = next.of[m];
      v[m][0] = low_half(quad.x), v[m][1] = high_half(quad.x), v[m][2] = low_half(quad.y), v[m][3] = high_half(quad.y);
    }
    if (i + MIXERS < items) next.read(x, place(i + MIXERS, blocks), blocks, width);
    int to = place(i, rows);
    const float4* by = reinterpret_cast<const float4*>(factors);
    float4 ahead[SIDE / 4] = {by[0], by[1]};  // beside the products' operands a read takes long
#pragma unroll 1
    for (int l = 0; l < rows; ++l, to += width) {
      float sum[4] = {};
      by += SIDE / 4;
#pragma unroll
      for (int m = 0; m < SIDE; m += 4) {
        const float4 f = ahead[m / 4];
        ahead[m / 4] = by[m / 4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[j] += f.x * v[m][j], sum[j] += f.y * v[m + 1][j], sum[j] += f.z * v[m + 2][j],
              sum[j] += f.w * v[m + 3][j];
      }
      if (x2) *reinterpret_cast<uint2*>(x2 + to) = make_uint2(round_pair(sum[0], sum[1]), round_pair(sum[2], sum[3]));
      *reinterpret_cast<uint2*>(scaled + to) =
          make_uint2(round_pair(scale * sum[0], scale * sum[1]), round_pair(scale * sum[2], scale * sum[3]));
    }
  }
}

// Grid (blocks that run at once). width: N, a multiple of 8. blocks, rows: of w1, at most SIDE and MOST_ROWS.
extern "C" __global__ void __launch_bounds__((WORKERS + 1) * GROUP, 1)
    NAME(extended_mixed)(const __grid_constant__ TensorMap x,           // (positions, blocks * width)
                         const __grid_constant__ TensorMap w,           // (1, blocks * width, columns)
                         const __grid_constant__ TensorMap scaled_map,  // (positions, rows * width)
                         const __grid_constant__ TensorMap w2,          // (1, width, block)
                         const __grid_constant__ TensorMap y_map,       // (positions, columns)
                         const bf16* x_values,                          // x itself
                         const bf16* w1,                                // (rows, blocks)
                         const float* scale,                            // (1,), or null for 1
                         const bf16* bias,                              // (columns), or null
                         bf16* x2,                                      // (positions, rows * width), or null
                         bf16* scaled,                                  // likewise: scale * x2
                         unsigned* flags,  // two for a row of tiles; zeros before and after
                         const __grid_constant__ Geometry g, const Term own, const Term other, int positions,
                         int columns, int rows, int blocks, int width, int band) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  __shared__ __align__(16) float factors[(MOST_ROWS + 1) * SIDE];  // one row is read too many
  Ring ring = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  asm volatile("" : "+r"(ring.memory), "+r"(ring.barriers));  // kept, not found anew at each step
  const unsigned slots = ring.memory + STAGES * STAGE;
  const int tiles_m = (positions + TILE_M - 1) / TILE_M, tiles_n = (columns + TILE_N - 1) / TILE_N;
  const int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0);  // one for a warp, as the compiler shall see
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(ring.full(i), 1), barrier_init(ring.empty(i), WORKERS);
    barrier_init_done();
  }
  if (threadIdx.x < MOST_ROWS * SIDE) {
    const int l = threadIdx.x / SIDE, m = threadIdx.x % SIDE;
    factors[threadIdx.x] = l < rows && m < blocks ? widen(w1[l * blocks + m]) : 0;
  }
  __syncthreads();
  Stage stage;
  if (group == WORKERS) {
    registers_fewer<80>();
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (warp < MIXERS / 32) {
      const float factor = scale ? *scale : 1.0f;
      for (int row = 0; row < positions; row += band * TILE_M) {
        const long long count = min(positions - row, band * TILE_M);
        const int from = row + blockIdx.x * count / gridDim.x, to = row + (blockIdx.x + 1) * count / gridDim.x;
        for (int t = from / TILE_M; t * TILE_M < to; ++t) {
          const int first = max(from, t * TILE_M), items = (min(to, (t + 1) * TILE_M) - first) * (width / 4);
          mix(x_values, factors, factor, x2, scaled, first, items, rows, blocks, width);
          fence_copies_global();
          __threadfence();
          const int done = (items - int(threadIdx.x % GROUP) + MIXERS - 1) / MIXERS;
          const unsigned all = __reduce_add_sync(~0u, max(done, 0));
          if (threadIdx.x % 32 == 0) raise(reinterpret_cast<Flag*>(flags) + t, all);
        }
      }
    } else if (threadIdx.x % 32 == 0) {
      prefetch_map(&x), prefetch_map(&w), prefetch_map(&scaled_map), prefetch_map(&w2), prefetch_map(&y_map);
      for (int t = blockIdx.x; t < tiles_m * tiles_n; t += gridDim.x) {
        const Tile tile(t, tiles_m, tiles_n, band, g, false);
        fetch<TILE_N>(&x, &w, nullptr, own, tile, tile.column, g, ring, stage);
        Flag* flag = reinterpret_cast<Flag*>(flags) + tile.row / TILE_M;
        await(flag, min(positions - tile.row, TILE_M) * (width / 4));
        fetch<TILE_N>(&scaled_map, &w2, nullptr, other, tile, tile.column, g, ring, stage);
        lower(flag, tiles_n);
      }
    }
  } else {
    registers_more<144>();
    const bool chief = threadIdx.x % GROUP == 0;
    for (int t = blockIdx.x; t < tiles_m * tiles_n; t += gridDim.x) {
      const Tile tile(t, tiles_m, tiles_n, band, g, false);
      float sum[ROWS][TILE_N / 2];
      begin<true>(sum, 0, nullptr, bias, tile, columns);
      accumulate<TILE_N, 0>(sum, sum, own, group, chief, ring, stage);
      accumulate<TILE_N, 0>(sum, sum, other, group, chief, ring, stage);
      finish_staged(sum, tile, group, &y_map, slots, positions);
    }
    if (threadIdx.x % 32 == 0) stores_read<0>();  // shared memory ends with the block
  }
}
