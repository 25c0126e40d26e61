// How the C++ functions of the library reach their ops: by a typed handle, which the dispatcher checks against the
// schema.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <type_traits>

namespace amct_ext {

// The handle of the op amct_ext::<name>, looked up at the first call. `function` is the C++ function of that op: it
// gives the signature, unless the schema takes symbolic sizes where the function takes numbers.
template <auto* function, typename Signature = std::remove_pointer_t<decltype(function)>>
const c10::TypedOperatorHandle<Signature>& op(const char* name) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow(("amct_ext::" + std::string(name)).c_str(), "").typed<Signature>();
  return handle;
}

}  // namespace amct_ext
