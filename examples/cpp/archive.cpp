#include "archive.h"

#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <vector>

namespace example {

Archive Archive::read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("can't read " + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return Archive(torch::jit::pickle_load(bytes));
}

c10::IValue Archive::at(const std::string& name) const {
  const auto found = dict_.find(name);
  TORCH_CHECK(found != dict_.end(), "no '", name, "' in this archive");
  return found->value();
}

}  // namespace example
