"""What a training run is: one flat list of keys, from a YAML file and the command line."""

# ruff: noqa: RUF009 (the calls in the class give dataclass fields)
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sr_kernels.backends import BACKENDS

from ..elan import ELAN, elan, elan_light
from ..mafdn import MAFDN, mafdn

__all__ = ["CONFIGS", "NETWORKS", "Config", "ConfigError", "load_config"]

NETWORKS: dict[str, Callable[..., ELAN | MAFDN]] = {
    "elan": elan,
    "elan_light": elan_light,
    "mafdn": mafdn,
}

_FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS: dict[str, Path] = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
"""Name -> file of the configurations that come with the package."""


class ConfigError(ValueError):
    """A configuration that cannot be used: the message names key, value and what is accepted."""


def _key(default: Any, check: Callable[[Any], Any], accepted: str) -> Any:
    """A key of the configuration: ``check`` gives the value in its type, or raises ValueError."""
    metadata = {"check": check, "accepted": accepted}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _number(value: Any) -> float:
    # YAML reads 1e-3 (without a dot) as a string.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or _number(value) != int(_number(value)):
        raise ValueError
    return int(_number(value))


def _must(good: bool) -> None:
    if not good:
        raise ValueError


def _int(low: int, optional: bool = False, default: int | None = None) -> Any:
    def check(value: Any) -> int | None:
        if value is None and optional:
            return None
        number = _whole(value)
        _must(number >= low)
        return number

    accepted = f"a whole number >= {low}" + (" or null" if optional else "")
    return _key(default, check, accepted)


def _float(default: float | None, low: float, high: float = float("inf")) -> Any:
    """low <= value < high; None only where it is the default."""

    def check(value: Any) -> float | None:
        if value is None and default is None:
            return None
        number = _number(value)
        _must(low <= number < high)
        return number

    upper = "" if high == float("inf") else f" and < {high:g}"
    null = " or null" if default is None else ""
    return _key(default, check, f"a number >= {low:g}{upper}{null}")


def _bool(default: bool) -> Any:
    def check(value: Any) -> bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        _must(isinstance(value, bool))
        return bool(value)

    return _key(default, check, "true or false")


def _choice(default: Any, accepted: tuple[Any, ...]) -> Any:
    def check(value: Any) -> Any:
        for choice in accepted:
            if value == choice or str(value) == str(choice):
                return choice
        raise ValueError

    return _key(default, check, ", ".join(map(str, accepted)))


def _text(default: str | None) -> Any:
    def check(value: Any) -> str | None:
        _must((value is None and default is None) or (isinstance(value, str) and value != ""))
        return value

    return _key(default, check, "text" if default is not None else "text or null")


def _folders(accepted: str = "a folder or a list of folders") -> Any:
    def check(value: Any) -> list[str]:
        value = [value] if isinstance(value, str) else value
        _must(isinstance(value, list) and all(isinstance(v, str) and v for v in value))
        return list(value)

    return _key([], check, accepted)


def _numbers(default: list[float], low: float, high: float, count: int | None = None) -> Any:
    def check(value: Any) -> list[float]:
        _must(isinstance(value, list) and (count is None or len(value) == count))
        numbers = [_number(v) for v in value]
        _must(all(low <= n < high for n in numbers) and (count or numbers == sorted(numbers)) != 0)
        return numbers

    how_many = f"{count} numbers" if count else "a rising list of numbers"
    return _key(default, check, f"{how_many} >= {low:g} and < {high:g}")


def _mapping() -> Any:
    def check(value: Any) -> dict[str, Any]:
        _must(isinstance(value, dict) and all(isinstance(k, str) for k in value))
        return dict(value)

    return _key({}, check, "a mapping of the network's options")


