#pragma once

/// Files of export_models.py: nested dicts and lists of tensors, numbers and strings.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <string>

namespace example {

/// A dict; a key that it lacks is an error that names it.
class Archive {
 public:
  explicit Archive(const c10::IValue& dict) : dict_(dict.toGenericDict()) {}

  /// The file that torch.save() wrote.
  static Archive read(const std::string& path);

  c10::IValue at(const std::string& name) const;
  Archive dict(const std::string& name) const { return Archive(at(name)); }
  at::Tensor tensor(const std::string& name) const { return at(name).toTensor(); }

 private:
  c10::Dict<c10::IValue, c10::IValue> dict_;
};

}  // namespace example
