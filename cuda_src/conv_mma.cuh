// Convolutions of bf16 on tensor cores: implicit GEMMs whose tiles are gathered by cp.async, STAGES of them in flight.
//
// One block of 4 warps makes a TILE_M x TILE_N tile of sums. Tiles lie in shared memory in rows of 16-byte chunks, each
// chunk XORed with its row so that neither the copies nor ldmatrix meet a bank twice. VEC_A, VEC_B: 8 if that operand
// can be copied in aligned chunks, 1 if it has to be read element by element (odd channel counts).
// EXTENDED: another sum over taps and channels is scaled and goes on in the same accumulators.
#pragma once
#include "conv_term.cuh"
#include "mma.cuh"

#ifndef EXTENDED
#define EXTENDED 0
#endif

constexpr int TILE_K = 32, STAGES = 4, THREADS = 128;
constexpr int WARPS_N = TILE_N >= 64 ? 2 : 1, WARPS_M = THREADS / 32 / WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;  // 64 x 64, 32 x 32
constexpr int A_BYTES = TILE_M * TILE_K * 2, B_BYTES = TILE_N * TILE_K * 2;
constexpr int RESIDENT = EXTENDED && TILE_M * TILE_N <= 64 * 64 ? 4 : 2;  // blocks a multiprocessor, as registers allow
constexpr int BAND = 8;  // column tiles that run side by side share the rows they gather in L2

// Bytes from the start of a tile to a chunk, for rows of CHUNKS chunks.
template <int CHUNKS>
INLINE int swizzled(int row, int chunk) {
  const int flip = CHUNKS >= 8 ? row & 7 : row >> 1 & 3;
  return (row * CHUNKS + (chunk ^ flip)) * 16;
}

using Sums = float[WARP_M / 16][WARP_N / 8][4];

// sums += one step. A lies as [k][m] if A_ACROSS, else [m][k]; B as [k][n] if B_ACROSS, else [n][k].
template <bool A_ACROSS, bool B_ACROSS>
INLINE void multiply(Sums& sums, unsigned a_tile, unsigned b_tile, int m, int n, int lane) {
  const int matrix = lane / 8, low = matrix % 2 * 8, high = matrix / 2 * 8, row = lane % 8;
#pragma unroll
  for (int k = 0; k < TILE_K; k += 16) {
    unsigned a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)  // fragment order: (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8)
      load_matrices<A_ACROSS>(a[i], a_tile + (A_ACROSS ? swizzled<TILE_M / 8>(k + high + row, (m + i * 16 + low) / 8)
                                                       : swizzled<TILE_K / 8>(m + i * 16 + low + row, (k + high) / 8)));
#pragma unroll
    for (int j = 0; j < WARP_N / 16; ++j)  // (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8)
      load_matrices<B_ACROSS>(b[j], b_tile + (B_ACROSS ? swizzled<TILE_N / 8>(k + low + row, (n + j * 16 + high) / 8)
                                                       : swizzled<TILE_K / 8>(n + j * 16 + high + row, (k + low) / 8)));
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j) mma(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// sums = the product over `steps` steps of TILE_K. load(a_tile, b_tile) stages the next step. EXTENDED: what the steps
// before `turn` gave counts `factor` times.
template <bool A_ACROSS, bool B_ACROSS, class Loader>
INLINE void pipeline(Sums& sums, Loader& load, int steps, unsigned memory, int turn = 0, float factor = 1) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m = warp / WARPS_N * WARP_M, n = warp % WARPS_N * WARP_N;
  const unsigned b_memory = memory + STAGES * A_BYTES;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) load(memory + s * A_BYTES, b_memory + s * B_BYTES);
    commit_copies();  // an empty group keeps the count right
  }
  int now = 0, next = STAGES - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the stage that is filled next
    if (step + STAGES - 1 < steps) load(memory + next * A_BYTES, b_memory + next * B_BYTES);
    commit_copies();
    if (EXTENDED && step == turn) {
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_N / 8; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] *= factor;
    }
    multiply<A_ACROSS, B_ACROSS>(sums, memory + now * A_BYTES, b_memory + now * B_BYTES, m, n, lane);
    now = now + 1 == STAGES ? 0 : now + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
}

// Calls use(row, column, first, second) for each pair of neighbouring columns that this thread holds.
template <class Use>
INLINE void for_pairs(const Sums& sums, Use use) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j)
        use(warp / WARPS_N * WARP_M + i * 16 + half * 8 + lane / 4, warp % WARPS_N * WARP_N + j * 8 + lane % 4 * 2,
            sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
}

