#include "masks.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "philox.h"

namespace avmae {
namespace {

// Boxes drawn before the rest of a block mask is filled with single tokens. It bounds the time: at
// high ratios most of a new box is masked already.
constexpr uint32_t kBoxLimit = 256;

struct Box {
  int64_t begin[3], end[3];
  bool reversed;
};

// Sides are uniform between a quarter and a half of the axis. Places are uniform over all that
// touch the grid, and what hangs over the edge is cut: so each token is equally likely to be hit.
Box draw_box(const Draws& draws, uint32_t number, const std::array<int64_t, 3>& grid) {
  uint32_t words[8];
  draws.pair(2 * number, words);
  const auto draw = [&](uint32_t i, int64_t range) -> int64_t {
    return draws.bounded(words[i], 8 * number + i, static_cast<uint64_t>(range));
  };
  Box box;
  for (uint32_t axis = 0; axis < 3; ++axis) {
    const int64_t size = grid[axis];
    const int64_t shortest = (size + 3) / 4, longest = (size + 1) / 2;
    const int64_t side = shortest + draw(2 * axis, longest - shortest + 1);
    const int64_t begin = draw(2 * axis + 1, size + side - 1) - (side - 1);
    box.begin[axis] = std::max<int64_t>(begin, 0);
    box.end[axis] = std::min(begin + side, size);
  }
  box.reversed = draw(6, 2) == 1;
  return box;
}

// Mark the tokens of one box, in row-major order or the reverse, until `missing` have been added;
// returns how many were. The order matters for the last box only, which it trims from either end.
int64_t mark_box(const Box& box, const std::array<int64_t, 3>& grid, int64_t missing,
                 uint8_t* marks) {
  const auto length = [&](int axis) { return box.end[axis] - box.begin[axis]; };
  const auto at = [&](int axis, int64_t i) {
    return box.reversed ? box.end[axis] - 1 - i : box.begin[axis] + i;
  };
  int64_t added = 0;
  for (int64_t i = 0; i < length(0); ++i) {
    for (int64_t j = 0; j < length(1); ++j) {
      const int64_t row = (at(0, i) * grid[1] + at(1, j)) * grid[2];
      for (int64_t k = 0; k < length(2); ++k) {
        if (added == missing) return added;
        uint8_t& mark = marks[row + at(2, k)];
        added += 1 - mark;
        mark = 1;
      }
    }
  }
  return added;
}

void mark_blocks(const MaskPlan& plan, uint64_t seed, uint32_t stream, int64_t key,
                 uint8_t* marks) {
  const int64_t tokens = plan.tokens();
  std::memset(marks, 0, static_cast<size_t>(tokens));
  const Draws draws(seed, Purpose::kBoxes, stream, key);
  int64_t missing = plan.masked_units;
  for (uint32_t number = 0; missing > 0 && number < kBoxLimit; ++number)
    missing -= mark_box(draw_box(draws, number, plan.grid), plan.grid, missing, marks);
  if (missing == 0) return;

  std::vector<int64_t> open;
  for (int64_t token = 0; token < tokens; ++token)
    if (!marks[token]) open.push_back(token);
  std::vector<uint8_t> chosen(open.size());
  choose(Draws(seed, Purpose::kBoxRemainder, stream, key), static_cast<int64_t>(open.size()),
         missing, chosen.data());
  for (size_t i = 0; i < open.size(); ++i) marks[open[i]] = chosen[i];
}

// marks[n] = 1 for each masked token n of one clip. `units` has room for plan.units() marks.
void mark_masked(const MaskPlan& plan, uint64_t seed, uint32_t stream, int64_t key, uint8_t* marks,
                 std::vector<uint8_t>& units) {
  if (plan.kind == MaskKind::kBlock) return mark_blocks(plan, seed, stream, key, marks);

  const Draws draws(seed, Purpose::kMask, stream, key);
  if (plan.kind == MaskKind::kRandom)
    return choose(draws, plan.tokens(), plan.masked_units, marks);

  choose(draws, plan.units(), plan.masked_units, units.data());
  const int64_t rows = plan.grid[0];
  const size_t row_tokens = static_cast<size_t>(plan.tokens() / rows);
  if (plan.kind == MaskKind::kTube || plan.kind == MaskKind::kFrequency) {
    for (int64_t row = 0; row < rows; ++row)
      std::memcpy(marks + row * row_tokens, units.data(), row_tokens);
    return;
  }
  std::vector<uint8_t> columns;
  if (plan.kind == MaskKind::kTimeFrequency) {
    columns.resize(row_tokens);
    choose(Draws(seed, Purpose::kMaskColumns, stream, key), static_cast<int64_t>(row_tokens),
           plan.masked_columns, columns.data());
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (columns.empty() || units[row])
      std::memset(marks + row * row_tokens, units[row], row_tokens);
    else
      std::memcpy(marks + row * row_tokens, columns.data(), row_tokens);
  }
}

// For four tokens whose marks are the bits of a number: which are visible and which masked, in
// order, and each one's rank among its own. Entries past a list's end are zeros nobody reads.
struct alignas(16) Quad {
  int32_t visible[4], masked[4], rank[4], is_masked[4];
  int64_t visible_count;
};

constexpr std::array<Quad, 16> make_quads() {
  std::array<Quad, 16> quads{};
  for (unsigned marks = 0; marks < 16; ++marks) {
    Quad& quad = quads[marks];
    int32_t visible = 0, masked = 0;
    for (int32_t i = 0; i < 4; ++i) {
      if (marks >> i & 1) {
        quad.is_masked[i] = -1;
        quad.rank[i] = masked;
        quad.masked[masked++] = i;
      } else {
        quad.rank[i] = visible;
        quad.visible[visible++] = i;
      }
    }
    quad.visible_count = visible;
  }
  return quads;
}

constexpr std::array<Quad, 16> kQuads = make_quads();

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "bits_of_marks reads four marks as one little-endian number"
#endif

// Four marks as the bits of a number: the product brings mark i to bit 24 + i, and whatever else it
// makes lies below bit 24 or runs over.
inline uint32_t bits_of_marks(const uint8_t* marks) {
  uint32_t four;
  std::memcpy(&four, marks, sizeof four);
  return four * 0x01020408u >> 24;
}

// The index lists of one clip from its marks. `visible` and `masked` need room for 4 entries more
// than they get: four tokens a step, and each step stores four entries to both, which spares it
// every branch. Loops of four become one vector instruction.
void write_lists(const uint8_t* marks, int64_t tokens, int64_t visible_total,
                 int32_t* __restrict visible, int32_t* __restrict masked,
                 int32_t* __restrict inverse) {
  int64_t v = 0;  // visible tokens so far
  int64_t n = 0;
  for (; n + 4 <= tokens; n += 4) {
    const Quad& quad = kQuads[bits_of_marks(marks + n)];
    const int32_t token = static_cast<int32_t>(n), seen = static_cast<int32_t>(v);
    const int32_t to_masked = static_cast<int32_t>(visible_total + n - 2 * v);
    for (int i = 0; i < 4; ++i) visible[v + i] = token + quad.visible[i];
    for (int i = 0; i < 4; ++i) masked[n - v + i] = token + quad.masked[i];
    for (int i = 0; i < 4; ++i)
      inverse[n + i] = seen + quad.rank[i] + (to_masked & quad.is_masked[i]);
    v += quad.visible_count;
  }
  for (; n < tokens; ++n) {
    if (marks[n]) {
      masked[n - v] = static_cast<int32_t>(n);
      inverse[n] = static_cast<int32_t>(visible_total + n - v);
    } else {
      visible[v] = static_cast<int32_t>(n);
      inverse[n] = static_cast<int32_t>(v++);
    }
  }
}

}  // namespace

int64_t MaskPlan::units() const {
  switch (kind) {
    case MaskKind::kTube:
      return grid[1] * grid[2];
    case MaskKind::kTime:
    case MaskKind::kTimeFrequency:
      return grid[0];
    case MaskKind::kFrequency:
      return grid[1] * grid[2];
    default:
      return tokens();
  }
}

int64_t MaskPlan::masked_tokens() const {
  if (kind == MaskKind::kTimeFrequency)
    return tokens() - (grid[0] - masked_units) * (tokens() / grid[0] - masked_columns);
  return masked_units * (tokens() / units());
}

void check(const MaskPlan& plan) {
  int64_t tokens = 1;
  for (const int64_t size : plan.grid) {
    if (size < 1 || size > INT32_MAX / tokens)
      throw std::invalid_argument("grid: each axis must be at least 1, the product below 2**31");
    tokens *= size;
  }
  if (plan.masked_units < 0 || plan.masked_units > plan.units() || plan.masked_columns < 0 ||
      plan.masked_columns > tokens / plan.grid[0])
    throw std::invalid_argument("masked counts: must lie between 0 and what the grid holds");
}

void sample_masks(const MaskPlan& plan, const int64_t* keys, int64_t batch, uint64_t seed,
                  uint32_t stream, int32_t* visible, int32_t* masked, int32_t* inverse) {
  const int64_t tokens = plan.tokens();
  const int64_t masked_count = plan.masked_tokens(), visible_count = tokens - masked_count;
  std::vector<uint8_t> marks(tokens), units(plan.units());
  // write_lists goes up to four entries past the end of a list: the lists of the next clips, which
  // overwrite them later; where there is none, it writes here and the list is copied.
  std::vector<int32_t> last_visible(visible_count + 4), last_masked(masked_count + 4);
  for (int64_t clip = 0; clip < batch; ++clip) {
    mark_masked(plan, seed, stream, keys[clip], marks.data(), units);
    int32_t* visible_row = visible + clip * visible_count;
    int32_t* masked_row = masked + clip * masked_count;
    const bool room = (batch - 1 - clip) * std::min(visible_count, masked_count) >= 4;
    write_lists(marks.data(), tokens, visible_count, room ? visible_row : last_visible.data(),
                room ? masked_row : last_masked.data(), inverse + clip * tokens);
    if (room) continue;
    std::copy_n(last_visible.data(), visible_count, visible_row);
    std::copy_n(last_masked.data(), masked_count, masked_row);
  }
}

}  // namespace avmae
