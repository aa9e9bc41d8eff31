// The decoder on a small random model: same bytes for every number of threads, chunking and batch;
// malformed batches are refused. Runs under the sanitizers, which see the phases, barriers and
// workspaces of a whole step.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/model/decoder.h"
#include "sagellm/quant/codec.h"

namespace sagellm::model {
namespace {

constexpr int32_t kVocab = 150;
constexpr int32_t kBlockSize = 16;

/// Random tensors in memory.
class MemoryFile final : public checkpoint::File {
 public:
  MemoryFile() : File("memory") {}

  void add(const std::string& name, std::vector<int64_t> shape, Format format, float scale) {
    int64_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    std::vector<float> values(static_cast<size_t>(count));
    std::normal_distribution<float> normal(0.f, scale);
    for (float& value : values) value = normal(random_);
    if (scale == 0.f) values.assign(values.size(), 1.f);
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

/// Two layers, the second with a sliding window of 24; q/k norms, biases and post norms are all
/// present.
struct Fixture {
  ModelConfig config;
  TensorSources sources;

  Fixture() {
    config.vocab_size = kVocab;
    config.hidden_size = 64;
    config.intermediate_size = 96;
    config.num_heads = 4;
    config.num_kv_heads = 2;
    config.head_dim = 16;
    config.max_position = 256;
    config.attention_scale = 0.25f;
    config.final_softcap = 30.f;
    config.qkv_bias = config.qk_norm = config.post_norms = config.tie_embeddings = true;
    config.ropes = {{{1.0, 0.5, 0.25, 0.125, 0.06, 0.03, 0.01, 0.001}, 1.f}};
    config.layers = {{0, 0, 0, 0}, {24, 1, 0, 0}};

    auto file = std::make_shared<MemoryFile>();
    file->add("embed", {kVocab, 64}, Format::kQ8_0, 0.5f);
    file->add("final_norm", {64}, Format::kF32, 0.f);
    for (int layer = 0; layer < 2; ++layer) {
      const std::string at = "layers." + std::to_string(layer) + ".";
      file->add(at + "q", {64, 64}, Format::kQ4_1, 0.2f);
      file->add(at + "k", {32, 64}, Format::kQ4_0, 0.2f);
      file->add(at + "v", {32, 64}, Format::kQ8_0, 0.2f);
      file->add(at + "o", {64, 64}, Format::kBF16, 0.2f);
      file->add(at + "gate", {96, 64}, Format::kQ5_0, 0.2f);
      file->add(at + "up", {96, 64}, Format::kQ5_1, 0.2f);
      file->add(at + "down", {64, 96}, Format::kF32, 0.2f);
      for (const char* name : {"q_bias", "k_bias", "v_bias"}) {
        file->add(at + name, {name[0] == 'q' ? 64 : 32}, Format::kF32, 0.1f);
      }
      for (const char* name : {"q_norm", "k_norm"}) file->add(at + name, {16}, Format::kF32, 0.f);
      for (const char* name : {"attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm"}) {
        file->add(at + name, {64}, Format::kF32, 0.f);
      }
    }
    for (const auto& [name, info] : file->tensors()) sources[name] = {file, name, 0, false};
  }
};

/// Runs `lengths.size()` sequences side by side in chunks of `chunk` tokens; returns all their
/// logits.
std::vector<std::vector<float>> run(int threads, const std::vector<int>& lengths, int chunk,
                                    kernels::KvDtype dtype) {
  static const Fixture fixture;
  DecoderOptions options;
  options.num_threads = threads;
  options.max_batch_tokens = 128;
  Decoder decoder(fixture.config, fixture.sources, options);
  constexpr int kBlocks = 8;  // per sequence and group
  const auto sequences = static_cast<int>(lengths.size());
  decoder.attach_kv(
      std::make_shared<kv::KvStorage>(2 * kBlocks * sequences, 1, 2, 16, kBlockSize, dtype));

  std::vector<std::vector<float>> logits(lengths.size());
  std::vector<int> done(lengths.size(), 0);
  for (;;) {
    std::vector<int32_t> ids, positions, starts = {0}, rows, live;
    for (int s = 0; s < sequences; ++s) {
      const auto i = static_cast<size_t>(s);
      const int count = std::min(chunk, lengths[i] - done[i]);
      if (count == 0) continue;
      live.push_back(s);
      for (int n = 0; n < count; ++n) {
        positions.push_back(done[i] + n);
        ids.push_back((17 * (done[i] + n) + 5 * s + 3) % kVocab);
        rows.push_back(static_cast<int32_t>(rows.size()));
      }
      done[i] += count;
      starts.push_back(static_cast<int32_t>(ids.size()));
    }
    if (live.empty()) return logits;
    std::vector<int32_t> tables;
    for (int group = 0; group < 2; ++group) {
      for (const int s : live) {
        for (int b = 0; b < kBlocks; ++b)
          tables.push_back(1 + (group * sequences + s) * kBlocks + b);
      }
    }
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.positions = positions;
    batch.query_starts = starts;
    batch.block_tables = tables;
    batch.logit_rows = rows;
    batch.num_groups = 2;
    batch.max_blocks = kBlocks;
    std::vector<float> out(rows.size() * kVocab);
    std::vector<sample::RowParams> sampling(rows.size());
    std::vector<sample::Result> sampled(rows.size());
    decoder.step(batch, sampling, {.sampled = sampled, .logits = out.data()});
    for (size_t i = 0; i < live.size(); ++i) {
      auto& to = logits[static_cast<size_t>(live[i])];
      to.insert(to.end(), out.begin() + starts[i] * kVocab, out.begin() + starts[i + 1] * kVocab);
    }
  }
}

bool same_bytes(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class DecoderOver : public ::testing::TestWithParam<kernels::KvDtype> {};

TEST_P(DecoderOver, GivesTheSameBytesForEveryNumberOfThreadsAndChunking) {
  const auto expected = run(1, {100}, 100, GetParam())[0];
  EXPECT_EQ(expected.size(), size_t{100} * kVocab);
  for (const int threads : {1, 2, 3}) {
    for (const int chunk : {1, 2, 7, 64, 100}) {
      EXPECT_TRUE(same_bytes(run(threads, {100}, chunk, GetParam())[0], expected))
          << threads << " " << chunk;
    }
  }
}

TEST_P(DecoderOver, GivesTheSameBytesInABatch) {
  const auto alone = run(2, {100}, 100, GetParam())[0];
  const auto together = run(2, {100, 3, 77, 1}, 31, GetParam());
  EXPECT_TRUE(same_bytes(together[0], alone));
}

INSTANTIATE_TEST_SUITE_P(KvDtype, DecoderOver,
                         ::testing::Values(kernels::KvDtype::kBF16, kernels::KvDtype::kI8),
                         [](const auto& test) { return std::string(kv::dtype_name(test.param)); });

TEST(Decoder, RefusesMalformedBatchesAndStaysUsable) {
  const Fixture fixture;
  Decoder decoder(fixture.config, fixture.sources, {});
  std::vector<int32_t> ids = {1, 2}, positions = {0, 1}, starts = {0, 2}, tables = {1, 2},
                       rows = {1};
  std::vector<float> out(kVocab);
  const auto step = [&] {
    ForwardBatch batch;
    batch.token_ids = ids;
    batch.positions = positions;
    batch.query_starts = starts;
    batch.block_tables = tables;
    batch.logit_rows = rows;
    batch.num_groups = 2;
    batch.max_blocks = 1;
    decoder.step(batch, {}, {.logits = out.data()});
  };
  EXPECT_THROW(step(), InvalidArgument) << "no KV storage";
  decoder.attach_kv(std::make_shared<kv::KvStorage>(2, 1, 2, 16, kBlockSize));
  const auto refused = [&](std::vector<int32_t>& field, std::vector<int32_t> bad) {
    std::swap(field, bad);
    EXPECT_THROW(step(), InvalidArgument);
    std::swap(field, bad);
  };
  refused(ids, {1, kVocab});
  refused(ids, {-1, 1});
  refused(positions, {0, 2});
  refused(positions, {-1, 0});
  refused(positions, {255, 256});
  refused(positions, {15, 16});  // beyond the table
  refused(starts, {0, 1});
  refused(starts, {0, 2, 2});
  refused(tables, {0, 1});
  refused(tables, {1, 3});
  refused(tables, {1});
  refused(rows, {2});
  refused(rows, {1, 0});
  EXPECT_NO_THROW(step());
}

TEST(Decoder, NamesAMissingOrMisshapenTensor) {
  Fixture fixture;
  fixture.sources.erase("layers.1.up");
  EXPECT_THROW(Decoder(fixture.config, fixture.sources, {}), CorruptFile);
  Fixture other;
  other.config.intermediate_size = 128;
  EXPECT_THROW(Decoder(other.config, other.sources, {}), CorruptFile);
}

}  // namespace
}  // namespace sagellm::model