// Stages the tiles of conv and, if BACK, of conv_dx: A is gathered, [m][k]; B is w, [k][n], or w's rows [n][k] if BACK.
// EXTENDED: first those of the other sum, for each block that has a column of this tile; B holds zeros for the rest.
template <bool BACK>
struct Gather {
  static constexpr int CHUNKS = TILE_K / 8, PASS = THREADS / CHUNKS, A_COUNT = TILE_M / PASS;
  static constexpr int B_CHUNKS = BACK ? CHUNKS : TILE_N / 8, B_PASS = THREADS / B_CHUNKS;
  static constexpr int B_COUNT = (BACK ? TILE_N : TILE_K) / B_PASS;

  const Geometry& g;
  const Sources& from;
  const bf16* in;  // at the block's first channel
  const bf16* w0;  // at the block's first column
  const bf16* w;   // forward: at this thread's chunk of the step
  int inner, outer, in_row, w_row, taps, k, n;
  Tap tap;  // this thread's chunk, the same for all its rows
  Rows<A_COUNT, BACK> rows;
  long long at[A_COUNT];  // element of `in` at channel 0 of the tap, or -1

  // EXTENDED: this tile's place, the next block and the last one of the other sum, steps until the next block.
  int first, positions, group, column, block, last, left;
  bool single;

  INLINE Gather(const Geometry& g, const Sources& from, int group, int m0, int n0, int positions)
      : g(g), from(from), positions(positions), group(group), left(0), single(false) {
    first = m0 + threadIdx.x / CHUNKS;
    column = group * from.own.outer + n0;
#pragma unroll
    for (int r = 0; r < A_COUNT; ++r) rows.start(r, first + r * PASS, positions, g);
    if (EXTENDED) {
      block = column / from.other.outer;
      last = (group * from.own.outer + min(n0 + TILE_N, from.own.outer) - 1) / from.other.outer;
    } else {
      start(from.in, from.w, from.own, group);
    }
  }

  INLINE static int steps(const Term& term, const Geometry& g) {
    return (taps_of(term, g) * term.inner - 1) / TILE_K + 1;
  }

  INLINE static int taps_of(const Term& term, const Geometry& g) {
    return term.single ? 1 : g.kernel[0] * g.kernel[1] * g.kernel[2];
  }

  // Goes to the start of a block of a sum.
  INLINE void start(const bf16* its_in, const bf16* its_w, const Term& term, int its_block) {
    const int w_columns = BACK ? term.inner : term.outer;
    inner = term.inner, outer = term.outer, taps = taps_of(term, g);
    in_row = term.blocks * inner, w_row = term.shared ? w_columns : term.blocks * w_columns;
    in = its_in + its_block * inner;
    w0 = term.shared ? its_w : its_w + its_block * w_columns;
    tap = Tap::of(threadIdx.x % CHUNKS * 8, inner, g);
    find();
    k = threadIdx.x / B_CHUNKS;
    n = column - its_block * outer + (BACK ? threadIdx.x / CHUNKS : threadIdx.x % B_CHUNKS * 8);
    w = w0 + (long long)k * w_row + n;
  }

  INLINE void turn() {
    const bool more = block <= last;
    Term term = from.own;
    if (more) term = from.other;
    single = term.single;
    left = steps(term, g);
    start(more ? from.in2 : from.in, more ? from.w2 : from.w, term, more ? block : group);
    ++block;
  }

  INLINE bool past(const Tap& t) const { return EXTENDED ? t.index >= taps : t.past(g); }

  // The pixel of `in` that row r reads at a tap; -1 for none.
  INLINE int pixel(int r, const Tap& t) const {
    if (EXTENDED && single) return !past(t) && first + r * PASS < positions ? first + r * PASS : -1;
    return rows.pixel(r, t, g);
  }

  INLINE void find() {
#pragma unroll
    for (int r = 0; r < A_COUNT && VEC_A == 8; ++r) {
      const int read = pixel(r, tap);
      at[r] = read < 0 ? -1 : (long long)read * in_row;
    }
  }

  INLINE void operator()(unsigned a_tile, unsigned b_tile) {
    if (EXTENDED && left == 0) turn();
    load_a(a_tile + swizzled<CHUNKS>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS));
    BACK ? load_rows(b_tile + swizzled<CHUNKS>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS)) : load_columns(b_tile);
    if (tap.forward(TILE_K, inner, g)) find();
    if (EXTENDED) --left;
  }

  INLINE void load_a(unsigned dst) {  // rows PASS apart have the same swizzle
    if (VEC_A == 8) {
#pragma unroll
      for (int r = 0; r < A_COUNT; ++r)
        copy_async(dst + r * PASS * TILE_K * 2, at[r] < 0 ? in : in + at[r] + tap.channel, at[r] >= 0);
      return;
    }
    Chunk v[A_COUNT];
    Tap t = tap;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int r = 0; r < A_COUNT; ++r) {
        const int read = pixel(r, t);
        v[r].at[e] = read < 0 ? bf16{0} : in[(long long)read * in_row + t.channel];
      }
      t.forward(1, inner, g);
    }
