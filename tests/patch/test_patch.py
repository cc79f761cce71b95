"""The mechanism: what patching changes, what it must not, and what still works afterwards."""

from __future__ import annotations

import copy
import enum
import functools
import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import third_party as tp
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sr_kernels.nn
from sr_kernels import _library, backends
from sr_kernels.patching import (
    NotRecognised,
    PatchError,
    Recogniser,
    core,
    elan,
    patch,
    patched,
    recognisers,
    register,
    swap,
)
from sr_kernels.patching import recogniser as recogniser_module
from sr_kernels.patching.swap import PatchedType, replacement_of

pytestmark = pytest.mark.usefixtures("of_any_size")

HERE = Path(__file__).resolve().parent


class Net(nn.Module):
    """One block of each kind, on (N, 3, H, W) with H and W multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 15, 3, padding=1)
        self.block = tp.ELAB(15, 2, 1, (2, 4, 8))
        self.gate = tp.CCALayer(15, 3)
        self.other = tp.with_tanh_gate(15)
        self.tail = nn.Conv2d(15, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.other(self.gate(self.block(self.head(x))))) + x


@pytest.fixture
def net() -> nn.Module:
    model = Net()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(2, 3, 16, 16))  # running statistics
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(1, 3, 16, 24)


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- what patching changes


def test_the_module_is_untouched_but_for_its_class(net: nn.Module, x: Tensor) -> None:
    before = {path: dict(vars(m)) for path, m in net.named_modules()}
    parameters = {name: (id(p), p._version) for name, p in net.named_parameters()}
    kinds, y = classes(net), output(net, x)
    report = patch(net)
    assert [e.path for e in report.replaced] == ["block", "gate"]
    for path, module in net.named_modules():
        now = vars(module)
        assert list(now) == list(before[path])
        assert all(now[name] is value for name, value in before[path].items()), path
    assert {n: (id(p), p._version) for n, p in net.named_parameters()} == parameters
    assert isinstance(net.block, tp.ELAB)
    assert type(net.block).__name__ == "ELAB"
    assert set(vars(type(net.block))) - {"__module__", "__qualname__", "__doc__"} == {"forward"}
    close(output(net, x), y)
    report.restore()
    assert classes(net) == kinds
    assert torch.equal(output(net, x), y)
    for path, module in net.named_modules():
        assert list(vars(module)) == list(before[path])
        assert all(vars(module)[name] is value for name, value in before[path].items()), path
    report.restore()
    assert classes(net) == kinds


def test_third_party_classes_and_torch_are_untouched(net: nn.Module) -> None:
    watched = [tp.ELAB, tp.CCALayer, nn.Module, nn.Conv2d, torch.nn.functional, torch.Tensor]
    before = [dict(vars(thing)) for thing in watched]
    with patched(net):
        assert [dict(vars(thing)) for thing in watched] == before


def test_one_class_for_modules_that_are_alike() -> None:
    gates = nn.Sequential(tp.CALayer(32, 4), tp.CALayer(32, 4), tp.CALayer(16, 4))
    patch(gates)
    assert type(gates[0]) is type(gates[1]) is not type(gates[2])
    assert type(type(gates[0])) is PatchedType


def test_patching_again_changes_nothing(net: nn.Module) -> None:
    first = patch(net)
    kinds = classes(net)
    second = patch(net)
    assert classes(net) == kinds
    assert not second.replaced
    assert "patched already" in {e.path: e.reason for e in second.entries}["block"]
    second.restore()
    assert classes(net) == kinds
    first.restore()
    assert classes(net) != kinds


def test_nested(net: nn.Module) -> None:
    plain = classes(net)
    with patched(net, include=["gate"]):
        inner = classes(net)
        assert inner != plain
        with patched(net) as report:
            assert [e.path for e in report.replaced] == ["block"]
        assert classes(net) == inner
    assert classes(net) == plain


def test_parts_first_then_the_whole(net: nn.Module, x: Tensor) -> None:
    y, plain = output(net, x), classes(net)
    inner = patch(net.block.modules_lfe)
    assert len(inner.replaced) == 2
    outer = patch(net)
    assert {e.path for e in outer.replaced} == {"block", "gate"}
    close(output(net, x), y)
    inner.restore()  # in whichever order
    close(output(net, x), y)
    outer.restore()
    assert classes(net) == plain


def test_restored_after_an_exception(net: nn.Module) -> None:
    plain = classes(net)
    with pytest.raises(ZeroDivisionError), patched(net):
        raise ZeroDivisionError
    assert classes(net) == plain


def test_never_half_patched(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, own = classes(net), core._patch_one

    def second_fails(path: str, *rest: Any) -> Any:
        if path == "gate":
            raise KeyboardInterrupt
        return own(path, *rest)

    monkeypatch.setattr(core, "_patch_one", second_fails)
    with pytest.raises(KeyboardInterrupt):
        patch(net)
    assert classes(net) == plain


def test_random_numbers_gradients_and_modes_stay(net: nn.Module) -> None:
    net.train()
    net.gate.eval()
    modes = [m.training for m in net.modules()]
    buffers = copy.deepcopy(dict(net.named_buffers()))
    state = torch.get_rng_state()
    patch(net, verify=torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_a_shared_module_is_replaced_once(x: Tensor) -> None:
    shared = tp.PA(3)
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 3, padding=1), shared).eval()
    y = output(model, x)
    report = patch(model)
    assert len(report.replaced) == 1
    assert model[0] is model[2]
    close(output(model, x), y)


def test_the_network_itself_may_be_the_module() -> None:
    gate = tp.CALayer(32, 4)
    report = patch(gate)
    assert (report.replaced[0].path, replacement_of(gate) is not None) == ("", True)
    assert "(the network)" in str(report)


# -------------------------------------------------------------------------------------- the report


def test_report(net: nn.Module) -> None:
    report = patch(net)
    assert [e.path for e in report.entries] == [path for path, _ in net.named_modules()]
    assert len(report.replaced) + len(report.skipped) == len(report.entries)
    by_path = {e.path: e for e in report.entries}
    assert by_path["block"].class_name == "ELAB"
    assert by_path["block"].replaced_by == "shift_conv_block + grouped_attention_block"
    assert by_path["block.modules_lfe.lfe_0"].reason == "part of block, replaced as one"
    assert by_path["head"].reason == "stock is faster for less than 12 channels"
    assert "Tanh" in by_path["other"].reason
    text = str(report)
    assert text.startswith("2 modules replaced, 1 of known kinds left alone")
    assert "1 x CCALayer" in text
    assert "left alone: Tanh" in text


def test_include_and_exclude(net: nn.Module) -> None:
    def chosen(**selection: Any) -> list[str]:
        with patched(net, **selection) as report:
            return [e.path for e in report.replaced]

    assert chosen(include=["gate"]) == ["gate"]
    assert chosen(include=["ELAB"]) == ["block"]
    assert chosen(include=[tp.CCALayer]) == ["gate"]
    assert chosen(include=tp.CCALayer) == ["gate"]
    assert chosen(include=["block.modules_lfe.*"]) == [
        "block.modules_lfe.lfe_0",
        "block.modules_lfe.lfe_1",
    ]
    assert chosen(exclude=["gate"]) == ["block"]
    assert chosen(exclude=["block*"]) == ["gate"]
    assert chosen(include=["block", "gate"], exclude=["ELAB"]) == ["gate"]
    assert chosen(include=[]) == []


def test_nothing_that_holds_an_excluded_part_is_replaced_as_one(net: nn.Module) -> None:
    report = patch(net, exclude=["GMSA"])
    assert [e.path for e in report.replaced] == [
        *(f"block.modules_lfe.lfe_{i}" for i in (0, 1)),
        "gate",
    ]
    reasons = {e.path: e.reason for e in report.entries}
    assert reasons["block"] == "holds block.modules_gmsa.gmsa_0, which is in exclude"
    assert reasons["block.modules_gmsa.gmsa_0"] == "in exclude"
    blocks = [f"IMDB{i}.cca" for i in (1, 2)]
    network = tp.IMDN(16, 2, 2)
    assert not {"", "IMDB1", "IMDB2", *blocks} & {*patched_names(network, exclude=["CCALayer"])}
    names = patched_names(tp.IMDN(16, 2, 2), exclude=["IMDB1.cca"])
    assert "IMDB2" in names
    assert not {"", "IMDB1", "IMDB1.cca", "IMDB2.cca"} & {*names}
    assert patched_names(tp.IMDN(16, 2, 2), exclude=[nn.Conv2d]) == []
    assert patched_names(tp.IMDN(16, 2, 2), exclude=["gate"]) == [""]


def test_bad_arguments(net: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        patch(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="include must hold"):
        patch(net, include=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"include must hold paths, .* got int"):
        patch(net, include=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="verify must be a tensor"):
        patch(net, verify=[1])  # type: ignore[arg-type]


def test_strict(net: nn.Module) -> None:
    plain = classes(net)
    with pytest.raises(PatchError, match="other: Tanh"):
        patch(net, strict=True)
    assert classes(net) == plain
    patch(net, strict=True, include=["block", "gate"])
    with pytest.raises(PatchError, match="nothing in this network"):
        patch(nn.Conv2d(3, 3, 3), strict=True)


# ------------------------------------------------------------------------------------------ verify


def test_verify(net: nn.Module, x: Tensor) -> None:
    assert len(patch(net, verify=x).replaced) == 2
    assert len(patched_names(Net(), verify=(x,))) == 2


def patched_names(model: nn.Module, **options: Any) -> list[str]:
    return [e.path for e in patch(model, **options).replaced]


class Lying(Recogniser):
    """Passes any probe, and is wrong on images."""

    name, replacement = "lying", "nonsense"

    def options(self, module: nn.Module) -> list[Any]:
        return [()] if type(module) is tp.CCALayer else []

    def examples(self, module: nn.Module, options: Any) -> list[tuple[Any, ...]]:
        return [(torch.randn(1, 15, 2, 2, dtype=torch.float64),)]

    def forward(self, module: nn.Module, options: Any, *args: Any) -> Any:
        y = tp.CCALayer.forward(module, args[0])
        return y if args[0].shape[2] == 2 else 2 * y


@pytest.fixture
def own_recognisers() -> Any:
    """What a test registers is gone after it."""
    before = dict(recogniser_module._RECOGNISERS)
    yield
    recogniser_module._RECOGNISERS.clear()
    recogniser_module._RECOGNISERS.update(before)


@pytest.mark.usefixtures("own_recognisers")
def test_verify_refuses_and_names_the_module(net: nn.Module, x: Tensor) -> None:
    register(Lying())
    plain = classes(net)
    with pytest.raises(PatchError, match="more than 1e-03 is refused; it begins with gate"):
        patch(net, verify=x)
    assert classes(net) == plain
    assert "nonsense" in str(patch(net))


@pytest.mark.usefixtures("own_recognisers")
def test_verify_finds_the_module_among_many() -> None:
    register(Lying())
    gates = [tp.CALayer(15, 3) for _ in range(40)]
    network = nn.Sequential(*gates[:37], tp.CCALayer(15, 3), *gates[37:]).eval()
    with pytest.raises(PatchError, match="it begins with 37"):
        patch(network, verify=torch.rand(1, 15, 9, 9))
    assert not any(isinstance(type(part), PatchedType) for part in network.modules())


def test_verify_finds_the_block_of_a_body(
    body: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, wrong = elan._lfe_run, {id(parameter) for parameter in body[2].parameters()}

    def lies(x: Tensor, lfe: Any, weights: Any, **options: Any) -> Tensor:
        return (1 + any(id(w) in wrong for w in weights)) * own(x, lfe, weights, **options)

    monkeypatch.setattr(elan, "_lfe_run", lies)
    with pytest.raises(PatchError, match="it begins with 2"):
        patch(body, verify=torch.rand(1, 15, 16, 16))


def test_verify_says_that_a_network_is_random() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return self[0](x) * self.calls

    class Alternating(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.odd = not getattr(self, "odd", False)
            return self[0](x) * (2 if self.odd else 3)

    x = torch.rand(1, 16, 9, 9)
    for network in (
        Noisy(tp.CCALayer(16, 4)),
        Alternating(tp.CCALayer(16, 4)),
        Alternating(nn.ReLU()),
    ):
        with pytest.raises(PatchError, match="with nothing replaced too"):
            patch(network.eval(), verify=x)


def test_verify_refuses_what_it_cannot_run(net: nn.Module) -> None:
    plain = classes(net)
    with pytest.raises(RuntimeError):
        patch(net, verify=torch.rand(1, 5, 8, 8))
    assert classes(net) == plain


# --------------------------------------------------------------------- attributes of the module


class Configured(tp.CALayer):
    """A look-alike: channel attention only if ``v`` is one of those that change nothing."""

    def __init__(self, v: Any) -> None:
        super().__init__(8, 4)
        self.v = v

    def forward(self, x: Tensor) -> Tensor:
        v = self.v
        if isinstance(v, Scale):
            v = v.value
        elif isinstance(v, (types.SimpleNamespace, Opaque)):
            v = v.scale
        elif isinstance(v, np.ndarray):
            v = float(v[0])
        y = super().forward(x)
        return v(y) if callable(v) else y * v


class Scale(enum.Enum):
    ONE = 1
    TWO = 2


class Opaque:
    def __init__(self, scale: int) -> None:
        self.scale = scale

    def times(self, y: Tensor) -> Tensor:
        return y * self.scale


def power(exponent: int, y: Tensor) -> Tensor:
    return y**exponent


# Right, then wrong: what changes nothing, and what does.
SETTINGS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tensor": lambda: (torch.tensor(1.0), torch.tensor(2.0)),
    "list of tensors": lambda: (MultipliesBy([torch.ones(2)]), MultipliesBy([torch.zeros(2)])),
    "enum": lambda: (Scale.ONE, Scale.TWO),
    "namespace": lambda: (types.SimpleNamespace(scale=1), types.SimpleNamespace(scale=2)),
    "numpy scalar": lambda: (np.float32(1), np.float32(2)),
    "numpy array": lambda: (np.ones(1), np.full(1, 2.0)),
    "builtin": lambda: (torch.clone, torch.tanh),
    "bound method": lambda: (Opaque(1).times, Opaque(2).times),
    "partial": lambda: (functools.partial(power, 1), functools.partial(power, 2)),
    "opaque": lambda: (Opaque(1), Opaque(2)),
}


class MultipliesBy(list):  # type: ignore[type-arg]
    def __call__(self, y: Tensor) -> Tensor:
        return y * self[0][0]


@pytest.mark.parametrize("kind", SETTINGS)
def test_twins_that_differ_in_an_attribute_are_told_apart(kind: str) -> None:
    right, wrong = SETTINGS[kind]()
    z = torch.rand(1, 8, 5, 5)
    for place, order in ("0", (right, wrong)), ("1", (wrong, right)):
        gates = nn.Sequential(*map(Configured, order)).eval()
        y = output(gates, z)
        assert [e.path for e in patch(gates).replaced] == [place]
        close(output(gates, z), y)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_attribute_that_changes_is_noticed(kind: str) -> None:
    right, wrong = SETTINGS[kind]()
    z = torch.rand(1, 8, 5, 5)
    gate, own = Configured(right).eval(), Configured(wrong).eval()
    own.load_state_dict(gate.state_dict())
    assert patch(gate).replaced
    assert swap.unchanged(gate, replacement_of(gate))
    gate.v = wrong
    assert torch.equal(output(gate, z), output(own, z))
    gate.v = right
    assert swap.unchanged(gate, replacement_of(gate))


def test_an_attribute_that_is_written_to_is_noticed() -> None:
    z = torch.rand(1, 8, 5, 5)
    for value, write in (
        (torch.tensor(1.0), lambda v: v.fill_(2)),
        (types.SimpleNamespace(scale=1), lambda v: setattr(v, "scale", 2)),
        (np.ones(1), lambda v: v.fill(2)),
    ):
        gate = Configured(value).eval()
        y = output(gate, z)
        assert patch(gate).replaced
        write(value)
        close(output(gate, z), 2 * y)


@pytest.mark.parametrize("kind", SETTINGS)
def test_copies_with_attributes(kind: str) -> None:
    """A copy, or what a pickle holds, is served as well, unless an attribute says nothing of its
    value: then it runs its own forward."""
    gate = Configured(SETTINGS[kind]()[0]).eval()
    z = torch.rand(1, 8, 5, 5)
    y = output(gate, z)
    assert patch(gate).replaced
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        close(output(twin, z), y)
        known = kind not in ("opaque", "bound method")
        assert swap.unchanged(twin, replacement_of(twin)) is known


class Steered(nn.Module):
    """A look-alike of channel attention: ``factor`` is a buffer, or an integer parameter."""

    def __init__(self, factor: Tensor, parameter: bool = False) -> None:
        super().__init__()
        self.gate = tp.CALayer(8, 4)
        if parameter:
            self.factor = nn.Parameter(factor, requires_grad=False)
        else:
            self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.factor


class SteeredAttention(Recogniser):
    """Does not look at ``factor``, and is right where that is one."""

    name, replacement, operators = "steered", "channel_attention", ("channel_attention",)

    def options(self, module: nn.Module) -> list[Any]:
        return [()] if type(module) is Steered else []

    def examples(self, module: nn.Module, options: Any) -> list[tuple[Any, ...]]:
        return [(torch.randn(1, 8, 5, 5, dtype=torch.float64),)]

    def forward(self, module: nn.Module, options: Any, x: Tensor) -> Tensor:
        down, _, up, _ = module.gate.conv_du
        return sr_kernels.channel_attention(x, down.weight, down.bias, up.weight, up.bias)


@pytest.mark.usefixtures("own_recognisers")
@pytest.mark.parametrize("parameter", [False, True])
def test_twins_that_differ_in_a_buffer_are_told_apart(parameter: bool) -> None:
    register(SteeredAttention())
    z = torch.rand(1, 8, 5, 5)
    for place, order in ("0", (1, 2)), ("1", (2, 1)):
        gates = nn.Sequential(*(Steered(torch.tensor(v), parameter) for v in order)).eval()
        y = output(gates, z)
        report = patch(gates, exclude=["*.gate"])
        assert not report.replaced, "what holds an excluded part"
        report = patch(gates, include=["Steered"])
        assert [e.path for e in report.replaced] == [place]
        close(output(gates, z), y)


@pytest.mark.usefixtures("own_recognisers")
@pytest.mark.parametrize("parameter", [False, True])
def test_a_buffer_that_changes_is_noticed(parameter: bool) -> None:
    register(SteeredAttention())
    z = torch.rand(1, 8, 5, 5)
    gate = Steered(torch.tensor(1 if parameter else 1.0), parameter).eval()
    y = output(gate, z)
    assert patch(gate, include=["Steered"]).replaced
    for twin in (gate, copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), gate.double()):
        assert swap.unchanged(twin, replacement_of(twin))
    gate.float()
    state = gate.state_dict()
    gate.load_state_dict({**state, "factor": torch.tensor(2)})
    close(output(gate, z), 2 * y)
    gate.factor.fill_(1)
    assert swap.unchanged(gate, replacement_of(gate))
    gate.factor.fill_(3)
    close(output(gate, z), 3 * y)
    gate.factor.data = torch.full_like(gate.factor, 4)
    close(output(gate, z), 4 * y)


def test_statistics_of_a_norm_may_change(net: nn.Module) -> None:
    """In training they do, at every step: the block stays replaced, and they are used."""
    patch(net)
    for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.running_mean.add_(0.5)
        norm.num_batches_tracked.add_(1)
    assert swap.unchanged(net.block, replacement_of(net.block))
    z = torch.rand(1, 15, 8, 8)
    close(output(net.block, z), output(plain_of(net).block, z))


def test_verify_refuses_what_it_cannot_compare() -> None:
    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return types.SimpleNamespace(sample=super().forward(x))

    model = Wrapped(tp.CALayer(8, 4))
    with pytest.raises(PatchError, match=r"verify: .* got SimpleNamespace"):
        patch(model, verify=torch.rand(1, 8, 4, 4))
    assert type(model[0]) is tp.CALayer


# ------------------------------------------------------------------------ what works as before


def test_copies_and_pickles(net: nn.Module, x: Tensor) -> None:
    patch(net)
    y = output(net, x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(net),
        copy.copy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    ):
        assert classes(twin) == classes(net)
        assert torch.equal(output(twin, x), y)
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), net.parameters(), strict=True):
            average.lerp_(parameter + 0.01, 0.5)
    close(output(ema, x), output(plain_of(ema), x))
    assert torch.equal(output(net, x), y), "the copy shares nothing"


def plain_of(model: nn.Module) -> nn.Module:
    twin = Net().train(model.training)
    twin.load_state_dict(model.state_dict())
    return twin


def test_pickle_in_another_process(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    patch(net)
    torch.save((net.block, net.gate), tmp_path / "net.pt")
    torch.save(
        (net.head(x).detach(), output(net.gate, output(net.block, net.head(x)))), tmp_path / "io.pt"
    )
    code = """
        import sys, torch
        block, gate = torch.load(sys.argv[1] + "/net.pt", weights_only=False)
        given, expected = torch.load(sys.argv[1] + "/io.pt")
        with torch.no_grad():
            assert torch.equal(gate(block(given)), expected)
        from sr_kernels.patching.swap import replacement_of
        assert replacement_of(block) and replacement_of(gate)
        print("as before")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "as before", done.stderr


