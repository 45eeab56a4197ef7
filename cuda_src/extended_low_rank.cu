// A linear layer and an adapter of up to 16 ranks from one read of x, in one accumulator, rounded once. For Hopper.
//
//   h = x @ down                                                 rounded
//   y = x @ w + (scale * h) @ up + bias                          scale * h rounded by itself
//
// It is the extended product (extended.cu), whose second term's x2 is made on the way: the steps of x pass through
// shared memory anyway. In the first MAKERS tiles of a row of tiles workers multiply their 64 rows with a step of down
// as well, copied beside w's, write what becomes of them to memory, and raise a flag: one worker of each of three tiles,
// or all of one, where three of a row are more than run at once. For every tile and worker a thread waits for the flag
// of the rows, and has them copied, with the tile's columns of up, to where the worker's finished columns wait for the
// copy engine at other times.
//
// Blocks wait for each other's flags, so all of them have to run at once: a cooperative launch, and the tiles that make
// h are the first of their blocks. The last tile that has seen a flag lowers it.
//
// The input gradient is the same product with all factors turned (B_ROWS=0): of y's gradient for x, up for down.
//
// only sm_90a
// variants bf16: TILE_M=192 TILE_N=192 B_ROWS=1 MAKERS=3 | TILE_M=192 TILE_N=192 B_ROWS=1 MAKERS=1
// variants bf16: TILE_M=192 TILE_N=192 B_ROWS=0 MAKERS=3 | TILE_M=192 TILE_N=192 B_ROWS=0 MAKERS=1
// variants bf16: TILE_M=192 TILE_N=160 B_ROWS=1 MAKERS=3 | TILE_M=192 TILE_N=160 B_ROWS=1 MAKERS=1
// variants bf16: TILE_M=192 TILE_N=160 B_ROWS=0 MAKERS=3 | TILE_M=192 TILE_N=160 B_ROWS=0 MAKERS=1
#define LOW_RANK 1
#include "extended_ends.cuh"
#include "extended_steps.cuh"
#include "flags.cuh"

constexpr int AHEAD = 2;  // steps of a tile until the worker's slots are free
constexpr int UP_BOX = RANKS * ROW_BYTES, UP_BOXES = (TILE_N + 63) / 64;  // 16 ranks by 64 columns
// Turned, up is one box of TILE_N by 16.
constexpr int UP_BYTES = B_ROWS ? UP_BOXES * UP_BOX : TILE_N * RANKS * 2, H_BYTES = 64 * RANKS * 2;
static_assert(STAGED && CLUSTER == 1 && ROWS == 1 && (MAKERS == WORKERS || MAKERS == 1), "what the workers count on");
static_assert(UP_BYTES + H_BYTES <= SLOT_BYTES / WORKERS, "up and h lie in the worker's slots");

// Rounds factor * h, a worker's, and writes what lies inside; first: its first row.
INLINE void leave(const float (&h)[RANKS / 2], float factor, bf16* to, int first, int positions, int ranks) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int n = 0; n < RANKS / 8; ++n) {
      const int row = first + threadIdx.x % GROUP / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
      const int r = n * 8 + threadIdx.x % 4 * 2, at = n * 4 + half * 2;
      if (row < positions && r < ranks)
        *reinterpret_cast<unsigned*>(to + (long long)row * ranks + r) = round_pair(factor * h[at], factor * h[at + 1]);
    }
}

