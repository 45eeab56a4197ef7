// The sums that come first in few_hadamard.cu. For Hopper.
#pragma once
#define CLUSTER 8
#define TILE_N 48
#include "cluster_sums.cuh"
#include "flags.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, RANKS_MOST = 16;
constexpr int ROWS = 32;                      // positions whose h is made together
constexpr int QUAD = 4;                       // and ranks r
constexpr int TILE = 16 * 32;                 // bytes of 16 rows of 16 values
constexpr int STEP = (ROWS / 16 + 2) * TILE;  // 16 channels of the rows and of two factors
constexpr int BATCH = 2;                      // steps that a warp copies at once; it has room for two times that
constexpr int ROOM = 2 * BATCH * STEP;
constexpr int PIECE = 16 * 16 * 4;  // bytes of f32 sums of a piece of h, 16 s of 16 positions
static_assert(QUAD * (ROWS / 16) == CLUSTER && WARPS == CLUSTER, "each block owns a piece, each warp adds up one");
static_assert(CLUSTER * PIECE <= ROOM, "the sums of a warp take the place of its steps");

// The inputs or the outputs of the layer.
struct Side {
  const bf16 *v, *f1, *f2;  // (positions, width); two factors
  int width, ranks;
  bool turned;  // factors are (ranks, width), else (width, ranks)

  INLINE int at(int r, int l) const { return turned ? r * width + l : l * ranks + r; }
};

// The chunk of eight values of a row in a tile of rows of 16; eight of a column meet no bank twice.
INLINE int place(int row, int half) {
  return row * 32 + (half ^ (row >> 2 & 1)) * 16;
}

// Copies the steps from `first` on, those before `last`, to the room of a warp.
INLINE void fetch(const Side& side, unsigned to, int start, int positions, int first, int last) {
  const int lane = threadIdx.x % 32;
  if (first < last) {
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) {
      const int p = j * 8 + lane / 4, step = lane % 4 / 2, half = lane % 2, l = (first + step) * 16 + half * 8;
      const bool there = start + p < positions && l < side.width;
      if (first + step < last)
        copy_async(to + step * STEP + place(p, half), side.v + (start + p) * side.width + l, there);
    }
    // A chunk is eight channels of a rank, or eight ranks of a channel.
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = j * 32 + lane, half = i % 2;
      const int step = side.turned ? i % 4 / 2 : j, row = side.turned ? i / 4 : i / 2 % 16;
      const int r = side.turned ? row : half * 8, l = (first + step) * 16 + (side.turned ? half * 8 : row);
      const bool there = r < side.ranks && l < side.width;
      const unsigned tile = to + step * STEP + ROWS / 16 * TILE + place(row, half);
      if (first + step < last) {
        copy_async(tile, side.f1 + side.at(r, l), there);
        copy_async(tile + TILE, side.f2 + side.at(r, l), there);
      }
    }
  }
  commit_copies();
}

// The products of two pairs of bf16, rounded.
INLINE unsigned multiply_pair(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// sum[i] (16 s x ROWS positions) += the products of a step, for r + i.
INLINE void multiply(float (&sum)[QUAD][ROWS / 8][4], unsigned step, bool turned, int r) {
  const int lane = threadIdx.x % 32, row = lane % 8, second = lane / 8 % 2, third = lane / 16;
  const int along = place(row + second * 8, third), across = place(row + third * 8, second);
  const unsigned factors = step + ROWS / 16 * TILE;
  unsigned f1[4], f2[4], both[QUAD][4];
  if (turned) {
    load_matrices<false>(f1, factors + along);
    load_matrices<false>(f2, factors + TILE + along);
  } else {
    load_matrices<true>(f1, factors + across);
    load_matrices<true>(f2, factors + TILE + across);
  }
#pragma unroll
  for (int i = 0; i < QUAD; ++i)
#pragma unroll
    for (int k = 0; k < 2; ++k) {  // eight channels
      const unsigned by = __shfl_sync(~0u, r < 8 ? f1[2 * k] : f1[2 * k + 1], (r + i) % 8 * 4 + lane % 4);
      both[i][2 * k] = multiply_pair(f2[2 * k], by);
      both[i][2 * k + 1] = multiply_pair(f2[2 * k + 1], by);
    }
#pragma unroll
  for (int j = 0; j < ROWS / 16; ++j) {
    unsigned v[4];
    load_matrices<false>(v, step + j * TILE + across);
#pragma unroll
    for (int i = 0; i < QUAD; ++i)
#pragma unroll
      for (int n = 0; n < 2; ++n) mma(sum[i][2 * j + n], both[i], v[2 * n], v[2 * n + 1]);
  }
}

// The pieces of h of QUAD ranks from r on and ROWS positions from `start` on, by a cluster. h: where those of rank 0
// go, (ranks, 4) pieces of 32 uint4.
INLINE void make(const Side& side, float4* memory, unsigned arrived, int start, int positions, int r, uint4* h,
                 Flag* flag) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = cluster_rank();
  float4* received = memory + WARPS * ROOM / 16;
  if (threadIdx.x == 0) barrier_init(arrived, 1), barrier_init_done();
  __syncwarp();
  if (threadIdx.x == 0) barrier_expect(arrived, CLUSTER * PIECE);
  arrive();

  const int steps = (side.width + 15) / 16, part = rank * WARPS + warp;
  const int first = part * steps / (CLUSTER * WARPS), last = (part + 1) * steps / (CLUSTER * WARPS);
  float4* own = memory + warp * (ROOM / 16);
  unsigned room = shared_address(own), other = room + BATCH * STEP;
  fetch(side, room, start, positions, first, last);
  fetch(side, other, start, positions, first + BATCH, last);
  float sum[QUAD][ROWS / 8][4] = {};
#pragma unroll 1
  for (int at = first; at < last; at += BATCH) {
    wait_copies<1>();
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < min(last - at, BATCH); ++i) multiply(sum, room + i * STEP, side.turned, r);
    __syncwarp();
    fetch(side, room, start, positions, at + 2 * BATCH, last);
    const unsigned now = room;
    room = other, other = now;
  }

  // Piece i * 2 + q is r + i and positions from 16 * q on, in the order in which a product takes it.
#pragma unroll
  for (int i = 0; i < QUAD; ++i)
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j)
      own[(i * (ROWS / 8) + j) * 32 + lane] = make_float4(sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]);
  __syncthreads();
  float4 total[2] = {};
#pragma unroll
  for (int w = 0; w < WARPS; ++w)
#pragma unroll
    for (int j = 0; j < 2; ++j) total[j] += memory[w * (ROOM / 16) + (warp * 2 + j) * 32 + lane];
  await();  // until all blocks of the cluster have begun, long ago
#pragma unroll
  for (int j = 0; j < 2; ++j)
    send4(place_in(shared_address(received + rank * (PIECE / 16) + j * 32 + lane), warp), place_in(arrived, warp),
          &total[j].x);
  if (warp) return;
  barrier_wait_sent(arrived);
  float4 all[2] = {};
#pragma unroll
  for (int part = 0; part < CLUSTER; ++part)
#pragma unroll
    for (int j = 0; j < 2; ++j) all[j] += received[part * (PIECE / 16) + j * 32 + lane];
  h[((r + rank / 2) * 4 + rank % 2) * 32 + lane] =
      make_uint4(round_pair(all[0].x, all[0].y), round_pair(all[0].z, all[0].w), round_pair(all[1].x, all[1].y),
                 round_pair(all[1].z, all[1].w));
  __syncwarp();
  if (lane == 0) raise(flag, 1);
}
