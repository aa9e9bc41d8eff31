#include "sagellm/sample/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>

#include "sagellm/base/error.h"

namespace sagellm::sample {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 16;  // logits tested at once while scanning; a loop over it vectorises

constexpr int64_t kWeightBlock = 512;  // tokens per sum of weights; 4 KB of weights stay in L1

// Tokens lighter than this, next to 1 for the heaviest, weigh nothing: as many as there can be do
// not change the sum.
constexpr double kNegligible = 0x1p-1000;

// Top-p sorts weights down to e^-44 of the heaviest into buckets of 0.043 natural-log units each.
constexpr int kBuckets = 1024;
constexpr double kBucketSpan = 44.0;

/// Order of preference: larger logit, then lower id. A strict total order, so selections have no
/// ties.
bool preferred(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

bool by_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }

bool all_finite(const float* x, int64_t n) {
  uint32_t not_finite = 0;
  for (int64_t i = 0; i < n; ++i) {
    not_finite |=
        static_cast<uint32_t>((std::bit_cast<uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u);
  }
  return not_finite == 0;
}

/// Uniform in [0, 1): splitmix64's output number `position` for the state `seed`.
double uniform(uint64_t seed, uint64_t position) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (position + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

bool has_penalties(const RowParams& row) {
  return row.repetition_penalty != 1.f || row.presence_penalty != 0.f ||
         row.frequency_penalty != 0.f;
}

/// Steps 1 to 3 on a copy of the logits. Costs O(history), not O(vocab), beyond the copy.
void adjust(const RowParams& row, Scratch& s) {
  float* x = s.logits.data();
  for (int64_t i = 0; i < row.num_bias; ++i) x[row.bias_ids[i]] += row.bias_values[i];
  if (!has_penalties(row)) return;

  const size_t vocab = s.logits.size();
  if (s.seen.size() < vocab) s.seen.resize(vocab, 0);
  if (s.counts.size() < vocab) s.counts.resize(vocab, 0);
  for (int64_t i = 0; i < row.history_length; ++i) {
    const auto id = static_cast<size_t>(row.history[i]);
    if (s.seen[id] == 0) {
      s.seen[id] = 1;
      x[id] = x[id] > 0.f ? x[id] / row.repetition_penalty : x[id] * row.repetition_penalty;
    }
    if (i >= row.prompt_length) ++s.counts[id];
  }
  for (int64_t i = 0; i < row.history_length;
       ++i) {  // applies each count once and leaves the tables zero again
    const auto id = static_cast<size_t>(row.history[i]);
    s.seen[id] = 0;
    if (s.counts[id] > 0) {
      const double penalty =
          static_cast<double>(row.presence_penalty) +
          static_cast<double>(row.frequency_penalty) * static_cast<double>(s.counts[id]);
      x[id] = static_cast<float>(static_cast<double>(x[id]) - penalty);
      s.counts[id] = 0;
    }
  }
}

/// Step 4: everything that is not allowed becomes -inf.
void mask(const uint32_t* allowed, float* x, int64_t vocab) {
  for (int64_t first = 0; first < vocab; first += 32) {
    const uint32_t word = allowed[first / 32];
    const int64_t count = std::min<int64_t>(32, vocab - first);
    if (word == 0) {
      std::fill_n(x + first, count, kNegativeInfinity);
    } else if (word != ~0u) {
      for (int64_t i = 0; i < count; ++i) {
        if ((word >> i & 1u) == 0) x[first + i] = kNegativeInfinity;
      }
    }
  }
}

/// The k preferred entries (fewer when fewer exceed -inf), in no particular order. One pass:
/// entries above the k-th best so far are collected, and when 2k are held the lesser half is
/// dropped.
void select_top_k(const float* x, int64_t vocab, int64_t k, std::vector<Candidate>& out) {
  out.clear();
  const auto keep = static_cast<size_t>(k);
  const size_t limit = 2 * keep + static_cast<size_t>(kBlock);
  float threshold = kNegativeInfinity;
  const auto shrink = [&] {
    if (out.size() <= keep) return;
    std::nth_element(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(keep) - 1, out.end(),
                     preferred);
    out.resize(keep);
    threshold = out[keep - 1].logit;  // a later id must be strictly larger
  };
  for (int64_t i = 0; i < vocab; i += kBlock) {
    const int64_t end = std::min(i + kBlock, vocab);
    int above = 0;
    for (int64_t j = i; j < end; ++j) above += x[j] > threshold;
    if (above == 0) continue;
    for (int64_t j = i; j < end; ++j) {
      if (x[j] > threshold) out.push_back({0.0, x[j], static_cast<int32_t>(j)});
    }
    if (out.size() + static_cast<size_t>(kBlock) > limit) shrink();
  }
  shrink();
}

double total_weight(const std::vector<Candidate>& candidates) {
  double total = 0.0;
  for (const Candidate& c : candidates) total += c.weight;
  return total;
}

/// The least preferred member of the smallest preferred set whose weights, on top of `before`,
/// reach `target` (never empty). Weighted quickselect: the half that holds the crossing is
/// searched, the other is only summed. Reorders `c`.
Candidate crossing(std::vector<Candidate>& c, double before, double target) {
  size_t begin = 0, end = c.size();  // `before`: weight of everything preferred to [begin, end)
  while (end - begin > 32) {
    const size_t middle = begin + (end - begin) / 2;
    Candidate pivot =
        c[middle];  // median of three: no random numbers, no bad case on ascending or equal logits
    Candidate a = c[begin], b = c[end - 1];
    if (preferred(b, a)) std::swap(a, b);
    pivot = preferred(pivot, a) ? a : (preferred(b, pivot) ? b : pivot);
    double weight = 0.0;
    size_t split = begin;
    for (size_t i = begin; i < end;
         ++i) {  // to the front: the pivot and everything preferred to it
      if (!preferred(pivot, c[i])) {
        weight += c[i].weight;
        std::swap(c[i], c[split++]);
      }
    }
    // The median of three distinct entries is neither the first nor the last, so that both sides
    // shrink.
    if (before + weight >= target) {
      end = split;
    } else {
      before += weight;
      begin = split;
    }
  }
  std::sort(c.begin() + static_cast<std::ptrdiff_t>(begin),
            c.begin() + static_cast<std::ptrdiff_t>(end), preferred);
  for (size_t i = begin; i < end; ++i) {
    before += c[i].weight;
    if (before >= target) return c[i];
  }
  return c[end - 1];  // by rounding, everything together just misses the target
}

/// The draw of step 7 as a point on the line of cumulative weights.
double draw_point(const RowParams& row, double total) {
  return uniform(row.seed, row.position) * total;
}

/// Steps 5 to 7 with top-k: few candidates, in a list.
int32_t draw_of_top_k(const float* x, int64_t vocab, float largest, const RowParams& row,
                      Scratch& s) {
  std::vector<Candidate>& candidates = s.candidates;
  select_top_k(x, vocab, row.top_k, candidates);
  std::sort(candidates.begin(), candidates.end(), by_id);
  for (Candidate& c : candidates) {
    c.weight =
        std::exp((static_cast<double>(c.logit) - static_cast<double>(largest)) / row.temperature);
  }
  if (row.top_p < 1.0) {
    s.selection = candidates;
    const Candidate last = crossing(s.selection, 0.0, row.top_p * total_weight(candidates));
    std::erase_if(candidates, [&last](const Candidate& c) { return preferred(last, c); });
  }
  if (row.min_p > 0.0) {  // the largest weight is exp(0) = 1
    std::erase_if(candidates, [&row](const Candidate& c) { return c.weight < row.min_p; });
  }
  const double point = draw_point(row, total_weight(candidates));
  double cumulative = 0.0;
  for (const Candidate& c : candidates) {
    cumulative += c.weight;
    if (cumulative > point) return c.id;
  }
  return candidates.back().id;
}

/// The weights of a row, block by block. Blocks, not the whole row, are the unit of work: with
/// top-p off no weight is kept, and a draw evaluates one block again.
struct WeighedRow {
  const float* x;
  int64_t vocab;
  double largest;
  double rate;  // log2(e) / temperature, bounded so that 0 * rate is 0
  const kernels::KernelTable& table;

  int64_t blocks() const { return (vocab + kWeightBlock - 1) / kWeightBlock; }
  int64_t begin(int64_t block) const { return block * kWeightBlock; }
  int64_t size(int64_t block) const { return std::min(kWeightBlock, vocab - begin(block)); }
  double weigh(int64_t block, float cut, double* weights) const {
    return table.sampling_weights(x + begin(block), size(block), largest, rate, cut, weights);
  }
};

/// Float bits in an unsigned order that agrees with the order of the values.
uint32_t ordered(float x) {
  const auto u = std::bit_cast<uint32_t>(x);
  return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}
float from_ordered(uint32_t u) {
  return std::bit_cast<float>((u & 0x80000000u) != 0 ? u & 0x7fffffffu : ~u);
}

/// The lowest finite logit for which `holds`, by bisection over all floats up to `largest`: `holds`
/// is true there and stays false once it is. Comparing with the result is then the exact test.
template <class Predicate>
float lowest_logit(float largest, Predicate holds) {
  uint32_t low = ordered(-std::numeric_limits<float>::max()), high = ordered(largest);
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (holds(from_ordered(middle))) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return from_ordered(high);
}

/// The lowest logit that weighs at least `share` (<= 1).
float lowest_of_weight(float largest, double temperature, double share) {
  return lowest_logit(largest, [=](float logit) {
    const double distance = static_cast<double>(logit) - static_cast<double>(largest);
    return std::exp(distance / temperature) >= share;
  });
}

/// Splits logits into kBuckets by their distance from the largest; bucket 0 holds the largest, the
/// last one everything far away and -inf.
struct Buckets {
  float largest;
  float rate;

  float place(float logit) const {  // in [0, kBuckets - 1], monotonic, not NaN
    const float distance = (largest - logit) * rate;
    constexpr float kLast = kBuckets - 1;
    return distance < kLast ? distance : kLast;
  }
  /// The lowest logit of the buckets 0 to `bucket`.
  float lowest(int bucket) const {
    const auto end = static_cast<float>(bucket + 1);
    return lowest_logit(largest, [&](float logit) { return place(logit) < end; });
  }
};

/// Adds the weights of one block of tokens to the sums of their buckets.
void add_to_buckets(const float* x, const double* weights, int64_t count, const Buckets& buckets,
                    double* sums) {
  int32_t places[kWeightBlock];
  for (int64_t i = 0; i < count; ++i) places[i] = static_cast<int32_t>(buckets.place(x[i]));
  for (int64_t i = 0; i < count; ++i) sums[places[i]] += weights[i];
}

/// Top-p without a sort: finds the bucket in which the target is reached and ranks its members
/// alone. Returns the lowest logit kept; ties with it that are not kept get weight 0.
float cut_of_top_p(const float* x, int64_t vocab, const Buckets& buckets, float cut, double target,
                   Scratch& s) {
  const double* sums = s.bucket_sums.data();
  int crossed = 0;  // by rounding, the last bucket in use may end just below the target
  double before = 0.0, cumulative = 0.0;
  for (int i = 0; i < kBuckets && cumulative < target; ++i) {
    if (sums[i] == 0.0) continue;
    before = cumulative;
    cumulative += sums[i];
    crossed = i;
  }
  std::vector<Candidate>& members = s.selection;
  members.clear();
  const float from = std::max(cut, buckets.lowest(crossed));
  const float until = crossed > 0 ? buckets.lowest(crossed - 1) : -kNegativeInfinity;
  for (int64_t i = 0; i < vocab; i += kBlock) {
    const int64_t end = std::min(i + kBlock, vocab);
    int inside = 0;
    for (int64_t j = i; j < end; ++j) {
      inside += static_cast<int>(x[j] >= from) & static_cast<int>(x[j] < until);
    }
    if (inside == 0) continue;
    for (int64_t j = i; j < end; ++j) {
      if (x[j] >= from && x[j] < until) {
        members.push_back({s.weights[static_cast<size_t>(j)], x[j], static_cast<int32_t>(j)});
      }
    }
  }
  const Candidate least = crossing(members, before, target);
  for (const Candidate& c : members) {
    if (preferred(least, c)) s.weights[static_cast<size_t>(c.id)] = 0.0;
  }
  return least.logit;
}

/// Sum of the weights whose logit is at least `cut`; the others become 0.
double drop_below(const float* x, int64_t count, float cut, double* weights) {
  constexpr int64_t kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) {
      weights[i + j] = x[i + j] >= cut ? weights[i + j] : 0.0;
      sums[j] += weights[i + j];
    }
  }
  for (int64_t j = 0; i + j < count; ++j) {
    weights[i + j] = x[i + j] >= cut ? weights[i + j] : 0.0;
    sums[j] += weights[i + j];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

/// Steps 5 to 7 without top-k, over the whole vocabulary.
int32_t draw_of_all(const float* x, int64_t vocab, float largest, const RowParams& row,
                    const kernels::KernelTable& table, Scratch& s) {
  constexpr double kLog2E = 1.4426950408889634;
  const WeighedRow weighed{x, vocab, static_cast<double>(largest),
                           std::min(kLog2E / row.temperature, 1e300), table};
  const int64_t blocks = weighed.blocks();
  s.block_sums.resize(static_cast<size_t>(blocks));
  const bool top_p = row.top_p < 1.0;
  s.weights.resize(static_cast<size_t>(top_p ? vocab : std::min(vocab, kWeightBlock)));
  const auto weights_of = [&](int64_t b) {
    return s.weights.data() + (top_p ? weighed.begin(b) : 0);
  };
  double* sums = s.block_sums.data();
  const auto sum_of_blocks = [&] {
    double total = 0.0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b];
    return total;
  };

  float cut = lowest_of_weight(largest, row.temperature,
                               top_p ? kNegligible : std::max(row.min_p, kNegligible));
  const double bucket_rate = kBuckets / (kBucketSpan * row.temperature);
  const Buckets buckets{largest, static_cast<float>(std::clamp(bucket_rate, 1e-30, 1e30))};
  if (top_p) s.bucket_sums.assign(kBuckets, 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    sums[b] = weighed.weigh(b, cut, weights_of(b));
    if (top_p) {
      add_to_buckets(x + weighed.begin(b), weights_of(b), weighed.size(b), buckets,
                     s.bucket_sums.data());
    }
  }
  if (top_p) {
    cut = cut_of_top_p(x, vocab, buckets, cut, row.top_p * sum_of_blocks(), s);
    if (row.min_p > 0.0) {
      cut = std::max(cut, lowest_of_weight(largest, row.temperature, row.min_p));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      sums[b] = drop_below(x + weighed.begin(b), weighed.size(b), cut, weights_of(b));
    }
  }

  const double point = draw_point(row, sum_of_blocks());
  int64_t chosen = 0;  // the first block that ends above the point
  double before = 0.0, cumulative = 0.0;
  for (int64_t b = 0; b < blocks && cumulative <= point; ++b) {
    if (sums[b] == 0.0) continue;
    before = cumulative;
    cumulative += sums[b];
    chosen = b;
  }
  const double* weights = weights_of(chosen);
  if (!top_p) weighed.weigh(chosen, cut, s.weights.data());
  int64_t last = 0;  // by rounding, the weights one by one may just miss what their sum reaches
  for (int64_t i = 0; i < weighed.size(chosen); ++i) {
    if (weights[i] == 0.0) continue;
    last = i;
    before += weights[i];
    if (before > point) break;
  }
  return static_cast<int32_t>(weighed.begin(chosen) + last);
}

/// Log-probabilities of the raw logits: of the chosen token and of the most likely ones.
void report_logprobs(const float* logits, int64_t vocab, const RowParams& row,
                     const kernels::KernelTable& table, Scratch& s, Result& result) {
  float largest = 0.f;
  int32_t index = 0;
  table.argmax(logits, vocab, &largest, &index);
  const double normalizer =
      static_cast<double>(largest) + std::log(table.sum_exp(logits, largest, vocab));
  const auto logprob = [&](int32_t id) { return static_cast<double>(logits[id]) - normalizer; };
  result.logprob = logprob(result.token_id);
  if (row.num_logprobs == 0) return;
  select_top_k(logits, vocab, std::min<int64_t>(row.num_logprobs, vocab), s.selection);
  std::sort(s.selection.begin(), s.selection.end(), preferred);
  for (const Candidate& c : s.selection) {
    result.top_ids.push_back(c.id);
    result.top_logprobs.push_back(logprob(c.id));
  }
}

void require_ids(const int32_t* ids, int64_t count, int64_t vocab, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    require<InvalidArgument>(ids[i] >= 0 && ids[i] < vocab, name, " holds token id ", ids[i],
                             ", outside [0, ", vocab, ")");
  }
}

}  // namespace

