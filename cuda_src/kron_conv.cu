// A convolution by the Kronecker product of w1 and w2, without either of its halves in memory:
//
//   y[p, o * OUT + c] = add[p, o * OUT + c]
//                     + scale * sum over blocks b of w1[o, b] * sum over taps t and i of x[p + t, b * IN + i] * w2[t, i, c]
//
// and with TURNED=1 its gradient for the input, where w1 is (b, o), w2 is (t, c, i) and its taps run in reverse, and
// beside it
//
//   dots[b, o] = sum over p and c of (sum over t and i of x[p + t, b * IN + i] * w2[t, c, i]) * z[p, o * OUT + c]
//
// which is the gradient of w1 when x is that of y and z is the input. For a stride of 1.
//
// A block has a multiprocessor of its own and keeps w2. Its two groups of four warps each go from piece to piece of
// the image, a piece with its halo in shared memory, so that x is read once for all taps; a warp makes 16 positions
// of 8 * TILES columns of every one of the BLOCKS products, whose sums meet in its registers and are mixed there. The
// groups wait for nobody: while one multiplies, the other mixes, writes, and fetches its next piece.
//
// variants bf16: BLOCKS=8 TILES=2 TURNED=0 | BLOCKS=8 TILES=3 TURNED=0 | BLOCKS=8 TILES=4 TURNED=0 | BLOCKS=8 TILES=5 TURNED=0
// variants bf16: BLOCKS=8 TILES=2 TURNED=1 | BLOCKS=8 TILES=3 TURNED=1 | BLOCKS=8 TILES=4 TURNED=1 | BLOCKS=8 TILES=5 TURNED=1
// variants bf16: BLOCKS=4 TILES=2 TURNED=0 | BLOCKS=4 TILES=3 TURNED=0 | BLOCKS=4 TILES=4 TURNED=0
// variants bf16: BLOCKS=4 TILES=5 TURNED=0 | BLOCKS=4 TILES=8 TURNED=0
// variants bf16: BLOCKS=4 TILES=2 TURNED=1 | BLOCKS=4 TILES=3 TURNED=1 | BLOCKS=4 TILES=4 TURNED=1
// variants bf16: BLOCKS=4 TILES=5 TURNED=1 | BLOCKS=4 TILES=8 TURNED=1
#include "types.cuh"
#include "kron_products.cuh"
#include "exchange.cuh"

constexpr int MOST = 8;  // blocks of the output

// Of COUNT values a lane the sums over the warp: lane l gets that of value l / (32 / COUNT).
template <int COUNT, int STEP = 16>
INLINE float over_warp(float* v) {
  if constexpr (STEP == 0) {
    return v[0];
  } else {
    const bool upper = COUNT > 1 && threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < (COUNT + 1) / 2; ++i) {
      const float mine = upper ? v[i + COUNT / 2] : v[i], other = upper || COUNT == 1 ? v[i] : v[i + COUNT / 2];
      v[i] = mine + __shfl_xor_sync(~0u, other, STEP);
    }
    return over_warp<(COUNT + 1) / 2, STEP / 2>(v);
  }
}

// A warp's 16 positions of a pair of blocks of the output, on their way through shared memory: to and from the array
// in chunks of 16 bytes, beside each other, to and from the lanes in pairs of columns, as the products hold them.
struct Slot {
  static constexpr int CHUNKS = 2 * TILES;  // of a position, and one that keeps positions on different banks
  static constexpr unsigned ROW = 16 * (CHUNKS + 1);
  unsigned own, first;  // where the lane's pairs of columns begin, and its chunks: TILES, 32 apart
  unsigned places;      // of their positions, four bits each
  int from[TILES];      // where they are in the array, of the first pair of blocks; -1 outside

