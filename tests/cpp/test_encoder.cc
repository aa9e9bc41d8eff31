// The encoder on small random models: same bytes for every number of threads and batch; malformed
// batches and checkpoints are refused. Runs under the sanitizers, which see the phases, barriers
// and workspaces of whole batches. Values are checked from Python, against NumPy.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/model/encoder.h"
#include "sagellm/quant/codec.h"

namespace sagellm::model {
namespace {

/// Random tensors in memory.
class MemoryFile final : public checkpoint::File {
 public:
  MemoryFile() : File("memory") {}

  void add(const std::string& name, std::vector<int64_t> shape, Format format) {
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    std::vector<float> values(static_cast<size_t>(count));
    std::normal_distribution<float> normal(0.f, 0.3f);
    for (float& value : values) value = normal(random_);
    auto bytes = std::make_unique<std::vector<uint8_t>>(
        static_cast<size_t>(row_bytes(format, shape.back()) * (count / shape.back())));
    quant::quantize_row(format, values.data(), bytes->data(), count);
    checkpoint::TensorInfo info;
    info.name = name;
    info.format = format;
    info.shape = std::move(shape);
    info.data = bytes->data();
    info.nbytes = bytes->size();
    storage_.push_back(std::move(bytes));
    add_tensor(std::move(info));
  }

 private:
  std::mt19937 random_{7};
  std::vector<std::unique_ptr<std::vector<uint8_t>>> storage_;
};

struct Fixture {
  EncoderConfig config;
  TensorSources sources;

