// SiLU, GELU (exact and by tanh) and ReLU, and their gradients g * f'(x). n values, by the whole grid.
#include "each.cuh"
#include "real.cuh"

// 1 / (1 + exp(-x)), exact to its last digits in both tails.
__device__ __forceinline__ A sigmoid(A x) {
  const A e = exponential(x < A(0) ? x : -x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

// (1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3) and x held where the cube is finite: the
// sigmoid is 0 or 1 long before.
constexpr double TWICE_ROOT = 1.5957691216057307;  // 2 * sqrt(2 / pi)

__device__ __forceinline__ A within(A x) {
  return x < A(-50) ? A(-50) : x > A(50) ? A(50) : x;
}

__device__ __forceinline__ A tanh_share(A x) {
  const A v = within(x);
  return sigmoid(A(TWICE_ROOT) * v * (A(1) + A(0.044715) * v * v));
}

struct Silu {
  static __device__ __forceinline__ A value(A x) { return x * sigmoid(x); }
  static __device__ __forceinline__ A slope(A x) {
    const A s = sigmoid(x);
    return s + value(x) * sigmoid(-x);
  }
};

struct Gelu {
  static __device__ __forceinline__ A value(A x) { return x * normal_below(x); }
  static __device__ __forceinline__ A slope(A x) {
    return normal_below(x) + x * A(0.3989422804014327) * exponential(A(-0.5) * x * x);  // 1 / sqrt(2 pi)
  }
};

struct GeluTanh {
  static __device__ __forceinline__ A value(A x) { return x * tanh_share(x); }
  static __device__ __forceinline__ A slope(A x) {
    const A v = within(x), s = tanh_share(v);
    return s + v * s * tanh_share(-v) * A(TWICE_ROOT) * (A(1) + A(0.134145) * v * v);
  }
};

struct Relu {
  static __device__ __forceinline__ A value(A x) { return x < A(0) ? A(0) : x; }
  static __device__ __forceinline__ A slope(A x) { return x > A(0) ? A(1) : A(0); }
};

template <class F>
__device__ __forceinline__ void apply(const T* x, T* y, long long n) {
  each(x, y, n, [](A v) { return F::value(v); });
}

template <class F>
__device__ __forceinline__ void apply_d(const T* g, const T* x, T* dx, long long n) {
  each(g, x, dx, n, [](A d, A v) { return d * F::slope(v); });
}

extern "C" __global__ void NAME(silu)(const T* x, T* y, long long n) {
  apply<Silu>(x, y, n);
}
extern "C" __global__ void NAME(silu_d)(const T* g, const T* x, T* dx, long long n) {
  apply_d<Silu>(g, x, dx, n);
}
extern "C" __global__ void NAME(gelu)(const T* x, T* y, long long n) {
  apply<Gelu>(x, y, n);
}
extern "C" __global__ void NAME(gelu_d)(const T* g, const T* x, T* dx, long long n) {
  apply_d<Gelu>(g, x, dx, n);
}
extern "C" __global__ void NAME(gelu_tanh)(const T* x, T* y, long long n) {
  apply<GeluTanh>(x, y, n);
}
extern "C" __global__ void NAME(gelu_tanh_d)(const T* g, const T* x, T* dx, long long n) {
  apply_d<GeluTanh>(g, x, dx, n);
}
extern "C" __global__ void NAME(relu)(const T* x, T* y, long long n) {
  apply<Relu>(x, y, n);
}
extern "C" __global__ void NAME(relu_d)(const T* g, const T* x, T* dx, long long n) {
  apply_d<Relu>(g, x, dx, n);
}