def test_state_dict(net: nn.Module, x: Tensor) -> None:
    keys = list(net.state_dict())
    patch(net)
    assert list(net.state_dict()) == keys
    fresh = Net().eval()
    patch(fresh)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(output(fresh, x), output(net, x))


def test_hooks(net: nn.Module, x: Tensor) -> None:
    y = output(net, x)
    patch(net)
    seen: list[str] = []
    net.block.register_forward_pre_hook(lambda *_: seen.append("before block"))
    net.block.register_forward_hook(lambda *_: seen.append("after block"))
    fast = output(net, x)
    assert seen == ["before block", "after block"]
    inner = net.block.modules_lfe["lfe_1"].conv0
    handle = inner.register_forward_hook(lambda *_: seen.append("inside"))
    assert torch.equal(output(net.block, net.head(x)), output(plain_of(net).block, net.head(x)))
    assert seen.count("inside") == 1, "a hook inside a block that is replaced as one"
    handle.remove()
    assert torch.equal(output(net, x), fast)
    close(fast, y)
    counted: list[str] = []
    everywhere = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: counted.append(type(module).__name__)
    )
    output(net, x)
    everywhere.remove()
    assert counted.count("GMSA") == 2


def test_children_that_are_exchanged_are_used(net: nn.Module, x: Tensor) -> None:
    """Adapters wrap layers, and show the weights of what they wrap."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Conv2d) -> None:
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    patch(net)
    net.gate.conv_du[0] = Adapter(net.gate.conv_du[0])
    z = torch.rand(1, 15, 8, 8)
    gate = net.gate.conv_du(tp.stdv_channels(z) + z.mean((2, 3), keepdim=True))
    torch.testing.assert_close(net.gate(z), z * gate)


def with_bias(module: nn.Module) -> nn.Module:
    module.conv3 = nn.Conv2d(module.conv3.in_channels, module.conv3.out_channels, 1)
    return module


def without_bias(module: nn.Module) -> nn.Module:
    module.cca.conv_du[0].bias = None
    return module


def with_another_activation(module: nn.Module) -> nn.Module:
    module.act = nn.PReLU()
    return module


@pytest.mark.usefixtures("of_any_size")
@pytest.mark.parametrize(
    ("module", "change"),
    [
        (tp.SCPA(24), with_bias),
        (tp.IMDModule(32), without_bias),
        (tp.IMDModule(32), with_another_activation),
    ],
)
@pytest.mark.parametrize("way", ["call", "compile", "export"])
def test_layers_that_change_are_noticed(
    module: nn.Module, change: Callable[[nn.Module], nn.Module], way: str
) -> None:
    """Before a graph is captured, too; a folded BatchNorm gives a convolution a bias."""
    torch._dynamo.reset()
    own, z = copy.deepcopy(module).eval(), torch.rand(1, 24 if change is with_bias else 32, 9, 8)
    ours = copy.deepcopy(own)
    assert patch(ours).replaced
    torch.manual_seed(0)
    change(own)
    torch.manual_seed(0)
    change(ours)
    expected = output(own, z)
    with torch.no_grad():
        if way == "compile":
            found = torch.compile(ours, fullgraph=True, backend="eager")(z)
        elif way == "export":
            found = torch.export.export(ours, (z,), strict=False).module()(z)
        else:
            found = ours(z)
    close(found, expected)
    torch._dynamo.reset()


def test_instance_forwards_inside_are_called(net: nn.Module) -> None:
    patch(net)
    own = net.gate.conv_du[2].forward
    net.gate.conv_du[2].forward = lambda x: own(x) - 100
    assert output(net.gate, torch.rand(1, 15, 8, 8)).abs().max() < 1e-6


def test_optimizer_and_training(net: nn.Module) -> None:
    net.train()
    theirs = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    patch(net)
    other = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        sample = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        for model, by in ((net, optimizer), (theirs, other)):
            by.zero_grad()
            (model(sample) - 1).square().mean().backward()
            by.step()
    for name, parameter in net.named_parameters():
        close(parameter, dict(theirs.named_parameters())[name])
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], rtol=1e-4, atol=1e-5)


def test_training_under_autocast(net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "sr_kernels.patching")
    net.train()
    theirs = copy.deepcopy(net)
    assert [e.path for e in patch(net).replaced] == ["block", "gate"]
    sample = torch.rand(2, 3, 16, 16)
    results = []
    for model in (net, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(sample)
            loss = (y - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        steps = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        names = [name for name, _ in model.named_parameters()]
        results.append((y.detach(), dict(zip(names, steps, strict=True))))
    assert "its own forward" not in caplog.text
    (y, ours), (expected, stock) = results
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    largest = max(float(step.abs().max()) for step in stock.values())
    for name, step in stock.items():
        if step.abs().max() > 1e-3 * largest:  # the others are rounding errors of bfloat16
            alike = nn.functional.cosine_similarity(ours[name].flatten(), step.flatten(), 0)
            assert alike > 0.9, name


def test_averaged_weights(net: nn.Module, x: Tensor) -> None:
    """torch's own moving average of a network that is patched, and whose weights move."""
    patch(net)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        average.update_parameters(net)
    assert classes(average.module) == classes(net)
    close(output(average, x), output(plain_of(average.module), x))
    assert not torch.allclose(output(average, x), output(net, x))


