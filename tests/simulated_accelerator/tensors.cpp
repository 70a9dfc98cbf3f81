// Tensors on the device: its memory is the host's, its arithmetic the CPU's, run by the stream's thread when
// its turn comes. So the host runs ahead of it, as it does of a GPU, and what it computes is right.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "device.h"

namespace {

using c10::DeviceIndex;
using c10::DeviceType;
constexpr DeviceType TYPE = DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

// -- memory
// ------------------------------------------------------------------------------------------------------

// Shared with the kernels that are yet to run: a storage that is freed or resized takes nothing from under
// them.
using Block = std::shared_ptr<void>;

void free_block(void* block) { delete static_cast<Block*>(block); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    simulated::check();
    simulated::initialize();
    auto* block = new Block(aligned_alloc(64, (size + 64) / 64 * 64), free);
    return {block->get(), block, &free_block, DEVICE};
  }
  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(TYPE, &memory);

bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == TYPE; }

// The same memory as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  const c10::Storage& storage = tensor.storage();
  auto* block = static_cast<Block*>(storage.data_ptr().get_context());
  auto* kept = block ? new Block(*block) : new Block();
  c10::DataPtr data(kept->get(), kept, &free_block, c10::Device(DeviceType::CPU));
  c10::Storage mine(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  at::Tensor made = at::empty({0}, tensor.options().device(at::kCPU).requires_grad(false));
  made.set_(mine, tensor.storage_offset(), tensor.sizes(), tensor.strides());
  return made;
}

at::Tensor empty_like_strided(at::IntArrayRef sizes, at::IntArrayRef strides, c10::ScalarType type) {
  return at::detail::empty_strided_generic(sizes, strides, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), type);
}

// -- operators
// ---------------------------------------------------------------------------------------------------

void launch(std::function<void()> kernel) {
  long id = simulated::current().id;
  simulated::launch_or_record([id, kernel] {
    simulated::stream(id).launch([kernel] {
      at::NoGradGuard no_grad;
      at::AutoDispatchBelowADInplaceOrView below;
      kernel();
    });
  });
}

void synchronize_current(const char* what) {
  simulated::forbid_in_capture(what);
  simulated::current().synchronize();
  simulated::check();
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (on_device(to)) {
    at::Tensor source = on_device(self) ? on_host(self) : self.clone(), target = on_host(to);
    launch([source, target] { target.copy_(source); });
  } else if (non_blocking) {
    at::Tensor source = on_host(self), target = to;
    launch([source, target] { target.copy_(source); });
  } else {
    synchronize_current("a copy to the host");
    to.copy_(on_host(self));
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  synchronize_current("a read of a value");
  return on_host(self).item();
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(type), format);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                         std::optional<c10::Device>, std::optional<bool>) {
  return empty_like_strided(sizes, strides, c10::dtype_or_default(type));
}

using Map = std::function<at::Tensor(const at::Tensor&)>;

c10::IValue mapped(const c10::IValue& value, const Map& map) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(map(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (at::Tensor each : value.toTensorList()) made.push_back(each.defined() ? map(each) : each);
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (std::optional<at::Tensor> each : value.toOptionalTensorList())
      made.push_back(each && each->defined() ? std::optional<at::Tensor>(map(*each)) : each);
    return made;
  }
  return value;
}

torch::jit::Stack mapped(const torch::jit::Stack& stack, const Map& map, c10::Device device) {
  torch::jit::Stack made;
  for (const c10::IValue& value : stack)
    made.push_back(value.isDevice() && value.toDevice().type() == TYPE ? c10::IValue(device)
                                                                       : mapped(value, map));
  return made;
}

void copy_results(const torch::jit::Stack& from, const torch::jit::Stack& to) {
  auto copy = [](const at::Tensor& source, const at::Tensor& target) {
    if (target.defined()) target.copy_(source);
  };
  for (size_t i = 0; i < to.size(); i++) {
    if (to[i].isTensor())
      copy(from[i].toTensor(), to[i].toTensor());
    else {
      auto sources = from[i].toTensorVector(), targets = to[i].toTensorVector();
      for (size_t k = 0; k < targets.size(); k++) copy(sources[k], targets[k]);
    }
  }
}

// The operator on tensors that have a shape and no contents; in the end the stack holds what it returns.
torch::jit::Stack run_on_shapes(const c10::OperatorHandle& op, const torch::jit::Stack& arguments) {
  at::AutoDispatchBelowADInplaceOrView below;
  torch::jit::Stack shapes = mapped(
      arguments,
      [](const at::Tensor& each) {
        return at::empty_strided(each.sizes(), each.strides(), each.options().device(at::kMeta));
      },
      at::kMeta);
  op.callBoxed(shapes);
  return shapes;
}

