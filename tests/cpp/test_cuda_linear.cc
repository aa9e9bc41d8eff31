// FP8 layers on devices with and without FP8 tensor cores: what Linear chooses, on the emulator.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "sagellm/base/dtype.h"
#include "sagellm/cuda/linear.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/stream.h"

namespace sagellm::cuda {
namespace {

using kernels::cuda::FloatType;

constexpr int32_t kRows = 70, kDense = 8, kN = 40, kK = 272;  // kN rows of FP8 after dense ones

template <typename T>
DeviceBuffer on_device(const std::vector<T>& values) {
  DeviceBuffer buffer(values.size() * sizeof(T));
  copy_to_device(buffer.data(), values.data(), buffer.size(), nullptr);
  synchronize(nullptr);
  return buffer;
}

/// A layer of two parts, the second of them FP8, and rows for it.
class Layer {
 public:
  Layer() {
    std::mt19937 random(3);
    std::uniform_real_distribution<float> uniform(-1.f, 1.f);
    std::vector<uint8_t> codes(kN * kK);
    std::vector<float> scales(kN);
    std::vector<uint16_t> dense(kDense * kK), x(kRows * kK);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random() % 0x7f | (random() % 2 << 7));
    for (float& scale : scales) scale = std::exp2(4.f * uniform(random) - 10.f);
    for (uint16_t& bits : dense) bits = f32_to_bf16(uniform(random));
    for (uint16_t& bits : x) bits = f32_to_bf16(uniform(random));
    for (int row = 0; row < kRows; ++row) {
      for (int n = 0; n < kDense + kN; ++n) {
        double sum = 0;
        for (int k = 0; k < kK; ++k) {
          float weight = 0;
          if (n < kDense) {
            weight = bf16_to_f32(dense[static_cast<size_t>(n * kK + k)]);
          } else {
            weight = e4m3_to_f32(codes[static_cast<size_t>((n - kDense) * kK + k)]) *
                     scales[static_cast<size_t>(n - kDense)];
          }
          sum += double{bf16_to_f32(x[static_cast<size_t>(row * kK + k)])} * weight;
        }
        expected_.push_back(sum);
      }
    }
    codes_ = on_device(codes);
    scales_ = on_device(scales);
    dense_ = on_device(dense);
    x_ = on_device(x);
    WeightPart first;
    first.n = kDense;
    first.dense = dense_.data();
    WeightPart fp8;
    fp8.first = kDense;
    fp8.n = kN;
    fp8.is_fp8 = true;
    fp8.fp8 = {codes_.as<uint8_t>(), scales_.as<float>(), kN, kK, 1};
    weights_.parts = {first, fp8};
    weights_.n = kDense + kN;
    weights_.k = kK;
  }

  std::vector<float> run(Linear& linear, int32_t rows) const {
    DeviceBuffer out(static_cast<size_t>(rows) * (kDense + kN) * sizeof(float));
    linear(weights_, {x_.data(), kK, rows, out.data(), kDense + kN, FloatType::kF32}, nullptr);
    std::vector<float> values(out.size() / sizeof(float));
    copy_to_host(values.data(), out.data(), out.size(), nullptr);
    synchronize(nullptr);
    return values;
  }

  double error(const std::vector<float>& got) const {
    double difference = 0, total = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += (got[i] - expected_[i]) * (got[i] - expected_[i]);
      total += expected_[i] * expected_[i];
    }
    return std::sqrt(difference / total);
  }

 private:
  DeviceBuffer codes_, scales_, dense_, x_;
  LinearWeights weights_;
  std::vector<double> expected_;
};

LinearOptions options(bool tensor_cores, bool deterministic) {
  return {.type = FloatType::kBF16,
          .deterministic = deterministic,
          .max_fp8_k = kK,
          .fp8_tensor_cores = tensor_cores,
          .library = nullptr};
}

TEST(Fp8Linear, RoundsActivationsOnlyWhereTensorCoresTakeThem) {
  const Layer layer;
  Linear with(options(true, false));
  Linear without(options(false, false));
  EXPECT_LT(layer.error(layer.run(with, 8)), 1e-6);
  for (const int32_t rows : {9, 70}) {
    const double error = layer.error(layer.run(with, rows));
    EXPECT_GT(error, 1e-3);
    EXPECT_LT(error, 4e-2);
  }
  EXPECT_LT(layer.error(layer.run(without, 8)), 1e-6);
  EXPECT_LT(layer.error(layer.run(without, 20)), 1e-6);
  EXPECT_LT(layer.error(layer.run(without, 70)), 3e-3);  // weights rounded to bfloat16
}

TEST(Fp8Linear, DeterministicRowsDoNotDependOnHowManyThereAre) {
  const Layer layer;
  for (const bool tensor_cores : {false, true}) {
    Linear linear(options(tensor_cores, true));
    const std::vector<float> whole = layer.run(linear, kRows);
    for (const int32_t rows : {1, 8, 9, 65}) {
      const std::vector<float> part = layer.run(linear, rows);
      EXPECT_EQ(part, std::vector<float>(whole.begin(), whole.begin() + rows * (kDense + kN)));
    }
  }
}

}  // namespace
}  // namespace sagellm::cuda