void validate(const RowParams& row, int64_t vocab) {
  require<InvalidArgument>(vocab > 0 && vocab <= std::numeric_limits<int32_t>::max(), "vocab is ",
                           vocab, ", must be a positive int32");
  require<InvalidArgument>(std::isfinite(row.temperature) && row.temperature >= 0,
                           "temperature is ", row.temperature, ", must be finite and >= 0");
  require<InvalidArgument>(row.top_k >= 0, "top_k is ", row.top_k,
                           ", must be >= 0 (0 turns it off)");
  require<InvalidArgument>(row.top_p > 0 && row.top_p <= 1, "top_p is ", row.top_p,
                           ", must be in (0, 1]");
  require<InvalidArgument>(row.min_p >= 0 && row.min_p <= 1, "min_p is ", row.min_p,
                           ", must be in [0, 1]");
  require<InvalidArgument>(std::isfinite(row.repetition_penalty) && row.repetition_penalty > 0,
                           "repetition_penalty is ", row.repetition_penalty,
                           ", must be finite and > 0");
  require<InvalidArgument>(std::isfinite(row.presence_penalty), "presence_penalty must be finite");
  require<InvalidArgument>(std::isfinite(row.frequency_penalty),
                           "frequency_penalty must be finite");
  require<InvalidArgument>(row.num_logprobs >= -1, "num_logprobs is ", row.num_logprobs,
                           ", must be >= -1");
  require<InvalidArgument>(row.forced_token >= -1 && row.forced_token < vocab, "forced_token is ",
                           row.forced_token, ", must be -1 or in [0, ", vocab, ")");
  require<InvalidArgument>(row.num_bias >= 0 && row.history_length >= 0 && row.prompt_length >= 0,
                           "lengths must not be negative");
  require<InvalidArgument>(
      row.num_bias == 0 || (row.bias_ids != nullptr && row.bias_values != nullptr),
      "bias ids and values must both be given");
  require_ids(row.bias_ids, row.num_bias, vocab, "bias_ids");
  for (int64_t i = 0; i < row.num_bias; ++i) {
    require<InvalidArgument>(std::isfinite(row.bias_values[i]), "the bias of token ",
                             row.bias_ids[i], " is not finite");
  }
  if (has_penalties(row)) {
    require<InvalidArgument>(row.history != nullptr || row.history_length == 0,
                             "penalties need the token history");
    require_ids(row.history, row.history_length, vocab, "history");
  }
}

