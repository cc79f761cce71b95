// The channel moments' operators, for any device: checks, outputs, params. Backend says what a
// device adds to that: a Guard, made from x before anything else, and run(params, x).
#pragma once

#include "channel_moments/params.h"
#include "torch_adapter.h"

namespace sr_kernels {

template <typename Backend>
struct ChannelMomentsOperators {
  // mean and covariance are float64, whatever x is.
  static ChannelMomentsParams params(const char* op, const Tensor& x) {
    require_feature_map(x, "x");
    require(x.numel() > 0, op, ": x must have at least one channel and one pixel, got ",
            shape_of(x));
    ChannelMomentsParams p{};
    p.kind = scalar_kind(x, "x");
    p.batch = x.size(0);
    p.channels = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    p.x = feature_map(x);
    return p;
  }

  static std::tuple<Tensor, Tensor> channel_moments(const Tensor& x) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    ChannelMomentsParams p = params("channel_moments", x);
    Tensor mean = new_tensor(x, {p.channels}, ScalarType::Double);
    Tensor covariance = new_tensor(x, {p.channels, p.channels}, ScalarType::Double);
    p.mean = static_cast<double*>(mean.data_ptr());
    p.covariance = static_cast<double*>(covariance.data_ptr());
    Backend::run(p, x);
    return {mean, covariance};
  }

  // others: gradients that reached x by other ways.
  static Tensor backward(const char* op, const Tensor& mean_grad_in,
                         const Tensor& covariance_grad_in, const Tensor& x, const Tensor& mean_in,
                         const std::optional<Tensor>& other, const std::optional<Tensor>& another) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    ChannelMomentsBackwardParams p{};
    p.forward = params(op, x);
    const int64_t c = p.forward.channels;
    const auto statistic = [&](const Tensor& tensor, const std::vector<int64_t>& shape,
                               const char* name) {
      require_shape(tensor, shape, name);
      require(tensor.scalar_type() == ScalarType::Double, name, " must be float64");
      require_device_of(tensor, x, name, "x");
      return dense(tensor);
    };
    const Tensor mean_grad = statistic(mean_grad_in, {c}, "mean_grad");
    const Tensor covariance_grad = statistic(covariance_grad_in, {c, c}, "covariance_grad");
    const Tensor mean = statistic(mean_in, {c}, "mean");
    Tensor dx = new_feature_map(x, c);
    p.forward.mean = static_cast<double*>(mean.data_ptr());
    p.mean_gradient = static_cast<const double*>(mean_grad.data_ptr());
    p.covariance_gradient = static_cast<const double*>(covariance_grad.data_ptr());
    p.dx = feature_map(dx);
    const auto join = [&](const std::optional<Tensor>& tensor, FeatureMap& map, const char* name) {
      if (!tensor.has_value()) return;
      require_shape(*tensor, {x.size(0), c, x.size(2), x.size(3)}, name);
      require_like(*tensor, x, name, "x");
      map = feature_map(*tensor);
    };
    join(other, p.others[0], "other_grad");
    join(another, p.others[1], "another_grad");
    Backend::run(p, x);
    return dx;
  }

  static Tensor channel_moments_backward(const Tensor& mean_grad, const Tensor& covariance_grad,
                                         const Tensor& x, const Tensor& mean) {
    return backward("channel_moments_backward", mean_grad, covariance_grad, x, mean, std::nullopt,
                    std::nullopt);
  }

  static Tensor channel_moments_joint_backward(const Tensor& mean_grad,
                                               const Tensor& covariance_grad, const Tensor& x,
                                               const Tensor& mean, const Tensor& other_grad,
                                               const std::optional<Tensor>& another_grad) {
    return backward("channel_moments_joint_backward", mean_grad, covariance_grad, x, mean,
                    other_grad, another_grad);
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("channel_moments", TORCH_BOX(&ChannelMomentsOperators::channel_moments));
    m.impl("channel_moments_backward",
           TORCH_BOX(&ChannelMomentsOperators::channel_moments_backward));
  }

  // Parts of training on the CPU.
  template <typename Library>
  static void implement_for_cpu(Library& m) {
    m.impl("channel_moments_joint_backward",
           TORCH_BOX(&ChannelMomentsOperators::channel_moments_joint_backward));
  }
};

}  // namespace sr_kernels
