// The gradient of w2 in a convolution by the Kronecker product of w1 and w2, see kron_conv.cu:
//
//   dw2[t, i, c] = sum over positions p and blocks b of x[p + t, b * IN + i] * (sum over o of w1[o, b] * g[p, o * OUT + c])
//
// For a stride of 1. A block has a multiprocessor of its own and goes from piece to piece of the image; the next
// piece is on its way while one is multiplied. Each warp mixes, on the tensor cores, the positions of g that it has
// copied itself, so that one barrier a piece is enough.
//
// A warp holds 16 rows of the sum, HELD times DOWN taps one below the other, by 8 * TILES columns. Such taps read the
// same pixels some rows further: with DOWN=3 a pair of rows of the image, one ldmatrix, serves 3 * TILES products.
// Where fewer warps hold the whole sum, groups of them take the blocks of channels in turn, and their sums meet at
// the end. The parts of all blocks of threads are added afterwards in a fixed order (conv_dw_sum of conv.cu).
//
// variants bf16: DOWN=1 TILES=2 | DOWN=1 TILES=3 | DOWN=1 TILES=4 | DOWN=1 TILES=5
// variants bf16: DOWN=3 TILES=2 | DOWN=3 TILES=3 | DOWN=3 TILES=4 | DOWN=3 TILES=5
#include "types.cuh"
#include "kron_conv.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32, HELD = 3 / DOWN, COLUMNS = 8 * TILES;
constexpr int OWN = SIDE * SIDE / WARPS;  // positions of g that a warp copies and mixes
static_assert(OWN == 4, "a warp mixes the four matrices of one ldmatrix");

INLINE void load_two_matrices(unsigned (&f)[2], unsigned address) {  // as load_matrices<true>, of lanes 0 to 15
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(f[0]), "=r"(f[1])
               : "r"(address)
               : "memory");
}

// a (16x8, its last eight rows zero) @ b (8x8): lane l gets row l/4, columns 2 * (l%4) and the next.
INLINE void mma_eight(float (&c)[4], unsigned a, unsigned b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(a), "r"(0), "r"(b), "f"(0.0f));
}

// The first operand that mixes g: w1 of block lane / 4 and of o = 2 * (lane % 4) and the next; zeros outside.
INLINE unsigned mixing(const bf16* w1, int blocks, int outs) {
  const int lane = threadIdx.x % 32, b = lane / 4, o = lane % 4 * 2;
  if (b >= blocks || o >= outs) return 0;
  return round_pair(widen(w1[o * blocks + b]), widen(w1[(o + 1) * blocks + b]));
}

// Mixes the warp's own positions of g where they lie: tiles of `outs` chunks become tiles of `most`, the last one
// first, so that none falls on one that is still to be read. A chunk of zeros behind them stands for what outs lacks
// of 8.
INLINE void mix_own(unsigned flow, unsigned row_bytes, unsigned w, int blocks, int outs, int most) {
  const int lane = threadIdx.x % 32, o = lane % 8;
  const unsigned own = flow + threadIdx.x / 32 * OWN * row_bytes, from = own + lane / 8 * row_bytes;
#pragma unroll 1
  for (int tile = TILES - 1; tile >= 0; --tile) {
    unsigned v[OWN];
    load_matrices<true>(v, from + (o < outs ? tile * outs + o : TILES * most) * 16);
    __syncwarp();  // all lanes have read what is written next
#pragma unroll
    for (int p = 0; p < OWN; ++p) {
      float mixed[4];
      mma_eight(mixed, w, v[p]);
      const unsigned to = own + p * row_bytes + (tile * most + lane / 4) * 16 + lane % 4 * 4;
      if (lane / 4 < blocks) write_shared(to, round_pair(mixed[0], mixed[1]));
    }
  }
}

// The first operand of two rows of the image: a pair of chunks of eight pixels each.
INLINE void load_rows(unsigned (&a)[DOWN + 1][2], int row, unsigned address) {
  unsigned v[4];
  load_matrices<true>(v, address);
  a[row][0] = v[0], a[row][1] = v[1], a[row + 1][0] = v[2], a[row + 1][1] = v[3];
}

