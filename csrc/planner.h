// Which values of a network differ, and from which they descend, when n coalitions run in lockstep. No torch, no
// Python.
#pragma once

#include <cstdint>
#include <vector>

namespace smpq {

// A place in the graph where rows part: it reads the rows of other places and the choices made in some slots.
struct Place {
  std::vector<int64_t> inputs;   // indices of earlier places; none: what depends on no slot, one row
  std::vector<int64_t> columns;  // of the choices
};

// The distinct rows of a place, sorted by the choice in its last column, or by the row of its last input. Where every
// coalition has a row of its own, they stay in the order of the coalitions: nothing has to be gathered between such
// places, nor for the outputs.
struct PlacePlan {
  std::vector<int64_t> row;  // [n]: the row of each coalition
  std::vector<int64_t>
      coalition;  // [rows]: the first coalition that needs the row; so an input's row is row[coalition]
};

// `choices` [n, columns], equal numbers in a column meaning equal choices. Throws std::runtime_error for an index that
// is out of range.
std::vector<PlacePlan> plan(const std::vector<Place>& places, const int32_t* choices, int64_t n, int64_t columns);

}  // namespace smpq