Result sample_row(const float* logits, int64_t vocab, const RowParams& row,
                  const kernels::KernelTable& table, Scratch& scratch) {
  validate(row, vocab);
  Result result;
  const auto failed = [&result](const char* why) {
    result.error = why;
    return result;
  };
  if (!all_finite(logits, vocab)) return failed("logits are not finite");
  if (row.forced_token >= 0) {
    result.token_id = row.forced_token;
    if (row.num_logprobs >= 0) report_logprobs(logits, vocab, row, table, scratch, result);
    return result;
  }

  const float* x = logits;  // greedy rows without adjustments read the logits in place
  if (row.num_bias > 0 || row.allowed != nullptr ||
      (has_penalties(row) && row.history_length > 0)) {
    scratch.logits.assign(logits, logits + vocab);
    adjust(row, scratch);
    if (row.allowed != nullptr) mask(row.allowed, scratch.logits.data(), vocab);
    x = scratch.logits.data();
  }
  float largest = 0.f;
  int32_t best = 0;
  table.argmax(x, vocab, &largest, &best);
  if (largest == kNegativeInfinity) return failed("no token is allowed");
  if (!std::isfinite(largest)) return failed("logits are not finite after bias and penalties");

  if (row.temperature == 0.0) {
    result.token_id = best;
  } else if (row.top_k > 0 && row.top_k < vocab) {
    result.token_id = draw_of_top_k(x, vocab, largest, row, scratch);
  } else {
    result.token_id = draw_of_all(x, vocab, largest, row, table, scratch);
  }
  if (row.num_logprobs >= 0) report_logprobs(logits, vocab, row, table, scratch, result);
  return result;
}

}  // namespace sagellm::sample