  INLINE Slot(unsigned slots, const Piece& piece, int positions, int row, int OUT, int column, const Geometry& g)
      : places(0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    slots += warp * 16 * ROW;
    own = slots + lane / 4 * ROW + lane % 4 * 4, first = slots + lane * 16;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int place = (lane + 32 * i) / CHUNKS, chunk = (lane + 32 * i) % CHUNKS;
      const int position = piece.position(warp % 4 * 2 + place / 8, place % 8, positions, g);
      places |= unsigned(place) << 4 * i;
      from[i] = position < 0 ? -1 : position * row + chunk / TILES * OUT + chunk % TILES * 8 + column;
    }
  }

  INLINE unsigned at(int i) const { return first + i * 512 + (places >> 4 * i & 15) * 16; }

  INLINE unsigned pair(int half, int out, int tile) const { return own + half * 8 * ROW + (out * TILES + tile) * 16; }

  INLINE void fetch(uint4 (&v)[TILES], const bf16* array) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      v[i] = make_uint4(0, 0, 0, 0);
      if (from[i] >= 0) v[i] = *reinterpret_cast<const uint4*>(array + from[i]);
    }
  }

  INLINE void put(const uint4 (&v)[TILES]) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) write_chunk(at(i), v[i]);
    __syncwarp();
  }

  INLINE void store(bf16* array) const {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const uint4 v = read_chunk(at(i));
      if (from[i] >= 0) *reinterpret_cast<uint4*>(array + from[i]) = v;
    }
    __syncwarp();  // the next pair takes its place
  }
};

