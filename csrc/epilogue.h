// From tensors to the arguments of an Epilogue, for the ops that end in one.
#pragma once

#include "tensor.h"

namespace smpq {

// An Epilogue with the tensors that it writes, and the memory of its children.
struct EpilogueTensors {
  Epilogue epilogue{};
  std::vector<Tensor> out;  // the values (no rows where they are not wanted), and each list of children
  std::vector<int64_t> child_begin;
  std::vector<Child> children;
  std::vector<Candidate> candidates;
  std::vector<Tensor> kept;  // on CUDA: the memory of these three

  template <class T>
  T* on_device_of(const Tensor& like, int64_t count) {
    kept.push_back(torch::stable::new_empty(like, {count * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte));
    return reinterpret_cast<T*>(mutable_data<uint8_t>(kept.back()));
  }
};

// The children of every row, put together on the host.
inline void plan_on_host(const char* op, EpilogueTensors& made, const std::vector<ChildList>& lists, int64_t rows) {
  auto& begin = made.child_begin;
  begin.assign(rows + 1, 0);
  for (const ChildList& list : lists) {
    for (int64_t i = 0; i < list.count; ++i) {
      ++begin[list.row[i] + 1];
      const float* g = list.grid + 4 * i;
      SMPQ_CHECK(list.bits > 8 || (g[2] >= 0 && g[3] <= 255), op, ": the bounds of child_grid must be from 0 to 255");
    }
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  made.children.resize(begin.back());
  for (const ChildList& list : lists) {
    for (int64_t i = 0; i < list.count; ++i) {
      made.children[next[list.row[i]]++] = child_of(list, i, made.epilogue);
    }
  }
  made.epilogue.child_begin = begin.data();
  made.epilogue.children = made.children.data();
}

// The same in device memory, without waiting for it.
inline void plan_on_device(EpilogueTensors& made, const Tensor& like, const std::vector<ChildList>& lists, int64_t rows,
                           int64_t total) {
  auto* first = made.on_device_of<int64_t>(like, rows);
  auto* children = made.on_device_of<Child>(like, total);
  made.epilogue.child_begin = first;
  made.epilogue.children = children;
  launch(
      like,
      [&](void* stream) {
        cuda::plan_children(lists.data(), lists.size(), made.epilogue, rows, first, children, stream);
      },
      [](int64_t, int64_t) {}, 0, 1);
}

// `size`: [samples, height, width] of one row. child_row[k] [children]: the rows that they descend from; child_bits[k]:
// what they become: 8, codes; 16, mixtures as whole numbers; 32, mixtures. child_grid[k]: scale, zero point and bounds,
// [children, 4], of codes; and the share, [children, candidates, 5], of every candidate of mixtures.
inline EpilogueTensors make_epilogue(const char* op, const Tensor& like, int64_t rows, const std::vector<int64_t>& size,
                                     int64_t channels, const OptionalTensor& scale, const OptionalTensor& bias,
                                     const OptionalTensor& residual, const OptionalTensor& residual_row,
                                     bool multiplies, double low, double high, int64_t activation, bool values,
                                     const std::vector<Tensor>& child_row, const std::vector<Tensor>& child_grid,
                                     const std::vector<int64_t>& child_bits) {
  SMPQ_CHECK(channels > 0, op, ": there are no channels");
  EpilogueTensors made;
  Epilogue& e = made.epilogue;
  e.pixels = size[0] * size[1] * size[2];
  e.channels = channels;
  e.code_channels = (channels + 3) / 4 * 4;
  e.low = static_cast<float>(low);
  e.high = static_cast<float>(high);
  SMPQ_CHECK(scale.has_value() == bias.has_value(), op, ": scale and bias come together");
  if (scale) {
    check_tensor(op, like, *scale, "scale", ScalarType::Float, {rows, channels});
    check_tensor(op, like, *bias, "bias", ScalarType::Float, {rows, channels});
  }
  e.scale = data<float>(scale);
  e.bias = data<float>(bias);
  SMPQ_CHECK(residual.has_value() == residual_row.has_value(), op, ": residual and residual_row come together");
  if (residual) {
    check_tensor(op, like, *residual, "residual", ScalarType::Float, {-1, size[0], size[1], size[2], channels});
    check_tensor(op, like, *residual_row, "residual_row", ScalarType::Long, {rows});
    check_indices(op, *residual_row, "residual_row", residual->size(0));
  }
  e.residual = data<float>(residual);
  e.residual_row = data<int64_t>(residual_row);
  e.multiplies = multiplies;
  SMPQ_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::hardswish), op,
             ": activation must be from 0 to 4, not ", activation);
  e.activation = static_cast<Activation>(activation);
  const auto shape = [&](int64_t n, int64_t c) { return std::vector<int64_t>{n, size[0], size[1], size[2], c}; };
  made.out.push_back(torch::stable::new_empty(like, shape(values ? rows : 0, channels), ScalarType::Float));
  e.values = values ? mutable_data<float>(made.out[0]) : nullptr;

  SMPQ_CHECK(child_row.size() == child_grid.size() && child_row.size() == child_bits.size(), op,
             ": child_row, child_grid and child_bits must have as many entries");
  const int64_t count = child_row.size();
  int64_t total = 0, candidates = 0;
  std::vector<ChildList> lists(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t n = child_row[k].numel(), bits = child_bits[k];
    SMPQ_CHECK(bits == 8 || bits == 16 || bits == 32, op, ": child_bits are 8, 16 or 32, not ", bits);
    check_tensor(op, like, child_row[k], "child_row", ScalarType::Long, {n});
    check_tensor(op, like, child_grid[k], "child_grid", ScalarType::Float,
                 bits == 8 ? std::vector<int64_t>{n, 4} : std::vector<int64_t>{n, -1, 5});
    check_indices(op, child_row[k], "child_row", rows);
    const ScalarType type = bits == 8 ? ScalarType::Byte : bits == 16 ? ScalarType::Short : ScalarType::Float;
    made.out.push_back(torch::stable::new_empty(like, shape(n, bits == 32 ? channels : e.code_channels), type));
    lists[k] = {data<int64_t>(child_row[k]),
                data<float>(child_grid[k]),
                made.out.back().mutable_data_ptr(),
                n,
                bits == 8 ? 0 : child_grid[k].size(1),
                bits,
                nullptr};
    total += n;
    candidates += n * lists[k].candidates;
  }
  Candidate* folded = nullptr;
  if (on_device(like)) {
    folded = made.on_device_of<Candidate>(like, candidates);
  } else {
    made.candidates.resize(candidates);
    folded = made.candidates.data();
  }
  for (ChildList& list : lists) {
    list.folded = folded;
    folded += list.count * list.candidates;
  }
  on_device(like) ? plan_on_device(made, like, lists, rows, total) : plan_on_host(op, made, lists, rows);
  return made;
}

}  // namespace smpq
