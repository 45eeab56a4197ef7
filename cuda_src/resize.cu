// Bilinear resize of channels-last images and its adjoint. Where an output lies between two inputs is a fraction of
// whole numbers, so that forward, gradient and NumPy never disagree about its neighbours; a thread owns one value.
#include "types.cuh"

// One axis: output o lies at max(numerator(o), 0) / denominator inputs.
struct Axis {
  int inputs, outputs, corners;

  __device__ __forceinline__ int denominator() const { return corners ? max(outputs - 1, 1) : 2 * outputs; }
  // Half-pixel centres: ((2 o + 1) inputs - outputs) / (2 outputs). Aligned corners: o (inputs - 1) / (outputs - 1).
  __device__ __forceinline__ int numerator(int o) const {
    return corners ? (outputs > 1 ? o * (inputs - 1) : 0) : max((2 * o + 1) * inputs - outputs, 0);
  }
  // The input at or before output o, the next one, and the share of the next one.
  __device__ __forceinline__ void between(int o, int& before, int& after, A& share) const {
    const int n = numerator(o), d = denominator();
    before = min(n / d, inputs - 1);
    after = min(before + 1, inputs - 1);
    share = A(n - before * d) / A(d);
  }
  // What output o takes of input i, times the denominator: a tent around the input.
  __device__ __forceinline__ int weight(int o, int i) const {
    const int d = denominator(), distance = min(numerator(o), (inputs - 1) * d) - i * d;
    return max(d - abs(distance), 0);
  }
  // The first output that lies at input i or after it; `outputs` if none does.
  __device__ __forceinline__ int first(int i) const {
    if (i <= 0) return 0;
    if (i >= inputs) return outputs;
    if (corners) return outputs > 1 ? min((i * (outputs - 1) + inputs - 2) / (inputs - 1), outputs) : outputs;
    const int least = (2 * i + 1) * outputs - inputs;  // 2 o inputs must reach it
    return least <= 0 ? 0 : min((least + 2 * inputs - 1) / (2 * inputs), outputs);
  }
};

// out[n, p, q, c]. Grid (out columns * channels / 256, out rows, samples).
extern "C" __global__ void __launch_bounds__(256)
    NAME(resize_bilinear)(const T* x,  // (samples, height, width, channels)
                          T* out,      // (samples, rows, columns, channels)
                          int samples, int height, int width, int rows, int columns, int channels, int corners) {
  const int at = blockIdx.x * 256 + threadIdx.x;  // in a row
  if (at >= columns * channels) return;
  const int q = at / channels, c = at % channels;
  int top, bottom, left, right;
  A down, across;
  Axis{height, rows, corners}.between(blockIdx.y, top, bottom, down);
  Axis{width, columns, corners}.between(q, left, right, across);
  for (long long n = blockIdx.z; n < samples; n += gridDim.z) {
    const T* from = x + n * height * width * channels + c;
    const auto pixel = [=](int i, int j) { return widen(from[((long long)i * width + j) * channels]); };
    const A upper = (A(1) - across) * pixel(top, left) + across * pixel(top, right);
    const A lower = (A(1) - across) * pixel(bottom, left) + across * pixel(bottom, right);
    out[(n * rows + blockIdx.y) * columns * channels + at] = narrow((A(1) - down) * upper + down * lower);
  }
}

// dx[n, i, j, c] = the sum over the outputs that lie within one input of (i, j). Grid (width * channels / 256, height,
// samples).
extern "C" __global__ void __launch_bounds__(256, 2)
    NAME(resize_bilinear_d)(const T* g, T* dx, int samples, int height, int width, int rows, int columns, int channels,
                            int corners) {
  const int at = blockIdx.x * 256 + threadIdx.x;  // in a row
  if (at >= width * channels) return;
  const int i = blockIdx.y, j = at / channels, c = at % channels;
  const Axis vertical{height, rows, corners}, horizontal{width, columns, corners};
  const int top = vertical.first(i - 1), bottom = vertical.first(i + 1);
  const int left = horizontal.first(j - 1), right = horizontal.first(j + 1);
  const A unit = A(vertical.denominator()) * A(horizontal.denominator());
  for (long long n = blockIdx.z; n < samples; n += gridDim.z) {
    const T* from = g + n * rows * columns * channels + c;
    A sum = A(0);
    for (int p = top; p < bottom; p++) {
      A row = A(0);
      for (int q = left; q < right; q++)
        row += A(horizontal.weight(q, j)) * widen(from[((long long)p * columns + q) * channels]);
      sum += A(vertical.weight(p, i)) * row;
    }
    dx[(n * height + i) * width * channels + at] = narrow(sum / unit);
  }
}