// The second operand: 16 positions of one block.
INLINE void load_flow(unsigned (&b)[TILES][2], unsigned address, int tile_bytes) {
#pragma unroll
  for (int tile = 0; tile < TILES; tile += 2) {
    if (tile + 1 == TILES) {
      load_two_matrices(b[tile], address + tile * tile_bytes);
    } else {
      unsigned v[4];
      load_matrices<true>(v, address + tile * tile_bytes);
      b[tile][0] = v[0], b[tile][1] = v[1], b[tile + 1][0] = v[2], b[tile + 1][1] = v[3];
    }
  }
}

// Grid (blocks that share the pieces, parts of IN by parts of OUT).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    NAME(kron_conv_dw)(const bf16* x,   // (pixels, blocks * IN)
                       const bf16* g,   // (positions, outs * OUT)
                       const bf16* w1,  // (outs, blocks), 8 or 4 of either
                       float* parts,    // (gridDim.x, taps, IN, OUT)
                       const __grid_constant__ Geometry walk, int pixels, int positions, int pieces, int IN, int OUT,
                       int blocks, int outs,
                       int part) {  // channels of a block of x that a block of threads does
  extern __shared__ char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int taps = walk.kernel[1] * walk.kernel[2], chunks = part / 8;
  const int count = taps / DOWN * chunks, pairs = (count + 1) / 2;  // of the first of DOWN taps
  const int across = (pairs + HELD - 1) / HELD, groups = min(WARPS / across, blocks), group = warp / across;
  const int steps = (blocks + groups - 1) / groups;
  // Of the warps beside each other on a tensor core half copies and mixes a step later, while the other half
  // multiplies.
  const int later = warp / 4 % 2, copies = min(later, steps - 1), mixes = max(steps - 1 + later, 1);
  const int wide = SIDE + (walk.kernel[2] - 1) * walk.dilation[2],
            high = SIDE + (walk.kernel[1] - 1) * walk.dilation[1];
  const int most = max(outs, blocks);
  const unsigned pixel_bytes = odd_row(blocks * chunks), g_bytes = odd_row(most * TILES);
  const unsigned image_bytes = wide * high * pixel_bytes, flow_bytes = SIDE * SIDE * g_bytes;
  unsigned* list = reinterpret_cast<unsigned*>(memory);
  int* channels = reinterpret_cast<int*>(list + 2 * pairs);
  int* g_channels = channels + blocks * chunks;
  const unsigned lists = 8 * pairs + 4 * (blocks * chunks + outs * TILES);
  const unsigned flow = shared_address(memory) + (lists + 15) / 16 * 16, image = flow + 2 * flow_bytes;  // two of each
  const int first = blockIdx.y % (IN / part) * part, column = blockIdx.y / (IN / part) * COLUMNS;
  list_chunks(list, taps / DOWN, part, wide, pixel_bytes, walk);
  list_channels(channels, blocks, IN, part);
  for (int i = threadIdx.x; i < outs * TILES; i += THREADS) g_channels[i] = i % outs * OUT + i / outs * 8;
  if (threadIdx.x < 2 * SIDE * SIDE) store_chunk(flow + threadIdx.x * g_bytes + most * TILES * 16, Chunk{});
  const unsigned w = mixing(w1, blocks, outs);
  __syncthreads();

  // Two groups of copies, also where there is no such piece: g, eight threads a position, so that a warp copies what
  // it mixes; x.
  auto load = [&](int piece, int turn) {
    const Piece at(piece, walk);
    if (piece < pieces)
      copy_piece<5>(threadIdx.x, blockDim.x, flow + turn * flow_bytes, g_bytes, g + column, positions, at.image, at.top,
                    at.left, SIDE, SIDE, walk.to[1], walk.to[2], outs * OUT, g_channels, outs * TILES);
    commit_copies();
    if (piece < pieces)
      copy_piece<5>(threadIdx.x, blockDim.x, image + turn * image_bytes, pixel_bytes, x + first, pixels, at.image,
                    at.top - walk.padding[1], at.left - walk.padding[2], high, wide, walk.from[1], walk.from[2],
                    blocks * IN, channels, blocks * chunks);
    commit_copies();
  };
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) load(blockIdx.x + turn * gridDim.x, turn);

  unsigned from[HELD];  // of the lane's row of the first operand