#pragma unroll
    for (int r = 0; r < A_COUNT; ++r) store_chunk(dst + r * PASS * TILE_K * 2, v[r]);
  }

  INLINE void load_columns(unsigned b_tile) {  // forward: rows k of w, chunks along the columns
#pragma unroll
    for (int r = 0; r < B_COUNT; ++r) {
      const unsigned dst = b_tile + swizzled<B_CHUNKS>(threadIdx.x / B_CHUNKS + r * B_PASS, threadIdx.x % B_CHUNKS);
      const bool row = k + r * B_PASS < taps * inner;
      const bf16* src = w + (long long)(r * B_PASS) * w_row;
      if (VEC_B == 8) {
        const bool valid = row && unsigned(n) < unsigned(outer);
        copy_async(dst, valid ? src : w0, valid);  // a source that is not read is aligned all the same
      } else {
        Chunk v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.at[e] = row && unsigned(n + e) < unsigned(outer) ? src[e] : bf16{0};
        store_chunk(dst, v);
      }
    }
    k += TILE_K;
    w += (long long)TILE_K * w_row;
  }

  INLINE void load_rows(unsigned dst) {  // gradient of x: rows n of w[tap], chunks along its columns
    if (VEC_B == 8) {
#pragma unroll
      for (int r = 0; r < B_COUNT; ++r) {
        const bool valid = unsigned(n + r * PASS) < unsigned(outer) && !past(tap);
        const bf16* src = w0 + (long long)(tap.index * outer + n + r * PASS) * w_row + tap.channel;
        copy_async(dst + r * PASS * TILE_K * 2, valid ? src : w0, valid);
      }
      return;
    }
    Chunk v[B_COUNT];
    Tap t = tap;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int r = 0; r < B_COUNT; ++r) {
        const bool valid = unsigned(n + r * PASS) < unsigned(outer) && !past(t);
        v[r].at[e] = valid ? w0[(long long)(t.index * outer + n + r * PASS) * w_row + t.channel] : bf16{0};
      }
      t.forward(1, inner, g);
    }
#pragma unroll
    for (int r = 0; r < B_COUNT; ++r) store_chunk(dst + r * PASS * TILE_K * 2, v[r]);
  }
};

// The tile of this block, by conv.cu's formulas. scale: of the sum, or of the other one if EXTENDED, with its bias2.
template <bool BACK>
INLINE void gather_product(const Sources& from, const float* scale, const bf16* add, const bf16* bias,
                           const bf16* bias2, bf16* out, const Geometry& g, int positions) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int outer = from.own.outer, groups = from.own.blocks;
  const int m_tiles = (positions - 1) / TILE_M + 1, n_tiles = (outer - 1) / TILE_N + 1;
  const int group = blockIdx.x / (m_tiles * n_tiles), rest = blockIdx.x % (m_tiles * n_tiles);
  const int band = rest / (m_tiles * BAND), within = rest % (m_tiles * BAND), width = min(BAND, n_tiles - band * BAND);
  const int m0 = within / width * TILE_M, n0 = (band * BAND + within % width) * TILE_N;
  const float factor = scale ? *scale : 1;

  Sums sums;
  Gather<BACK> load(g, from, group, m0, n0, positions);
  const int turn = EXTENDED ? (load.last - load.block + 1) * load.steps(from.other, g) : 0;
  pipeline<false, !BACK>(sums, load, turn + load.steps(from.own, g), shared_address(memory), turn, factor);

  const bool pair = outer % 2 == 0;
  for_pairs(sums, [&](int row, int column, float first, float second) {
    const int p = m0 + row, j = n0 + column;
    if (p >= positions || j >= outer) return;
    const bool has_second = j + 1 < outer;
    const long long at = (long long)p * (groups * outer) + group * outer + j;
    auto plus = [&](const bf16* more, float by) {
      first += by * widen(more[0]), second += has_second ? by * widen(more[1]) : 0;
    };
    if (!EXTENDED) first *= factor, second *= factor;
    if (EXTENDED && bias2) plus(bias2 + group * outer + j, factor);
    if (add) plus(add + at, 1);
    if (bias) plus(bias + group * outer + j, 1);
    put(out + at, first, second, has_second, pair);
  });
}