// Grid (blocks that share the pieces, columns of an output block / COLUMNS).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    NAME(kron_conv)(const bf16* x,       // (pixels, BLOCKS * IN)
                    const bf16* w1,      // (outs, BLOCKS); (BLOCKS, outs) with TURNED
                    const bf16* w2,      // (taps, IN, OUT); (taps, OUT, IN) with TURNED
                    const float* scale,  // (1,), or null
                    const bf16* beside,  // (positions, outs * OUT), or null: what is added; with TURNED, z
                    bf16* y,             // (positions, outs * OUT)
                    float* dots,         // (gridDim.y * gridDim.x, BLOCKS, outs), with z
                    const __grid_constant__ Geometry g, int pixels, int positions, int pieces, int IN, int OUT,
                    int outs,
                    int part) {  // channels of a block that are there at a time
  extern __shared__ char memory[];
  __shared__ alignas(16) float mix[MOST][BLOCKS];
  __shared__ float found[WARPS][MOST * BLOCKS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / OF_GROUP,
            own = threadIdx.x % OF_GROUP;
  const int taps = g.kernel[1] * g.kernel[2], count = taps * (part / 8), pairs = (count + 1) / 2;
  const int wide = SIDE + (g.kernel[2] - 1) * g.dilation[2], high = SIDE + (g.kernel[1] - 1) * g.dilation[1];
  const unsigned pixel_bytes = odd_row(BLOCKS * part / 8), weight_row = odd_row(TURNED ? 2 * pairs : TILES);
  const unsigned weight_bytes = (TURNED ? COLUMNS : 16 * pairs) * weight_row;
  unsigned* places = reinterpret_cast<unsigned*>(memory);
  int* weights = reinterpret_cast<int*>(places + 2 * pairs);
  int* channels = weights + 2 * pairs;
  const unsigned lists = 16 * pairs + 4 * (BLOCKS * part / 8);
  const int column = blockIdx.y * COLUMNS, stages = IN / part, row = outs * OUT;
  const unsigned weight = shared_address(memory) + (lists + 15) / 16 * 16;
  const unsigned image = weight + stages * weight_bytes + group * wide * high * pixel_bytes;
  const unsigned slots = image + (GROUPS - group) * wide * high * pixel_bytes;
  const float by = scale ? *scale : 1.0f;
  for (int i = threadIdx.x; i < outs * BLOCKS; i += THREADS) {
    const int o = i / BLOCKS, b = i % BLOCKS;
    mix[o][b] = by * widen(w1[TURNED ? b * outs + o : i]);
  }
  for (int i = lane; i < MOST * BLOCKS; i += 32) found[threadIdx.x / 32][i] = 0;
  list_chunks(places, taps, part, wide, pixel_bytes, g);
  list_weight(weights, taps, IN, OUT, part);
  list_channels(channels, BLOCKS, IN, part);
  __syncthreads();

  auto load = [&](int piece, int stage) {  // what the group multiplies next: a part of the channels of a piece
    if (piece < pieces) {
      const Piece at(piece, g);
      copy_piece<5>(own, OF_GROUP, image, pixel_bytes, x + stage * part, pixels, at.image, at.top - g.padding[1],
                    at.left - g.padding[2], high, wide, g.from[1], g.from[2], BLOCKS * IN, channels, BLOCKS * part / 8);
    }
    commit_copies();
  };

  // The second group's first piece comes while the first group multiplies, which then begins the sooner.
  const int step = GROUPS * gridDim.x, first = blockIdx.x + group * gridDim.x;
  if (group == 0) load(first, 0);
  for (int stage = 0; stage < stages; ++stage)
    copy_weight(weight + stage * weight_bytes, w2 + (TURNED ? column * IN + stage * part : column + stage * part * OUT),
                weights, 2 * pairs, IN, OUT);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  if (group == 1) load(first, 0);

  const unsigned from = image + ((warp * 2 + lane / 8 % 2) * wide + lane % 8) * pixel_bytes;
  for (int piece = first; piece < pieces; piece += step) {
    const Piece at(piece, g);
    float sum[BLOCKS][TILES][4] = {};
    if (beside)
      prefetch_piece(own, OF_GROUP, beside, positions, at.image, at.top, at.left, SIDE, SIDE, g.to[1], g.to[2], row);
    for (int stage = 0; stage < stages; ++stage) {
      wait_copies<0>();
      group_barrier(group);
      multiply(sum, from, places, weight + stage * weight_bytes, weight_row, pairs, part * 2);
      group_barrier(group);  // nobody reads this any more
      if (stage + 1 < stages) load(piece, stage + 1);
    }

    const Slot slot(slots, at, positions, row, OUT, column, g);
    uint4 next[TILES];
    if (beside) slot.fetch(next, beside);
    load(piece + step, 0);
#pragma unroll 1
    for (int pair = 0; pair < outs; pair += 2) {
      if (beside) {
        slot.put(next);
        if (pair + 2 < outs) slot.fetch(next, beside + (pair + 2) * OUT);
      }
      if (TURNED && beside) {  // before y takes the place of z
        float dot[2 * BLOCKS] = {};
#pragma unroll
        for (int i = 0; i < 2 * 2 * TILES; ++i) {
          const int out = i / (2 * TILES), half = i / TILES % 2, tile = i % TILES;
          const unsigned z = read_shared(slot.pair(half, out, tile));
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b) {
            float& d = dot[out * BLOCKS + b];
            d += sum[b][tile][half * 2] * low_half(z), d += sum[b][tile][half * 2 + 1] * high_half(z);
          }
        }
        const float total = over_warp<2 * BLOCKS>(dot);
        if (lane % (16 / BLOCKS) == 0) found[threadIdx.x / 32][pair * BLOCKS + lane / (16 / BLOCKS)] += total;
      }
#pragma unroll
      for (int out = 0; out < 2; ++out) {
        float factor[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) factor[b] = mix[pair + out][b];
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
          const int half = i / TILES, tile = i % TILES;
          const unsigned place = slot.pair(half, out, tile), added = !TURNED && beside ? read_shared(place) : 0;
          float low = low_half(added), high_ = high_half(added);
#pragma unroll
          for (int b = 0; b < BLOCKS; ++b)
            low += factor[b] * sum[b][tile][half * 2], high_ += factor[b] * sum[b][tile][half * 2 + 1];
          write_shared(place, round_pair(low, high_));
        }
      }
      slot.store(y + pair * OUT);
    }
  }
  wait_copies<0>();
  if (!TURNED || !beside) return;
  __syncthreads();
  float* to = dots + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * BLOCKS * outs;
  for (int i = threadIdx.x; i < BLOCKS * outs; i += THREADS) {
    const int b = i / outs, o = i % outs;
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += found[w][o * BLOCKS + b];
    to[i] = by * total;
  }
}
