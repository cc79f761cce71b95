"""The CUDA kernels' own source, run on the CPU: what one thread computes, for every thread.

The `.cuh` file is compiled by the host compiler against CUDA's headers; only the launch is left
out. It shows that the index arithmetic and the maths are right. It does not show that the kernel
runs on a GPU.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import sr_kernels
from sr_kernels.testing import assert_within_tolerance, make_tensor

ROOT = Path(__file__).resolve().parent.parent

SOURCE = r"""
#include "shift_conv/forward.cuh"

using namespace sr_kernels;

static FeatureMap map(void* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

extern "C" void run(int kind, const int64_t* sizes, int pattern, int groups, int activation,
                    void* x, const int64_t* x_strides, void* weight, void* bias, void* residual,
                    const int64_t* residual_strides, void* y, const int64_t* y_strides) {
  ShiftConvParams p{};
  p.batch = sizes[0], p.height = sizes[1], p.width = sizes[2];
  p.c_in = sizes[3], p.c_out = sizes[4];
  p.pattern = static_cast<ShiftPattern>(pattern);
  p.groups = groups;
  p.activation = static_cast<Activation>(activation);
  p.negative_slope = 0.05;
  p.x = map(x, x_strides);
  p.weight = weight;
  p.bias = bias;
  p.residual = map(residual, residual_strides);
  p.y = map(y, y_strides);
  for (int64_t pixel = 0; pixel < p.batch * p.height * p.width; ++pixel)
    for (int64_t first = 0; first < p.c_out; first += kOutputs) {
      if (kind == 0) shift_conv2d_pixel<float>(p, pixel, first);
      if (kind == 2) shift_conv2d_pixel<__half>(p, pixel, first);
      if (kind == 3) shift_conv2d_pixel<__nv_bfloat16>(p, pixel, first);
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and CUDA's headers (nvcc is not on PATH)")
    listing = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    line = next(line for line in listing.splitlines() if line.startswith("#$ INCLUDES="))
    includes = line.split("=", 1)[1].replace('"', "").split()
    folder = tmp_path_factory.mktemp("cuda_source")
    (folder / "run.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-I", ROOT / "csrc", *includes]
    subprocess.run(["g++", *flags, "-o", folder / "run.so", folder / "run.cpp"], check=True)
    return ctypes.CDLL(str(folder / "run.so"))


def strides_of(tensor):
    return (ctypes.c_int64 * 4)(*tensor.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pattern", ["plus", "cross"])
def test_shift_conv2d(library, dtype, layout, pattern):
    n, c_in, c_out, h, w = 2, 13, 11, 5, 7
    x = make_tensor((n, c_in, h, w), dtype, layout=layout)
    weight = make_tensor((c_out, c_in, 1, 1), dtype, seed=1, scale=c_in**-0.5)
    bias = make_tensor((c_out,), dtype, seed=2)
    residual = make_tensor((n, c_out, h, w), dtype, seed=3)
    y = torch.full_like(residual, float("nan"))
    library.run(
        {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}[dtype],
        (ctypes.c_int64 * 5)(n, h, w, c_in, c_out),
        ["plus", "cross"].index(pattern),
        5,
        4,
        ctypes.c_void_p(x.data_ptr()),
        strides_of(x),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(bias.data_ptr()),
        ctypes.c_void_p(residual.data_ptr()),
        strides_of(residual),
        ctypes.c_void_p(y.data_ptr()),
        strides_of(y),
    )

    def stock(*tensors):
        x, weight, bias, residual = tensors
        return sr_kernels.reference.shift_conv2d(
            x, weight, bias, residual=residual, activation="silu", pattern=pattern
        )

    tensors = (x, weight, bias, residual)
    assert_within_tolerance(y, stock(*tensors), stock(*(t.double() for t in tensors)))
