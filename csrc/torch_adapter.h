// The one bridge between torch's stable C++ API and the kernels: argument checks, tensor -> params,
// outputs in the memory format of the input, and torch's thread pool.
//
// The checks repeat those of sr_kernels.functional in short: the operators can be called directly
// (torch.ops.sr_kernels.*), and a kernel must never see a size that it was not written for.
#pragma once

#if defined(USE_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/platform.h"

namespace sr_kernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

// require(condition, "sr_kernels::op: ", ...): a RuntimeError in Python.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error(message(parts...));
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

inline void require_shape(const Tensor& tensor, const std::vector<int64_t>& shape,
                          const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && tensor.size(static_cast<int64_t>(i)) == shape[i];
    expected += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  }
  require(same, name, " must have shape (", expected, "), got ", shape_of(tensor));
}

inline ScalarKind scalar_kind(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ScalarKind::kFloat32;
    case ScalarType::Double:
      return ScalarKind::kFloat64;
    case ScalarType::Half:
      return ScalarKind::kFloat16;
    case ScalarType::BFloat16:
      return ScalarKind::kBFloat16;
    default:
      throw std::runtime_error(
          message(name, " must be float32, float64, float16 or bfloat16, got another dtype"));
  }
}

// float64 for float64 tensors, float32 for all others: the type of statistics such as log-sum-exp.
inline ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void require_device_of(const Tensor& tensor, const Tensor& reference, const char* name,
                              const char* reference_name) {
  require(tensor.is_cpu() == reference.is_cpu() &&
              tensor.get_device_index() == reference.get_device_index(),
          name, " must be on the device of ", reference_name);
}

inline void require_like(const Tensor& tensor, const Tensor& reference, const char* name,
                         const char* reference_name) {
  require(tensor.scalar_type() == reference.scalar_type(), name, " must have the dtype of ",
          reference_name);
  require_device_of(tensor, reference, name, reference_name);
}

inline void require_feature_map(const Tensor& tensor, const char* name) {
  require(tensor.dim() == 4, name, " must be (N, C, H, W), got ", tensor.dim(), " dimensions");
}

inline FeatureMap feature_map(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}
inline FeatureMap feature_map(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? feature_map(*tensor) : FeatureMap{};
}

// Torch's stable API reports a failed call without its cause. These calls fail for want of memory
// alone, and callers (a tiled upscaler, say) want to know that.
template <typename Function>
Tensor allocate(const Function& function) {
  try {
    return function();
  } catch (const std::exception&) {
    throw std::runtime_error("sr_kernels: not enough memory for a tensor");
  }
}

// A weight or bias as one dense block (weights are small: a copy costs nothing).
inline Tensor dense(const Tensor& tensor) {
  return allocate([&] { return torch::stable::contiguous(tensor); });
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return dense(*tensor);
}
inline void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr() : nullptr;
}

// torch's own rule (suggest_memory_format): strides that ascend in the order C, W, H, N.
// sr_kernels/ops/_registration.py has the same rule for the fake kernels.
inline MemoryFormat memory_format_of(const Tensor& tensor) {
  int64_t least = 0;
  if (tensor.stride(1) == 0) return MemoryFormat::Contiguous;
  for (const int64_t d : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 0 || stride < least) return MemoryFormat::Contiguous;
    if (d == 0 && least == tensor.stride(1)) return MemoryFormat::Contiguous;
    least = size > 1 ? stride * size : stride;
  }
  return MemoryFormat::ChannelsLast;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return allocate([&] { return torch::stable::new_empty(like, sizes, dtype); });
}
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_tensor(like, sizes, like.scalar_type());
}

// An uninitialised (N, channels, H, W) tensor of like's dtype, device and memory format.
inline Tensor new_feature_map(const Tensor& like, int64_t channels) {
  const std::vector<int64_t> sizes{like.size(0), channels, like.size(2), like.size(3)};
  return allocate([&] {
    return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(),
                                std::nullopt, memory_format_of(like));
  });
}

// Where an operator writes a feature map: `out`, or a new one.
inline Tensor output_or_new(const std::optional<Tensor>& out, const Tensor& like,
                            int64_t channels) {
  if (!out.has_value()) return new_feature_map(like, channels);
  require_shape(*out, {like.size(0), channels, like.size(2), like.size(3)}, "out");
  require_like(*out, like, "out", "x");
  return *out;
}

// What a backward operator returns for a gradient that nobody asked for.
inline Tensor no_gradient(const Tensor& like) { return new_tensor(like, {0}); }

// Torch's thread pool as the kernels see it; one work item is the unit of distribution. Threads
// take runs of items until none is left, a half of a fair share of the rest at a time: whoever is
// held up by other programs takes less, and the last runs are short. No result depends on who
// computed what. The first exception of any thread is thrown again here: torch's C interface would
// lose its message.
inline void torch_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (threads <= 1) return body(0, count, context);
  std::atomic<int64_t> next{0};
  std::exception_ptr first;
  std::mutex mutex;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t begin = next.load(); begin < count;) {
        const int64_t end = begin + std::max<int64_t>(1, (count - begin) / (2 * threads));
        if (!next.compare_exchange_weak(begin, end)) continue;
        body(begin, end, context);
        begin = next.load();
      }
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!first) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

#if defined(USE_CUDA)
// Torch's current stream on the tensor's device: a cudaStream_t.
inline void* current_cuda_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// Makes the tensor's device current while it lives.
struct CudaGuard {
  explicit CudaGuard(const Tensor& tensor) : guard(tensor.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

// Memory of torch's allocator for one operator's intermediate results. It is given back while the
// kernels that use it may still be queued: torch hands it out again in the order of the stream.
class CudaWorkspace {
 public:
  CudaWorkspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) tensor_ = new_tensor(like, {bytes}, ScalarType::Byte);
  }
  void* data() const { return data_or_null(tensor_); }

 private:
  std::optional<Tensor> tensor_;
};

// error: what a launch function returned, nullptr for success.
inline void require_launched(const char* op, const char* error) {
  require(error == nullptr, op, ": ", error == nullptr ? "" : error);
}
#endif

}  // namespace sr_kernels