#pragma unroll
  for (int h = 0; h < HELD; ++h) {
    const int pair = min(warp % across + h * across, pairs - 1);
    from[h] = image + (lane / 16 * wide + lane % 8) * pixel_bytes + list[pair * 2 + lane / 8 % 2];
  }
  const unsigned g_from = flow + lane % 16 * g_bytes + lane / 16 * most * 16;
  wait_copies<3>();
  __syncwarp();
  mix_own(flow, g_bytes, w, blocks, outs, most);
  wait_copies<2>();
  __syncthreads();

  float sum[HELD][DOWN][TILES][4] = {};
  for (int piece = blockIdx.x, turn = 0; piece < pieces; piece += gridDim.x, turn ^= 1) {
    const int next = piece + gridDim.x;
#pragma unroll 1
    for (int step = 0; step <= steps; ++step) {
      if (step == copies && piece != blockIdx.x) load(next, turn ^ 1);  // the second piece is on its way already
      if (step == mixes && next < pieces) {
        wait_copies<1>();
        __syncwarp();
        mix_own(flow + (turn ^ 1) * flow_bytes, g_bytes, w, blocks, outs, most);
      }
      const int block = step * groups + group;
      if (group >= groups || block >= blocks) continue;
      const unsigned to_block = turn * image_bytes + block * part * 2,
                     g_block = g_from + turn * flow_bytes + block * 16;
      unsigned a[HELD][DOWN + 1][2];  // rows of the image
#pragma unroll
      for (int h = 0; DOWN > 1 && h < HELD; ++h) load_rows(a[h], 0, from[h] + to_block);
#pragma unroll 1                                 // four warps a tensor core: one multiplies while others load
      for (int row = 0; row < SIDE; row += 2) {  // 16 positions
        unsigned b[TILES][2];
        load_flow(b, g_block + row * SIDE * g_bytes, most * 16);
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
          if (HELD > 1 && warp % across + h * across >= pairs) continue;
          load_rows(a[h], DOWN - 1, from[h] + to_block + (row + DOWN - 1) * wide * pixel_bytes);
#pragma unroll
          for (int down = 0; down < DOWN; ++down) {
            const unsigned two[4] = {a[h][down][0], a[h][down][1], a[h][down + 1][0], a[h][down + 1][1]};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) mma(sum[h][down][tile], two, b[tile][0], b[tile][1]);
          }
#pragma unroll
          for (int down = 0; down + 2 <= DOWN; ++down)  // the next step reads these rows too
            a[h][down][0] = a[h][down + 2][0], a[h][down][1] = a[h][down + 2][1];
        }
      }
    }
    wait_copies<0>();
    __syncthreads();  // the next piece is there, and nobody reads this any more
  }

  float4* others = reinterpret_cast<float4*>(memory) + lane;  // the sums of the groups after the first
#pragma unroll
  for (int i = 0; i < HELD * DOWN * TILES; ++i) {
    const float (&v)[4] = sum[i / (DOWN * TILES)][i / TILES % DOWN][i % TILES];
    if (group > 0 && group < groups)
      others[((warp - across) * HELD * DOWN * TILES + i) * 32] = make_float4(v[0], v[1], v[2], v[3]);
  }
  __syncthreads();
  if (group > 0) return;
#pragma unroll 1
  for (int other = 0; other + 1 < groups; ++other)
#pragma unroll
    for (int i = 0; i < HELD * DOWN * TILES; ++i) {
      float (&v)[4] = sum[i / (DOWN * TILES)][i / TILES % DOWN][i % TILES];
      const float4 more = others[((other * across + warp) * HELD * DOWN * TILES + i) * 32];
      v[0] += more.x, v[1] += more.y, v[2] += more.z, v[3] += more.w;
    }

#pragma unroll
  for (int h = 0; h < HELD; ++h)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = (warp + h * across) * 2 + half;
      if (chunk >= count) continue;
      const int i = first + chunk % chunks * 8 + lane / 4;
#pragma unroll
      for (int down = 0; down < DOWN; ++down) {
        const int tap = chunk / chunks + down * walk.kernel[2];
        float* to = parts + (((long long)blockIdx.x * taps + tap) * IN + i) * OUT + column + lane % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
          const float (&v)[4] = sum[h][down][tile];
          *reinterpret_cast<float2*>(to + tile * 8) = make_float2(v[half * 2], v[half * 2 + 1]);
        }
      }
    }
}
