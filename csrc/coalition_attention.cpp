// coalition_attention: schema, checks, and the way from tensors to the kernel's arguments. On the CPU alone.
#include "tensor.h"

namespace smpq {
namespace {

constexpr const char* op = "coalition_attention";

Tensor coalition_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_row, const Tensor& k_row,
                           const Tensor& v_row, int64_t samples, bool causal, double scale) {
  SMPQ_CHECK(samples > 0, op, ": samples must be positive, not ", samples);
  const int64_t rows = q_row.numel();
  const auto check = [&](const Tensor& x, const char* name, const Tensor& row) {
    SMPQ_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float && !x.is_cuda() && x.size(0) % samples == 0, op,
               ": ", name, " ", shape_of(x), " must be float32 [rows * ", samples, ", heads, tokens, size] on the CPU");
    const std::string row_name = std::string(name) + "_row";
    check_tensor(op, x, row, row_name.c_str(), ScalarType::Long, {rows});
    check_indices(op, row, row_name.c_str(), x.size(0) / samples);
    return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
  };
  const Tensor qs = check(q, "q", q_row), ks = check(k, "k", k_row), vs = check(v, "v", v_row);
  SMPQ_CHECK(k.size(1) == q.size(1) && v.size(1) == q.size(1), op, ": q ", shape_of(q), ", k ", shape_of(k), " and v ",
             shape_of(v), " must have as many heads");
  SMPQ_CHECK(k.size(3) == q.size(3) && v.size(2) == k.size(2), op, ": k ", shape_of(k), " must have the size of q ",
             shape_of(q), " and the tokens of v ", shape_of(v));
  SMPQ_CHECK(k.size(2) > 0, op, ": there are no keys");
  AttentionArgs a{data<float>(qs),
                  data<float>(ks),
                  data<float>(vs),
                  data<int64_t>(q_row),
                  data<int64_t>(k_row),
                  data<int64_t>(v_row),
                  {qs.stride(0), qs.stride(1), qs.stride(2)},
                  {ks.stride(0), ks.stride(1), ks.stride(2)},
                  {vs.stride(0), vs.stride(1), vs.stride(2)},
                  nullptr,
                  rows,
                  samples,
                  q.size(1),
                  q.size(2),
                  k.size(2),
                  q.size(3),
                  v.size(3),
                  static_cast<float>(scale),
                  causal};
  const Tensor out = torch::stable::new_empty(q, {rows * samples, a.queries, a.heads, a.value_size});
  a.out = mutable_data<float>(out);
  if (out.numel() > 0) {
    torch::stable::parallel_for(0, rows * samples * a.heads, 1,
                                [&](int64_t first, int64_t last) { SMPQ_ON_CPU(coalition_attention, a, first, last); });
  }
  return torch::stable::transpose(out, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "coalition_attention(Tensor q, Tensor k, Tensor v, Tensor q_row, Tensor k_row, Tensor v_row, SymInt samples, "
      "bool causal, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(SMPQ_LIBRARY, CPU, m) { m.impl("coalition_attention", TORCH_BOX(&coalition_attention)); }

}  // namespace smpq
