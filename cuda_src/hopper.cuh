// What Hopper's own instructions need: barriers in shared memory, the bulk tensor copy, and warpgroup products.
//
// A bulk copy writes a box of a tensor, 128 bytes wide, row by row and swizzled in groups of 8 rows (1024 bytes); a
// warpgroup product reads that same swizzle. Addresses of boxes are multiples of 1024 bytes. sm_90a only.
#pragma once
#include "types.cuh"
#include "conv_walk.cuh"
#include "mma.cuh"

struct alignas(64) TensorMap {
  unsigned long long words[16];  // as cuTensorMapEncode* lays it out; opaque
};

constexpr int GROUP = 128;      // threads of a warpgroup
constexpr int ROW_BYTES = 128;  // of a swizzled row: 64 bf16

INLINE void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers that were just initialised become visible to the copy engine.
INLINE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

INLINE void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase end only after `bytes` have been copied in.
INLINE void barrier_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

INLINE void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra PAST;\n"
      "bra AGAIN;\nPAST:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// All threads of one warpgroup meet.
INLINE void group_barrier(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP) : "memory");
}

INLINE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box at (c0, c1) of a matrix, (c0, c1, c2) of a stack of matrices; the innermost coordinate first.
INLINE void copy_box(unsigned to, const TensorMap* map, unsigned barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

INLINE void copy_box(unsigned to, const TensorMap* map, unsigned barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The pixels that consecutive output positions read at one tap (im2col): from pixel (x, y, n) on, moved by the tap's
// offset, over row and image ends as the map says; outside are zeros.
INLINE void copy_pixels(unsigned to, const TensorMap* map, unsigned barrier, int c, int x, int y, int n, int tap_x,
                        int tap_y) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], "
      "[%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(n), "h"((unsigned short)tap_x), "h"((unsigned short)tap_y)
      : "memory");
}

INLINE void copy_voxels(unsigned to, const TensorMap* map, unsigned barrier, int c, int x, int y, int z, int n,
                        int tap_x, int tap_y, int tap_z) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2], {%8, %9, %10};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(x), "r"(y), "r"(z), "r"(n), "h"((unsigned short)tap_x),
      "h"((unsigned short)tap_y), "h"((unsigned short)tap_z)
      : "memory");
}

