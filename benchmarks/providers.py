"""Who computes a case: stock PyTorch, torch.compile, libraries, other runtimes, and us."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sr_kernels import backends, models
from sr_kernels.ops._registration import memory_format_of
from sr_kernels.testing import make_tensor

from . import networks, operators
from .cases import Case, MissingExtra
from .operators import Problem, Unavailable
from .work import Work

__all__ = ["Provider", "Running", "Subject", "Unavailable"]

BACKENDS = ("cuda", "triton", "cpu")
PATCHED = "patched"
OURS = (*BACKENDS, PATCHED)  # in the names of what is this package's
# torch.compile, as it is and with everything that it can do: it then tries many kernels for each
# product, and replays a CUDA graph.
COMPILE, MAX_AUTOTUNE = "compile", "compile_max_autotune"
CHANNELS_LAST = "_channels_last"
PLAN = "_plan"


@dataclass
class Running:
    """A provider, ready to run one case.

    forward: one call, with inputs as they were prepared.
    leaves: by name, what backward computes gradients of; empty for a forward case.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def _gradient_for(self, out: Tensor) -> Tensor:
        # The same rounded numbers for every dtype.
        g = make_tensor(out.shape, torch.bfloat16, seed=99, device=out.device)
        return g.to(out.dtype).contiguous(memory_format=memory_format_of(out))

    def call(self, mode: str) -> Callable[[], object]:
        """What is timed."""
        if mode == "forward":
            return self._no_grad
        leaves = list(self.leaves.values())
        if mode == "both":
            with torch.enable_grad():
                g = self._gradient_for(self.forward())

            def both() -> object:
                return torch.autograd.grad(self.forward(), leaves, g)

            return both
        out = self.forward()
        g = self._gradient_for(out)

        def backward() -> object:
            return torch.autograd.grad(out, leaves, g, retain_graph=True)

        return backward

    def _no_grad(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def results(self, mode: str) -> dict[str, Tensor]:
        """What is verified."""
        if mode == "forward":
            return {"output": self._no_grad()}
        out = self.forward()
        gradients = torch.autograd.grad(
            out, list(self.leaves.values()), self._gradient_for(out), retain_graph=mode != "both"
        )
        named = {f"gradient {n}": g for n, g in zip(self.leaves, gradients, strict=True)}
        return {"output": out.detach(), **named}


@dataclass(frozen=True)
class Provider:
    """name: as in the table.  build: makes it ready; raises Unavailable where it cannot run.

    ours: of this package.  foreign: a runtime with threads of its own.
    compiles: the first call compiles.  slow: for minutes, so that the quick set goes without.
    graphs: a call replays a CUDA graph of its own.
    """

    name: str
    build: Callable[[], Running]
    ours: bool = False
    foreign: bool = False
    compiles: bool = False
    slow: bool = False
    graphs: bool = False


@dataclass
class Subject:
    """A case with its providers.

    stock: builds the definition in a dtype, as the oracle; None: as the case has it.  best_format:
    "" or "_channels_last", the format that stock runs faster in; `torch.compile` gets it and reads
    it when it is built.  export: writes the file that foreign runtimes read, unless it is there;
    they do it themselves if nobody has.
    """

    case: Case
    providers: list[Provider]
    work: dict[str, Work]
    stock: Callable[[torch.dtype | None], Running]
    weights: str = ""
    best_format: str = ""
    export: Callable[[], None] = lambda: None


def subject(case: Case, *, weights: Path | None, image: Path, folder: Path) -> Subject:
    """Every provider that there might be for the case.

    folder: for exported networks; a second call for the same case finds them there.
    """
    if case.is_network:
        return _network_subject(case, weights, image, folder)
    return _operator_subject(case)


def our_backends(device: str, op: str, like: Tensor) -> Iterator[tuple[str, str]]:
    """(name, why it cannot run or ""), of those that are for the device."""
    for name in BACKENDS:
        if (name == "cpu") != (device == "cpu"):
            continue
        able, reason = backends.can_run(name, op, [like])
        yield name, "" if able else reason


def stem(provider: str) -> str:
    """A provider's name without what says how it is called: "cpu" of "cpu_plan"."""
    return provider.removesuffix(CHANNELS_LAST).removesuffix(PLAN)


def _memory_format(suffix: str) -> torch.memory_format:
    return torch.channels_last if suffix == CHANNELS_LAST else torch.contiguous_format


def _compile_providers(
    case: Case, build: Callable[[Callable[[Any], Any]], Running]
) -> Iterator[Provider]:
    """build: makes the definition ready with what is given, applied to it."""
    how = {"compiles": True, "slow": case.is_network}
    yield Provider(COMPILE, partial(build, partial(torch.compile, dynamic=False)), **how)
    # On a CPU it has no graphs and hardly a kernel to choose. A graph's results are overwritten by
    # the next forward: backward after backward is nothing that it could do.
    if case.device != "cpu" and case.mode != "backward":
        yield Provider(MAX_AUTOTUNE, partial(build, _max_autotune), graphs=True, **how)


def _max_autotune(function: Any) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=False, mode="max-autotune")

    def run(*arguments: Any, **named: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # nobody needs the last call's results any more
        return compiled(*arguments, **named)

    return run


# ------------------------------------------------------------------------------ operators


def _operator_subject(case: Case) -> Subject:
    if case.op not in operators.OPERATORS:
        raise ValueError(f"op is {case.op!r}; it has no definition in operators.py")
    if case.autocast:
        raise ValueError(f"op is {case.op!r}, but autocast is measured with networks only")
    problem: Problem = operators.OPERATORS[case.op](case)
    differentiate = case.mode != "forward"

    def run(builder: operators.Builder, suffix: str, dtype: torch.dtype | None = None) -> Running:
        inputs = {}
        for name, value in problem.inputs.items():
            tensor = value.detach().to(dtype) if dtype is not None else value.detach().clone()
            if name in problem.maps:
                tensor = tensor.contiguous(memory_format=_memory_format(suffix))
            wanted = differentiate and name in problem.gradients
            inputs[name] = tensor.requires_grad_(wanted)
        leaves = {n: t for n, t in inputs.items() if t.requires_grad}
        return Running(partial(builder(inputs), **inputs), leaves)

    result = Subject(
        case, [], problem.work, lambda dtype: run(problem.stock, "", dtype), weights=""
    )

    def compiled(compiler: Callable[[Any], Any]) -> Running:
        return run(lambda inputs: compiler(problem.stock(inputs)), result.best_format)

    for suffix in ("", CHANNELS_LAST):
        result.providers.append(Provider(f"eager{suffix}", partial(run, problem.stock, suffix)))
    result.providers.extend(_compile_providers(case, compiled))
    for name, builder in problem.alternatives.items():
        for suffix in ("", CHANNELS_LAST):
            if name == "flex" and suffix:
                continue  # it copies into a layout of its own
            result.providers.append(
                Provider(
                    f"{name}{suffix}",
                    partial(run, builder, suffix),
                    compiles=name == "flex",
                    slow=name in problem.slow and case.device == "cpu",
                )
            )
    like = problem.inputs[problem.maps[0]]
    public = {"grouped_window_reuse": "apply_window_scores"}.get(case.op, case.op)
    for backend, reason in our_backends(case.device, public, like):
        for suffix in ("", CHANNELS_LAST):

            def build(name: str = backend, reason: str = reason, suffix: str = suffix) -> Running:
                if reason:
                    raise Unavailable(reason)
                return run(lambda inputs: problem.ours(inputs, name), suffix)

            result.providers.append(Provider(f"{backend}{suffix}", build, ours=True))
    return result


# ------------------------------------------------------------------------------ networks


def _network_subject(case: Case, weights: Path | None, image: Path, folder: Path) -> Subject:
    network, description = networks.load(case, weights, image)
    dtype: torch.dtype = getattr(torch, case.storage)
    theirs = networks.NETWORKS[case.op].theirs
    white = networks.white(case.op, network)
    picture = networks.photograph(image, case.batch, case.height, case.width, white)
    training = case.mode != "forward"

    def prepare(
        suffix: str,
        backend: str = "reference",
        to: torch.dtype | None = None,
        wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None,
    ) -> Running:
        """to: a dtype to compute in instead of the case's, without autocast."""
        format_, autocast = _memory_format(suffix), case.autocast and to is None
        to = dtype if to is None else to
        # By way of the dtype under test: the oracle gets the same rounded numbers.
        model: Any = copy.deepcopy(network).to(case.device, dtype).to(to)
        model = model.to(memory_format=format_).train(training)
        if not theirs:
            model.backend = backend
        x = picture.to(case.device, dtype).to(to).contiguous(memory_format=format_)
        leaves = {}
        if training:
            leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
        function = partial(model if wrap is None else wrap(model), x)
        if autocast:
            function = torch.autocast(case.device, getattr(torch, case.arithmetic))(function)
        return Running(function, leaves)

    work = networks.work(case, network)
    result = Subject(case, [], work, lambda to: prepare("", to=to), weights=description)

    def compiled(compiler: Callable[[Any], Any]) -> Running:
        return prepare(result.best_format, wrap=compiler)

    for suffix in ("", CHANNELS_LAST):
        result.providers.append(Provider(f"eager{suffix}", partial(prepare, suffix)))
    result.providers.extend(_compile_providers(case, compiled))
    if case.device == "cpu" and case.mode == "forward" and case.dtype == "float32":
        file = folder / f"{case.op}-{case.shape}.onnx"

        def export() -> None:
            if file.exists():
                return
            try:
                import onnx  # noqa: F401
            except ImportError as error:
                raise Unavailable(str(MissingExtra("onnx"))) from error
            # Here, so that builds of older commits, which lack it, can be compared.
            from sr_kernels import export_onnx

            export_onnx(copy.deepcopy(network).float().eval(), picture, file, verify=False)

        def runtime(session: Callable[[Path, Tensor], Callable[[], Tensor]]) -> Running:
            export()
            return Running(session(file, picture))

        result.export = export

        for name, session in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
            result.providers.append(Provider(name, partial(runtime, session), foreign=True))
    like = picture.to(case.device, dtype)
    reasons = dict(our_backends(case.device, "shift_conv2d", like))
    if theirs:
        for suffix in ("", CHANNELS_LAST):

            def build_patched(suffix: str = suffix) -> Running:
                if all(reasons.values()):
                    raise Unavailable("; ".join(reasons.values()))
                return prepare(suffix, wrap=_patched)

            result.providers.append(Provider(f"{PATCHED}{suffix}", build_patched, ours=True))
        return result
    for backend, reason in reasons.items():
        # A plan chooses its own layout inside, so that one is enough.
        planned = () if training else (PLAN,)
        for suffix in ("", CHANNELS_LAST, *planned):

            def build(name: str = backend, reason: str = reason, suffix: str = suffix) -> Running:
                if reason:
                    raise Unavailable(reason)
                return prepare(suffix, name, wrap=models.plan if suffix == PLAN else None)

            result.providers.append(Provider(f"{backend}{suffix}", build, ours=True))
    return result


def _patched(model: nn.Module) -> nn.Module:
    # Here, since builds of older commits, which lack it, can be compared.
    from sr_kernels import patch

    if not patch(model).replaced:
        raise Unavailable("sr_kernels.patch recognises nothing in it")
    return model


def _onnxruntime(file: Path, x: Tensor) -> Callable[[], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(str(MissingExtra("onnxruntime"))) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    array = x.numpy()
    return lambda: torch.from_numpy(session.run(None, {name: array})[0])


def _openvino(file: Path, x: Tensor) -> Callable[[], Tensor]:
    try:
        import openvino
    except ImportError as error:
        raise Unavailable(str(MissingExtra("openvino"))) from error
    # float32 by name: on processors with bfloat16 units it would otherwise compute in those.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()
    array = x.numpy()

    def run() -> Tensor:
        found = request.infer({0: array}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    return run
