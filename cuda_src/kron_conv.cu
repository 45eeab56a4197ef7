// A convolution (or a product over single positions) by the Kronecker product of w1 and w2, without either of its halves in
// memory:
//
//   y[p, o * OUT + c] = add[p, o * OUT + c]
//                     + scale * sum over blocks b of w1[o, b] * sum over taps t and i of x[p + t, b * IN + i] * w2[t, i, c]
//
// and with TURNED=1 its gradient for the input, where w1 is (b, o), w2 is (t, c, i) and its taps run in reverse, and beside it
//
//   dots[b, o] = sum over p and c of (sum over t and i of x[p + t, b * IN + i] * w2[t, c, i]) * z[p, o * OUT + c]
//
// which is the gradient of w1 when x is that of y and z is the input. For a stride of 1.
//
// A block keeps w2 and a piece of the image with its halo in shared memory, so that x is read once for all taps; a warp makes 16
// positions of 8 * TILES columns of every one of the BLOCKS products, whose sums meet in its registers and are mixed there.
//
// variants bf16: BLOCKS=8 TILES=2 TURNED=0 | BLOCKS=8 TILES=3 TURNED=0 | BLOCKS=8 TILES=4 TURNED=0 | BLOCKS=8 TILES=5 TURNED=0
// variants bf16: BLOCKS=8 TILES=2 TURNED=1 | BLOCKS=8 TILES=3 TURNED=1 | BLOCKS=8 TILES=4 TURNED=1 | BLOCKS=8 TILES=5 TURNED=1
// variants bf16: BLOCKS=4 TILES=2 TURNED=0 | BLOCKS=4 TILES=3 TURNED=0 | BLOCKS=4 TILES=4 TURNED=0
// variants bf16: BLOCKS=4 TILES=5 TURNED=0 | BLOCKS=4 TILES=8 TURNED=0
// variants bf16: BLOCKS=4 TILES=2 TURNED=1 | BLOCKS=4 TILES=3 TURNED=1 | BLOCKS=4 TILES=4 TURNED=1
// variants bf16: BLOCKS=4 TILES=5 TURNED=1 | BLOCKS=4 TILES=8 TURNED=1
#include "types.cuh"
#include "kron_conv.cuh"
#include "exchange.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, COLUMNS = 8 * TILES;
constexpr int MOST = 8;  // blocks of the output

// Where the chunks of w2 start: of eight channels at a tap; -1 for what an odd number of them leaves of a pair.
INLINE void list_weight(int* list, int taps, int IN, int OUT, int part) {
  const int chunks = part / 8, count = taps * chunks;
  for (int i = threadIdx.x; i < count + count % 2; i += THREADS) {
    const int tap = i / chunks, channel = i % chunks * 8;
    list[i] = i == count ? -1 : TURNED ? (taps - 1 - tap) * OUT * IN + channel : (tap * IN + channel) * OUT;
  }
}

// w2 from `from` on, as the second operand: rows of COLUMNS columns, a row a channel and tap; or, TURNED, rows of channels and
// taps, a row a column.
INLINE void copy_weight(unsigned to, const bf16* from, const int* list, int whole, int IN, int OUT) {
  if (TURNED) {
    for (int c = threadIdx.x / 32; c < COLUMNS; c += WARPS)
      for (int at = threadIdx.x % 32; at < whole; at += 32)
        copy_async(to + c * odd_row(whole) + at * 16, list[at] < 0 ? from : from + list[at] + c * IN, list[at] >= 0);
  } else {
    for (int i = threadIdx.x; i < whole * 8 * TILES; i += THREADS) {
      const int row = i / TILES, tile = i % TILES, start = list[row / 8];
      copy_async(to + row * odd_row(TILES) + tile * 16, start < 0 ? from : from + start + row % 8 * OUT + tile * 8, start >= 0);
    }
  }
}

// The second operand for a pair of chunks: its 16 rows of two tiles at a time.
INLINE void load_weight(unsigned (&b)[TILES][2], unsigned weight, int pair, unsigned row_bytes) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < TILES; tile += 2) {
    const int own = min(tile + lane / 16, TILES - 1);
    unsigned v[4];
    if (TURNED)
      load_matrices<false>(v, weight + (own * 8 + lane % 8) * row_bytes + (pair * 2 + lane / 8 % 2) * 16);
    else
      load_matrices<true>(v, weight + (pair * 16 + lane % 16) * row_bytes + own * 16);
    b[tile][0] = v[0], b[tile][1] = v[1];
    if (tile + 1 < TILES) b[tile + 1][0] = v[2], b[tile + 1][1] = v[3];
  }
}