// Grid (blocks that run at once). ranks: a multiple of 8.
extern "C" __global__ void __launch_bounds__((WORKERS + 1) * GROUP, 1)
    NAME(extended_low_rank)(const __grid_constant__ TensorMap x,     // (positions, inner)
                            const __grid_constant__ TensorMap w,     // (1, inner, columns); turned: (1, columns, inner)
                            const __grid_constant__ TensorMap down,  // (inner, ranks); turned: (ranks, inner)
                            const __grid_constant__ TensorMap scaled_map,  // (positions, ranks)
                            const __grid_constant__ TensorMap up,          // (ranks, columns); turned: (columns, ranks)
                            const __grid_constant__ TensorMap y_map,       // (positions, columns)
                            const float* scale,                            // (1,), or null for 1
                            const bf16* bias,                              // (columns), or null
                            bf16* h,                                       // (positions, ranks), or null
                            bf16* scaled,                                  // (positions, ranks): scale * h
                            unsigned* flags,  // two for 64 rows of every row of tiles; zeros before and after
                            int positions, int columns, int inner, int ranks, int band) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES + 2 * WORKERS];
  Ring ring = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  asm volatile("" : "+r"(ring.memory), "+r"(ring.barriers));  // kept, not found anew at each step
  const unsigned slots = ring.memory + STAGES * STAGE;
  // Of a worker: its slots are free; they hold up and h.
  const unsigned free = ring.barriers + 16 * STAGES, held = free + 8 * WORKERS;
  const int tiles_m = (positions + TILE_M - 1) / TILE_M, tiles_n = (columns + TILE_N - 1) / TILE_N;
  const int tiles = tiles_m * tiles_n, steps = (inner + TILE_K - 1) / TILE_K;
  const int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0);  // one for a warp, as the compiler shall see
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(ring.full(i), 1), barrier_init(ring.empty(i), WORKERS);
    for (int i = 0; i < WORKERS; ++i) barrier_init(free + 8 * i, 4), barrier_init(held + 8 * i, 1);
    barrier_init_done();
  }
  __syncthreads();
  // The tiles that make h come first, all rows of them; the others by bands.
  const auto tile_of = [&](int t) {
    const int before = MAKERS * tiles_m;
    if (t < before) return Tile(t, tiles_m, MAKERS, tiles_m, Geometry{}, false);
    Tile tile(t - before, tiles_m, tiles_n - MAKERS, band, Geometry{}, false);
    tile.column += MAKERS * TILE_N;
    return tile;
  };
  const auto flag_of = [&](const Tile& tile, int worker) {
    return reinterpret_cast<Flag*>(flags) + tile.row / 64 + worker;
  };
  Stage stage;
  if (group == WORKERS) {
    registers_fewer<32>();
    const int worker = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (lane != 0) {
    } else if (worker == WORKERS) {
      prefetch_map(&x), prefetch_map(&w), prefetch_map(&down), prefetch_map(&y_map);
      for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
        const Tile tile = tile_of(t);
        const bool makes = t < MAKERS * tiles_m;
#pragma unroll 1
        for (int k = 0; k < inner; k += TILE_K) {
          const unsigned done = ring.full(stage.index), to = ring.memory + stage.index * STAGE;
          barrier_wait(ring.empty(stage.index), stage.parity ^ 1);
          barrier_expect(done, A_BYTES + box_bytes(TILE_N) + (makes ? DOWN_BYTES : 0));
          copy_box(to, &x, done, k, tile.row);
          share<TILE_N>(to + A_BYTES, &w, done, tile.column, k, 0);
          if (makes) copy_box(to + A_BYTES + B_BYTES, &down, done, B_ROWS ? 0 : k, B_ROWS ? k : 0);
          stage.next();
        }
      }
    } else {
      prefetch_map(&scaled_map), prefetch_map(&up);
      const unsigned own = slots + worker * (SLOT_BYTES / WORKERS), done = held + 8 * worker;
      unsigned parity = 0;
      for (int t = blockIdx.x; t < tiles; t += gridDim.x, parity ^= 1) {
        const Tile tile = tile_of(t);
        barrier_wait(free + 8 * worker, parity);
        barrier_expect(done, UP_BYTES + H_BYTES);
        if (B_ROWS)
#pragma unroll
          for (int box = 0; box < UP_BOXES; ++box) copy_box(own + box * UP_BOX, &up, done, tile.column + 64 * box, 0);
        else
          copy_box(own, &up, done, 0, tile.column);
        await(flag_of(tile, worker), 1);
        copy_box(own + UP_BYTES, &scaled_map, done, 0, tile.row + worker * 64);
        lower(flag_of(tile, worker), tiles_n);
      }
    }
  } else {
    registers_more<160>();
    const bool chief = threadIdx.x % GROUP == 0;
    const unsigned own = slots + group * (SLOT_BYTES / WORKERS);
    unsigned parity = 0;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x, parity ^= 1) {
      const Tile tile = tile_of(t);
      float sum[ROWS][TILE_N / 2];
      begin<true>(sum, 0, nullptr, bias, tile, columns);
      const auto release_slots = [&] {
        if (lane != 0) return;
        stores_read<0>();  // of the tile before
        barrier_arrive(free + 8 * group);
      };
      if (tile.column == (MAKERS == WORKERS ? group * TILE_N : 0)) {
        float made[RANKS / 2] = {};
        release_slots();
        multiply<TILE_N, 0, 4, true>(sum, sum, steps, group, chief, ring, stage, made);
        const float factor = scale ? *scale : 1.0f;
        if (h) leave(made, 1, h, tile.row + group * 64, positions, ranks);
        leave(made, factor, scaled, tile.row + group * 64, positions, ranks);
        group_barrier(group);
        if (chief) raise(flag_of(tile, group), 1);
      } else {
        multiply<TILE_N, 0, 4>(sum, sum, min(steps, AHEAD), group, chief, ring, stage);
        release_slots();
        multiply<TILE_N, 0, 4>(sum, sum, steps - AHEAD, group, chief, ring, stage);
      }
      barrier_wait(held + 8 * group, parity);
      settle(sum);
      products_begin();
      wgmma<TILE_N, B_ROWS>(sum[0], narrow_operand(own + UP_BYTES),
                            B_ROWS ? operand(own, UP_BOX) : narrow_operand(own));
      products_commit();
      products_wait<0>();
      settle(sum);
      group_barrier(group);  // all its warps have read up
      finish_staged(sum, tile, group, &y_map, slots, positions);
    }
    if (lane == 0) stores_read<0>();  // shared memory ends with the block
  }
}
