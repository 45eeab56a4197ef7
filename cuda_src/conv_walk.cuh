// How a convolution walks: from a position and a tap to the element that is read there. No divisions after the start.
//
// Space is (D, H, W) with leading ones. The reduction axis is flat, k = tap * channels + channel, so that a narrow
// layer wastes no part of a tile: a chunk of 8 lies in one tap whenever channels % 8 == 0.
#pragma once
#define INLINE __device__ __forceinline__

struct Geometry {
  int from[3];  // extents of the array that is read through the window: x; dy for the gradient of x
  int to[3];    // extents of the positions that are summed for or over: y; x for the gradient of x
  int kernel[3], stride[3], padding[3], dilation[3];
};

// A position of g.to, as digits; steps of a fixed length are added digit by digit.
struct Place {
  int n, z, y, x;

  INLINE static Place of(int p, const Geometry& g) {
    Place at;
    at.x = p % g.to[2], p /= g.to[2];
    at.y = p % g.to[1], p /= g.to[1];
    at.z = p % g.to[0], at.n = p / g.to[0];
    return at;
  }

  INLINE void add(const Place& step, const Geometry& g) {
    x += step.x, y += step.y, z += step.z, n += step.n;
    if (x >= g.to[2]) x -= g.to[2], ++y;
    if (y >= g.to[1]) y -= g.to[1], ++z;
    if (z >= g.to[0]) z -= g.to[0], ++n;
  }
};

// A place on the reduction axis: channel of tap (z, y, x). Past the last tap z is g.kernel[0] or more.
struct Tap {
  int channel, index, z, y, x;

  INLINE static Tap of(int k, int channels, const Geometry& g) {
    Tap t;
    t.index = k / channels, t.channel = k % channels;
    t.x = t.index % g.kernel[2];
    t.y = t.index / g.kernel[2] % g.kernel[1];
    t.z = t.index / g.kernel[2] / g.kernel[1];
    return t;
  }

  INLINE bool past(const Geometry& g) const { return z >= g.kernel[0]; }

  // Goes `count` elements on; true if that left the tap.
  INLINE bool forward(int count, int channels, const Geometry& g) {
    channel += count;
    if (channel < channels) return false;
    do {
      channel -= channels, ++index;
      if (++x == g.kernel[2]) {
        x = 0;
        if (++y == g.kernel[1]) y = 0, ++z;
      }
    } while (channel >= channels);
    return true;
  }
};

INLINE bool divides(int by, int& value) {
  if (by == 1) return true;
  const int quotient = value / by;
  const bool exact = quotient * by == value;
  value = quotient;
  return exact;
}

// COUNT positions of g.to, and what each reads at a tap. BACK: the gradient of x, which reads dy where a product of
// that tap came from x, o * stride = p + padding - tap * dilation.
template <int COUNT, bool BACK>
struct Rows {
  int z[COUNT], y[COUNT], x[COUNT];
  int base[COUNT];  // pixel of g.from at tap 0, or the image n if BACK

  INLINE void start(int r, int p, int positions, const Geometry& g) {
    if (p >= positions) {
      z[r] = -(1 << 30);  // outside at every tap
      y[r] = x[r] = base[r] = 0;
      return;
    }
    const Place at = Place::of(p, g);
    if (BACK) {
      z[r] = at.z + g.padding[0], y[r] = at.y + g.padding[1], x[r] = at.x + g.padding[2];
      base[r] = at.n;
    } else {
      z[r] = at.z * g.stride[0] - g.padding[0];
      y[r] = at.y * g.stride[1] - g.padding[1];
      x[r] = at.x * g.stride[2] - g.padding[2];
      base[r] = ((at.n * g.from[0] + z[r]) * g.from[1] + y[r]) * g.from[2] + x[r];
    }
  }

  // The pixel of g.from that row r reads at a tap; -1 for none.
  INLINE int pixel(int r, const Tap& t, const Geometry& g) const {
    const int dz = t.z * g.dilation[0], dy = t.y * g.dilation[1], dx = t.x * g.dilation[2];
    if (t.past(g)) return -1;
    if (BACK) {
      int a = z[r] - dz, b = y[r] - dy, c = x[r] - dx;
      if ((a | b | c) < 0) return -1;
      if (!divides(g.stride[0], a) || !divides(g.stride[1], b) || !divides(g.stride[2], c)) return -1;
      if (a >= g.from[0] || b >= g.from[1] || c >= g.from[2]) return -1;
      return ((base[r] * g.from[0] + a) * g.from[1] + b) * g.from[2] + c;
    }
    const bool inside = unsigned(z[r] + dz) < unsigned(g.from[0]) && unsigned(y[r] + dy) < unsigned(g.from[1]) &&
                        unsigned(x[r] + dx) < unsigned(g.from[2]);
    return inside ? base[r] + (dz * g.from[1] + dy) * g.from[2] + dx : -1;
  }
};

// The pixel of g.from that position `at` of g.to reads at a tap; -1 for none.
INLINE int pixel_read(const Place& at, const Tap& t, const Geometry& g) {
  const int z = at.z * g.stride[0] - g.padding[0] + t.z * g.dilation[0];
  const int y = at.y * g.stride[1] - g.padding[1] + t.y * g.dilation[1];
  const int x = at.x * g.stride[2] - g.padding[2] + t.x * g.dilation[2];
  const bool inside = unsigned(z) < unsigned(g.from[0]) && unsigned(y) < unsigned(g.from[1]) &&
                      unsigned(x) < unsigned(g.from[2]) && !t.past(g);
  return inside ? ((at.n * g.from[0] + z) * g.from[1] + y) * g.from[2] + x : -1;
}

// A column pair of a sum, written with one access where the row allows it (`pair`: an even count of columns).
template <class O>
INLINE void put(O* out, A first, A second, bool has_second, bool pair) {
  if (pair) {
    *reinterpret_cast<Pack<O, 2>*>(out) = Pack<O, 2>{{round<O>(first), round<O>(second)}};
  } else {
    out[0] = round<O>(first);
    if (has_second) out[1] = round<O>(second);
  }
}