@dataclass
class Config:
    """A training run. docs/training.md explains every key.

    Raises:
        ConfigError: a value is not accepted, or two do not go together.
    """

    # The network.
    model: str = _choice("elan_light", tuple(NETWORKS))
    scale: int = _choice(4, (2, 3, 4))
    options: dict[str, Any] = _mapping()
    init_from: str | None = _text(None)
    residual_init: float = _float(1.0, 0)
    tail_init: float = _float(1.0, 0)
    # Data.
    data: list[str] = _folders("a folder or packed file, or a list of such")
    lr_data: list[str] = _folders()
    patch: int = _int(4, default=64)
    batch: int = _int(1, default=16)
    candidates: int = _int(1, default=1)
    # Loss and optimizer.
    frequency_loss: float = _float(0.0, 0)
    peak_lr: float = _float(2e-4, 0)
    betas: list[float] = _numbers([0.9, 0.999], 0, 1, 2)
    clip: float | None = _float(None, 0)
    ema: float = _float(0.999, 0, 1)
    # How long, and the learning rate on the way.
    steps: int | None = _int(1, optional=True)
    minutes: float | None = _float(None, 0)
    schedule: str = _choice("cosine", ("cosine", "multistep", "constant"))
    milestones: list[float] = _numbers([0.5, 0.8, 0.9, 0.95], 0, 1)
    gamma: float = _float(0.5, 0)
    warmup: float = _float(0.0, 0, 1)
    # How it runs.
    backend: str = _choice("auto", ("auto", *BACKENDS))
    device: str = _text("auto")
    precision: str = _choice("float32", ("float32", "bfloat16", "float16"))
    compile: bool = _bool(False)
    channels_last: bool = _bool(True)
    seed: int = _int(0, default=1)
    threads: int | None = _int(1, optional=True)
    # Where it is written, and how it is watched.
    out: str | None = _text(None)
    validate: str | None = _text(None)
    validate_lr: str | None = _text(None)
    validate_side: int | None = _int(16, optional=True)
    validate_count: int | None = _int(1, optional=True)
    validate_every: int = _int(1, default=1000)
    save_minutes: float = _float(5.0, 0)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            try:
                setattr(self, item.name, item.metadata["check"](value))
            except (ValueError, OverflowError):
                accepted = item.metadata["accepted"]
                raise ConfigError(f"{item.name} is {value!r}; accepted: {accepted}") from None
        for lonely, needed in (("lr_data", "data"), ("validate_lr", "validate")):
            if getattr(self, lonely) and not getattr(self, needed):
                raise ConfigError(f"{lonely} is {getattr(self, lonely)!r}, but {needed} is not set")
        if self.model == "mafdn" and (self.residual_init, self.tail_init) != (1.0, 1.0):
            raise ConfigError(
                f"residual_init is {self.residual_init}, tail_init {self.tail_init}; mafdn begins "
                "as bilinear interpolation by itself: accepted is 1 for both"
            )

    def build(self) -> ELAN | MAFDN:
        """The network, with fresh weights.

        Raises:
            ConfigError: ``options`` does not fit.
        """
        try:
            return NETWORKS[self.model](self.scale, **self.options)
        except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = str(error).replace("__init__()", self.model)
            raise ConfigError(f"options is {self.options!r}: {reason}") from error

    def plain(self) -> dict[str, Any]:
        """The keys and values, as a YAML file has them."""
        return dataclasses.asdict(self)


KEYS = tuple(item.name for item in dataclasses.fields(Config))


def _check_names(content: Mapping[Any, Any], source: str) -> None:
    for name in content:
        if name not in KEYS:
            near = difflib.get_close_matches(str(name), KEYS, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(KEYS)}"
            raise ConfigError(f"{source}: there is no key {name!r}; {hint}")


def _read(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a configuration and of the one that it is based on."""
    import yaml

    path = CONFIGS.get(name, Path(name))
    if name in seen:
        raise ConfigError(f"{name}: its base leads back to it")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(name, CONFIGS, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{name} is neither a file nor a configuration of the package; {hint}These come with "
            f"it: {', '.join(CONFIGS)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is not YAML: {reason}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{name} holds a {type(content).__name__}; expected lines `key: value`")
    base = content.pop("base", None)
    _check_names(content, name)
    if base is None:
        return content
    if not isinstance(base, str) or base not in CONFIGS:
        raise ConfigError(f"{name}: base is {base!r}; accepted: {', '.join(CONFIGS)}")
    return {**_read(base, (*seen, name)), **content}


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of that name or file, with some keys replaced.

    Args:
        name: a key of :data:`CONFIGS`, or a YAML file; its key ``base`` names one of
            :data:`CONFIGS` whose values hold where the file is silent.
        overrides: keys and values that win over the file's.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is not accepted.
    """
    content = _read(name)
    overrides = dict(overrides or {})
    _check_names(overrides, "override")
    try:
        return Config(**{**content, **overrides})
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