// Of BLOCKS values a lane the sums over the warp: lane l gets that of block l / (32 / BLOCKS).
INLINE float over_warp(float (&v)[BLOCKS]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int count = BLOCKS / 2, step = 16; count; count /= 2, step /= 2)
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float other = __shfl_xor_sync(~0u, lane & step ? v[i] : v[i + count], step);
      v[i] = (lane & step ? v[i + count] : v[i]) + other;
    }
#pragma unroll
  for (int step = 16 / BLOCKS; step; step /= 2) v[0] += __shfl_xor_sync(~0u, v[0], step);
  return v[0];
}

// A row's pairs of columns in TILES tiles; 16 bytes a lane where four tiles are together.
INLINE void read_row(unsigned (&v)[TILES], const bf16* from, bool inside) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile + 4 <= TILES; tile += 4) {
    uint4 a = make_uint4(0, 0, 0, 0);
    if (inside) a = *reinterpret_cast<const uint4*>(from + (tile + lane) * 8);
    unsigned four[4] = {a.x, a.y, a.z, a.w};
    exchange(four);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[tile + i] = four[i];
  }
#pragma unroll
  for (int tile = TILES / 4 * 4; tile < TILES; ++tile)
    v[tile] = inside ? *reinterpret_cast<const unsigned*>(from + tile * 8 + lane * 2) : 0;
}

INLINE void write_row(const unsigned (&v)[TILES], bf16* to, bool inside) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile + 4 <= TILES; tile += 4) {
    unsigned four[4] = {v[tile], v[tile + 1], v[tile + 2], v[tile + 3]};
    exchange(four);
    if (inside) *reinterpret_cast<uint4*>(to + (tile + lane) * 8) = make_uint4(four[0], four[1], four[2], four[3]);
  }
#pragma unroll
  for (int tile = TILES / 4 * 4; tile < TILES; ++tile)
    if (inside) *reinterpret_cast<unsigned*>(to + tile * 8 + lane * 2) = v[tile];
}

