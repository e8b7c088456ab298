#include "planner.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <unordered_map>

namespace smpq {
namespace {

// Replaces label[k] by the number of its pair with other(k), counted in the order of first appearance.
template <class Other>
void refine(std::vector<int64_t>& label, Other other) {
  std::unordered_map<uint64_t, int64_t> known;
  known.reserve(label.size());
  for (size_t k = 0; k < label.size(); ++k) {
    const uint64_t pair = static_cast<uint64_t>(label[k]) << 32 | static_cast<uint32_t>(other(k));
    label[k] = known.try_emplace(pair, static_cast<int64_t>(known.size())).first->second;
  }
}

void check(bool good, const char* message) {
  if (!good) throw std::runtime_error(message);
}

}  // namespace

std::vector<PlacePlan> plan(const std::vector<Place>& places, const int32_t* choices, int64_t n, int64_t columns) {
  check(n < int64_t{1} << 31, "plan: too many coalitions at once");
  std::vector<PlacePlan> plans;
  plans.reserve(places.size());
  for (const Place& place : places) {
    std::vector<int64_t> label(n, 0);
    for (int64_t input : place.inputs) {
      check(input >= 0 && input < static_cast<int64_t>(plans.size()), "plan: a place may only read earlier ones");
      refine(label, [&](size_t k) { return plans[input].row[k]; });
    }
    for (int64_t column : place.columns) {
      check(column >= 0 && column < columns, "plan: there is no such column of choices");
      refine(label, [&](size_t k) { return choices[k * columns + column]; });
    }
    std::vector<int64_t> first;  // [rows]: the first coalition with each label
    for (int64_t k = 0; k < n; ++k) {
      if (label[k] == static_cast<int64_t>(first.size())) first.push_back(k);
    }
    const auto key = [&](int64_t coalition) -> int64_t {
      if (!place.columns.empty()) return choices[coalition * columns + place.columns.back()];
      return place.inputs.empty() ? 0 : plans[place.inputs.back()].row[coalition];
    };
    std::vector<int64_t> order(first.size()), position(first.size());
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](int64_t a, int64_t b) { return key(first[a]) < key(first[b]); };
    if (static_cast<int64_t>(first.size()) < n) std::stable_sort(order.begin(), order.end(), before);
    PlacePlan p;
    for (int64_t there : order) {
      position[there] = static_cast<int64_t>(p.coalition.size());
      p.coalition.push_back(first[there]);
    }
    for (int64_t there : label) p.row.push_back(position[there]);
    plans.push_back(std::move(p));
  }
  return plans;
}

}  // namespace smpq
