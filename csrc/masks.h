// Which tokens of a clip are masked, as the index lists a masked autoencoder works with.

#pragma once

#include <array>
#include <cstdint>

namespace avmae {

enum class MaskKind { kRandom, kTube, kBlock, kTime, kFrequency, kTimeFrequency };

// Tokens lie on a row-major grid of up to three axes (unused ones are 1): video (time, height,
// width), sound (time, frequency).
struct MaskPlan {
  MaskKind kind;
  std::array<int64_t, 3> grid;
  // How many of the kind's units are masked: tokens (random, block), sites of a frame (tube), time
  // rows (time, time_frequency) or frequency columns (frequency).
  int64_t masked_units;
  int64_t masked_columns;  // time_frequency only: frequency columns

  int64_t tokens() const { return grid[0] * grid[1] * grid[2]; }
  int64_t units() const;
  int64_t masked_tokens() const;
};

// Throws std::invalid_argument where the counts do not fit the grid.
void check(const MaskPlan& plan);

// For each of `batch` keys write V visible and M masked token indices, both ascending, and the
// inverse: inverse[n] is the place of token n in (visible, masked) laid end to end.
// visible [batch, V], masked [batch, M], inverse [batch, V + M], all contiguous.
void sample_masks(const MaskPlan& plan, const int64_t* keys, int64_t batch, uint64_t seed,
                  uint32_t stream, int32_t* visible, int32_t* masked, int32_t* inverse);

}  // namespace avmae
