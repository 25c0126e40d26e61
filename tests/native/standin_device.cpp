// A stand-in for an accelerator: PrivateUse1 tensors in host memory, a few kernels of its own, and the CPU fallback for
// all other ops, as in a vendor's back end. It records every host sync, so that tests can show that a training step has
// none.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_local_scalar_dense_cpu_dispatch.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/resize_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// The host syncs since the last reset, in order. Locked because the backward pass runs on another thread.
struct HostSyncs {
  std::mutex mutex;
  std::vector<std::string> names;
};

HostSyncs& host_syncs() {
  static HostSyncs instance;
  return instance;
}

void record_sync(const std::string& name) {
  const std::lock_guard lock(host_syncs().mutex);
  host_syncs().names.push_back(name);
}

// Copies made by the fallback are not recorded: a device with a kernel for the op would not make them.
thread_local bool in_fallback = false;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    return {data, data, &c10::free_cpu, c10::Device(kDevice, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kDevice> {
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {kDevice, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& x) {
  if (!x.defined() || x.is_cpu()) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU));
}

Tensor on_device(const Tensor& x) {
  if (!x.defined()) return x;
  Tensor y = at::empty_strided(x.sizes(), x.strides(), x.options().device(c10::Device(kDevice, 0)));
  on_host(y).copy_(x);
  return y;
}

Tensor empty(IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> type, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (!in_fallback && from.device() != to.device()) record_sync(to.is_cpu() ? "copy to host" : "copy to device");
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const Tensor& x) {
  record_sync("item");
  return at::cpu::_local_scalar_dense(on_host(x));
}

Tensor convolution(const Tensor& x, const Tensor& w, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  return on_device(at::convolution(on_host(x), on_host(w), bias ? on_host(*bias) : Tensor(), stride, padding, dilation,
                                   transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  const std::vector<int64_t> bias_size{grad.size(1)};
  auto [dx, dw, db] = at::convolution_backward(on_host(grad), on_host(x), on_host(w), bias_size, stride, padding,
                                               dilation, transposed, output_padding, groups, mask);
  return {on_device(dx), on_device(dw), on_device(db)};
}

// A kernel of its own, because the schema does not say that the running statistics are written to: the fallback would
// not copy them back.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const optional<Tensor>& weight,
                                              const optional<Tensor>& bias, const optional<Tensor>& mean,
                                              const optional<Tensor>& variance, bool training, double momentum,
                                              double eps) {
  const auto given = [](const optional<Tensor>& value) { return value ? on_host(*value) : Tensor(); };
  auto [y, saved_mean, saved_inverse] = at::native_batch_norm(on_host(x), given(weight), given(bias), given(mean),
                                                              given(variance), training, momentum, eps);
  return {on_device(y), on_device(saved_mean), on_device(saved_inverse)};
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape)) {
    record_sync(c10::toString(op.operator_name()));
  }
  const bool before = in_fallback;
  in_fallback = true;
  try {
    at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  } catch (...) {
    in_fallback = before;
    throw;
  }
  in_fallback = before;
}

std::vector<std::string> take_host_syncs() {
  const std::lock_guard lock(host_syncs().mutex);
  return std::exchange(host_syncs().names, {});
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", at::cpu::as_strided);
  m.impl("view", at::cpu::view);
  m.impl("_reshape_alias", at::cpu::_reshape_alias);
  m.impl("unfold", at::cpu::unfold);
  m.impl("resize_", at::cpu::resize_);
  m.impl("set_", static_cast<Tensor& (*)(Tensor&)>(&at::cpu::set_));
  m.impl("set_.source_Tensor", static_cast<Tensor& (*)(Tensor&, const Tensor&)>(&at::cpu::set_));
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::cpu::set_));
  m.impl("set_.source_Storage_storage_offset",
         static_cast<Tensor& (*)(Tensor&, at::Storage, int64_t, IntArrayRef, IntArrayRef)>(&at::cpu::set_));
  m.impl("native_batch_norm", batch_norm);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY(standin, m) { m.def("take_host_syncs", take_host_syncs); }

const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace
