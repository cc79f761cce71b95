"""Builds sr_kernels: the libraries `_C` (schemas and CPU kernels) and `_C_cuda`, with ninja.

Everything that decides how the libraries are compiled and linked is in `build_parameters`.
The environment variables that it and `parallel_jobs` read:

    SR_KERNELS_BUILD=0              install the Python package alone, without the libraries
    SR_KERNELS_BUILD_CUDA=0|1       never | always build `_C_cuda` (default: where nvcc is found and
                                    the installed torch is a CUDA build)
    SR_KERNELS_CUDA_ARCHS           compute capabilities, as in "8.0;9.0a;10.0+PTX"
    SR_KERNELS_SANITIZE             g++ sanitizers for `_C`, as in "address,undefined"
    SR_KERNELS_BUILD_DIR            where object files are kept between builds (default: build/)
    MAX_JOBS                        parallel compilations (default: from cores and free memory)
    CXX, NVCC, CUDA_HOME            the compilers, when those on PATH are not the ones wanted

The libraries use LibTorch's stable ABI and no Python symbol: one build serves Python >= 3.10 and
torch >= 2.10. torch is found where it is installed and never installed or changed from here.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10: the oldest torch the libraries load in
PY_LIMITED_API = "0x030a0000"  # Python 3.10
INSTALLED_INSIDE = ("models", "benchmarks")  # top-level folders, as sr_kernels.models and so on

# One translation unit per instruction set from the same source; the library chooses at run time.
X86_ISA_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}

# The last entry also carries PTX, from which the driver compiles for GPUs that came later.
DEFAULT_CUDA_ARCHS = "8.0;9.0a;10.0+PTX"

GIB = 1 << 30
CXX_JOB_MEMORY = GIB  # the largest unit takes 0.4 GiB
NVCC_JOB_MEMORY = 3 * GIB


class BuildError(RuntimeError):
    """The build cannot be done; the message says what is missing and how to supply it."""


@dataclass(frozen=True)
class Unit:
    """One compilation: a source, the object it becomes, and the flags it alone has."""

    source: str  # relative to the repository
    object: str  # relative to the build directory
    compiler: str  # "cxx" or "nvcc"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """One shared library of the package."""

    name: str  # "_C"
    units: tuple[Unit, ...]
    link_flags: tuple[str, ...]


@dataclass(frozen=True)
class BuildParameters:
    """All that the ninja file is written from."""

    cxx: str
    cxx_flags: tuple[str, ...]
    nvcc: str | None
    nvcc_flags: tuple[str, ...]
    libraries: tuple[Library, ...]
    description: dict[str, object] = field(default_factory=dict)  # becomes sr_kernels/_build.json


@dataclass(frozen=True)
class Torch:
    """The installed torch, found without importing it (importing takes seconds)."""

    root: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch is not importable in the build environment. Install torch >= 2.10 first, then "
            "sr_kernels with: pip install --no-build-isolation --no-deps ."
        )
    root = Path(spec.origin).parent
    version = runpy.run_path(str(root / "version.py"))
    torch = Torch(root, str(version["__version__"]), version.get("cuda"))
    match = re.match(r"(\d+)\.(\d+)", torch.version)
    if match is None or (int(match[1]), int(match[2])) < (2, 10):
        raise BuildError(f"torch {torch.version} at {root} is too old: torch >= 2.10 is needed.")
    return torch


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """nvcc, from NVCC, CUDA_HOME, PATH, or the usual folder. torch's own CUDA_HOME is not asked:
    it is None under a CPU-only torch even where nvcc exists."""
    if "NVCC" in environment:
        return shutil.which(environment["NVCC"])
    for folder in (environment.get("CUDA_HOME"), environment.get("CUDA_PATH")):
        if folder and os.access(Path(folder) / "bin" / "nvcc", os.X_OK):
            return str(Path(folder) / "bin" / "nvcc")
    return shutil.which("nvcc", path=environment.get("PATH")) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )


def toolkit_of(nvcc: str) -> tuple[Path, tuple[int, int]]:
    """The CUDA toolkit's folder and version, asked of nvcc itself: nvcc may be a wrapper script
    that stands far from its toolkit."""
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", shown.stdout)
    if top is None or release is None:
        raise BuildError(f"{nvcc} does not answer as nvcc does: {dry.stderr[:500]}")
    return Path(top[1].strip()).resolve(), (int(release[1]), int(release[2]))


def cuda_decision(environment: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Whether `_C_cuda` is built, and why (or why not): shown by `sr-kernels env`."""
    wish = environment.get("SR_KERNELS_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"SR_KERNELS_BUILD_CUDA is {wish!r}: use 0 (never) or 1 (always).")
    if not list(ROOT.glob("csrc/*/launch.cu")):
        return False, "the sources hold no CUDA kernels"
    if wish == "0":
        return False, "SR_KERNELS_BUILD_CUDA=0 when the package was built"
    if environment.get("SR_KERNELS_SANITIZE"):
        return False, "a sanitizer build holds the CPU library alone"
    nvcc = find_nvcc(environment)
    if wish == "1":
        if nvcc is None:
            raise BuildError("SR_KERNELS_BUILD_CUDA=1, but nvcc is not found: set NVCC or PATH.")
        return True, "SR_KERNELS_BUILD_CUDA=1"
    if nvcc is None:
        return False, "nvcc was not found when the package was built"
    if importlib.util.find_spec("torch") is None:  # as when metadata alone is asked for
        return False, "torch was not found when the package was built"
    if find_torch().cuda is None:
        return False, "torch was a CPU-only build when the package was built"
    return True, "nvcc was found and torch is a CUDA build"


def gencode_flags(archs: str, toolkit_version: tuple[int, int]) -> tuple[str, ...]:
    """nvcc's -gencode flags for a list such as "8.0;9.0a;10.0+PTX"."""
    flags: list[str] = []
    for arch in filter(None, re.split(r"[;,\s]+", archs)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise BuildError(
                f"SR_KERNELS_CUDA_ARCHS has {arch!r}: entries look like 8.0, 9.0a or 10.0+PTX."
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise BuildError(f"SR_KERNELS_CUDA_ARCHS is {archs!r}: it names no architecture.")
    return tuple(flags)


def build_parameters(environment: Mapping[str, str] = os.environ) -> BuildParameters:
    """Every build parameter: compile units with their flags, include folders, link flags."""
    torch = find_torch()
    machine = platform.machine().lower()
    x86 = machine in ("x86_64", "amd64")
    sanitizers = environment.get("SR_KERNELS_SANITIZE", "")

    # Torch's headers are system headers here: our warnings are about our code.
    includes = ("-Icsrc", "-isystem", str(torch.root / "include"))
    torch_flags = (
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-DPy_LIMITED_API={PY_LIMITED_API}",
    )
    x86_flags = ("-DSR_KERNELS_X86=1",) if x86 else ()
    # No -ffast-math: NaN and infinity pass as in the reference. Contraction to FMA and an errno
    # that is not set change no result that a caller could rely on.
    cxx_flags = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
    cxx_flags += ("-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra")
    cxx_flags += (*x86_flags, *includes)
    sanitizer_flags: tuple[str, ...] = ()
    if sanitizers:
        sanitizer_flags = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
        # Multiplications and additions are contracted as in the ordinary build (at -O1 g++ does so
        # with its expensive optimisations only): the tests hold the same accuracy.
        cxx_flags += (*sanitizer_flags, "-O1", "-fexpensive-optimizations")
        cxx_flags += ("-g", "-fno-omit-frame-pointer")

    def sources(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))

    def object_of(source: str, suffix: str = "") -> str:
        return str(Path(source).with_suffix(f"{suffix}.o"))

    # --- _C
    isa_flags = X86_ISA_FLAGS if x86 else {"portable": ()}
    units = [  # the longest compilations first, so that none is left over at the end
        Unit(source, object_of(source, f".{isa}"), "cxx", (f"-DSR_KERNELS_ISA={isa}", *flags))
        for source in sources("csrc/*/cpu*.cpp")
        if not source.startswith(os.path.join("csrc", "common"))
        for isa, flags in isa_flags.items()
    ]
    units += [
        Unit(source, object_of(source), "cxx", torch_flags)
        for source in sources("csrc/library.cpp") + sources("csrc/*/ops_cpu.cpp")
    ]
    units += [Unit(source, object_of(source), "cxx") for source in sources("csrc/common/*.cpp")]
    # libtorch is needed although no symbol names it: under a CUDA build of torch it is what brings
    # libtorch_cuda into the library's scope. No rpath: `import torch` has loaded them all before.
    # libstdc++ stands first: libtorch_cpu exports parts of it too, which are not to be depended on.
    torch_link = ("-Wl,--no-as-needed", f"-L{torch.root / 'lib'}")
    torch_link += ("-lstdc++", "-ltorch_cpu", "-lc10", "-ltorch")
    undefined = () if sanitizers else ("-Wl,-z,defs",)  # an unresolved symbol fails here, not later
    libraries = [Library("_C", tuple(units), (*sanitizer_flags, *undefined, *torch_link))]

    # --- _C_cuda
    build_cuda, reason = cuda_decision(environment)
    nvcc = None
    nvcc_flags: tuple[str, ...] = ()
    archs = ""
    toolkit_version = None
    if build_cuda:
        nvcc = find_nvcc(environment)
        assert nvcc is not None  # cuda_decision has seen it
        toolkit, toolkit_version = toolkit_of(nvcc)
        archs = environment.get("SR_KERNELS_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
        cuda_includes = ("-isystem", str(toolkit / "include"))
        # Without USE_CUDA torch's stable headers hide the getter of the current stream.
        cuda_torch_flags = (*torch_flags, "-DUSE_CUDA")
        nvcc_flags = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")
        nvcc_flags += ("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", *includes)
        nvcc_flags += gencode_flags(archs, toolkit_version)
        cuda_units = [
            Unit(source, object_of(source, ".cuda"), "nvcc", cuda_torch_flags)
            for source in sources("csrc/*/launch*.cu")
        ]
        cuda_units += [
            Unit(source, object_of(source), "cxx", (*cuda_torch_flags, *cuda_includes))
            for source in sources("csrc/*/ops_cuda.cpp")
        ]
        # The runtime is linked statically: the library then needs no libcudart of one version. The
        # stream getter is in libtorch_cuda, which a CPU-only torch lacks: undefined until loaded.
        libdirs = [toolkit / "lib64", *toolkit.glob("targets/*/lib")]
        cuda_link = (*torch_link, *(f"-L{folder}" for folder in libdirs if folder.is_dir()))
        cuda_link += ("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL")
        libraries.append(Library("_C_cuda", tuple(cuda_units), cuda_link))

    cxx = environment.get("CXX") or "g++"
    if shutil.which(cxx.split()[0]) is None:
        raise BuildError(f"the C++ compiler {cxx!r} is not found: install g++ or set CXX.")
    return BuildParameters(
        cxx=cxx,
        cxx_flags=cxx_flags,
        nvcc=nvcc,
        nvcc_flags=nvcc_flags,
        libraries=tuple(libraries),
        description={
            "torch": torch.version,
            "machine": machine,
            "isas": list(isa_flags),
            "sanitizers": sanitizers,
            "compiler": first_line(cxx, "--version"),
            "cuda": {
                "built": build_cuda,
                "reason": reason,
                "toolkit": ".".join(map(str, toolkit_version)) if toolkit_version else None,
                "archs": archs,
            },
        },
    )


def first_line(command: str, argument: str) -> str:
    shown = subprocess.run([*command.split(), argument], capture_output=True, text=True)
    return shown.stdout.partition("\n")[0]


# ------------------------------------------------------------------------------- parallel jobs


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: no quota to respect
    return cores


def free_memory() -> int | None:
    """Bytes that new processes can use, or None where the system does not say."""
    figures = []
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if available is not None:
            figures.append(int(available[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            figures.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # whatever was read before stands
    return min(figures) if figures else None


def parallel_jobs(
    environment: Mapping[str, str], cores: int, memory: int | None, job_memory: int
) -> int:
    """How many compilers run at once: MAX_JOBS, else as many as both cores and memory allow."""
    wish = environment.get("MAX_JOBS")
    if wish:
        if not wish.isdecimal() or int(wish) < 1:
            raise BuildError(f"MAX_JOBS is {wish!r}: it must be a positive integer.")
        return int(wish)
    by_memory = cores if memory is None else memory // job_memory
    return max(1, min(cores, by_memory))


# --------------------------------------------------------------------------------------- ninja


def find_ninja() -> str:
    beside_python = Path(sys.executable).parent / "ninja"  # a venv that is used but not activated
    if os.access(beside_python, os.X_OK):
        return str(beside_python)
    ninja = shutil.which("ninja")
    if ninja is None:
        raise BuildError("ninja is not found. Install it with: pip install ninja")
    return ninja


def ninja_text(parameters: BuildParameters, build_dir: Path) -> str:
    """The ninja file. Commands run in the repository, so that compilers' messages and debug
    information name sources as the repository does."""

    def join(words: tuple[str, ...]) -> str:
        return " ".join(re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", word) for word in words).replace(
            "$", "$$"
        )

    def path(value: Path | str) -> str:
        return re.sub(r"[$ :]", r"$\g<0>", str(value))

    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(build_dir)}",  # where ninja keeps its logs
        f"cxx = {parameters.cxx}",
        f"cxx_flags = {join(parameters.cxx_flags)}",
        f"nvcc = {parameters.nvcc or ''}",
        f"nvcc_flags = {join(parameters.nvcc_flags)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxx_flags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $out",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $nvcc_flags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = NVCC $out",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
        "  description = LINK $out",
    ]
    for library in parameters.libraries:
        objects = []
        for unit in library.units:
            target = path(build_dir / unit.object)
            objects.append(target)
            lines += [f"build {target}: {unit.compiler} {path(unit.source)}"]
            lines += [f"  flags = {join(unit.flags)}"]
        target = path(build_dir / f"{library.name}.abi3.so")
        lines += [f"build {target}: link {' '.join(objects)}"]
        lines += [f"  flags = {join(library.link_flags)}"]
    return "\n".join(lines) + "\n"


def write_if_changed(target: Path, text: str) -> None:
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def build_directory(parameters: BuildParameters, environment: Mapping[str, str]) -> Path:
    """Object files of different torch versions and sanitizers do not replace one another."""
    base = Path(environment.get("SR_KERNELS_BUILD_DIR") or ROOT / "build").resolve()
    sanitizers = str(parameters.description["sanitizers"]).replace(",", "-")
    return base / "-".join(filter(None, [f"torch-{parameters.description['torch']}", sanitizers]))


def run_ninja(parameters: BuildParameters, build_dir: Path, environment: Mapping[str, str]) -> None:
    job_memory = NVCC_JOB_MEMORY if parameters.nvcc else CXX_JOB_MEMORY
    jobs = parallel_jobs(environment, available_cores(), free_memory(), job_memory)
    build_dir.mkdir(parents=True, exist_ok=True)
    command = [find_ninja(), "-f", str(build_dir / "build.ninja"), "-j", str(jobs)]
    with open(build_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree at once: one waits
        write_if_changed(build_dir / "build.ninja", ninja_text(parameters, build_dir))
        print("sr_kernels:", *command, flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise BuildError("compiling sr_kernels failed: the compiler's message is above.")


# ---------------------------------------------------------------------------------- setuptools


class FreshBuild(build):
    """Collects the package in a folder of its own. setuptools' shared build/lib would carry files
    of earlier builds (a removed module, another build's `_C_cuda`) into the wheel."""

    def finalize_options(self) -> None:
        if self.build_base == "build":
            self.build_base = tempfile.mkdtemp(prefix="sr_kernels-build-")
            atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)
        super().finalize_options()


class NinjaBuildExt(build_ext):
    """Builds the libraries with ninja, incrementally, and puts them where setuptools wants them."""

    def run(self) -> None:
        if not self.extensions:  # SR_KERNELS_BUILD=0
            return
        parameters = build_parameters()
        build_dir = build_directory(parameters, os.environ)
        run_ninja(parameters, build_dir, os.environ)
        package = Path(self.get_ext_fullpath("sr_kernels._C")).parent
        built = {f"{library.name}.abi3.so" for library in parameters.libraries}
        for present in package.glob("_C*.abi3.so"):
            if present.name not in built:  # left by an earlier editable installation
                present.unlink()
        for name in sorted(built):
            replace_file(build_dir / name, package / name)
        description = json.dumps(parameters.description, indent=2) + "\n"
        (package / "_build.json").write_text(description)


def replace_file(source: Path, target: Path) -> None:
    """Copies in one step: a process that has the old library mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.chmod(0o755)
    os.replace(temporary, target)


def extensions() -> list[Extension]:
    wish = os.environ.get("SR_KERNELS_BUILD", "1")
    if wish not in ("0", "1"):
        raise BuildError(f"SR_KERNELS_BUILD is {wish!r}: use 0 (Python alone) or 1.")
    if wish == "0":
        return []
    names = ["_C", "_C_cuda"] if cuda_decision()[0] else ["_C"]
    return [Extension(f"sr_kernels.{name}", sources=[], py_limited_api=True) for name in names]


def packages() -> list[str]:
    """`sr_kernels`, and the top-level folders that are installed inside it."""
    inside = [
        f"sr_kernels.{name}"
        for folder in INSTALLED_INSIDE
        for name in (folder, *(f"{folder}.{n}" for n in find_packages(folder)))
    ]
    return find_packages(include=["sr_kernels", "sr_kernels.*"]) + inside


if __name__ == "__main__":
    if int(setuptools.__version__.partition(".")[0]) < 77:
        # Older ones stop at pyproject.toml's license, with a message that helps nobody.
        raise BuildError(
            f"setuptools {setuptools.__version__} is too old. Install a newer one with: "
            "pip install 'setuptools>=77'"
        )
    setup(
        packages=packages(),
        package_dir={f"sr_kernels.{folder}": folder for folder in INSTALLED_INSIDE},
        ext_modules=extensions(),
        cmdclass={"build": FreshBuild, "build_ext": NinjaBuildExt},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
