// One piece of memory cut into the intermediate results of an operator.
#pragma once

#include "common/platform.h"

namespace sr_kernels {

// From nullptr, measures how large the memory must be.
class WorkspacePieces {
 public:
  explicit WorkspacePieces(void* workspace) : base_(static_cast<char*>(workspace)) {}
  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

inline FeatureMap dense_map(void* memory, int64_t channels, int64_t height, int64_t width,
                            bool channels_last) {
  return {memory, channels * height * width, channels_last ? 1 : height * width,
          channels_last ? width * channels : width, channels_last ? channels : 1};
}

// A dense map of an operator's own, of elements of a GPU's `kind`.
inline FeatureMap take_map(WorkspacePieces& pieces, ScalarKind kind, int64_t batch,
                           int64_t channels, int64_t height, int64_t width, bool channels_last) {
  const int64_t count = batch * channels * height * width;
  void* memory = kind == ScalarKind::kFloat32 ? static_cast<void*>(pieces.take<float>(count))
                                              : static_cast<void*>(pieces.take<uint16_t>(count));
  return dense_map(memory, channels, height, width, channels_last);
}

}  // namespace sr_kernels
