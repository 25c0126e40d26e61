// The choice between instruction sets: the best that the processor has, or the one that the environment names.
#pragma once

#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>

namespace amct_ext::cpu {

// Errors: std::invalid_argument where the variable names a level that is not among `usable`, which goes from the
// simplest to the best.
template <typename Table>
const Table& choose_level(const char* variable, std::span<const Table* const> usable) {
  const char* wanted = std::getenv(variable);
  if (wanted == nullptr || *wanted == '\0') return *usable.back();
  std::string names;
  for (const Table* table : usable) {
    if (std::string(wanted) == table->level) return *table;
    names += names.empty() ? table->level : std::string(", ") + table->level;
  }
  throw std::invalid_argument(std::string(variable) + "=" + wanted + ": this build has on this processor: " + names);
}

}  // namespace amct_ext::cpu