def test_replicas(net: nn.Module, x: Tensor) -> None:
    """What DataParallel makes: shallow copies whose parameters are plain attributes."""
    patch(net)
    replica = net.gate._replicate_for_data_parallel()
    down = net.gate.conv_du._replicate_for_data_parallel()
    for name, layer in list(down._modules.items()):
        twin = layer._replicate_for_data_parallel()
        for key, parameter in layer._parameters.items():
            setattr(twin, key, (2 * parameter).detach())
        down._modules[name] = twin
    replica._modules["conv_du"] = down
    z = torch.rand(1, 15, 8, 8)
    expected = copy.deepcopy(net.gate)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(2)
    assert torch.equal(output(replica, z), output(expected, z))
    assert not torch.equal(output(replica, z), output(net.gate, z))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compile(net: nn.Module, x: Tensor, mode: str) -> None:
    torch._dynamo.reset()
    net.train(mode == "train")
    twin = copy.deepcopy(net)
    patch(net)
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(net, fullgraph=True, backend=backend)
    if mode == "eval":
        close(output(compiled, x), output(twin, x))
    else:
        compiled(x).sum().backward()
        twin(x).sum().backward()
        close(net.head.weight.grad, twin.head.weight.grad)
    assert any("sr_kernels.shift_conv_block" in target for target in found), found
    torch._dynamo.reset()


