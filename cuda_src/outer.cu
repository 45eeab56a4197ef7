// The gradient of a convolution's weight, for Hopper: an outer product summed over positions.
//
//   dw[t, i, o] = scale * sum over positions p and blocks b of x[pixel(p, t), b * I + i] * g[p, b * O + o]
//
// Both operands lie with their channels in a row, which is along the sides of the product, not along its inner axis;
// the warpgroup products take them so. Positions are split over blocks, whose sums are added afterwards in a fixed
// order (conv_dw_sum of conv.cu). One warpgroup copies 64 positions at a time into a ring of stages, the others
// multiply: each has 64 rows of its own, of any tap, so that a few channels fill a tile with the taps side by side, and
// all of them read the same g.
//
// only sm_90a
// variants bf16: WORKERS=2 TILE_N=40 | WORKERS=2 TILE_N=64 | WORKERS=2 TILE_N=80 | WORKERS=2 TILE_N=128
// variants bf16: WORKERS=2 TILE_N=160
// variants bf16: WORKERS=3 TILE_N=40 | WORKERS=3 TILE_N=64 | WORKERS=3 TILE_N=80 | WORKERS=3 TILE_N=128
// variants bf16: WORKERS=3 TILE_N=160
#include "hopper.cuh"

constexpr int TILE_K = 64;
constexpr int BOX = TILE_K * ROW_BYTES;  // 64 positions by 64 channels
constexpr int B_BOXES = (TILE_N + 63) / 64;
constexpr int STAGE = (WORKERS + B_BOXES) * BOX;
constexpr int STAGES = (227 * 1024 - 2048) / STAGE;  // 2048: the barriers, and what the alignment may cost

// 64 rows of the result: channels of one tap from `channel` on. unit: their number, by tap.
struct Unit {
  int tap, channel;

  INLINE Unit(int unit, int I) {
    const int pieces = (I + 63) / 64;
    tap = unit / pieces, channel = unit % pieces * 64;
  }
};

extern "C" __global__ void __launch_bounds__((WORKERS + 1) * GROUP, 1)
    NAME(outer)(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap g,
                const float* scale,  // (1,), or null; null where the sums are added afterwards
                float* dw,           // (splits, taps, I, O)
                const __grid_constant__ Geometry walk, int axes, int I, int O, int blocks, int positions,
                int span) {  // positions a split, a multiple of 64
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  const unsigned ring = (shared_address(memory) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(barriers), empty = full + 8 * STAGES;
  const int taps = walk.kernel[0] * walk.kernel[1] * walk.kernel[2], units = taps * ((I + 63) / 64);
  const int tiles_n = (O + TILE_N - 1) / TILE_N, tiles = (units + WORKERS - 1) / WORKERS * tiles_n;
  const int tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
  const int first = tile / tiles_n * WORKERS, column = tile % tiles_n * TILE_N;
  const int start = split * span, end = min(start + span, positions);
  const int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, WORKERS);
    barrier_init_done();
  }
  __syncthreads();
  int stage = 0;
  unsigned parity = 0;
  if (group == WORKERS) {
    registers_fewer<40>();
    if (threadIdx.x == WORKERS * GROUP) {
      prefetch_map(&x), prefetch_map(&g);
      int channel[WORKERS], dx[WORKERS], dy[WORKERS], dz[WORKERS];
#pragma unroll
      for (int w = 0; w < WORKERS; ++w) {
        const Unit unit(min(first + w, units - 1), I);  // rows past the last are copied again, and not written
        channel[w] = unit.channel;
        dx[w] = unit.tap % walk.kernel[2] * walk.dilation[2];
        dy[w] = unit.tap / walk.kernel[2] % walk.kernel[1] * walk.dilation[1];
        dz[w] = unit.tap / walk.kernel[2] / walk.kernel[1] * walk.dilation[0];
      }
#pragma unroll 1
      for (int p = start; p < end; p += TILE_K) {
        Place at = Place::of(p, walk);
        at.z = at.z * walk.stride[0] - walk.padding[0];
        at.y = at.y * walk.stride[1] - walk.padding[1];
        at.x = at.x * walk.stride[2] - walk.padding[2];
#pragma unroll 1
        for (int b = 0; b < blocks; ++b) {
          const unsigned done = full + 8 * stage, to = ring + stage * STAGE;
          barrier_wait(empty + 8 * stage, parity ^ 1);
          barrier_expect(done, STAGE);
#pragma unroll
          for (int w = 0; w < WORKERS; ++w) {
            if (axes == 2)
              copy_pixels(to + w * BOX, &x, done, b * I + channel[w], at.x, at.y, at.n, dx[w], dy[w]);
            else
              copy_voxels(to + w * BOX, &x, done, b * I + channel[w], at.x, at.y, at.z, at.n, dx[w], dy[w], dz[w]);
          }
          // A box that no column is written from is copied from where there are columns.
#pragma unroll
          for (int box = 0; box < B_BOXES; ++box)
            copy_box(to + (WORKERS + box) * BOX, &g, done, b * O + column + (column + 64 * box < O ? 64 * box : 0), p);
          if (++stage == STAGES) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    registers_more<WORKERS == 2 ? 232 : 152>();
    const bool chief = threadIdx.x % GROUP == 0;
    float sum[TILE_N / 2];
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) sum[i] = 0;
    const int steps = (end - start + TILE_K - 1) / TILE_K * blocks;
    unsigned before = 0;  // the barrier of a stage whose products may be under way
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + 8 * stage, parity);
      const unsigned a_at = ring + stage * STAGE + group * BOX, b_at = ring + stage * STAGE + WORKERS * BOX;
      products_begin();
#pragma unroll
      for (int s = 0; s < TILE_K / 16; ++s)
        wgmma_turned<TILE_N>(sum, operand(a_at + s * 16 * ROW_BYTES, BOX), operand(b_at + s * 16 * ROW_BYTES, BOX));
      products_commit();
      products_wait<1>();
      if (before && chief) barrier_arrive(before);
      before = empty + 8 * stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < TILE_N / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");  // not read before this
    if (first + group >= units) return;
    const Unit unit(first + group, I);
    const float factor = scale ? *scale : 1.0f;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = unit.channel + warp * 16 + lane / 4 + half * 8;
      if (i >= I) continue;
      float* to = dw + (((long long)split * taps + unit.tap) * I + i) * O;
#pragma unroll
      for (int piece = 0; piece < TILE_N / 8; ++piece) {
        const int o = column + piece * 8 + lane % 4 * 2;
        if (o < O)
          *reinterpret_cast<float2*>(to + o) =
              make_float2(factor * sum[piece * 4 + half * 2], factor * sum[piece * 4 + half * 2 + 1]);
      }
    }
  }
}
