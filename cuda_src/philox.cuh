// Philox 4x32-10, counter-based random numbers: the bits of lycoris_cupy's philox module, element by element.
// Salmon et al. 2011. Nothing is stored: key and counter give the bits, in any order, by any thread.
#pragma once

struct Words {
  unsigned at[4];
};

// The four words of a counter under a key of two words: low and high half of a seed.
__device__ __forceinline__ Words philox4x32(Words counter, unsigned key_low, unsigned key_high) {
  unsigned a = counter.at[0], b = counter.at[1], c = counter.at[2], d = counter.at[3];
#pragma unroll
  for (int turn = 0; turn < 10; ++turn) {
    const unsigned high_a = __umulhi(a, 0xD2511F53u), low_a = a * 0xD2511F53u;
    const unsigned high_c = __umulhi(c, 0xCD9E8D57u), low_c = c * 0xCD9E8D57u;
    a = high_c ^ b ^ key_low;
    b = low_c;
    c = high_a ^ d ^ key_high;
    d = low_a;
    key_low += 0x9E3779B9u;   // golden ratio
    key_high += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return {{a, b, c, d}};
}

// The bits of elements 4 * block to 4 * block + 3 of a step's tensor, in C order, as random_bits gives them.
__device__ __forceinline__ Words random_words(unsigned block, unsigned tensor, unsigned step, unsigned key_low,
                                              unsigned key_high) {
  return philox4x32({{block, tensor, step, 0u}}, key_low, key_high);
}
