// Convolution and the gradient of its input as implicit GEMMs of bf16: which pieces of the image get into a tile.
//
// VEC_A, VEC_B: 8 if that operand can be copied in aligned chunks, 1 if it has to be read element by element (odd
// channel counts).
#pragma once
#include "conv_mma.cuh"
#include "conv_term.cuh"

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
