"""The trainer on a GPU: mixed precision, averaged weights, exact resuming, memory running out. The
same bodies run on the CPU in tests/models/test_training.py."""

import pytest
from trainer_checks import check_memory_running_out, check_training

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", ["elan_light", "mafdn"])
def test_training(tmp_path, model, precision, device, backend):
    check_training(tmp_path, model, precision, device, backend)


def test_memory_running_out(tmp_path, device, backend, monkeypatch):
    check_memory_running_out(tmp_path, device, backend, monkeypatch)
