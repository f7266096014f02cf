// A pretend accelerator, the device type "pretend" of PyTorch's PrivateUse1: its memory is that of the host, and its
// operations are the kernels of the CPU. What matters is what it refuses, as CUDA does: a tensor of the CPU with one or
// more dimensions among its own, a generator of the CPU, a product of matrices of integers, a view of its memory by
// NumPy. With float64 switched off it also refuses to make such a tensor, as Metal does.
//
// It is loaded as a plain library (torch.ops.load_library): no header of Python is needed to build it.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using OptionalTensor = std::optional<Tensor>;

const Device kPretend(DeviceType::PrivateUse1, 0);
bool has_float64 = true;

// -- memory ---------------------------------------------------------------------------------------------------

void free_host(void* memory) { c10::free_cpu(memory); }

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &free_host, kPretend};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_host; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &allocator);

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1> {
  Device getDevice() const override { return kPretend; }
  Device exchangeDevice(Device) const override { return kPretend; }
  c10::Stream getStream(Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kPretend); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(kPretend); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kPretend); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void resize_storage(const c10::Storage& storage, size_t bytes) {
  auto* old = storage.unsafeGetStorageImpl();
  auto fresh = allocator.allocate(bytes);
  if (size_t kept = std::min(bytes, old->nbytes())) memcpy(fresh.get(), old->mutable_data(), kept);
  old->set_data_ptr_noswap(std::move(fresh));
  old->set_nbytes(bytes);
}

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      has_float64 || (dtype != at::kDouble && dtype != at::kComplexDouble),
      "the pretend device has no float64, as Metal has none");
}

Tensor empty(at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type, format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device>, std::optional<bool>) {
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

// The same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& t) {
  if (t.is_cpu()) return t;
  auto host = at::from_blob(
      t.mutable_data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
  if (t.is_conj()) host = host.conj();
  return t.is_neg() ? host._neg_view() : host;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize_(const Tensor& t, at::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  size_t needed =
      at::detail::computeStorageNbytesContiguous(size, t.dtype().itemsize(), t.storage_offset());
  if (needed > t.storage().nbytes()) resize_storage(t.storage(), needed);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return t;
}

Tensor& set_(Tensor& t, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}

// -- randomness -----------------------------------------------------------------------------------------------

// It holds a generator of the CPU, which the kernels are called with.
struct Generator : at::CPUGeneratorImpl {
  explicit Generator(uint64_t seed = c10::default_rng_seed_val) : at::CPUGeneratorImpl(seed) {
    device_ = kPretend;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
    host = at::make_generator<at::CPUGeneratorImpl>(seed);
  }
  void set_current_seed(uint64_t seed) override {
    at::CPUGeneratorImpl::set_current_seed(seed);
    host.set_current_seed(seed);
  }
  uint64_t seed() override {
    auto drawn = at::CPUGeneratorImpl::seed();
    host.set_current_seed(drawn);
    return drawn;
  }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  at::Generator host;
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};
[[maybe_unused]] const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// -- operations -----------------------------------------------------------------------------------------------

at::Scalar local_scalar(const Tensor& t) { return at::_local_scalar_dense(on_cpu(t)); }

bool equal(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.device() == b.device(), "Cannot compare two tensors on different devices: ", a.device(), " and ", b.device());
  return at::equal(on_cpu(a), on_cpu(b));
}

// CUDA and devices of this kind have a fused cell of LSTMs in place of the operations that the CPU takes.
std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input, const Tensor& hidden, const Tensor& cell,
                                             const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  Tensor gates = input + hidden;
  if (input_bias && input_bias->defined()) gates = gates + *input_bias + *hidden_bias;
  auto parts = gates.chunk(4, 1);
  auto in = parts[0].sigmoid(), forget = parts[1].sigmoid(), fresh = parts[2].tanh(), out = parts[3].sigmoid();
  auto next = forget * cell + in * fresh;
  return {out * next.tanh(), next, at::cat({in, forget, fresh, out}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hidden, const OptionalTensor& grad_cell,
                                                      const Tensor& cell, const Tensor& next, const Tensor& workspace,
                                                      bool has_bias) {
  auto parts = workspace.chunk(4, 1);
  auto in = parts[0], forget = parts[1], fresh = parts[2], out = parts[3], top = next.tanh();
  Tensor dh = grad_hidden && grad_hidden->defined() ? *grad_hidden : at::zeros_like(next);
  Tensor dc = grad_cell && grad_cell->defined() ? *grad_cell : at::zeros_like(next);
  auto d = dh * out * (1 - top * top) + dc;
  auto gates = at::cat({d * fresh * in * (1 - in), d * cell * forget * (1 - forget),
                        d * in * (1 - fresh * fresh), dh * top * out * (1 - out)}, 1);
  return {gates, d * forget, has_bias ? gates.sum(0, false) : Tensor()};
}

Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
  bool has_bias = bias && bias->defined();
  TORCH_CHECK(weight.device() == x.device() && (!has_bias || bias->device() == x.device()),
              "Input and weight of a convolution should be on the same device");
  OptionalTensor host_bias;
  if (has_bias) host_bias = on_cpu(*bias);
  return at::convolution(on_cpu(x), on_cpu(weight), host_bias, stride, padding, dilation, transposed,
                         output_padding, groups).to(x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  at::OptionalIntArrayRef biases(weight.size(0));
  auto [dx, dw, db] = at::convolution_backward(on_cpu(grad), on_cpu(x), on_cpu(weight), biases, stride, padding,
                                               dilation, transposed, output_padding, groups, wanted);
  auto back = [&](const Tensor& t) { return t.defined() ? t.to(x.device()) : Tensor(); };
  return {back(dx), back(dw), back(db)};
}

// CUDA takes indices from the CPU too.
const std::set<std::string> kIndexing = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
                                         "aten::_index_put_impl_", "aten::_unsafe_index_put"};
const std::set<std::string> kProducts = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::addmv",
                                         "aten::addmv_", "aten::mv", "aten::baddbmm", "aten::dot", "aten::vdot",
                                         "aten::addbmm"};

