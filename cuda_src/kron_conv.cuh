// A piece of an image in shared memory: 8 x 8 positions and the pixels around them that their windows read, with a
// part of the channels of every block. What kron_conv.cu and kron_conv_dw.cu have in common.
#pragma once
#include "conv_walk.cuh"
#include "mma.cuh"

constexpr int SIDE = 8;

// Bytes of a row of 16-byte chunks: an odd number of them, so that eight rows one after the other fall on different
// banks.
INLINE unsigned odd_row(int chunks) {
  return (chunks | 1) * 16;
}

INLINE unsigned read_shared(unsigned from) {
  unsigned v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}
INLINE void write_shared(unsigned to, unsigned v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}
INLINE uint4 read_chunk(unsigned from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
INLINE void write_chunk(unsigned to, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Which 64 positions of which image.
struct Piece {
  int image, top, left;

  INLINE Piece(int piece, const Geometry& g) {
    const int across = (g.to[2] + SIDE - 1) / SIDE, down = (g.to[1] + SIDE - 1) / SIDE;
    left = piece % across * SIDE, top = piece / across % down * SIDE, image = piece / across / down;
  }

  // The number of a position of the piece; -1 outside.
  INLINE int position(int row, int column, int positions, const Geometry& g) const {
    if (top + row >= g.to[1] || left + column >= g.to[2]) return -1;
    const int at = (image * g.to[1] + top + row) * g.to[2] + left + column;
    return at < positions ? at : -1;
  }
};

// Where the chunks of a pixel's row come from: channels, of each of `blocks` blocks the first `part`.
INLINE void list_channels(int* list, int blocks, int block, int part) {
  const int chunks = part / 8;
  for (int c = threadIdx.x; c < blocks * chunks; c += blockDim.x) list[c] = c / chunks * block + c % chunks * 8;
}

// Copies `rows` x `columns` pixels from (top, left) of an image on, of each the `chunks` chunks listed in `channels`;
// zeros outside. By `threads` threads, eight a pixel, which keep HELD entries of the list at hand.
template <int HELD>
INLINE void copy_piece(int thread, int threads, unsigned to, unsigned row_bytes, const bf16* x, int pixels, int image,
                       int top, int left, int rows, int columns, int height, int width, int channels_all,
                       const int* channels, int chunks) {
  for (int first = thread % 8; first < chunks; first += 8 * HELD) {
    int held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = first + i * 8 < chunks ? channels[first + i * 8] : -1;
    int down = thread / 8 / columns, right = thread / 8 - down * columns;
    unsigned row = to + thread / 8 * row_bytes + first * 16;
    while (down < rows) {
      const int y = top + down, z = left + right, pixel = (image * height + y) * width + z;
      const bool inside = unsigned(y) < unsigned(height) && unsigned(z) < unsigned(width) && pixel < pixels;
      const bf16* from = inside ? x + (long long)pixel * channels_all : x;
#pragma unroll
      for (int i = 0; i < HELD; ++i)
        if (held[i] >= 0) copy_async(row + i * 128, from + unsigned(held[i]), inside);
      row += threads / 8 * row_bytes;
      for (right += threads / 8; right >= columns; right -= columns) ++down;
    }
  }
}

// Brings the same pixels, all their channels, into L2: 128 bytes an instruction.
INLINE void prefetch_piece(int thread, int threads, const bf16* x, int pixels, int image, int top, int left, int rows,
                           int columns, int height, int width, int channels_all) {
  const int lines = (channels_all + 63) / 64;
  for (int i = thread; i < rows * columns * lines; i += threads) {
    const int at = i / lines, down = at / columns, y = top + down, z = left + at - down * columns;
    const int pixel = (image * height + y) * width + z;
    if (unsigned(y) < unsigned(height) && unsigned(z) < unsigned(width) && pixel < pixels)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(x + pixel * channels_all + (i - at * lines) * 64));
  }
}

// Where the chunks of eight channels of all taps lie, from the pixel of tap 0 on; the last one again where their
// number is odd.
INLINE void list_chunks(unsigned* list, int taps, int part, int columns, unsigned row_bytes, const Geometry& g) {
  const int chunks = part / 8, count = taps * chunks;
  for (int i = threadIdx.x; i < count + count % 2; i += blockDim.x) {
    const int at = min(i, count - 1), tap = at / chunks;
    const int down = tap / g.kernel[2] * g.dilation[1], right = tap % g.kernel[2] * g.dilation[2];
    list[i] = (down * columns + right) * row_bytes + at % chunks * 16;
  }
}
