// Rows of a table by index, and the table's gradient: positions are sorted by index, so that equal ones are added in
// order and without atomics. A key is index * 2^32 + position: no two are equal, and their order is the order of the
// sum.
#include "types.cuh"

constexpr int TILE = 1024;  // keys of a block of the sort; as in embedding.py
constexpr int CHUNK = 32;   // sorted positions of a block of the sum; as in embedding.py

// A value that no reader takes for a result.
__device__ __forceinline__ A no_number() {
  return A(__int_as_float(0x7fc00000));
}

// out[p] = table[indices[p]], NaN for an index that the table does not have. Grid (positions).
extern "C" __global__ void __launch_bounds__(128) NAME(embedding)(const T* table,      // (rows, columns)
                                                                  const int* indices,  // (positions)
                                                                  T* out,              // (positions, columns)
                                                                  int rows, int columns) {
  const int row = indices[blockIdx.x];
  const bool known = row >= 0 && row < rows;
  const T* from = table + (long long)row * columns;
  T* to = out + (long long)blockIdx.x * columns;
  for (int c = threadIdx.x; c < columns; c += 128) to[c] = known ? from[c] : narrow(no_number());
}

// keys: of each tile of positions, sorted (a bitonic network). An index outside 0 to rows - 1 is sorted behind all
// others.
extern "C" __global__ void __launch_bounds__(TILE) NAME(sort_tiles)(const int* indices,  // (count)
                                                                    long long* keys,     // (count)
                                                                    int count, int rows) {
  __shared__ long long key[TILE];
  const int position = blockIdx.x * TILE + threadIdx.x, at = threadIdx.x;
  long long own = 0x7fffffffffffffff;  // behind the last position
  if (position < count) {
    const int row = indices[position];
    own = ((long long)(row >= 0 && row < rows ? row : rows) << 32) + position;
  }
  key[at] = own;
  for (int run = 2; run <= TILE; run *= 2)
    for (int distance = run / 2; distance; distance /= 2) {
      __syncthreads();
      const int other = at ^ distance;
      if (other > at) {
        const long long a = key[at], b = key[other];
        if ((a > b) == ((at & run) == 0)) {
          key[at] = b;
          key[other] = a;
        }
      }
    }
  __syncthreads();
  if (position < count) keys[position] = key[at];
}

// sorted: all keys in order. A key's place is the number of smaller ones, found in each tile by halving. Grid as
// sort_tiles.
extern "C" __global__ void __launch_bounds__(TILE)
    NAME(merge_tiles)(const long long* keys, long long* sorted, int count) {
  const int position = blockIdx.x * TILE + threadIdx.x;
  if (position >= count) return;
  const long long own = keys[position];
  int place = 0;
  for (int start = 0; start < count; start += TILE) {
    int low = start, high = start + TILE < count ? start + TILE : count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (keys[middle] < own)
        low = middle + 1;
      else
        high = middle;
    }
    place += low - start;
  }
  sorted[place] = own;
}

__device__ __forceinline__ int row_of(const long long* sorted, long long at) {
  return int(sorted[at] >> 32);
}

// The sums over the runs of equal rows inside each chunk. A run that lies inside goes to out; one that began before the
// chunk to partial[chunk, 0], one that goes on after it to partial[chunk, 1]. Grid (chunks, columns / 256).
extern "C" __global__ void __launch_bounds__(256) NAME(embedding_d)(const T* g,               // (count, columns)
                                                                    const long long* sorted,  // (count)
                                                                    A* partial,               // (chunks, 2, columns)
                                                                    A* out,                   // (rows, columns), zeros
                                                                    int count, int rows, int columns) {
  const int c = blockIdx.y * 256 + threadIdx.x;
  if (c >= columns) return;
  const long long first = (long long)blockIdx.x * CHUNK;
  const long long last = first + CHUNK < count ? first + CHUNK : count;
  bool before = first > 0 && row_of(sorted, first - 1) == row_of(sorted, first);
  A sum = A(0);
  for (long long i = first; i < last; i++) {
    const long long key = sorted[i];
    const int row = int(key >> 32);
    sum += widen(g[(key & 0xffffffff) * columns + c]);
    const bool after = i + 1 < count && row_of(sorted, i + 1) == row;
    if (after && i + 1 < last) continue;
    if (before)
      partial[2LL * blockIdx.x * columns + c] = sum;
    else if (after)
      partial[(2LL * blockIdx.x + 1) * columns + c] = sum;
    else if (row < rows)
      out[(long long)row * columns + c] = sum;
    before = false;
    sum = A(0);
  }
}

// The runs of several chunks: the chunk where one begins adds its parts in order. Grid as embedding_d.
extern "C" __global__ void __launch_bounds__(256)
    NAME(embedding_joined)(const long long* sorted, const A* partial, A* out, int count, int rows, int columns) {
  const int c = blockIdx.y * 256 + threadIdx.x;
  const long long first = (long long)blockIdx.x * CHUNK, last = first + CHUNK;
  if (c >= columns || last >= count) return;
  const int row = row_of(sorted, last - 1);
  const bool before = first > 0 && row_of(sorted, first - 1) == row;
  if (row >= rows || before || row_of(sorted, last) != row) return;
  A sum = partial[(2LL * blockIdx.x + 1) * columns + c];
  for (long long chunk = blockIdx.x + 1LL; chunk * CHUNK < count && row_of(sorted, chunk * CHUNK) == row; chunk++)
    sum += partial[2 * chunk * columns + c];
  out[(long long)row * columns + c] = sum;
}
