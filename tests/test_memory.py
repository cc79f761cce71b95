"""Peak memory of a whole network's forward pass, against its twin on stock operators."""

import json
import os
import subprocess
import sys

PROGRAM = r"""
import json, sys, torch
from sr_kernels import models
from sr_kernels.benchmarks import measure

torch.manual_seed(0)
torch.set_num_threads(2)
network = models.elan_light(4, backend=sys.argv[1]).eval()
if sys.argv[2:]:
    network = models.plan(network)
with torch.inference_mode():
    network(torch.rand(1, 3, 16, 16))  # loads what torch loads at the first call
    image = torch.rand(1, 3, 180, 320)
    before = measure.resident()
    measure.reset_peak()
    network(image)
    print(json.dumps({"growth": measure.peak() - before}))
"""


def growth_in_megabytes(*arguments):
    """Growth of the resident set over the loaded model, in 10^6 bytes; a process of its own.

    Every map is returned when it is freed. Left alone, glibc keeps some or not by how the heap
    happens to lie, and the same program grows by 180 to 270 MB.
    """
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)["growth"] / 1e6


def test_elan_light_forward_takes_little_memory(capsys):
    stock = growth_in_megabytes("reference")
    ours, plan = growth_in_megabytes("cpu"), growth_in_megabytes("cpu", "plan")
    with capsys.disabled():
        print(
            f"\nELAN-light x4, 320x180, peak growth: plan {plan:.0f} MB, cpu {ours:.0f} MB, "
            f"reference {stock:.0f} MB"
        )
    assert ours < 180
    assert plan < 70
    assert plan < stock / 4


OUT_OF_MEMORY = """
import resource, torch, sr_kernels
from sr_kernels.inference import is_out_of_memory

x = torch.zeros(1, 5, 1, 1)
q = torch.randn(1, 400, 64, 64)
sr_kernels.shift_conv2d(x, torch.zeros(1, 5, 1, 1))  # loads what is loaded at the first call
sr_kernels.window_attention(x, x, x, window=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 20_000_000, used + 20_000_000))
calls = {
    "output": lambda: sr_kernels.shift_conv2d(x.expand(1, 5, 4096, 4096), torch.zeros(1, 5, 1, 1)),
    "scratch": lambda: sr_kernels.window_attention(q, q, q, window=64),
    "weight": lambda: sr_kernels.shift_conv2d(
        x.expand(1, 5, 1, 1), torch.zeros(1, 1, 1, 1).expand(10_000_000, 5, 1, 1)
    ),
}
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        assert "not enough memory" in str(error) and is_out_of_memory(error), (name, error)
    else:
        raise SystemExit(f"{name}: there was memory enough")
"""


def test_running_out_of_memory_inside_an_operator_says_so():
    """The tiled upscaler recognises it by these words and goes on with smaller tiles."""
    result = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