// `out=` may be given empty, and has its shape before the kernel runs.
void fit_outputs(const c10::OperatorHandle& op, const torch::jit::Stack& arguments) {
  const auto& schema = op.schema();
  bool fits = true;
  for (size_t i = 0; i < arguments.size(); i++)
    if (schema.arguments()[i].is_out() && arguments[i].isTensor())
      fits &= arguments[i].toTensor().numel() > 0;
  if (fits) return;
  torch::jit::Stack shapes = run_on_shapes(op, arguments);
  for (size_t i = 0, out = 0; i < arguments.size(); i++)
    if (schema.arguments()[i].is_out() && arguments[i].isTensor() && out < shapes.size())
      arguments[i].toTensor().resize_(shapes[out++].toTensor().sizes());
}

// Any operator that has no kernel above: launched, if what it returns can be told before it has run.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& returns = schema.returns();
  torch::jit::Stack arguments(stack->end() - (long)schema.arguments().size(), stack->end());
  if (schema.is_mutable()) fit_outputs(op, arguments);
  torch::jit::Stack host = mapped(arguments, on_host, at::kCPU);
  bool in_place = true, tensors = true;
  for (const auto& each : returns) {
    in_place &= each.alias_info() != nullptr && each.alias_info()->isWrite();
    tensors &= each.type()->isSubtypeOf(*c10::TensorType::get()) || each.type()->str() == "Tensor[]";
  }
  if (in_place && (!returns.empty() || schema.is_mutable())) {
    launch([op, host] {
      torch::jit::Stack mine = host;
      op.callBoxed(mine);
    });
    torch::jit::Stack results;
    for (const auto& each : returns)
      for (size_t i = 0; i < arguments.size(); i++) {
        const auto* info = schema.arguments()[i].alias_info();
        if (info && info->isWrite() && *info == *each.alias_info()) {
          results.push_back(arguments[i]);
          break;
        }
      }
    torch::jit::drop(*stack, arguments.size());
    for (auto& each : results) stack->push_back(std::move(each));
    return;
  }
  if (tensors) {
    bool told = true;
    torch::jit::Stack shapes;
    try {
      shapes = run_on_shapes(op, arguments);
    } catch (const std::exception&) {
      told = false;
    }
    if (told) {
      auto made = [](const at::Tensor& each) {
        return empty_like_strided(each.sizes(), each.strides(), each.scalar_type());
      };
      torch::jit::Stack results = mapped(shapes, made, DEVICE), targets = mapped(results, on_host, at::kCPU);
      launch([op, host, targets] {
        torch::jit::Stack mine = host;
        op.callBoxed(mine);
        copy_results(mine, targets);
      });
      torch::jit::drop(*stack, arguments.size());
      for (auto& each : results) stack->push_back(std::move(each));
      return;
    }
  }
  synchronize_current("an operator whose result the host has to know");
  op.callBoxed(host);
  auto made = [](const at::Tensor& each) {
    at::Tensor result = empty_like_strided(each.sizes(), each.strides(), each.scalar_type());
    on_host(result).copy_(each);
    return result;
  };
  torch::jit::drop(*stack, arguments.size());
  for (auto& each : mapped(host, made, DEVICE)) stack->push_back(each);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
}

}  // namespace

// -- what torch asks of a device
// -----------------------------------------------------------------------------------

namespace {

using simulated::MarkerPtr;

c10::Stream as_stream(long id) { return c10::Stream(c10::Stream::UNSAFE, DEVICE, id); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return as_stream(simulated::current().id); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return getNewStream(DEVICE, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    return as_stream(simulated::make_stream("program").id);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return as_stream(simulated::exchange(stream.id()).id);
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override {
    delete static_cast<MarkerPtr*>(event);
  }
  void record(void** event, const c10::Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new MarkerPtr(std::make_shared<simulated::Marker>());
    MarkerPtr marker = *static_cast<MarkerPtr*>(*event);
    long id = stream.id();
    simulated::launch_or_record([marker, id] { marker->latest = simulated::stream(id).launch([] {}); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    MarkerPtr marker = *static_cast<MarkerPtr*>(event);
    long id = stream.id();
    simulated::launch_or_record([marker, id] { simulated::stream(id).wait_for(marker->latest); });
  }
  bool queryEvent(void* event) const override {
    return !event || (*static_cast<MarkerPtr*>(event))->latest->done;
  }
  void synchronizeEvent(void* event) const override {
    simulated::forbid_in_capture("synchronize an event");
    if (event) simulated::host_wait((*static_cast<MarkerPtr*>(event))->latest);
  }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream& stream) const override { return simulated::stream(stream.id()).idle(); }
  bool isStreamCapturing(const c10::Stream&) const override { return simulated::capturing(); }
  void synchronizeStream(const c10::Stream& stream) const override {
    simulated::forbid_in_capture("synchronize a stream");
    simulated::stream(stream.id()).synchronize();
    simulated::check();
  }
  void synchronizeDevice(const DeviceIndex) const override { simulated::synchronize(); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return simulated::initialized(); }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::globalContext().defaultGenerator(at::kCPU);
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  void init() const override { simulated::initialize(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    c10::DataPtr data = memory.allocate(size);
    if (storage.nbytes() && size) memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

}  // namespace
