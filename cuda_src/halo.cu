// A convolution over two axes to a few columns that reads x once: a piece of the image with its halo lies in shared
// memory.
//
//   y[p, r] = add[p, r] + scale * sum over taps t and channels k of x[p + t, k] * w[t, k, r] + bias[r]      r < R <= 16
//
// For a stride of 1. A block makes 8 rows of 32 positions, a warp one row; channels come 32 at a time through a ring of
// stages.
//
// variants bf16: none
#include "types.cuh"
#include "conv_walk.cuh"
#include "mma.cuh"

constexpr int DOWN = 8, ACROSS = 32, THREADS = 32 * DOWN, CHANNELS = 32, RANKS = 16;
constexpr int COPIES = 8;  // of 16 bytes that a thread makes of a piece: 512 pixels
constexpr int STAGES = 3;

// Where 16 bytes lie: eight pixels, or eight channels of w, one after the other fall on different banks.
INLINE unsigned pixel_place(int pixel, int chunk) {
  return (pixel * 4 + (chunk ^ (pixel >> 1 & 3))) * 16;
}
INLINE unsigned weight_place(int row, int chunk) {
  return (row * 2 + (chunk ^ (row >> 2 & 1))) * 16;
}

// Grid (pieces across, pieces down, images).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(halo_conv)(const bf16* x,       // (images, height, width, channels)
                    const bf16* w,       // (taps, channels, R)
                    const float* scale,  // (1,), or null
                    const bf16* add,     // (positions, R), or null
                    const bf16* bias,    // (R), or null
                    bf16* y,             // (positions, R)
                    const __grid_constant__ Geometry g, int channels, int R) {
  extern __shared__ char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int reach_x = (g.kernel[2] - 1) * g.dilation[2], reach_y = (g.kernel[1] - 1) * g.dilation[1];
  const int wide = ACROSS + reach_x, pixels = wide * (DOWN + reach_y), taps = g.kernel[1] * g.kernel[2];
  const int left = blockIdx.x * ACROSS, top = blockIdx.y * DOWN, image = blockIdx.z;
  const unsigned piece_bytes = (pixels * 64 + 127) / 128 * 128, stage_bytes = piece_bytes + taps * CHANNELS * RANKS * 2;
  const unsigned base = shared_address(memory);

  int from[COPIES];  // where in x the thread's copies start; -1 outside
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int at = threadIdx.x + i * THREADS, pixel = at / 4;
    const int row = top - g.padding[1] + pixel / wide, column = left - g.padding[2] + pixel % wide;
    const bool inside = pixel < pixels && unsigned(row) < unsigned(g.from[1]) && unsigned(column) < unsigned(g.from[2]);
    from[i] = inside ? ((image * g.from[1] + row) * g.from[2] + column) * channels + at % 4 * 8 : -1;
  }
  auto load = [&](int first, int slot) {
    if (first < channels) {
      const unsigned to = base + slot * stage_bytes;
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        const int at = threadIdx.x + i * THREADS;
        if (at >= pixels * 4) break;
        const bool inside = from[i] >= 0 && first + at % 4 * 8 < channels;
        copy_async(to + pixel_place(at / 4, at % 4), x + (inside ? from[i] + first : 0), inside);
      }
      for (int at = threadIdx.x; at < taps * CHANNELS * 2; at += THREADS) {
        const int row = at / 2, chunk = at % 2, channel = first + row % CHANNELS;
        const bool inside = channel < channels && chunk * 8 < R;
        const bf16* source = w + ((long long)(row / CHANNELS) * channels + channel) * R + chunk * 8;
        copy_async(to + piece_bytes + weight_place(row, chunk), inside ? source : w, inside);
      }
    }
    commit_copies();  // also an empty group, so that they can be counted
  };

  float sum[ACROSS / 16][RANKS / 8][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) load(s * CHANNELS, s);
  int slot = 0;
  for (int first = 0; first < channels; first += CHANNELS) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // the channels are there, and nobody reads those before any more
    load(first + (STAGES - 1) * CHANNELS, slot == 0 ? STAGES - 1 : slot - 1);
    const unsigned piece = base + slot * stage_bytes, weights = piece + piece_bytes;
    for (int ty = 0, tap = 0; ty < g.kernel[1]; ++ty)
      for (int tx = 0; tx < g.kernel[2]; ++tx, ++tap) {
        const int start = (warp + ty * g.dilation[1]) * wide + tx * g.dilation[2] + lane % 16;
#pragma unroll
        for (int k = 0; k < CHANNELS / 16; ++k) {
          unsigned b[4];
          load_matrices<true>(b, weights + weight_place(tap * CHANNELS + k * 16 + lane % 16, lane / 16));
#pragma unroll
          for (int m = 0; m < ACROSS / 16; ++m) {
            unsigned a[4];
            load_matrices<false>(a, piece + pixel_place(start + m * 16, k * 2 + lane / 16));
            mma(sum[m][0], a, b[0], b[1]);
            mma(sum[m][1], a, b[2], b[3]);
          }
        }
      }
    slot = slot == STAGES - 1 ? 0 : slot + 1;
  }

  const float by = scale ? *scale : 1.0f;
  const int row = top + warp;
  if (row >= g.to[1]) return;
#pragma unroll
  for (int m = 0; m < ACROSS / 16; ++m)
#pragma unroll
    for (int n = 0; n < RANKS / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = left + m * 16 + half * 8 + lane / 4, r = n * 8 + lane % 4 * 2;
        if (column >= g.to[2] || r >= R) continue;
        const long long to = (((long long)image * g.to[1] + row) * g.to[2] + column) * R + r;
        float v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          v[i] = (add ? widen(add[to + i]) : 0) + by * sum[m][n][half * 2 + i] + (bias ? widen(bias[r + i]) : 0);
        *reinterpret_cast<unsigned*>(y + to) = round_pair(v[0], v[1]);
      }
}