// Refuse what CUDA refuses, then call the kernel of the CPU with the generator that belongs to the device's.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  size_t n = schema.arguments().size(), begin = stack->size() - n;
  bool on_device = false;
  std::string stray;
  for (size_t k = 0; k < n; ++k) {
    auto& value = (*stack)[begin + k];
    bool index = kIndexing.count(name) && k == 1;
    auto look = [&](const Tensor& t) {
      if (!t.defined()) return;
      if (t.is_cpu() && t.dim() > 0 && !index) stray = schema.arguments()[k].name();
      if (!t.is_privateuseone()) return;
      on_device = true;
      TORCH_CHECK(!kProducts.count(name) || !c10::isIntegralType(t.scalar_type(), true),
                  '"', name, "\" not implemented for '", toString(t.scalar_type()), "' on this device");
    };
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList()) for (const Tensor& t : value.toTensorList()) look(t);
    if (value.isOptionalTensorList())
      for (const OptionalTensor& t : value.toOptionalTensorList()) if (t) look(*t);
    bool generator = schema.arguments()[k].name() == "generator";
    if (generator && value.isNone()) value = default_generator();
    if (generator) {
      auto given = value.toGenerator();
      TORCH_CHECK(given.device().type() == DeviceType::PrivateUse1, "Expected a 'pretend' device type for generator but found '",
                  given.device().type(), "' (", name, ")");
      value = static_cast<Generator*>(given.unsafeGetGeneratorImpl())->host;
    }
  }
  TORCH_CHECK(!on_device || stray.empty(), "Expected all tensors to be on the same device, but found at least two devices, ",
              "pretend:0 and cpu! (argument ", stray, " of ", name, ".", schema.overload_name(), ")");
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_);
  m.impl("equal", equal);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
}

// Conjugates are resolved by the kernels of the CPU.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  for (auto name : {"_copy_from", "_copy_from_and_resize", "_local_scalar_dense"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  for (auto name : {"_copy_from", "_copy_from_and_resize", "_local_scalar_dense"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}

// Autocast as on CUDA, for the operations that the models use.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmv, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mv, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32_set_opt_dtype)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32_set_opt_dtype)
}

// Switches, for Python.
TORCH_LIBRARY(pretend, m) {
  m.def("float64", [](bool on) { has_float64 = on; });
  m.def("manual_seed", [](int64_t seed) { default_generator().set_current_seed(static_cast<uint64_t>(seed)); });
  m.def("get_state", [] { return Tensor(default_generator().unsafeGetGeneratorImpl()->get_state()); });
  m.def("set_state", [](const Tensor& state) { default_generator().set_state(state); });
}
