"""Our networks in a registry that behaves like BasicSR's, and what its trainers save."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sr_kernels.models import ELAN, MAFDN, load_checkpoint, register_basicsr

NAMES = ["ELAN", "MAFDN", "elan", "elan_light", "mafdn"]


class Registry:
    """What BasicSR's ``basicsr.utils.registry.Registry`` promises, written anew."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def register(self, obj: Any = None) -> Any:
        if obj is None:
            return self.register_and_return
        self.register_and_return(obj)
        return None

    def register_and_return(self, obj: Any) -> Any:
        assert obj.__name__ not in self.objects, f"{obj.__name__} was already registered"
        self.objects[obj.__name__] = obj
        return obj

    def __contains__(self, name: str) -> bool:
        return name in self.objects

    def get(self, name: str) -> Any:
        if name not in self.objects:
            raise KeyError(name)
        return self.objects[name]


def build_network(registry: Registry, options: dict[str, Any]) -> Any:
    """As BasicSR does with the ``network_g`` of an option file."""
    options = dict(options)
    return registry.get(options.pop("type"))(**options)


@pytest.fixture
def basicsr(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """An installed basicsr, as far as it is asked for."""
    registry = Registry()
    package, utils = types.ModuleType("basicsr"), types.ModuleType("basicsr.utils")
    module: Any = types.ModuleType("basicsr.utils.registry")
    package.__spec__ = types.SimpleNamespace(name="basicsr")  # type: ignore[assignment]
    module.ARCH_REGISTRY = registry
    for name, value in {
        "basicsr": package,
        "basicsr.utils": utils,
        "basicsr.utils.registry": module,
    }.items():
        monkeypatch.setitem(sys.modules, name, value)
    return registry


def test_installed_basicsr(basicsr: Registry) -> None:
    assert register_basicsr() == NAMES
    assert list(basicsr.objects) == NAMES
    assert register_basicsr() == []


def test_nothing_happens_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert register_basicsr() == []


def test_basicsr_that_cannot_be_imported_says_why(
    basicsr: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "basicsr.utils.registry", None)
    with pytest.raises(ImportError, match="registry"):
        register_basicsr()


def test_a_taken_name_stays(basicsr: Registry) -> None:
    @basicsr.register()
    class ELAN:
        pass

    assert register_basicsr() == [name for name in NAMES if name != "ELAN"]
    assert basicsr.get("ELAN") is ELAN


def test_registry_that_does_not_tell_letters_apart() -> None:
    class Lower(Registry):
        """As traiNNer-redux's: ELAN and elan are one name."""

        def register_and_return(self, obj: Any) -> Any:
            assert obj.__name__.lower() not in self.objects
            self.objects[obj.__name__.lower()] = obj
            return obj

        def __contains__(self, name: str) -> bool:
            return name.lower() in self.objects

    registry = Lower()
    assert register_basicsr(registry) == ["ELAN", "MAFDN", "elan_light"]
    assert list(registry.objects) == ["elan", "mafdn", "elan_light"]


def test_no_registry() -> None:
    with pytest.raises(TypeError, match="registry is a dict"):
        register_basicsr({})


OPTIONS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "ELAN", "scale": 2, "m_elan": 2, "c_elan": 15, "rgb_range": 1.0}, ELAN),
    ({"type": "elan_light", "scale": 3, "m_elan": 2, "c_elan": 15, "rgb_range": 1.0}, ELAN),
    ({"type": "MAFDN", "scale": 2, "channels": 8, "num_blocks": 1}, MAFDN),
    ({"type": "mafdn", "scale": 4, "channels": 8, "num_blocks": 1}, MAFDN),
]


@pytest.mark.parametrize(("options", "kind"), OPTIONS)
def test_option_file_to_checkpoint(
    options: dict[str, Any], kind: Callable[..., Any], tmp_path: Path
) -> None:
    registry = Registry()
    register_basicsr(registry)
    network = build_network(registry, options).eval()
    assert type(network) is kind
    assert (network.scale, network.rgb_range) == (options["scale"], 1.0)
    state = {"module." + name: value for name, value in network.state_dict().items()}
    torch.save({"params": state, "params_ema": state}, tmp_path / "net_g_5000.pth")
    loaded = load_checkpoint(tmp_path / "net_g_5000.pth")
    assert loaded.rgb_range == 1.0
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), network(x))
