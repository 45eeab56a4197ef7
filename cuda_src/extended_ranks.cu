// A linear layer and an adapter of 17 to 64 ranks from one read of x, in one accumulator, rounded once. For Hopper.
//
//   h = x @ down                                                 rounded
//   y = x @ w + (scale * h) @ up + bias                          scale * h rounded by itself
//
// As extended_low_rank.cu, but the first tiles of a row of tiles make 16 ranks each, for the 64 rows of every worker, and
// the second term is a step of the ring like those of the first: up and scale * h of so many ranks have no room
// elsewhere. The copying thread asks for it once it has seen that all ranks of its rows are there.
//
// Blocks wait for each other's flags, so all of them have to run at once: a cooperative launch, and the tiles that make
// h are the first of their blocks. The last tile that has seen a flag lowers it.
//
// The input gradient is the same product with all factors turned (B_ROWS=0): of y's gradient for x, up for down.
//
// only sm_90a
// variants bf16: TILE_M=192 TILE_N=192 B_ROWS=1 | TILE_M=192 TILE_N=192 B_ROWS=0
#define LOW_RANK 1
#include "low_rank_made.cuh"

static_assert(STAGED && CLUSTER == 1 && ROWS == 1, "what the workers count on");

// Grid (blocks that run at once). ranks: a multiple of 8, 64 at most.
extern "C" __global__ void __launch_bounds__((WORKERS + 1) * GROUP, 1)
    NAME(extended_ranks)(const __grid_constant__ TensorMap x,     // (positions, inner)
                         const __grid_constant__ TensorMap w,     // (1, inner, columns); turned: (1, columns, inner)
                         const __grid_constant__ TensorMap down,  // (inner, ranks); turned: (ranks, inner)
                         const __grid_constant__ TensorMap scaled_map,  // (positions, ranks)
                         const __grid_constant__ TensorMap up,     // (1, ranks, columns); turned: (1, columns, ranks)
                         const __grid_constant__ TensorMap y_map,  // (positions, columns)
                         const float* scale,                       // (1,), or null for 1
                         const bf16* bias,                         // (columns), or null
                         bf16* h,                                  // (positions, ranks), or null
                         bf16* scaled,                             // (positions, ranks): scale * h
                         unsigned* flags,  // two for 64 rows of every row of tiles; zeros before and after
                         int positions, int columns, int inner, int ranks, int band) {
  extern __shared__ char memory[];
  __shared__ unsigned long long barriers[2 * STAGES];
  Ring ring = {(shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers)};
  asm volatile("" : "+r"(ring.memory), "+r"(ring.barriers));  // kept, not found anew at each step
  const unsigned slots = ring.memory + STAGES * STAGE;
  const int tiles_m = (positions + TILE_M - 1) / TILE_M, tiles_n = (columns + TILE_N - 1) / TILE_N;
  const int tiles = tiles_m * tiles_n, steps = (inner + TILE_K - 1) / TILE_K;
  const int makers = (ranks + RANKS - 1) / RANKS;
  const int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0);  // one for a warp, as the compiler shall see
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) barrier_init(ring.full(i), 1), barrier_init(ring.empty(i), WORKERS);
    barrier_init_done();
  }
  __syncthreads();
  const auto tile_of = [&](int t) { return making_first(t, makers, tiles_m, tiles_n, band); };
  const auto flag_of = [&](const Tile& tile, int worker) {
    return reinterpret_cast<Flag*>(flags) + tile.row / 64 + worker;
  };
  Stage stage;
  if (group == WORKERS) {
    registers_fewer<32>();
    if (threadIdx.x % GROUP == 0) {
      prefetch_map(&x), prefetch_map(&w), prefetch_map(&down);
      prefetch_map(&scaled_map), prefetch_map(&up), prefetch_map(&y_map);
      for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
        const Tile tile = tile_of(t);
        const bool makes = t < makers * tiles_m;
        const int rank = tile.column / TILE_N * RANKS;  // if it makes h
        const auto fetch = [&](const TensorMap* of, const TensorMap* by, int k, bool more) {
          const unsigned done = ring.full(stage.index), to = ring.memory + stage.index * STAGE;
          barrier_wait(ring.empty(stage.index), stage.parity ^ 1);
          barrier_expect(done, A_BYTES + box_bytes(TILE_N) + (more ? DOWN_BYTES : 0));
          copy_box(to, of, done, k, tile.row);
          share<TILE_N>(to + A_BYTES, by, done, tile.column, k, 0);
          if (more) copy_box(to + A_BYTES + B_BYTES, &down, done, B_ROWS ? rank : k, B_ROWS ? k : rank);
          stage.next();
        };
#pragma unroll 1
        for (int k = 0; k < inner; k += TILE_K) fetch(&x, &w, k, makes);
        for (int worker = 0; worker < WORKERS; ++worker) await(flag_of(tile, worker), makers);
        fetch(&scaled_map, &up, 0, false);
        for (int worker = 0; worker < WORKERS; ++worker) lower(flag_of(tile, worker), tiles_n);
      }
    }
  } else {
    registers_more<160>();
    const bool chief = threadIdx.x % GROUP == 0;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const Tile tile = tile_of(t);
      float sum[ROWS][TILE_N / 2];
      begin<true>(sum, 0, nullptr, bias, tile, columns);
      if (t < makers * tiles_m) {
        float made[RANKS / 2] = {};
        multiply<TILE_N, 0, 4, true>(sum, sum, steps, group, chief, ring, stage, made);
        const int first = tile.row + group * 64, rank = tile.column / TILE_N * RANKS;
        if (h) leave(made, 1, h, first, rank, positions, ranks);
        leave(made, scale ? *scale : 1.0f, scaled, first, rank, positions, ranks);
        group_barrier(group);
        if (chief) raise(flag_of(tile, group), 1);
      } else {
        multiply<TILE_N, 0, 4>(sum, sum, steps, group, chief, ring, stage);
      }
      multiply<TILE_N, 0, 4>(sum, sum, 1, group, chief, ring, stage);
      finish_staged(sum, tile, group, &y_map, slots, positions);
    }
    if (threadIdx.x % 32 == 0) stores_read<0>();  // shared memory ends with the block
  }
}