// The same box into the shared memory of every block of the cluster that `blocks` has a bit of, at the same address;
// each one's own barrier counts what reached it.
INLINE void copy_box_to(unsigned short blocks, unsigned to, const TensorMap* map, unsigned barrier, int c0, int c1,
                        int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, "
      "%5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

// The box at (c0, c1) of a matrix from shared memory; what lies outside is left out. Of the stores that a thread
// asked for, `stores_read` waits until their shared memory may be written again.
INLINE void store_box(const TensorMap* map, unsigned from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(c0), "r"(c1)
               : "memory");
}
INLINE void stores_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int PENDING>
INLINE void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// What this thread wrote to shared memory becomes visible to the copy engine.
INLINE void fence_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread wrote to global memory becomes visible to the copy engine, and what it has seen that others wrote.
INLINE void fence_copies_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Four 8x8 matrices of pairs of bf16, as the pieces of a product lie; lane l gives the address of row l % 8 of matrix
// l / 8.
INLINE void store_matrices(unsigned address, const unsigned (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// The descriptor of an operand in shared memory: 128-byte swizzle, groups of 8 rows 1024 bytes apart, and, where the
// 64 values of a row run along M or N, the next 64 of them `leading` bytes further.
INLINE unsigned long long operand(unsigned address, unsigned leading) {
  return (unsigned long long)((address & 0x3FFFF) >> 4) | (unsigned long long)(leading >> 4) << 16 |
         (unsigned long long)(1024 >> 4) << 32 | 1ull << 62;
}

// The same of a box of 16 values a row, which are all along that side: 32-byte swizzle, groups of 8 rows 256 bytes apart.
INLINE unsigned long long narrow_operand(unsigned address) {
  return (unsigned long long)((address & 0x3FFFF) >> 4) | 1ull << 16 | (unsigned long long)(256 >> 4) << 32 |
         3ull << 62;
}

// The descriptor of what lies so many bytes, a multiple of 16, behind an operand.
INLINE unsigned long long further(unsigned long long operand, unsigned bytes) {
  return operand & 0xFFFFFFFF00000000ull | (unsigned(operand) + bytes / 16);
}

INLINE void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
INLINE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
INLINE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int COUNT>
INLINE void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
INLINE void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// wgmma<N, ALONG_N>: d (64 x N, f32, this warpgroup's registers from d[0] on) += a (64 x 16) @ b (16 x N). ALONG_N: b's
// rows of 64 values run along N in shared memory (else along K). Defined for the N that a module asks for.
template <int N, bool ALONG_N>
INLINE void wgmma(float* d, unsigned long long a, unsigned long long b);

// wgmma_turned<N, ALONG_N>: the same for an a whose rows of 64 values run along M in shared memory.
template <int N, bool ALONG_N = true>
INLINE void wgmma_turned(float* d, unsigned long long a, unsigned long long b);

// wgmma_own<N, ALONG_N>: the same for an a in registers, as the sums of a product of 16 columns lie, in pairs.
template <int N, bool ALONG_N = true>
INLINE void wgmma_own(float* d, const unsigned (&a)[4], unsigned long long b);

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT8 OUT4(0), OUT4(4)
#define OUT20 OUT4(0), OUT4(4), OUT4(8), OUT4(12), OUT4(16)
#define OUT32 OUT20, OUT4(20), OUT4(24), OUT4(28)
#define OUT40 OUT32, OUT4(32), OUT4(36)
#define OUT48 OUT40, OUT4(40), OUT4(44)
#define OUT64 OUT48, OUT4(48), OUT4(52), OUT4(56), OUT4(60)
#define OUT72 OUT64, OUT4(64), OUT4(68)
#define OUT80 OUT72, OUT4(72), OUT4(76)
#define OUT96 OUT80, OUT4(80), OUT4(84), OUT4(88), OUT4(92)
#define IN8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define IN20 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define IN32 IN20 ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define IN40 IN32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define IN48 IN40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define IN64 IN48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define IN72 IN64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define IN80 IN72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define IN96 IN80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// COUNT: registers a thread, N / 2. A, B: the numbers of the descriptors among the asm's operands, COUNT and COUNT + 1.
// TURNED, ALONG_N: 0 or 1.
#define DEFINE_ONE(NAME, TURNED, N, ALONG_N, COUNT, A, B)                                       \
  template <>                                                                                   \
  INLINE void NAME<N, ALONG_N>(float* d, unsigned long long a, unsigned long long b) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(N) "k16.f32.bf16.bf16 {" IN##COUNT    \
                 "}, %" TEXT(A) ", %" TEXT(B) ", 1, 1, 1, " TEXT(TURNED) ", " TEXT(ALONG_N) ";" \
                 : OUT##COUNT                                                                   \
                 : "l"(a), "l"(b));                                                             \
  }
#define DEFINE_WGMMA(N, COUNT, A, B)             \
  DEFINE_ONE(wgmma, 0, N, 0, COUNT, A, B)        \
  DEFINE_ONE(wgmma, 0, N, 1, COUNT, A, B)        \
  DEFINE_ONE(wgmma_turned, 1, N, 0, COUNT, A, B) \
  DEFINE_ONE(wgmma_turned, 1, N, 1, COUNT, A, B)
DEFINE_WGMMA(16, 8, 8, 9)
DEFINE_WGMMA(40, 20, 20, 21)
DEFINE_WGMMA(64, 32, 32, 33)
DEFINE_WGMMA(80, 40, 40, 41)
DEFINE_WGMMA(96, 48, 48, 49)
DEFINE_WGMMA(128, 64, 64, 65)
DEFINE_WGMMA(144, 72, 72, 73)
DEFINE_WGMMA(160, 80, 80, 81)
DEFINE_WGMMA(192, 96, 96, 97)

// COUNT, A, B: as above; A, A1, A2, A3: the numbers of a's registers among the asm's operands, B of the descriptor.
#define DEFINE_ONE_OWN(N, ALONG_N, COUNT, A, A1, A2, A3, B)                                                         \
  template <>                                                                                                       \
  INLINE void wgmma_own<N, ALONG_N>(float* d, const unsigned (&a)[4], unsigned long long b) {                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(N) "k16.f32.bf16.bf16 {" IN##COUNT "}, {%" TEXT(          \
                     A) ", %" TEXT(A1) ", %" TEXT(A2) ", %" TEXT(A3) "}, %" TEXT(B) ", 1, 1, 1, " TEXT(ALONG_N) ";" \
                 : OUT##COUNT                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
  }
#define DEFINE_WGMMA_OWN(N, ...) DEFINE_ONE_OWN(N, 0, __VA_ARGS__) DEFINE_ONE_OWN(N, 1, __VA_ARGS__)
DEFINE_WGMMA_OWN(64, 32, 32, 33, 34, 35, 36)
DEFINE_WGMMA_OWN(128, 64, 64, 65, 66, 67, 68)
