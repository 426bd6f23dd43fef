// What a call of the C++ API costs for a small mask above at::empty and writing as many bytes: the
// two are timed in turn, many times, and the medians are subtracted. Takes Google Benchmark's
// options (--benchmark_filter=...).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <attn_mask/attn_mask.h>
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr double kTarget = 1500;  // ns
constexpr int64_t kBatch = 2;
constexpr int64_t kLength = 16;

using MakeMask = std::function<at::Tensor()>;

void add(const std::string& name, const MakeMask& make) {
  const at::Tensor mask = make();
  // A stride-0 expand stores one of its rows.
  const int64_t stored = mask.stride(0) == 0 ? mask.numel() / mask.size(0) : mask.numel();
  const auto bytes = static_cast<size_t>(stored * mask.element_size());
  const auto dtype = mask.scalar_type();
  const std::vector<int64_t> sizes{stored / (kLength * kLength), 1, kLength, kLength};
  benchmark::RegisterBenchmark((name + "/least").c_str(), [=](benchmark::State& state) {
    for (auto _ : state) {
      const at::Tensor written = at::empty(sizes, dtype);
      std::memset(written.mutable_data_ptr(), 0, bytes);
      benchmark::DoNotOptimize(written.const_data_ptr());
      benchmark::ClobberMemory();
    }
  });
  benchmark::RegisterBenchmark((name + "/call").c_str(), [=](benchmark::State& state) {
    for (auto _ : state) {
      benchmark::DoNotOptimize(make().const_data_ptr());
    }
  });
}

/// Keeps the times of the repetitions.
class Medians : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context& context) override {
    PrintBasicContext(&GetErrorStream(), context);
    return true;
  }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type == Run::RT_Iteration) {
        times_[run.run_name.function_name].push_back(run.GetAdjustedCPUTime());
      }
    }
  }

  void print() {
    std::printf("%-52s %9s %9s %9s\n", "ns a call, medians", "least", "call", "above");
    for (const auto& [name, times] : times_) {
      const size_t end = name.rfind("/call");
      if (end == std::string::npos) {
        continue;
      }
      const std::string of = name.substr(0, end);
      const double call = median(name);
      const double least = median(of + "/least");
      std::printf("%-52s %9.0f %9.0f %9.0f%s\n", of.c_str(), least, call, call - least,
                  call - least <= kTarget ? "" : "  above the target");
    }
  }

 private:
  double median(const std::string& name) {
    std::vector<double>& times = times_[name];
    std::sort(times.begin(), times.end());
    return times.empty() ? 0 : times[times.size() / 2];
  }

  std::map<std::string, std::vector<double>> times_;
};

}  // namespace

int main(int argc, char** argv) {
  using namespace attn_mask;
  std::vector<const char*> arguments{argv[0], "--benchmark_enable_random_interleaving=true",
                                     "--benchmark_repetitions=21", "--benchmark_min_time=0.01"};
  arguments.insert(arguments.end(), argv + 1, argv + argc);
  int count = static_cast<int>(arguments.size());
  benchmark::Initialize(&count, const_cast<char**>(arguments.data()));

  at::Tensor mask = at::ones({kBatch, kLength}, at::kLong);
  mask.narrow(0, 0, 1).narrow(1, 0, 3).zero_();
  const at::Tensor ids = at::arange(kLength, at::kLong).div(5, "floor").view({1, kLength});
  const at::Tensor embeds = at::zeros({kBatch, kLength, 8});
  const AttentionMaskConverter converter(true);
  const AttentionMaskConverter windowed(true, 4);
  const MaskRule decoder = causal() & padding(mask);
  const MaskRule packed = causal() & sliding_window(8) & documents(ids);

  add("to_causal_4d",
      [=] { return *converter.to_causal_4d(kBatch, kLength, kLength, at::kFloat); });
  add("to_4d", [=] { return converter.to_4d(mask, kLength, at::kFloat, kLength); });
  add("to_4d, window", [=] { return windowed.to_4d(mask, kLength, at::kFloat, kLength); });
  add("expand_mask", [=] { return expand_mask(mask, at::kFloat); });
  add("prepare_4d_causal_attention_mask",
      [=] { return *prepare_4d_causal_attention_mask(mask, {kBatch, kLength}, embeds, 0); });
  add("prepare_4d_causal_attention_mask_for_sdpa", [=] {
    return *prepare_4d_causal_attention_mask_for_sdpa(mask, {kBatch, kLength}, embeds, 0);
  });
  add("prepare_4d_attention_mask",
      [=] { return prepare_4d_attention_mask(mask, at::kFloat, kLength); });
  add("prepare_4d_attention_mask_for_sdpa",
      [=] { return *prepare_4d_attention_mask_for_sdpa(mask, at::kFloat, kLength); });
  add("create_4d_causal_attention_mask",
      [=] { return *create_4d_causal_attention_mask({kBatch, kLength}, at::kFloat, at::kCPU); });
  add("additive, causal", [] { return additive(causal(), kBatch, kLength, kLength); });
  add("additive, causal & padding", [=] { return additive(decoder, kBatch, kLength, kLength); });
  add("additive, the same, made for each call",
      [=] { return additive(causal() & padding(mask), kBatch, kLength, kLength); });
  add("additive, causal & sliding_window & documents",
      [=] { return additive(packed, kBatch, kLength, kLength); });
  add("boolean, causal & padding", [=] { return boolean(decoder, kBatch, kLength, kLength); });

  std::fprintf(stderr, "float32 [%d, 1, %d, %d], %d threads\n", static_cast<int>(kBatch),
               static_cast<int>(kLength), static_cast<int>(kLength), at::get_num_threads());
  Medians medians;
  benchmark::RunSpecifiedBenchmarks(&medians);
  medians.print();
}
