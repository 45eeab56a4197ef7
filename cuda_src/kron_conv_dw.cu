// The gradient of w2 in a convolution by the Kronecker product of w1 and w2, see kron_conv.cu:
//
//   dw2[t, i, c] = sum over positions p and blocks b of x[p + t, b * IN + i] * (sum over o of w1[o, b] * g[p, o * OUT + c])
//
// For a stride of 1. A block goes from piece to piece of the image. It mixes g where it lies in shared memory, and its warps hold
// all taps and a part of the channels of the sum in their registers: 16 of these rows at a time, HELD times, by 8 * TILES columns.
// The parts of all blocks are added afterwards in a fixed order (conv_dw_sum of conv.cu).
//
// variants bf16: BLOCKS=8 TILES=2 | BLOCKS=8 TILES=3 | BLOCKS=8 TILES=4 | BLOCKS=8 TILES=5
// variants bf16: BLOCKS=4 TILES=2 | BLOCKS=4 TILES=3 | BLOCKS=4 TILES=4 | BLOCKS=4 TILES=5
#include "types.cuh"
#include "kron_conv.cuh"
#include "exchange.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, HELD = 3, COLUMNS = 8 * TILES;
constexpr int MOST = 8;  // blocks of g

// Grid (blocks that share the pieces, parts of IN by parts of OUT).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(kron_conv_dw)(const bf16* x,   // (pixels, BLOCKS * IN)
                       const bf16* g,   // (positions, outs * OUT)
                       const bf16* w1,  // (outs, BLOCKS)
                       float* parts,    // (gridDim.x, taps, IN, OUT)
                       const __grid_constant__ Geometry walk, int pixels, int positions, int pieces, int IN, int OUT, int outs,
                       int part) {  // channels of a block of x that a block of threads does
  extern __shared__ char memory[];
  __shared__ float mix[MOST][BLOCKS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int taps = walk.kernel[1] * walk.kernel[2], chunks = part / 8, count = taps * chunks, pairs = (count + 1) / 2;
  const int wide = SIDE + (walk.kernel[2] - 1) * walk.dilation[2], high = SIDE + (walk.kernel[1] - 1) * walk.dilation[1];
  const unsigned pixel_bytes = odd_row(BLOCKS * chunks), g_bytes = odd_row(max(outs, BLOCKS) * TILES);
  unsigned* list = reinterpret_cast<unsigned*>(memory);
  int* channels = reinterpret_cast<int*>(list + 2 * pairs);
  int* g_channels = channels + BLOCKS * chunks;
  const unsigned lists = 8 * pairs + 4 * (BLOCKS * chunks + outs * TILES);
  const unsigned image = shared_address(memory) + (lists + 15) / 16 * 16, flow = image + wide * high * pixel_bytes;
  const int first = blockIdx.y % (IN / part) * part, column = blockIdx.y / (IN / part) * COLUMNS;
  for (int i = threadIdx.x; i < outs * BLOCKS; i += THREADS) mix[i / BLOCKS][i % BLOCKS] = widen(w1[i]);
  list_chunks(list, taps, part, wide, pixel_bytes, walk);
  list_channels(channels, BLOCKS, IN, part);
  list_channels(g_channels, outs, OUT, COLUMNS);
  __syncthreads();

  unsigned from[HELD];  // of the lane's row of the first operand
#pragma unroll
  for (int h = 0; h < HELD; ++h)
    from[h] = image + (lane / 16 * wide + lane % 8) * pixel_bytes +
              (warp + h * WARPS < pairs ? list[(warp + h * WARPS) * 2 + lane / 8 % 2] : 0);
  float sum[HELD][TILES][4] = {};
  for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Piece at(piece, walk);
    copy_piece(image, pixel_bytes, x + first, pixels, at.image, at.top - walk.padding[1], at.left - walk.padding[2], high, wide,
               walk.from[1], walk.from[2], BLOCKS * IN, channels, BLOCKS * chunks);
    copy_piece(flow, g_bytes, g + column, positions, at.image, at.top, at.left, SIDE, SIDE, walk.to[1], walk.to[2], outs * OUT,
               g_channels, outs * TILES);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < SIDE * SIDE * COLUMNS / 2; i += THREADS) {
      const unsigned own = flow + i / (COLUMNS / 2) * g_bytes + i % (COLUMNS / 2) * 4;
      float mixed[BLOCKS][2] = {};
#pragma unroll 2
      for (int o = 0; o < outs; ++o) {
        const unsigned v = read_shared(own + o * COLUMNS * 2);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) mixed[b][0] += mix[o][b] * low_half(v), mixed[b][1] += mix[o][b] * high_half(v);
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) write_shared(own + b * COLUMNS * 2, round_pair(mixed[b][0], mixed[b][1]));
    }
    __syncthreads();
#pragma unroll 1
    for (int two = 0; two < SIDE / 2; ++two)  // 16 positions
#pragma unroll 1
      for (int block = 0; block < BLOCKS; ++block) {
        unsigned b[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile += 2) {
          const int own = min(tile + lane / 16, TILES - 1);
          unsigned v[4];
          load_matrices<true>(v, flow + (two * 16 + lane % 16) * g_bytes + (block * TILES + own) * 16);
          b[tile][0] = v[0], b[tile][1] = v[1];
          if (tile + 1 < TILES) b[tile + 1][0] = v[2], b[tile + 1][1] = v[3];
        }
#pragma unroll
        for (int h = 0; h < HELD; ++h)
          if (warp + h * WARPS < pairs) {
            unsigned a[4];
            load_matrices<true>(a, from[h] + two * 2 * wide * pixel_bytes + block * part * 2);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) mma(sum[h][tile], a, b[tile][0], b[tile][1]);
          }
      }
    __syncthreads();  // nobody reads this any more
  }

#pragma unroll
  for (int h = 0; h < HELD; ++h)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = (warp + h * WARPS) * 2 + half;
      if (chunk >= count) continue;
      const int i = first + chunk % chunks * 8 + lane / 4;
      float* to = parts + (((long long)blockIdx.x * taps + chunk / chunks) * IN + i) * OUT + column + lane % 4 * 2;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        *reinterpret_cast<float2*>(to + tile * 8) = make_float2(sum[h][tile][half * 2], sum[h][tile][half * 2 + 1]);
    }
}
