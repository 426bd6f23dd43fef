// Runs a package of AOTInductor without Python:
//   run_exported PACKAGE TENSORS
// TENSORS is a tuple by torch.save: for each call a tuple of the inputs and one of the results that
// are expected. Exits with 1, and says which, where a result is another.

#include <ATen/ops/equal.h>
#include <attn_mask/attn_mask.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<at::Tensor> tensors(const c10::IValue& tuple) {
  std::vector<at::Tensor> result;
  for (const c10::IValue& element : tuple.toTuple()->elements()) {
    result.push_back(element.toTensor());
  }
  return result;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && at::equal(a, b);
}

int run(const char* package, const char* file) {
  torch::inductor::AOTIModelPackageLoader model(package);
  const auto calls = torch::jit::pickle_load(read(file)).toTuple()->elements();
  for (size_t call = 0; call < calls.size(); ++call) {
    const auto parts = calls[call].toTuple()->elements();
    const auto got = model.run(tensors(parts[0]));
    const auto want = tensors(parts[1]);
    for (size_t i = 0; i < want.size(); ++i) {
      if (got.size() != want.size() || !same(got[i], want[i])) {
        std::cerr << "call " << call << ": result " << i << " is another\n";
        return EXIT_FAILURE;
      }
    }
  }
  std::cout << calls.size() << " calls\n";
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "expected PACKAGE TENSORS\n";
    return EXIT_FAILURE;
  }
  // The operators are there because the library is linked: this call keeps the linker from leaving
  // it out.
  attn_mask::make_causal_mask({1, 1}, at::kFloat, at::kCPU);
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
