"""Which implementation runs, what is said when it is not the one hoped for, and every CPU copy."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from threads import threads

import sr_kernels
from sr_kernels import _library, backends
from sr_kernels.testing import bitwise_equal, make_tensor

X = make_tensor((1, 10, 6, 6))
W = make_tensor((10, 10, 1, 1), seed=1)


def run_python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_auto_takes_the_cpu_kernels_for_cpu_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("shift_conv2d", (X,)) == "cpu"


def test_the_argument_beats_the_context_which_beats_auto():
    with sr_kernels.use_backend("reference"):
        assert backends.choose("shift_conv2d", (X,)) == "reference"
        assert backends.choose("shift_conv2d", (X,), "cpu") == "cpu"
        assert backends.choose("shift_conv2d", (X,), "auto") == "cpu"
        with sr_kernels.use_backend(None):
            assert backends.choose("shift_conv2d", (X,)) == "cpu"
        assert backends.current_backend() == "reference"
    assert backends.current_backend() == "auto"


def test_the_choice_is_given_back_after_an_error():
    with pytest.raises(KeyError), sr_kernels.use_backend("reference"):
        raise KeyError
    assert backends.current_backend() == "auto"


def test_a_named_backend_that_cannot_run_raises_with_the_reason():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run shift_conv2d: .*Triton"):
        sr_kernels.shift_conv2d(X, W, backend="triton")
    with (
        sr_kernels.use_backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' cannot run shift_conv2d"),
    ):
        sr_kernels.shift_conv2d(X, W)
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        backends.choose("shift_conv2d", (X.to("meta"),), "cpu")


@pytest.mark.parametrize(
    ("built", "capability", "fits"),
    [
        ("8.0;9.0a;10.0+PTX", (8, 0), True),
        ("8.0;9.0a;10.0+PTX", (8, 9), True),  # the code of 8.0 runs on all of 8.x
        ("8.0;9.0a;10.0+PTX", (9, 0), True),
        ("8.0;9.0a;10.0+PTX", (10, 3), True),
        ("8.0;9.0a;10.0+PTX", (12, 0), True),  # from PTX
        ("8.0;9.0a;10.0+PTX", (7, 5), False),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (12, 0), False),  # PTX of 9.0a is for 9.0 alone
        ("8.6", (8, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
        ("", (7, 5), True),  # nothing is known
    ],
)
def test_a_gpu_that_the_cuda_kernels_were_not_built_for(
    monkeypatch, tmp_path, built, capability, fits
):
    (tmp_path / "_build.json").write_text(json.dumps({"cuda": {"archs": built}}))
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_library, "CUDA_LIBRARY", _library.LoadResult("_C_cuda", None, None))
    _library.why_no_image.cache_clear()
    try:
        x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float16)
        ok, reason = backends.can_run("cuda", "shift_conv2d", [x])
    finally:
        _library.why_no_image.cache_clear()
    assert ok == fits
    assert fits or f"built for compute capability {built}, the GPU has {capability[0]}." in reason


@pytest.mark.parametrize("with_triton", [True, False])
def test_heads_too_wide_for_the_cuda_kernels_go_to_the_next_backend(monkeypatch, with_triton):
    monkeypatch.setattr(_library, "CUDA_LIBRARY", _library.LoadResult("_C_cuda", None, None))
    monkeypatch.setattr(backends, "_why_no_cuda", lambda index: "")
    no_triton = "" if with_triton else "no Triton here"
    monkeypatch.setattr(backends, "_why_no_triton", lambda device: no_triton)
    monkeypatch.setattr(backends, "_warned", set())
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16, is_cuda=True)
    choose = partial(backends.choose, "window_attention", [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(head_channels=128) == "cuda"
        with pytest.raises(RuntimeError, match=r"'cuda' .*up to 128 channels, not 129"):
            choose("cuda", head_channels=129)
        if with_triton:
            assert choose(head_channels=129) == "triton"
            return
    with pytest.warns(sr_kernels.FallbackWarning, match="128 channels, not 129; no Triton here"):
        assert choose(head_channels=129) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(head_channels=129) == "reference"


def test_what_triton_lacks_says_so():
    expected = (False, "channel_moments has no Triton kernel")
    assert backends.can_run("triton", "channel_moments", (torch.ones(1, 4, 2, 2),)) == expected


def test_every_attention_says_how_wide_its_heads_are(monkeypatch):
    seen = {}

    def choose(op, tensors, backend=None, *, head_channels=0, real=backends.choose):
        seen[op] = head_channels
        return real(op, tensors, backend, head_channels=head_channels)

    monkeypatch.setattr(backends, "choose", choose)
    q, v = make_tensor((1, 6, 4, 4)), make_tensor((1, 10, 4, 4), seed=1)
    _, scores = sr_kernels.window_attention(q, q, v, window=4, num_heads=2, return_scores=True)
    sr_kernels.apply_window_scores(scores, v)
    assert seen == {"window_attention": 5, "apply_window_scores": 5}
    seen.clear()
    options = {"windows": (2, 4), "return_scores": True}
    x, w = make_tensor((1, 14, 4, 4)), make_tensor((28, 14, 1, 1), seed=1)
    _, scores = sr_kernels.grouped_window_attention(torch.cat((x, x), 1), **options)
    sr_kernels.apply_window_scores(scores, x)
    _, scores = sr_kernels.grouped_attention_block(x, w, None, w[:14], None, **options)
    sr_kernels.apply_grouped_attention_block(scores, x, w[:14], None, w[:14], None)
    assert len(seen) == 4
    assert set(seen.values()) == {7}


def test_unknown_names_are_refused_with_the_list():
    accepted = "name must be one of auto, cuda, triton, cpu, reference"
    with pytest.raises(ValueError, match=accepted), sr_kernels.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.choose("shift_conv2d", (X,), "CPU")


def test_the_environment_variable_is_read_at_import():
    program = "import sr_kernels.backends as b; print(b.current_backend())"
    assert run_python(program, SR_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(program, SR_KERNELS_BACKEND="").stdout.strip() == "auto"


@pytest.mark.parametrize(
    "use",
    [
        "b.current_backend()",
        "b.use_backend('cpu').__enter__()",
        "sr_kernels.shift_conv2d(torch.ones(1, 5, 2, 2), torch.ones(1, 5, 1, 1))",
    ],
)
def test_a_wrong_environment_variable_is_refused_at_first_use(use):
    program = f"import torch, sr_kernels, sr_kernels.backends as b; print('imported'); {use}"
    wrong = run_python(program, SR_KERNELS_BACKEND="fast")
    assert wrong.stdout.strip() == "imported"
    assert wrong.returncode != 0
    assert "SR_KERNELS_BACKEND must be one of auto" in wrong.stderr
    assert "got 'fast'" in wrong.stderr


def test_without_the_library_auto_falls_back_and_says_so_once(monkeypatch):
    missing = _library.LoadResult("_C", None, "_C.abi3.so was not built")
    monkeypatch.setattr(_library, "CPU_LIBRARY", missing)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(sr_kernels.FallbackWarning, match=r"reference.*_C\.abi3\.so was not built"):
        y = sr_kernels.shift_conv2d(X, W)
    assert bitwise_equal(y, sr_kernels.reference.shift_conv2d(X, W))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sr_kernels.shift_conv2d(X, W)
    with pytest.raises(RuntimeError, match="was not built"):
        sr_kernels.shift_conv2d(X, W, backend="cpu")
    assert ("cpu", False, "_C.abi3.so was not built") in backends.report()


def test_a_library_that_does_not_load_says_the_loaders_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    result = _library._load("_C")
    assert not result.loaded
    assert "_C.abi3.so does not load" in result.error
    assert "too short" in result.error or "invalid ELF header" in result.error


def test_report_names_every_backend():
    rows = {name: (available, detail) for name, available, detail in backends.report()}
    assert tuple(rows) == backends.BACKENDS
    assert rows["reference"][0]
    assert rows["cpu"] == (True, f"{backends.cpu_capability()} kernels")


def test_a_bad_instruction_set_is_an_error():
    program = "import sr_kernels.backends as b; b.cpu_capability()"
    wrong = run_python(program, SR_KERNELS_CPU_ISA="sse9")
    assert "SR_KERNELS_CPU_ISA must be portable, avx2 or avx512" in wrong.stderr
    call = "import torch, sr_kernels as s; s.shift_conv2d(torch.ones(1,5,2,2), torch.ones(1,5,1,1))"
    wrong = run_python(call, SR_KERNELS_CPU_ISA="sse9")
    assert wrong.returncode != 0
    assert "SR_KERNELS_CPU_ISA must be portable, avx2 or avx512, got 'sse9'" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_copy_of_the_kernels_passes_the_smoke_tests(isa):
    """The kernels are compiled once per instruction set: each copy must be right, not only ours."""
    probe = run_python(
        "import sr_kernels.backends as b; print(b.cpu_capability())", SR_KERNELS_CPU_ISA=isa
    )
    if probe.stdout.strip() != isa:
        pytest.skip(f"this processor or build has no {isa} kernels")
    folder = Path(__file__).parent
    tests = [folder / f"test_{name}.py" for name in FAMILIES]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "smoke or asan", *tests, *NOT_HERE],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "SR_KERNELS_CPU_ISA": isa},
    )
    assert result.returncode == 0, result.stdout[-4000:]


FAMILIES = ("shift_conv", "window_attention", "attention_gates", "conv3x3")
NOT_HERE = ("-p", "no:cacheprovider")


def test_threads_are_torchs():
    """Kernels run in torch's pool: with one thread the result is the same, bit by bit."""
    x, weight = make_tensor((1, 20, 90, 90)), W.repeat(1, 2, 1, 1)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(sr_kernels.shift_conv2d(x, weight))
    assert bitwise_equal(*results)
