// A random-looking permutation of 0..n-1 that is computed index by index: no table, no memory.
//
// An index is split into (row, column) of a rectangle a * b that just holds n. Each round of a
// Feistel network adds a keyed function of one to the other, modulo its side; an image of n or more
// is permuted again until it falls below n (cycle walking), so the map stays a bijection of 0..n-1.
// The rectangle has fewer than a cells too many, so that is rare. Sides of any length, rather than
// powers of two, also mix small n well: 16 rounds make every order of 8 numbers equally likely as
// far as 400,000 keys can tell, where a network on bits needs 20.
//
// Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 5.

#pragma once

#include <cstdint>

#include "philox.h"

namespace avmae {

class KeyedPermutation {
 public:
  // n from 1 to 2**40.
  KeyedPermutation(uint64_t n, uint64_t seed, int64_t key) : n_(n), seed_(seed), key_(key) {
    // The largest root with root * root < n, bit by bit: in floating point it may be off by one.
    uint64_t root = 0;
    for (uint64_t bit = uint64_t{1} << 20; bit > 0; bit >>= 1)
      if ((root + bit) * (root + bit) < n) root += bit;
    rows_ = root + 1;
    columns_ = (n + rows_ - 1) / rows_;
  }

  uint64_t operator()(uint64_t index) const {
    do index = permute_once(index);
    while (index >= n_);
    return index;
  }

 private:
  static constexpr uint32_t kRounds = 16;

  uint64_t permute_once(uint64_t index) const {
    uint64_t row = index / columns_, column = index % columns_;
    for (uint32_t round = 0; round < kRounds; round += 2) {
      row += shift(round, column, rows_);
      if (row >= rows_) row -= rows_;
      column += shift(round + 1, row, columns_);
      if (column >= columns_) column -= columns_;
    }
    return row * columns_ + column;
  }

  // A keyed function of `place` in [0, side), side <= 2**20. 44 random bits scaled to the side
  // favour no value by more than one part in 2**24.
  uint64_t shift(uint32_t round, uint64_t place, uint64_t side) const {
    // The round number takes the place of the stream, so the rounds are independent functions.
    const Block words = Draws(seed_, Purpose::kPermutation, round, key_)
                            .block(static_cast<uint32_t>(place));
    const uint64_t bits = (uint64_t{words[1]} << 32 | words[0]) >> 20;
    return bits * side >> 44;
  }

  uint64_t n_;
  uint64_t seed_;
  int64_t key_;
  uint64_t rows_, columns_;
};

}  // namespace avmae