def test_export(net: nn.Module, x: Tensor) -> None:
    patch(net)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert any("sr_kernels.grouped_attention_block" in t for t in targets)
    close(output(program.module(), x), output(net, x))


def test_torch_fx_and_func_see_the_module_itself(net: nn.Module, x: Tensor) -> None:
    y = output(net.gate, net.head(x))
    patch(net)
    graph = torch.fx.symbolic_trace(net.gate)
    assert torch.equal(output(graph, net.head(x)), y)
    samples = torch.rand(3, 1, 15, 8, 8)
    with torch.no_grad():
        each = torch.func.vmap(net.gate)(samples)
        close(each, torch.stack([net.gate(sample) for sample in samples]))
        _, tangent = torch.func.jvp(net.gate, (samples[0],), (samples[1],))
        assert tangent.abs().max() > 0


@pytest.mark.parametrize("each", [False, True])
def test_ensembles_of_weights(each: bool) -> None:
    """One network, the weights of two and their buffers, under vmap."""
    pair = [tp.SequentialLFE(10).eval() for _ in range(2)]
    weights, buffers = torch.func.stack_module_state(pair)
    base = copy.deepcopy(pair[0])
    assert patch(base).replaced
    z = torch.rand(2, 1, 10, 5, 5) if each else torch.rand(1, 10, 5, 5)

    def one(p: Any, b: Any, x: Tensor) -> Any:
        return torch.func.functional_call(base, (p, b), (x,))

    with torch.no_grad():
        found = torch.func.vmap(one, (0, 0, 0 if each else None))(weights, buffers, z)
        own = torch.stack([m(z[i] if each else z) for i, m in enumerate(pair)])
    close(found, own)


