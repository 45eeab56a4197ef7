// How the blocks of a cluster add their sums of one tile of 64 x TILE_N: each owns some of the pieces of eight columns,
// and the others send it their sums of these, straight from the registers that products leave them in. Its barrier counts
// the bytes; nobody waits for anybody else. For Hopper.
//
// A tile may have RANKS more columns, two pieces at the end, which are added in some clusters only.
//
// Adding takes (CLUSTER - 1) * 64 * TILE_N * 4 bytes through the network between multiprocessors, which carries about
// 15 bytes a cycle and multiprocessor; a warp sends 512 bytes in a row.
#pragma once
#include "cluster.cuh"
#include "hopper.cuh"

#ifndef RANKS
#define RANKS 0
#endif
#define MOST (((TILE_N + RANKS) / 8 + CLUSTER - 1) / CLUSTER)  // pieces that a block owns, at most
#define PART_BYTES (GROUP * 16)                                // of a piece from one block
#define PARTS_BYTES (MOST * (CLUSTER - 1) * PART_BYTES)

constexpr int PIECES = (TILE_N + RANKS) / 8;

INLINE constexpr int owner_of(int piece) {
  return ((piece + 1) * CLUSTER - 1) / PIECES;
}
INLINE constexpr int first_of(int block) {
  return block * PIECES / CLUSTER;
}

// Four values to an address in another block of the cluster, whose barrier there counts them.
INLINE void send4(unsigned there, unsigned barrier, const float* v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

// As barrier_wait, for what blocks of the cluster have sent.
INLINE void barrier_wait_sent(unsigned barrier) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n@done bra "
      "PAST;\nbra AGAIN;\nPAST:\n}" ::"r"(barrier)
      : "memory");
}

// The place of what comes from the blocks of a cluster; `arrived` is the address of a barrier of one arrival.
struct Parts {
  unsigned memory, arrived;
  int rank, pieces;  // pieces: PIECES, or fewer that are added

  INLINE int count() const { return min(first_of(rank + 1), pieces) - min(first_of(rank), pieces); }

  // Before any block sends; by one thread, then the cluster meets. warps: those that have rows.
  INLINE void begin(int warps) const {
    barrier_init(arrived, 1);
    barrier_expect(arrived, count() * (CLUSTER - 1) * warps * (PART_BYTES / 4));
  }

  // Sends the others their pieces of this thread's sums; own: those of the block itself.
  INLINE void send(const float (&sum)[PIECES * 4], float (&own)[MOST][4]) const {
#pragma unroll
    for (int i = 0; i < MOST * 4; ++i) own[i / 4][i % 4] = 0;
#pragma unroll
    for (int j = 0; j < PIECES; ++j) {
      const int owner = owner_of(j), slot = j - first_of(owner);
      if (owner == rank) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own[slot][i] = sum[4 * j + i];
      } else if (j < pieces) {
        const unsigned to = memory + ((rank - (rank > owner)) * MOST + slot) * PART_BYTES + threadIdx.x * 16;
        send4(place_in(to, owner), place_in(arrived, owner), sum + 4 * j);
      }
    }
  }

  // own += what the others have sent, in the order of the blocks.
  INLINE void receive(float (&own)[MOST][4]) const {
    barrier_wait_sent(arrived);
#pragma unroll
    for (int part = 0; part < CLUSTER - 1; ++part)
#pragma unroll
      for (int slot = 0; slot < MOST; ++slot) {
        if (slot >= count()) continue;
        float4 v;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                     : "r"(memory + (part * MOST + slot) * PART_BYTES + threadIdx.x * 16)
                     : "memory");
        own[slot][0] += v.x, own[slot][1] += v.y, own[slot][2] += v.z, own[slot][3] += v.w;
      }
  }
};