// Grid (blocks that share the pieces, columns of an output block / COLUMNS).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    NAME(kron_conv)(const bf16* x,       // (pixels, BLOCKS * IN)
                    const bf16* w1,      // (outs, BLOCKS); (BLOCKS, outs) with TURNED
                    const bf16* w2,      // (taps, IN, OUT); (taps, OUT, IN) with TURNED
                    const float* scale,  // (1,), or null
                    const bf16* add,     // (positions, outs * OUT), or null
                    const bf16* z,       // (positions, outs * OUT), or null: with TURNED
                    bf16* y,             // (positions, outs * OUT)
                    float* dots,         // (gridDim.y * gridDim.x, BLOCKS, outs), with z
                    const __grid_constant__ Geometry g, int pixels, int positions, int pieces, int IN, int OUT, int outs,
                    int part) {  // channels of a block that are there at a time
  extern __shared__ char memory[];
  __shared__ alignas(16) float mix[MOST][BLOCKS];
  __shared__ float found[WARPS][MOST][BLOCKS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int taps = g.kernel[1] * g.kernel[2], count = taps * (part / 8), pairs = (count + 1) / 2;
  const int wide = SIDE + (g.kernel[2] - 1) * g.dilation[2], high = SIDE + (g.kernel[1] - 1) * g.dilation[1];
  const unsigned pixel_bytes = odd_row(BLOCKS * part / 8), weight_row = odd_row(TURNED ? 2 * pairs : TILES);
  const unsigned beside_row = odd_row(outs * TILES);  // of z, which takes the place of x
  unsigned* places = reinterpret_cast<unsigned*>(memory);
  int* weights = reinterpret_cast<int*>(places + 2 * pairs);
  int* channels = weights + 2 * pairs;
  int* beside = channels + BLOCKS * part / 8;
  const unsigned lists = 16 * pairs + 4 * (BLOCKS * part / 8 + (TURNED ? outs * TILES : 0));
  const unsigned weight = shared_address(memory) + (lists + 15) / 16 * 16;
  const unsigned image = weight + (TURNED ? COLUMNS : 16 * pairs) * weight_row;
  const int column = blockIdx.y * COLUMNS, stages = IN / part, row = outs * OUT;
  const float by = scale ? *scale : 1.0f;
  for (int i = threadIdx.x; i < outs * BLOCKS; i += THREADS) {
    const int o = i / BLOCKS, b = i % BLOCKS;
    mix[o][b] = by * widen(w1[TURNED ? b * outs + o : i]);
  }
  for (int i = threadIdx.x; i < WARPS * MOST * BLOCKS; i += THREADS) found[0][0][i] = 0;
  list_chunks(places, taps, part, wide, pixel_bytes, g);
  list_weight(weights, taps, IN, OUT, part);
  list_channels(channels, BLOCKS, IN, part);
  if (TURNED) list_channels(beside, outs, OUT, COLUMNS);
  __syncthreads();

  // What is multiplied next: a part of the channels of a piece; w2 stays where there is but one part.
  auto load = [&](int piece, int stage) {
    if (piece < pieces) {
      const Piece at(piece, g);
      copy_piece<1>(threadIdx.x, blockDim.x, image, pixel_bytes, x + stage * part, pixels, at.image, at.top - g.padding[1], at.left - g.padding[2], high,
                 wide, g.from[1], g.from[2], BLOCKS * IN, channels, BLOCKS * part / 8);
      if (stages > 1 || piece == blockIdx.x)
        copy_weight(weight, w2 + (TURNED ? column * IN + stage * part : column + stage * part * OUT), weights, 2 * pairs, IN,
                    OUT);
    }
    commit_copies();
  };

  const unsigned own = image + ((warp * 2 + lane / 8 % 2) * wide + lane % 8) * pixel_bytes;
  load(blockIdx.x, 0);
  for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const Piece at(piece, g);
    float sum[BLOCKS][TILES][4] = {};
    for (int stage = 0; stage < stages; ++stage) {
      wait_copies<0>();
      __syncthreads();
#pragma unroll 1
      for (int pair = 0; pair < pairs; ++pair) {
        const unsigned from = own + places[pair * 2 + lane / 16];
        unsigned a[2][4], b[TILES][2];
        load_matrices<false>(a[0], from);
        load_weight(b, weight, pair, weight_row);
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          if (block + 1 < BLOCKS) load_matrices<false>(a[(block + 1) % 2], from + (block + 1) * part * 2);
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) mma(sum[block][tile], a[block % 2], b[tile][0], b[tile][1]);
        }
      }
      __syncthreads();  // nobody reads this any more
      if (stage + 1 < stages) load(piece, stage + 1);
    }
    if (TURNED && z) {
      copy_piece<1>(threadIdx.x, blockDim.x, image, beside_row, z + column, positions, at.image, at.top, at.left, SIDE, SIDE, g.to[1], g.to[2], row, beside,
                 outs * TILES);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
    } else {
      load(piece + gridDim.x, 0);
    }

    int position[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) position[half] = at.position(warp * 2 + half, lane / 4, positions, g);
#pragma unroll 1
    for (int o = 0; o < outs; ++o) {
      float factor[BLOCKS];
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) factor[b] = mix[o][b];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool inside = position[half] >= 0;
        const long long to = (inside ? (long long)position[half] * row : 0) + o * OUT + column;
        unsigned added[TILES] = {}, v[TILES];
        if (add) read_row(added, add + to, inside);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          float low = low_half(added[tile]), high_ = high_half(added[tile]);
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
            low += factor[b] * sum[b][tile][half * 2], high_ += factor[b] * sum[b][tile][half * 2 + 1];
          v[tile] = round_pair(low, high_);
        }
        write_row(v, y + to, inside);
      }
      if (TURNED && z) {
        float dot[BLOCKS] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            const unsigned pair = read_shared(image + ((warp * 2 + half) * SIDE + lane / 4) * beside_row +
                                              (o * COLUMNS + tile * 8 + lane % 4 * 2) * 2);
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b)
              dot[b] += sum[b][tile][half * 2] * low_half(pair) + sum[b][tile][half * 2 + 1] * high_half(pair);
          }
        const float total = over_warp(dot);
        if (lane % (32 / BLOCKS) == 0) found[warp][o][lane / (32 / BLOCKS)] += total;
      }
    }
    if (TURNED && z) {
      __syncthreads();
      load(piece + gridDim.x, 0);
    }
  }
  wait_copies<0>();
  if (!TURNED || !z) return;
  __syncthreads();
  float* to = dots + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * BLOCKS * outs;
  for (int i = threadIdx.x; i < BLOCKS * outs; i += THREADS) {
    const int b = i / outs, o = i % outs;
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += found[w][o][b];
    to[i] = by * total;
  }
}
