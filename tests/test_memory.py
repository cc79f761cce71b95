"""Peak memory of a whole network's forward pass, against its twin on stock operators."""

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys, torch
from sr_kernels import models

torch.manual_seed(0)
torch.set_num_threads(2)
network = models.elan_light(4, backend=sys.argv[1]).eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.inference_mode():
    network(torch.rand(1, 3, 16, 16))  # loads what torch loads at the first call
    image = torch.rand(1, 3, 180, 320)
    before = peak()
    network(image)
    print(json.dumps({"growth": peak() - before}))
"""


def growth_in_megabytes(backend):
    """Growth of the resident set over the loaded model, in 10^6 bytes; a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, backend], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)["growth"] / 1e6


def test_elan_light_forward_stays_under_250_megabytes(capsys):
    ours, stock = growth_in_megabytes("cpu"), growth_in_megabytes("reference")
    with capsys.disabled():
        print(f"\nELAN-light x4, 320x180, peak growth: cpu {ours:.0f} MB, reference {stock:.0f} MB")
    assert ours < 250
    assert ours < stock / 2