  explicit Fixture(int32_t heads = 4, Format format = Format::kF32) {
    config.vocab_size = 50;
    config.hidden_size = 48;
    config.intermediate_size = 80;
    config.num_layers = 2;
    config.num_heads = heads;
    config.num_positions = 130;
    config.position_offset = 2;
    config.num_token_types = 2;
    config.has_head = true;

    auto file = std::make_shared<MemoryFile>();
    const int64_t n = config.hidden_size, inner = config.intermediate_size;
    file->add("embed.word", {config.vocab_size, n}, format);
    file->add("embed.position", {config.num_positions, n}, format);
    file->add("embed.type", {config.num_token_types, n}, format);
    const auto both = [&](const std::string& name, std::vector<int64_t> shape) {
      file->add(name + "_bias", {shape.front()}, Format::kF32);
      file->add(name, std::move(shape), format);
    };
    both("embed.norm", {n});
    for (int layer = 0; layer < config.num_layers; ++layer) {
      const std::string at = "layers." + std::to_string(layer) + ".";
      for (const char* name : {"q", "k", "v", "o"}) both(at + name, {n, n});
      for (const char* name : {"attn_norm", "ffn_norm"}) both(at + name, {n});
      both(at + "up", {inner, n});
      both(at + "down", {n, inner});
    }
    both("head.dense", {n, n});
    both("head.out", {1, n});
    for (const auto& [name, info] : file->tensors()) sources[name] = {file, name, 0, false};
  }
};

struct Result {
  std::vector<float> hidden, pooled, scores;
  bool operator==(const Result&) const = default;
};

Result run(Encoder& encoder, const std::vector<int>& lengths, int first = 0) {
  std::vector<int32_t> ids, types, starts = {0};
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int sequence = first + static_cast<int>(s);
    for (int t = 0; t < lengths[s]; ++t) {
      ids.push_back((17 * t + 5 * sequence + 3) % encoder.config().vocab_size);
      types.push_back(t > lengths[s] / 2 ? 1 : 0);
    }
    starts.push_back(static_cast<int32_t>(ids.size()));
  }
  const auto n = static_cast<size_t>(encoder.config().hidden_size);
  Result out{std::vector<float>(ids.size() * n), std::vector<float>(lengths.size() * n),
             std::vector<float>(lengths.size())};
  encoder.run({ids, types, starts},
              {out.hidden.data(), out.pooled.data(), Pooling::kMean, true, out.scores.data()});
  return out;
}

class EncoderOn : public testing::TestWithParam<std::string> {};

TEST_P(EncoderOn, GivesTheSameBytesInEveryBatchAndOnEveryNumberOfThreads) {
  const std::vector<int> lengths = {1, 128, 15, 16, 17, 49, 2};
  for (const Format format : {Format::kF32, Format::kF16, Format::kBF16}) {
    for (const int32_t heads : {1, 3, 4, 48}) {  // 48, 16, 12 and 1 values per head
      const Fixture fixture(heads, format);
      Encoder one(fixture.config, fixture.sources, {1, 512, GetParam()});
      Encoder three(fixture.config, fixture.sources, {3, 300, GetParam()});
      const Result together = run(three, lengths);
      EXPECT_EQ(together, run(three, lengths));
      EXPECT_EQ(together, run(one, lengths));
      size_t token = 0;
      for (size_t s = 0; s < lengths.size(); ++s) {
        const Result alone = run(one, {lengths[s]}, static_cast<int>(s));
        const std::vector<float> part(
            together.hidden.begin() + static_cast<int64_t>(token),
            together.hidden.begin() + static_cast<int64_t>(token + alone.hidden.size()));
        EXPECT_EQ(alone.hidden, part) << "sequence " << s;
        EXPECT_EQ(alone.scores[0], together.scores[s]);
        token += alone.hidden.size();
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, EncoderOn, testing::ValuesIn(kernels::available_isas()),
                         [](const auto& test) { return test.param; });

TEST(Encoder, RefusesMalformedBatchesAndGoesOn) {
  Fixture fixture;
  Encoder encoder(fixture.config, fixture.sources, {2, 256, ""});
  const Result before = run(encoder, {5, 9});
  const std::vector<int32_t> ids = {1, 2, 3}, types = {0, 0, 1}, starts = {0, 3};
  const auto refuse = [&](const std::vector<int32_t>& i, const std::vector<int32_t>& t,
                          const std::vector<int32_t>& s) {
    std::vector<float> pooled(48 * 4);
    EncoderOutputs outputs;
    outputs.pooled = pooled.data();
    EXPECT_THROW(encoder.run({i, t, s}, outputs), InvalidArgument);
  };
  refuse({1, 2, 50}, types, starts);
  refuse({1, -1, 3}, types, starts);
  refuse(ids, {0, 0, 2}, starts);
  refuse(ids, {0, -1, 0}, starts);
  refuse(ids, {0, 0}, starts);
  refuse(ids, types, {});
  refuse(ids, types, {0});
  refuse(ids, types, {0, 2});
  refuse(ids, types, {1, 3});
  refuse(ids, types, {0, 3, 3});
  refuse(ids, types, {0, 100, 3});
  refuse(ids, types, {0, -5, 3});
  refuse(ids, types, {0, 2147483647, 3});
  refuse({}, {}, {0, 0});
  refuse(std::vector<int32_t>(129, 1), std::vector<int32_t>(129, 0), {0, 129});  // positions
  refuse(std::vector<int32_t>(257, 1), std::vector<int32_t>(257, 0), {0, 100, 257});
  EXPECT_EQ(run(encoder, {5, 9}), before);
}

TEST(Encoder, RefusesScoresWithoutAHead) {
  Fixture fixture;
  fixture.config.has_head = false;
  Encoder encoder(fixture.config, fixture.sources, {1, 256, ""});
  EXPECT_THROW(run(encoder, {3}), Unsupported);
}

TEST(Encoder, RefusesConfigurationsAndCheckpointsThatDoNotFit) {
  const auto broken = [](auto change) {
    Fixture fixture;
    change(fixture);
    Encoder encoder(fixture.config, fixture.sources, {1, 256, ""});
  };
  EXPECT_THROW(broken([](Fixture& f) { f.config.num_heads = 5; }), InvalidArgument);
  EXPECT_THROW(broken([](Fixture& f) { f.config.num_layers = 0; }), InvalidArgument);
  EXPECT_THROW(broken([](Fixture& f) { f.config.position_offset = 130; }), InvalidArgument);
  EXPECT_THROW(broken([](Fixture& f) { f.config.intermediate_size = 81; }), Unsupported);
  EXPECT_THROW(broken([](Fixture& f) { f.config.vocab_size = 51; }), CorruptFile);
  EXPECT_THROW(broken([](Fixture& f) { f.config.num_layers = 3; }), CorruptFile);
  EXPECT_THROW(broken([](Fixture& f) { f.sources.erase("layers.1.v_bias"); }), CorruptFile);
  EXPECT_THROW(broken([](Fixture& f) { f.sources["head.out"].tensor = "head.dense"; }),
               CorruptFile);
}

}  // namespace
}  // namespace sagellm::model