// Stages the tiles of conv_dw: both operands lie across, A [position][tap, channel], B [position][column].
struct Outer {
  static constexpr int A_CHUNKS = TILE_M / 8, A_PASS = THREADS / A_CHUNKS, A_COUNT = TILE_K / A_PASS;
  static constexpr int B_CHUNKS = TILE_N / 8, B_PASS = THREADS / B_CHUNKS, B_COUNT = TILE_K / B_PASS;

  const Geometry& g;
  const bf16 *x, *dy;  // at the group's first channel
  int channels, columns, x_row, dy_row, n, first, past, a_at, b_at;
  Tap tap;
  Place place, start, pass;  // of a_at; where the split begins; A_PASS positions

  INLINE Outer(const Geometry& g, const bf16* x, const bf16* dy, int channels, int columns, int x_row, int dy_row,
               int m0, int n0, int first, int past)
      : g(g), x(x), dy(dy), channels(channels), columns(columns), x_row(x_row), dy_row(dy_row), first(first),
        past(past) {
    tap = Tap::of(m0 + threadIdx.x % A_CHUNKS * 8, channels, g);
    n = n0 + threadIdx.x % B_CHUNKS * 8;
    start = Place::of(first + threadIdx.x / A_CHUNKS, g);
    pass = Place::of(A_PASS, g);
    begin();
  }

  INLINE void begin() {
    place = start;
    a_at = first + threadIdx.x / A_CHUNKS, b_at = first + threadIdx.x / B_CHUNKS;
  }

  INLINE void operator()(unsigned a_tile, unsigned b_tile) {
    if (a_at - int(threadIdx.x / A_CHUNKS) >= past) {  // the next group of a shared weight; the same for all threads
      x += channels, dy += columns;
      begin();
    }
#pragma unroll
    for (int r = 0; r < A_COUNT; ++r) {
      const unsigned dst = a_tile + swizzled<A_CHUNKS>(threadIdx.x / A_CHUNKS + r * A_PASS, threadIdx.x % A_CHUNKS);
      if (VEC_A == 8) {
        const int pixel = a_at < past ? pixel_read(place, tap, g) : -1;
        copy_async(dst, pixel < 0 ? x : x + (long long)pixel * x_row + tap.channel, pixel >= 0);
      } else {
        Chunk v;
        Tap t = tap;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int pixel = a_at < past ? pixel_read(place, t, g) : -1;
          v.at[e] = pixel < 0 ? bf16{0} : x[(long long)pixel * x_row + t.channel];
          t.forward(1, channels, g);
        }
        store_chunk(dst, v);
      }
      a_at += A_PASS;
      place.add(pass, g);
    }
#pragma unroll
    for (int r = 0; r < B_COUNT; ++r) {
      const unsigned dst = b_tile + swizzled<B_CHUNKS>(threadIdx.x / B_CHUNKS + r * B_PASS, threadIdx.x % B_CHUNKS);
      const bf16* src = dy + (long long)b_at * dy_row + n;
      if (VEC_B == 8) {
        const bool valid = b_at < past && n < columns;
        copy_async(dst, valid ? src : dy, valid);
      } else {
        Chunk v;
#pragma unroll
        for (int e = 0; e < 8; ++e) v.at[e] = b_at < past && n + e < columns ? src[e] : bf16{0};
        store_chunk(dst, v);
      }
      b_at += B_PASS;
    }
  }
};

INLINE void outer_product(const bf16* x, const bf16* dy, const float* scale, float* dw, const Geometry& g,
                          int positions, int inner, int outer, int groups, int shared, int span) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int rows = g.kernel[0] * g.kernel[1] * g.kernel[2] * inner;
  const int m_tiles = (rows - 1) / TILE_M + 1, n_tiles = (outer - 1) / TILE_N + 1, own = shared ? 1 : groups;
  int index = blockIdx.x;  // the tiles of one split run side by side: they read the same positions
  const int n0 = index % n_tiles * TILE_N, m0 = (index /= n_tiles) % m_tiles * TILE_M;
  const int group = (index /= m_tiles) % own, split = index / own;
  const int first = split * span, past = min(positions, first + span);

  Sums sums;
  Outer load(g, x + group * inner, dy + group * outer, inner, outer, groups * inner, groups * outer, m0, n0, first,
             past);
  const int steps = (past - first - 1) / TILE_K + 1;
  pipeline<true, true>(sums, load, shared ? steps * groups : steps, shared_address(memory));

  const float factor = scale ? *scale : 1;
  const int row_length = own * outer;
  const bool pair = outer % 2 == 0;
  dw += (long long)split * rows * row_length + group * outer;
  for_pairs(sums, [&](int row, int column, float a, float b) {
    const int m = m0 + row, j = n0 + column;
    if (m >= rows || j >= outer) return;
    put(dw + (long long)m * row_length + j, a * factor, b * factor, j + 1 < outer, pair);
  });
}