def test_jit_trace(net: nn.Module, x: Tensor) -> None:
    patch(net)
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,))
    close(output(traced, x), output(net, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_whole_windows_runs_on_ragged_ones() -> None:
    attention = tp.SABase4D(12, 2, ((4, 8), (8, 4)), ((2, 4), (4, 2))).eval()
    whole, ragged = torch.rand(1, 12, 16, 24), torch.rand(2, 12, 13, 21)
    y = output(attention, ragged)
    assert patch(attention).replaced
    with torch.no_grad():
        traced = torch.jit.trace(attention, (whole,), check_trace=False)
    close(output(traced, ragged), y)


def test_ddp_with_two_processes(tmp_path: Path) -> None:
    code = """
        import os, sys, torch, copy
        import torch.distributed as dist
        import third_party as tp, sr_kernels
        rank = int(sys.argv[2])
        dist.init_process_group(
            "gloo", init_method="file://" + sys.argv[1] + "/rendezvous", rank=rank, world_size=2
        )
        torch.manual_seed(0)
        plain = tp.ELAB(15, 2, 1, (2, 4, 8))
        batch = torch.rand(2, 15, 8, 8)
        for patch_first in (False, True):
            model = copy.deepcopy(plain)
            if patch_first:
                assert len(sr_kernels.patch(model).replaced) == 1
            model = torch.nn.parallel.DistributedDataParallel(model)
            if not patch_first:
                assert len(sr_kernels.patch(model).replaced) == 1
            model.eval(), plain.eval(), plain.zero_grad()
            model(batch[rank : rank + 1]).square().sum().backward()
            plain(batch).square().sum().backward()
            for (name, own), other in zip(plain.named_parameters(), model.parameters()):
                if own.grad is not None:
                    scale = float(own.grad.abs().max())
                    torch.testing.assert_close(
                        2 * other.grad, own.grad, rtol=1e-3, atol=1e-3 * scale, msg=name
                    )
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model.train()  # statistics of its own half in each process
            for _ in range(2):
                optimizer.zero_grad()
                model(batch[rank : rank + 1]).square().mean().backward()
                optimizer.step()
            for parameter in model.parameters():
                there = [torch.empty_like(parameter) for _ in range(2)]
                dist.all_gather(there, parameter.detach())
                assert torch.equal(*there), "the processes have drifted apart"
        dist.destroy_process_group()
        print("agrees")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert out.strip() == "agrees", err


# ---------------------------------------------------------------- a container and what it holds


class Allocations(TorchDispatchMode):
    """Counts the tensors of a shape that are made."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, Tensor) and func._schema.name.endswith(("empty_like", "empty"))
        self.count += made and result.shape == self.shape
        return result


@pytest.fixture
def body() -> nn.Sequential:
    blocks = nn.Sequential(*(tp.ELAB(15, 2, i % 2, (2, 4, 8)) for i in range(4)))
    with torch.no_grad():
        for _ in range(3):
            blocks(torch.rand(2, 15, 16, 16))
    return blocks.eval()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_blocks_in_the_memory_of_one(body: nn.Sequential, memory_format: Any) -> None:
    z = torch.rand(2, 15, 16, 24).contiguous(memory_format=memory_format)
    kept, plain = z.clone(), classes(body)
    expected = output(body, z)
    report = patch(body, strict=True)
    assert [e.path for e in report.replaced] == ["", "0", "1", "2", "3"]
    with Allocations(z.shape) as made:
        y = output(body, z)
    assert made.count == 3
    close(y, expected)
    assert torch.equal(z, kept)
    assert y.stride() == expected.stride()
    one_by_one = z
    for block in body:
        one_by_one = output(block, one_by_one)
    close(y, one_by_one)  # to the bit only where the blocks between are channels_last too
    for twin in (copy.deepcopy(body), pickle.loads(pickle.dumps(body))):
        with Allocations(z.shape) as made:
            assert torch.equal(output(twin, z), y)
        assert made.count == 3
    report.restore()
    assert classes(body) == plain
    assert torch.equal(output(body, z), expected)


def test_blocks_that_are_no_longer_alike_run_one_by_one(body: nn.Sequential) -> None:
    z = torch.rand(1, 15, 16, 16)
    patch(body)
    y = output(body, z)
    seen: list[Tensor] = []
    handle = body[1].register_forward_hook(lambda _module, _args, out: seen.append(out))
    with Allocations(z.shape) as made:
        close(output(body, z), y)
    assert len(seen) == 1
    assert made.count == 3 * 4, "each block in memory of its own: they are still replaced"
    handle.remove()
    assert torch.equal(output(body[:2], z), seen[0])
    close(output(torch.compile(body, fullgraph=True, backend="eager"), z), y)
    with torch.no_grad():
        program = torch.export.export(body, (z,))
    assert any("sr_kernels.shift_conv_block" in str(n.target) for n in program.graph.nodes)
    close(output(program.module(), z), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(output(body, z).float(), y, rtol=0.1, atol=0.1)
    body[2] = nn.Identity()
    del body[3]
    assert torch.equal(output(body, z), seen[0])
    torch._dynamo.reset()


def test_a_call_that_a_body_leaves_to_its_blocks_is_not_looked_at_twice(
    body: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[nn.Module] = []
    own = swap.unchanged
    patch(body)
    monkeypatch.setattr(swap, "unchanged", lambda m, r: looked.append(m) or own(m, r))
    body(torch.rand(1, 15, 16, 16))
    assert looked == [*body]
    looked.clear()
    output(body, torch.rand(1, 15, 16, 16))
    assert looked == [body]


def test_a_body_is_not_replaced_without_its_blocks(body: nn.Sequential) -> None:
    report = patch(body, include=["Sequential"])
    assert not report.replaced
    assert report.entries[0].reason == "its blocks run as one only if each of them is replaced"
    network = nn.ModuleDict({"body": body})
    assert len(patched_names(network, include=["body", "body.*"])) == 5


def test_blocks_of_which_some_are_left_alone(body: nn.Sequential) -> None:
    z = torch.rand(1, 15, 16, 16)
    y = output(body, z)
    with patched(body, exclude=["2", "2.*"]) as report:
        assert [e.path for e in report.replaced] == ["0", "1", "3"]
        assert {e.path: e.reason for e in report.entries}[""] == "holds 2, which is in exclude"
    with patched(body, include=["0", "1", "2", "3"]) as parts:
        assert [e.path for e in parts.replaced] == ["0", "1", "2", "3"]
        with patched(body) as whole:  # the parts are those that are replaced already
            assert [e.path for e in whole.replaced] == [""]
            close(output(body, z), y)
    assert torch.equal(output(body, z), y)


# -------------------------------------------------------------------- modules that are left alone


def reason(module: nn.Module) -> str:
    kind = type(module)
    first = patch(module).entries[0]
    assert first.replaced_by is None
    assert type(module) is kind
    return first.reason


class WithSlots(tp.CALayer):
    __slots__ = ("extra",)


class WithMeta(type):
    pass


class OtherMetaclass(tp.CALayer, metaclass=WithMeta):
    pass


class Registered(tp.CALayer):
    seen: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registered.seen.append(cls)


class OtherCall(tp.CALayer):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x)


class OtherSetattr(tp.CALayer):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError("not mine")
        super().__setattr__(name, value)


class TwoArguments(tp.CALayer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale


class KeywordsOnly(tp.CALayer):
    def forward(self, *, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_odd_modules_are_left_alone() -> None:
    gate = tp.CALayer(32, 4)
    assert "TorchScript" in reason(torch.jit.trace(gate, torch.rand(1, 32, 4, 4)))
    assert "torch.fx graph" in reason(torch.fx.symbolic_trace(gate))
    assert "metaclass" in reason(OtherMetaclass(32, 4))
    assert "derived from" in reason(Registered(32, 4))
    assert Registered.seen == []
    assert "__call__" in reason(OtherCall(32, 4))
    with torch.device("meta"):
        assert "meta device" in reason(tp.CALayer(32, 4))
    weighted = tp.CALayer(32, 4)
    torch.nn.utils.parametrizations.weight_norm(weighted.conv_du[0])
    assert "parametrization" in reason(weighted)
    old = tp.PA(8)
    old.conv = torch.nn.utils.spectral_norm(old.conv)
    assert "hooks" in reason(old)
    mixed = tp.CALayer(32, 4)
    mixed.conv_du[0].half()
    assert "several dtypes" in reason(mixed)
    patched_by_hand = tp.CALayer(32, 4)
    patched_by_hand.forward = lambda x: x
    assert "instance" in reason(patched_by_hand)
    lazy = tp.CALayer(32, 4)
    lazy.conv_du[0] = nn.LazyConv2d(8, 1)
    reason(lazy)
    quantised = tp.CALayer(32, 4)
    quantised.conv_du[0] = torch.ao.nn.quantized.Conv2d(32, 8, 1)
    reason(quantised)
    reason(TwoArguments(32, 4))
    reason(KeywordsOnly(32, 4))


class OldStyle(tp.CALayer):
    def forward(self, x: Tensor) -> Tensor:
        return super(self.__class__, self).forward(x)


class OldStyleTrain(tp.CALayer):
    def train(self, mode: bool = True) -> Any:
        return super(type(self), self).train(mode)


def test_super_of_the_objects_own_class_would_not_end() -> None:
    for kind, name in ((OldStyle, "forward"), (OldStyleTrain, "train")):
        gate = kind(32, 4)
        assert f"its {name} would not end" in reason(gate)
        gate.train()(torch.rand(1, 32, 5, 5))


class AsksForTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([tp.CALayer(16, 4), tp.PA(16)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if type(layer) is tp.CALayer else 1 - layer(x)
        return x


class InheritsTheForward(AsksForTypes):
    pass


class AsksInside(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        for layer, known in zip(
            self.layers, [type(one) is tp.CALayer for one in self.layers], strict=True
        ):
            x = layer(x) if known else 1 - layer(x)
        return x


class AsksInAMethod(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        return self.run_all(x)

    def run_all(self, x: Tensor) -> Tensor:
        return AsksForTypes.forward(self, x)


Renamed = tp.CALayer


class AsksByAnotherName(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if layer.__class__ is Renamed else 1 - layer(x)
        return x


def applied(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) if type(layer) is tp.CALayer else 1 - layer(x)


class AsksInAFunction(AsksForTypes):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = applied(layer, x)
        return x


@pytest.mark.parametrize(
    "kind",
    [
        AsksForTypes,
        InheritsTheForward,
        AsksInside,
        AsksInAMethod,
        AsksByAnotherName,
        AsksInAFunction,
    ],
)
def test_a_network_that_asks_for_exact_types(kind: type[AsksForTypes]) -> None:
    network, z = kind().eval(), torch.rand(1, 16, 5, 5)
    y = output(network, z)
    report = patch(network)
    assert [e.path for e in report.replaced] == ["layers.1"]
    reasons = {e.path: e.reason for e in report.entries}
    assert f"{kind.__name__}.forward asks" in reasons["layers.0"]
    close(output(network, z), y)


def test_a_forward_of_no_module() -> None:
    """As exec makes functions whose globals have no name: the others are looked at all the same."""
    scope: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.gate(x)", scope)
    forward = types.FunctionType(scope["forward"].__code__, {})
    assert forward.__module__ is None
    network = type("Made", (nn.Module,), {"forward": forward})()
    network.gate = tp.CALayer(16, 4)
    assert [entry.path for entry in patch(network.eval()).replaced] == ["gate"]


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_transforms_in_a_graph(transform: str) -> None:
    """torch.func inside of torch.compile, which has no values to look at."""
    torch._dynamo.reset()
    gate, z = tp.CALayer(32, 4).eval(), torch.rand(1, 32, 5, 5)

    def run(x: Tensor) -> Tensor:
        if transform == "jvp":
            return torch.func.jvp(gate, (x,), (torch.ones_like(x),))[1]
        return torch.func.grad(lambda v: gate(v).square().sum())(x)

    expected = run(z)
    assert patch(gate).replaced
    close(torch.compile(run, backend="eager")(z), expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: tp.ELAB(15, 2, 0, (2, 4, 8)),
        lambda: nn.Sequential(*(tp.ELAB(15, 2, i % 2, (2, 4, 8)) for i in range(2))),
        lambda: nn.Conv2d(15, 17, 3, padding=1),
    ],
)
def test_replicas_with_gradients(build: Callable[[], nn.Module]) -> None:
    """Of an input that needs none, as behind frozen layers."""
    module, z = build().eval(), torch.rand(1, 15, 16, 16)
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(module(z).square().sum(), weights)
    assert patch(module).replaced

    def replica(part: nn.Module) -> nn.Module:
        twin = part._replicate_for_data_parallel()
        twin._former_parameters = {}
        for name, parameter in part._parameters.items():
            value = None if parameter is None else parameter.view_as(parameter)
            setattr(twin, name, value)
            twin._former_parameters[name] = value
        for name, child in part._modules.items():
            twin._modules[name] = None if child is None else replica(child)
        return twin

    found = torch.autograd.grad(replica(module)(z).square().sum(), weights)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)


def test_a_part_that_was_exchanged_is_patched_again(body: nn.Sequential) -> None:
    assert patch(body).replaced
    body[2] = tp.ELAB(15, 2, 0, (2, 4, 8)).eval()
    assert [e.path for e in patch(body).replaced if "." not in e.path] == ["2"]


def test_a_forward_that_is_exchanged_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, z = tp.CALayer(32, 4).eval(), torch.rand(1, 32, 5, 5)
    y = output(gate, z)
    assert patch(gate).replaced
    for kind in (tp.CALayer, nn.Conv2d):  # the module's, and that of a layer inside
        with monkeypatch.context() as change:
            before = kind.forward
            change.setattr(kind, "forward", lambda self, x, own=before: own(self, 2 * x))
            expected = z * gate.conv_du(gate.avg_pool(z)) if kind is nn.Conv2d else None
            found = output(gate, z)
            assert not torch.allclose(found, y, rtol=1e-3)
            assert expected is None or torch.equal(found, expected)
            if kind is nn.Conv2d:
                assert "exchanged the forward of" in reason(tp.CALayer(32, 4))
        close(output(gate, z), y)


def test_a_method_that_is_replaced_on_an_object() -> None:
    convolution, z = nn.Conv2d(32, 32, 3, padding=1).eval(), torch.rand(1, 32, 33, 34)
    y = output(convolution, z)
    assert patch(convolution).replaced
    convolution.note = "of no class"
    assert swap.unchanged(convolution, replacement_of(convolution))

    def wrapping(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        around = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
        return nn.functional.conv2d(around, weight, bias)

    convolution._conv_forward = wrapping
    assert torch.equal(output(convolution, z), wrapping(z, convolution.weight, convolution.bias))
    del convolution._conv_forward
    close(output(convolution, z), y)


class Wrapped(Tensor):
    """A tensor that only torch's own operators can read, as those of quantisation libraries."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace == "aten", func
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda v: v.inner, (args, kwargs))
        out = func(*args, **(kwargs or {}))
        return cls(out) if func is torch.ops.aten.detach.default else out


@pytest.mark.parametrize("path", ["conv_du.0", "conv_du.2"])
def test_weights_of_another_class_of_tensors(path: str) -> None:
    gate, z = tp.CALayer(32, 4).eval(), torch.rand(1, 32, 5, 5)
    y = output(gate, z)
    assert patch(gate).replaced
    layer: Any = gate.get_submodule(path)
    layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    close(output(gate, z), y)


def test_a_patched_network_goes_to_the_meta_device() -> None:
    network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), tp.CALayer(32, 4))
    assert len(patch(network).replaced) == 2
    z = torch.rand(1, 32, 40, 40, device="meta")
    assert output(network.to("meta"), z).shape == z.shape


def test_layers_of_this_package_keep_their_backend() -> None:
    layer = sr_kernels.nn.PixelAttention(8, backend="reference")
    assert "of this package" in reason(layer)


def test_odd_modules_that_can_be_replaced() -> None:
    z = torch.rand(1, 32, 5, 5)
    for kind in (WithSlots, OtherSetattr):
        module = kind(32, 4).eval()
        y = output(module, z)
        report = patch(module)
        assert len(report.replaced) == 1, str(report)
        close(output(module, z), y)
        report.restore()
        assert type(module) is kind
    with torch.inference_mode():
        module = tp.SequentialLFE(10).eval()
        z = torch.rand(1, 10, 5, 5)
        y = module(z)
        assert len(patch(module).replaced) == 1
        close(module(z), y)


def test_parameters_of_inference_mode_are_served() -> None:
    with torch.inference_mode():
        module = tp.ELAB(15, 2, 0, (2, 4, 8)).eval()
    z = torch.rand(1, 15, 8, 8)
    with torch.inference_mode():
        y = module(z)
        assert len(patch(module).replaced) == 1
        close(module(z), y)


def test_tensors_without_values(net: nn.Module) -> None:
    patch(net)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert net(torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    net.to("meta")
    assert net(torch.rand(1, 3, 16, 16, device="meta")).is_meta


def test_a_module_that_notes_what_it_saw_is_left_alone() -> None:
    class Noting(tp.CALayer):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.mean()
            return super().forward(x)

    class Counting(tp.CALayer):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    assert "stores something" in reason(Noting(32, 4))
    assert "stores something" in reason(Counting(32, 4))


@pytest.mark.parametrize(("name", "channels"), [("net", 3), ("body", 15)])
def test_onnx_exports_the_own_forward(
    name: str, channels: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    network = request.getfixturevalue(name)
    assert patch(network).replaced
    file = tmp_path / "net.onnx"
    given = (torch.rand(1, channels, 16, 24),)
    with torch.no_grad():
        torch.onnx.export(network, given, str(file), dynamo=False, opset_version=18)
    assert {node.domain for node in onnx.load(str(file)).graph.node} == {""}


def test_onnx_file_and_exported_program_of_a_whole_network(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    network, z = tp.IMDN(32, 1, 2).eval(), torch.rand(1, 3, 21, 23)
    y = output(network, z)
    assert patch(network).replaced
    with torch.no_grad():
        program = torch.export.export(network, (z,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {f"sr_kernels.{op}.default" for op in ("conv3x3", "gated_conv1x1")} <= targets
    close(program.module()(z), y)
    # Compared in ONNX Runtime with the patched network before it appears.
    file = sr_kernels.export_onnx(network, z, tmp_path / "network.onnx")
    assert {node.domain for node in onnx.load(str(file)).graph.node} == {""}


def weighted(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Conv2d(20, 20, 3, padding=1)), nn.Conv2d(20, 20, 3, padding=1))


def doubling(inside: bool) -> nn.Module:
    network = weighted(lambda layer: layer)
    if inside:
        network[0].register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    else:
        network[0].register_forward_hook(lambda _module, _args, out: 2 * out)
    return network


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("build", "replaced"),
    [
        (lambda: weighted(torch.nn.utils.parametrizations.weight_norm), ["1"]),
        (lambda: weighted(torch.nn.utils.parametrizations.spectral_norm), ["1"]),
        (lambda: weighted(torch.nn.utils.weight_norm), ["1"]),
        (lambda: doubling(True), ["0", "1"]),
        (lambda: doubling(False), ["0", "1"]),
        (lambda: nn.DataParallel(weighted(lambda layer: layer)), ["module.0", "module.1"]),
        (lambda: nn.Sequential(*[nn.Conv2d(20, 20, 3, padding="same")] * 2), ["0"]),
    ],
)
def test_convolutions_of_others(build: Callable[[], nn.Module], replaced: list[str]) -> None:
    network, z = build().eval(), torch.rand(2, 20, 47, 49)
    y = output(network, z)
    report = patch(network, strict=True)
    assert [e.path for e in report.replaced] == replaced
    close(output(network, z), y)
    close(network(z).detach(), y)
    narrow = output(network, z[:, :, :3, :3])
    report.restore()
    close(output(network, z[:, :, :3, :3]), narrow)
    assert torch.equal(output(network, z), y)


def test_a_convolution_returns_the_memory_format_of_torch() -> None:
    own = nn.Conv2d(32, 32, 3, padding=1).eval()
    for weights in (torch.contiguous_format, torch.channels_last):
        own.to(memory_format=weights)
        ours = copy.deepcopy(own)
        assert patch(ours).replaced
        for inputs in (torch.contiguous_format, torch.channels_last):
            z = torch.rand(2, 32, 33, 34).contiguous(memory_format=inputs)
            assert output(ours, z).stride() == output(own, z).stride()
            close(output(ours, z), output(own, z))


def test_a_lazy_convolution_is_no_failure() -> None:
    network = nn.Sequential(nn.LazyConv2d(16, 3, padding=1), tp.PA(16))
    report = patch(network, strict=True)
    assert [e.path for e in report.replaced] == ["1"]
    assert "lazy" in report.entries[1].reason


def test_a_backend_by_name_that_cannot_run_is_said_once(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    z = torch.rand(1, 15, 8, 8)
    y = output(net.gate, z)
    patch(net)
    with sr_kernels.use_backend("cuda"):
        with pytest.warns(
            sr_kernels.FallbackWarning, match=r"CCALayer.*'cuda' cannot run channel_attention"
        ):
            assert torch.equal(output(net.gate, z), y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output(net.gate, z)
    with caplog.at_level("DEBUG", "sr_kernels.patching"):
        output(net.gate, z)
        assert not caplog.records
        with pytest.raises(RuntimeError):
            output(net.block, z[:, :, :7])
    assert "elan_block does not take this call" in caplog.text


def test_without_kernels(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _library.LoadResult("_C", None, "_C.abi3.so was not built")
    monkeypatch.setattr(_library, "CPU_LIBRARY", missing)
    report = patch(net)
    assert not report.replaced
    assert {e.reason for e in report.skipped if e.resembles} >= {"_C.abi3.so was not built"}
    # As on a GPU with Triton alone: modules are tried out on the definitions.
    monkeypatch.setattr(core, "_cannot_run", lambda *_: "")
    assert [e.path for e in patch(net).replaced] == ["block", "gate"]


def test_hooks_inside_are_in_a_compiled_graph(net: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    patch(net)
    net.gate.conv_du[3].register_forward_hook(lambda _module, _args, out: 0 * out)
    z = torch.rand(1, 15, 8, 8)
    compiled = torch.compile(net.gate, fullgraph=True, backend="eager")
    assert output(compiled, z).abs().max() == 0
    torch._dynamo.reset()


# ------------------------------------------------------------------------- recognisers of one's own


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.conv(x) + x


class ScaledConvolution(Recogniser):
    name = "scaled_convolution"
    replacement = "shift_conv2d"
    operators = ("shift_conv2d",)

    def options(self, module: nn.Module) -> list[float]:
        return [0.25, 0.5] if type(module).__name__ == "Scaled" else []

    def examples(self, module: nn.Module, options: float) -> list[tuple[Any, ...]]:
        return [(torch.randn(2, 6, 5, 7, dtype=torch.float64),)]

    def forward(self, module: nn.Module, options: float, *args: Any) -> Any:
        (x,) = args
        conv = module.conv
        return sr_kernels.shift_conv2d(
            x, options * conv.weight, options * conv.bias, pattern="none", residual=x
        )


@pytest.mark.usefixtures("own_recognisers")
def test_a_recogniser_of_ones_own(x: Tensor) -> None:
    module = Scaled().eval()
    assert not patch(module).replaced
    register(ScaledConvolution())
    y = output(module, torch.ones(1, 6, 4, 4))
    report = patch(module)
    assert [e.replaced_by for e in report.replaced] == ["shift_conv2d"]
    assert replacement_of(module).options == 0.5
    close(output(module, torch.ones(1, 6, 4, 4)), y)
    stored = pickle.dumps(module)
    recogniser_module._RECOGNISERS.pop("scaled_convolution")
    with pytest.raises(LookupError, match="no recogniser 'scaled_convolution' is registered"):
        recogniser_module.by_name("scaled_convolution")
    report.restore()
    del module, report
    assert stored


@pytest.mark.usefixtures("own_recognisers")
def test_the_page_on_writing_a_recogniser(capsys: pytest.CaptureFixture[str]) -> None:
    """Its code, block after block, and the report that it shows."""
    page = (HERE.parents[1] / "docs" / "recognisers.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 5
    scope: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(block, scope)
    shown = page.split("    2 modules replaced")[1].split("\n\n")[0]
    assert textwrap.dedent("    2 modules replaced" + shown) in capsys.readouterr().out


def test_the_table_of_what_is_recognised_names_every_operator() -> None:
    page = (HERE.parents[1] / "docs" / "patching.md").read_text()
    table = page.split("## What is recognised")[1].split("\n\n")[1]
    named = {word for row in table.splitlines() for word in re.findall(r"`(\w+)`", row)}
    for recogniser in recognisers():
        promised = set(re.findall(r"\w+", recogniser.replacement)) | {*recogniser.operators}
        operators = {word for word in promised if hasattr(torch.ops.sr_kernels, word)}
        # The reuse of scores goes by the name of what made them.
        assert {name.removeprefix("apply_") for name in operators} - named <= {"window_scores"}


def test_recognisers_are_checked() -> None:
    with pytest.raises(TypeError, match="derived from Recogniser"):
        register(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have a name"):
        register(Recogniser())
    with pytest.raises(NotImplementedError):
        Recogniser().options(nn.Identity())
    assert issubclass(NotRecognised, Exception)


@pytest.mark.usefixtures("own_recognisers")
def test_a_recogniser_that_fails_leaves_the_network_whole(net: nn.Module) -> None:
    class Broken(ScaledConvolution):
        name = "broken"

        def options(self, module: nn.Module) -> list[float]:
            if isinstance(module, tp.CALayer):
                raise ZeroDivisionError
            return []

    register(Broken())
    plain = classes(net)
    report = patch(net)
    assert [e.path for e in report.replaced] == ["block", "gate"]
    assert "broken fails on it" in {e.path: e.reason for e in report.entries}["other"]
    report.restore()
    assert classes(net) == plain


def test_modules_of_this_package_are_left_alone() -> None:
    network = sr_kernels.models.elan_light(4)
    plain = classes(network)
    report = patch(network)
    assert not report.replaced
    assert classes(network) == plain
    ours = {e.path: e.reason for e in report.entries if e.class_name == "ShiftConv2d"}
    assert set(ours.values()) == {"is of this package already"}
