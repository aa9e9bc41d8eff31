#include "sagellm/model/activation_buffer.h"

#include "sagellm/base/math.h"

namespace sagellm::model {

namespace {

/// Hands out 64-byte aligned arrays of one Buffer; a first pass with a null base measures.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    T* result = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset_);
    offset_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return result;
  }
  size_t offset() const { return offset_; }

 private:
  uint8_t* base_;
  size_t offset_ = 0;
};

}  // namespace

ActivationBuffer::ActivationBuffer(int64_t rows, int64_t k, Precision precision, ActKinds kinds)
    : k_(k) {
  const auto carve = [&](uint8_t* base) {
    Carver carver(base);
    f32_ = carver.take<float>(rows * k);
    if (kinds.bf16) bf16_ = carver.take<uint16_t>(rows * round_up(k, 2));
    if (kinds.i8 && k % kernels::kUnit == 0) {
      q_ = carver.take<int8_t>(rows * k);
      if (precision == Precision::kA15) q_lo_ = carver.take<int8_t>(rows * k);
      d_ = carver.take<float>(rows * (k / kernels::kUnit));
      s_ = carver.take<float>(rows * (k / kernels::kUnit));
      sum16_ = carver.take<int32_t>(rows * (k / 16));
    }
    return carver.offset();
  };
  storage_ = Buffer(carve(nullptr));
  carve(storage_.data());
}

void ActivationBuffer::encode(const kernels::KernelTable& table, ActKinds kinds, int64_t begin,
                              int64_t end) {
  if (begin >= end) return;
  if (kinds.bf16) {
    const int64_t stride = round_up(k_, 2);
    for (int64_t r = begin; r < end; ++r) table.to_bf16(row(r), bf16_ + r * stride, k_);
  }
  if (kinds.i8) {
    kernels::QuantizeParams params;
    params.x = row(begin);
    params.x_stride = k_;
    params.k = k_;
    params.num_tokens = static_cast<int32_t>(end - begin);
    params.q = q_ + begin * k_;
    params.q_lo = q_lo_ == nullptr ? nullptr : q_lo_ + begin * k_;
    params.d = d_ + begin * (k_ / kernels::kUnit);
    params.s = s_ + begin * (k_ / kernels::kUnit);
    params.sum16 = sum16_ + begin * (k_ / 16);
    table.quantize(params);
  }
}

kernels::Activations ActivationBuffer::view(int64_t begin) const {
  kernels::Activations x;
  x.f32 = row(begin);
  if (bf16_ != nullptr) x.bf16 = bf16_ + begin * round_up(k_, 2);
  if (q_ != nullptr) {
    x.q = q_ + begin * k_;
    x.q_lo = q_lo_ == nullptr ? nullptr : q_lo_ + begin * k_;
    x.d = d_ + begin * (k_ / kernels::kUnit);
    x.s = s_ + begin * (k_ / kernels::kUnit);
    x.sum16 = sum16_ + begin * (k_ / 16);
  }
  return x;
}

}  // namespace sagellm::model
