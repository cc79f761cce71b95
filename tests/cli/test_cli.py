"""The command line: what it writes, says and refuses, and that it leaves no half file."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sr_kernels.models as models
import torch
from PIL import Image

from sr_kernels import cli
from sr_kernels.cli import console, demo

Run = Callable[..., Any]


def files(folder: Path) -> list[str]:
    """Everything below `folder`, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """photos/{a.png, b.jpg, notes.txt, .hidden.png, sub/a.bmp, sub/deep/c.webp}"""
    root = tmp_path / "photos"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "notes.txt").write_text("no picture")
    names = ("a.png", "b.jpg", "sub/a.bmp", "sub/deep/c.webp", ".hidden.png")
    for number, name in enumerate(names):
        Image.new("RGB", (6 + number, 5), (9 * number, 50, 99)).save(root / name)
    return root


# ----------------------------------------------------------------------------------------- one file


def test_default_name(run: Run, photo: Path) -> None:
    outcome = run("upscale", photo)
    assert outcome.status == 0
    assert outcome.err == ""
    target = photo.with_name("photo_x4.png")
    assert size(target) == (80, 48)
    pixels = np.asarray(Image.open(photo))
    np.testing.assert_array_equal(np.asarray(Image.open(target)), pixels.repeat(4, 0).repeat(4, 1))
    assert files(photo.parent) == ["photo.png", "photo_x4.png"]


def test_it_says_what_it_wrote_with_what_and_how_fast(run: Run, photo: Path) -> None:
    out = run("upscale", photo).out
    assert "photo_x4.png" in out
    assert "20x12 -> 80x48" in out
    assert re.search(r"backend (cpu \(\w+\)|reference)", out)
    assert re.search(r"\d+\.\d\d s", out)
    assert "megapixels/s" in out


def test_permissions_are_those_of_any_new_file(run: Run, photo: Path) -> None:
    ordinary = photo.with_name("ordinary")
    ordinary.touch()
    run("upscale", photo)
    target = photo.with_name("photo_x4.png")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp", "tif", "tiff", "bmp"])
def test_the_name_gives_the_format(run: Run, photo: Path, ending: str) -> None:
    target = photo.with_name(f"large.{ending}")
    assert run("upscale", photo, "-o", target).status == 0
    with Image.open(target) as image:
        expected = {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper())
        assert image.format == expected


def test_format_gives_the_ending(run: Run, photo: Path) -> None:
    assert run("upscale", photo, "--format", "jpeg").status == 0
    assert size(photo.with_name("photo_x4.jpg")) == (80, 48)
    assert run("upscale", photo, "--format", "webp", "-o", photo.with_name("bare")).status == 0
    assert Image.open(photo.with_name("bare")).format == "WEBP"


def test_into_a_folder(run: Run, photo: Path) -> None:
    folder = photo.parent / "out"
    folder.mkdir()
    assert run("upscale", photo, "-o", folder).status == 0
    assert files(folder) == ["photo_x4.png"]


def test_overwrite(run: Run, photo: Path) -> None:
    target = photo.with_name("photo_x4.png")
    target.write_text("precious")
    outcome = run("upscale", photo)
    assert outcome.status == 1
    assert "--overwrite" in outcome.err
    assert target.read_text() == "precious"
    assert run("upscale", photo, "--overwrite").status == 0
    assert size(target) == (80, 48)


def test_awkward_names(run: Run, photo: Path) -> None:
    for name in (
        "a b.png",
        "-dash.png",
        "bracket[page=3].png",
        "ümlaut 写真.png",
        "x" * 240 + ".png",
    ):
        source = photo.parent / name
        shutil.copy(photo, source)
        assert run("upscale", source).status == 0, name
        assert size(source.with_name(source.stem + "_x4.png")) == (80, 48)


def test_name_that_is_not_utf8(run: Run, photo: Path) -> None:
    source = os.fsdecode(os.fsencode(photo.parent) + b"/caf\xe9.png")
    shutil.copy(photo, source)
    outcome = subprocess.run(
        [sys.executable, Path(__file__).with_name("nearest.py"), "upscale", source],
        capture_output=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert os.path.exists(source.replace(".png", "_x4.png"))


def test_memory_running_out_is_told(run: Run, photo: Path, nearest_class: Any) -> None:
    net = nearest_class(limit=150, overlap=2)
    outcome = run("upscale", photo, "--tile", "off", "--tile-overlap", 2, net=net)
    assert outcome.status == 0
    assert "memory ran out with a tile of 20 pixels; going on with 10" in outcome.err
    assert size(photo.with_name("photo_x4.png")) == (80, 48)


def test_memory_running_out_for_good_is_told(run: Run, photo: Path, nearest_class: Any) -> None:
    outcome = run("upscale", photo, net=nearest_class(limit=1))
    assert outcome.status == 1
    assert "even with a tile" in outcome.err
    assert files(photo.parent) == ["photo.png"]


def test_picture_larger_than_memory(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sr_kernels import inference

    monkeypatch.setattr(inference, "available_memory", lambda *_: 5000)
    outcome = run("upscale", photo, "--tile", "16")
    assert outcome.status == 1
    assert "GB of memory" in outcome.err
    assert files(photo.parent) == ["photo.png"]


# ------------------------------------------------------------------------------------------ folders


def test_tree(run: Run, tree: Path) -> None:
    outcome = run("upscale", tree)
    assert outcome.status == 0
    out = tree.with_name("photos_x4")
    assert files(out) == ["a_x4.png", "b_x4.png", "sub/a_x4.png", "sub/deep/c_x4.png"]
    assert size(out / "sub" / "a_x4.png") == (32, 20)
    assert "4 of 4 pictures written" in outcome.out
    assert "1 other files" in outcome.err


def test_relative_folder(run: Run, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert run("upscale", ".").status == 0
    assert len(files(tree.with_name("photos_x4"))) == 4


def test_repeated_run_skips(run: Run, tree: Path) -> None:
    out = tree.with_name("out")
    assert run("upscale", tree, "-o", out).status == 0
    (out / "b_x4.png").unlink()
    before = (out / "a_x4.png").stat().st_mtime_ns
    outcome = run("upscale", tree, "-o", out)
    assert outcome.status == 0
    assert "1 of 4 pictures written" in outcome.out
    assert "3 were already there" in outcome.out
    assert (out / "a_x4.png").stat().st_mtime_ns == before
    outcome = run("upscale", tree, "-o", out, "--overwrite")
    assert "4 of 4 pictures written" in outcome.out
    assert (out / "a_x4.png").stat().st_mtime_ns > before


def test_same_stem_twice(run: Run, tree: Path) -> None:
    shutil.copy(tree / "a.png", tree / "b.png")
    assert run("upscale", tree).status == 0
    names = files(tree.with_name("photos_x4"))
    assert "b_jpg_x4.png" in names
    assert "b_png_x4.png" in names
    assert "a_x4.png" in names


def test_one_bad_file_in_a_folder(run: Run, tree: Path) -> None:
    (tree / "bad.png").write_text("no picture")
    (tree / "sub" / "cut.png").write_bytes((tree / "a.png").read_bytes()[:50])
    outcome = run("upscale", tree)
    assert outcome.status == 1
    assert "bad.png" in outcome.err
    assert "cut.png" in outcome.err
    assert "2 of 6 pictures failed" in outcome.err
    assert "4 of 6 pictures written" in outcome.out
    assert len(files(tree.with_name("photos_x4"))) == 4


# -------------------------------------------------------------------------------------- bad command
# {photo}, {tree} and {tmp} stand for paths. Status, words on stderr, arguments.

BAD_COMMANDS = [
    (2, "COMMAND", ["frobnicate"]),
    (2, "INPUT", ["upscale"]),
    (2, "unrecognized", ["upscale", "{photo}", "--frobnicate"]),
    (2, "unrecognized", ["upscale", "{photo}", "{photo}"]),
    (2, "--scale", ["upscale", "{photo}", "--scale", "5"]),
    (2, "--scale", ["upscale", "{photo}", "--scale", "four"]),
    (2, "--scale", ["upscale", "{photo}", "--scale", "-4"]),
    (2, "--backend", ["upscale", "{photo}", "--backend", "opencl"]),
    (2, "--dtype", ["upscale", "{photo}", "--dtype", "int8"]),
    (2, "--device must be", ["upscale", "{photo}", "--device", "tpu"]),
    (2, "--device must be", ["upscale", "{photo}", "--device", ""]),
    (2, "--device must be", ["upscale", "{photo}", "--device", "cuda:x"]),
    (2, "--device must be", ["upscale", "{photo}", "--device", "mps"]),
    (2, "--device says cpu", ["upscale", "{photo}", "--device", "cpu", "--backend", "cuda"]),
    (2, "--device says cuda", ["upscale", "{photo}", "--device", "cuda", "--backend", "cpu"]),
    (2, "--format", ["upscale", "{photo}", "--format", "gif"]),
    (2, "1 to 100", ["upscale", "{photo}", "--quality", "0"]),
    (2, "1 to 100", ["upscale", "{photo}", "--quality", "101"]),
    (2, "1 to 100", ["upscale", "{photo}", "--quality", "high"]),
    (2, "auto, off or", ["upscale", "{photo}", "--tile", "0"]),
    (2, "auto, off or", ["upscale", "{photo}", "--tile", "-64"]),
    (2, "auto, off or", ["upscale", "{photo}", "--tile", "12.5"]),
    (2, "auto, off or", ["upscale", "{photo}", "--tile", ""]),
    (2, "0 or more", ["upscale", "{photo}", "--tile-overlap", "-1"]),
    (2, "0 or more", ["upscale", "{photo}", "--tile-overlap", "some"]),
    (2, "leaves nothing", ["upscale", "{photo}", "--tile", "32", "--tile-overlap", "32"]),
    (2, "leaves nothing", ["upscale", "{photo}", "--tile", "32", "--tile-overlap", "16"]),
    (1, "does not exist", ["upscale", "{tmp}/none.png"]),
    (2, "INPUT is empty", ["upscale", ""]),
    (1, "does not exist", ["upscale", "{photo}/inside.png"]),
    (1, "neither a file nor a folder", ["upscale", "/dev/null"]),
    (2, "cannot be told", ["upscale", "{photo}", "-o", "{tmp}/large"]),
    (2, "cannot be told", ["upscale", "{photo}", "-o", "{tmp}/large.gif"]),
    (2, "contradicts", ["upscale", "{photo}", "-o", "{tmp}/large.png", "--format", "jpeg"]),
    (1, "does not exist", ["upscale", "{photo}", "-o", "{tmp}/none/large.png"]),
    (1, "does not exist", ["upscale", "{photo}", "-o", "{tmp}/none/"]),
    (2, "the input itself", ["upscale", "{photo}", "-o", "{photo}", "--overwrite"]),
    (2, "the input itself", ["upscale", "{photo}", "-o", "{tmp}/link.png", "--overwrite"]),
    (2, "must be one too", ["upscale", "{tree}", "-o", "{photo}"]),
    (2, "lies inside the input", ["upscale", "{tree}", "-o", "{tree}"]),
    (2, "lies inside the input", ["upscale", "{tree}", "-o", "{tree}/sub/out"]),
    (2, "lies inside the input", ["upscale", "{tree}", "-o", "{tree}/../photos/new"]),
    (1, "no pictures", ["upscale", "{tmp}/nothing"]),
    (2, "-o", ["upscale", "/"]),
    (2, "cannot be told", ["demo", "-o", "{tmp}/large"]),
]


@pytest.mark.parametrize(
    ("status", "words", "arguments"),
    BAD_COMMANDS,
    ids=[" ".join(arguments) for _, _, arguments in BAD_COMMANDS],
)
def test_bad_commands(
    run: Run, photo: Path, tree: Path, status: int, words: str, arguments: list[str]
) -> None:
    tmp = photo.parent
    (tmp / "link.png").symlink_to(photo)
    (tmp / "nothing").mkdir()
    before = files(tmp)
    outcome = run(*(text.format(photo=photo, tree=tree, tmp=tmp) for text in arguments))
    assert outcome.status == status, outcome.err
    assert words in outcome.err
    assert outcome.err.startswith("sr-kernels: error: ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    assert files(tmp) == before


def test_no_command_shows_the_help(run: Run) -> None:
    outcome = run()
    assert outcome.status == 2
    assert "upscale" in outcome.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_no_gpu(run: Run, photo: Path, name: str) -> None:
    outcome = run("upscale", photo, "--device", name)
    assert outcome.status == 1
    assert "CUDA" in outcome.err
    assert files(photo.parent) == ["photo.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_that_is_absent(run: Run, photo: Path, name: str) -> None:
    outcome = run("upscale", photo, "--backend", name)
    assert outcome.status == 1
    assert f"backend {name} is not available: " in outcome.err


@pytest.mark.parametrize("variable", ["SR_KERNELS_BACKEND", "SR_KERNELS_CPU_ISA"])
def test_wrong_environment_variables(start: Run, photo: Path, variable: str) -> None:
    """One sentence, which does not blame the picture; `env` tells of it beside everything else."""
    sentence = f"{variable} must be "
    process = start("upscale", photo, **{variable: "fast"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(f"sr-kernels: error: {sentence}")
    assert err.endswith("got 'fast'\n")
    assert len(err.splitlines()) == 1
    assert out == ""
    process = start("env", **{variable: "fast"})
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sentence in out
    assert "environment variables" in out


def test_backend_of_the_environment_that_is_absent(start: Run, photo: Path) -> None:
    process = start("upscale", photo, SR_KERNELS_BACKEND="triton")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("sr-kernels: error: the backend triton (SR_KERNELS_BACKEND asks for it)")


# Unlike the tests above these load real weights.
@pytest.mark.parametrize(
    ("status", "words", "arguments"),
    [
        (2, "no weights come with the package for nonesuch_x4", ["--model", "nonesuch"]),
        (2, "mafdn_x4", ["--model", "mafdn", "--scale", "3"]),
        (1, "do not exist", ["--weights", "{tmp}/none.pth"]),
        (1, "cannot be used", ["--weights", "{photo}"]),
        (1, "cannot be used", ["--weights", "{tmp}/empty.pth"]),
        (1, "cannot be used", ["--weights", "{tmp}/other.pth"]),
        (1, "cannot be", ["--weights", "{tmp}"]),
    ],
)
def test_bad_weights(
    photo: Path, capsys: pytest.CaptureFixture[str], status: int, words: str, arguments: list[str]
) -> None:
    tmp = photo.parent
    (tmp / "empty.pth").touch()
    torch.save({"some.weight": torch.zeros(3)}, tmp / "other.pth")
    before = files(tmp)
    given = [text.format(photo=photo, tmp=tmp) for text in arguments]
    assert cli.main(["upscale", str(photo), *given]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert files(tmp) == before


# ------------------------------------------------------------------------ disks, signals, processes


def is_mounted(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if shutil.which("mount") is None or not is_mounted(
        "-t", "tmpfs", "-o", "size=64k", "x", str(folder)
    ):
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff", "bmp"])
def test_full_disk(run: Run, tmp_path: Path, small_disk: Path, kind: str) -> None:
    source = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    Image.fromarray(noise).save(source)
    outcome = run("upscale", source, "-o", small_disk, "--format", kind, "--quality", 100)
    assert outcome.status == 1
    assert "cannot be written" in outcome.err
    assert "Traceback" not in outcome.err
    assert files(small_disk) == []


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_file_size_limit(tmp_path: Path, kind: str) -> None:
    """The same where no file system can be mounted: the process may write 50 kB a file."""
    source = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    Image.fromarray(noise).save(source)
    out = tmp_path / "out"
    out.mkdir()
    outcome = subprocess.run(
        [
            *(sys.executable, Path(__file__).with_name("nearest.py"), "upscale", source),
            *("-o", out, "--format", kind, "--quality", "100"),
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert outcome.returncode == 1
    assert "cannot be written" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert files(out) == []


def test_read_only_folder(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photo.parent / "locked"
    folder.mkdir()
    mounted = False
    if os.geteuid() == 0:  # permissions do not hold root: a read-only file system does
        mounted = is_mounted("-t", "tmpfs", "-o", "ro", "x", str(folder))
        if not mounted:
            pytest.skip("root, without the right to mount")
    else:
        folder.chmod(0o500)
    try:
        outcome = run("upscale", photo, "-o", folder)
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        folder.chmod(0o700)
    assert outcome.status == 1
    assert "nothing can be written to the folder" in outcome.err
    assert files(folder) == []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_interrupted_folder(
    run: Run, start: Run, tree: Path, number: signal.Signals, status: int
) -> None:
    out = tree.with_name("out")
    process = start("upscale", tree, "-o", out, NEAREST_SECONDS="1")
    wait_for(lambda: (out / "a_x4.png").exists())
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    done = files(out)
    assert "a_x4.png" in done
    assert len(done) < 4
    for name in done:
        size(out / name)  # whole, and none under a temporary name
    outcome = run("upscale", tree, "-o", out)
    assert f"{4 - len(done)} of 4 pictures written" in outcome.out
    assert len(files(out)) == 4


# What the installed command `sr-kernels` does.
ENTRY = "import sys; from sr_kernels_cli import main; sys.exit(main())"


@pytest.fixture
def fake_torch(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts the command with `program` in the place of torch."""

    def call(program: str) -> subprocess.Popen[str]:
        (tmp_path / "torch.py").write_text(program)
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-c", ENTRY, "env"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    return call


def test_interrupted_while_torch_is_imported(fake_torch: Run) -> None:
    process = fake_torch(
        "import time\n"
        "print('importing', flush=True)\n"
        "try:\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt as error:\n"
        "    raise ImportError('what a C extension makes of it') from error\n"
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "sr-kernels: error: interrupted\n"


def test_torch_that_cannot_be_imported(fake_torch: Run) -> None:
    process = fake_torch("raise ImportError('libfoo.so: cannot open shared object file')")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("sr-kernels: error: the package cannot be imported: libfoo.so")
    assert "Traceback" not in err


def test_signal_that_python_drops(run: Run, tree: Path, nearest_class: Any) -> None:
    """An exception in a destructor is dropped by the interpreter; the signal must still count."""

    class Dropping(nearest_class):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    out = tree.with_name("out")
    assert run("upscale", tree, "-o", out, net=Dropping()).status == 130
    assert files(out) == []


def test_interrupted_while_compressing(start: Run, tmp_path: Path) -> None:
    """The encoder is one long call into C: it must hear of Ctrl-C all the same."""
    source = tmp_path / "noise.png"
    out = tmp_path / "out"
    out.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), np.uint8)
    Image.fromarray(noise).save(source)
    process = start("upscale", source, "-o", out)

    def has_begun() -> bool:
        return any((out / name).stat().st_size > 100_000 for name in files(out))

    wait_for(has_begun)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert files(out) == []


def test_reader_that_goes_away(photo: Path) -> None:
    script = f"{sys.executable} {Path(__file__).with_name('nearest.py')} env | head -1"
    outcome = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "Traceback" not in outcome.stderr
    assert "Exception" not in outcome.stderr


@pytest.mark.slow
def test_memory_of_a_24_megapixel_photograph(tmp_path: Path) -> None:
    """x4 within the 8-bit pictures' own size plus 1 GB, file to file, in a process of its own."""
    y, x = np.mgrid[:4000, :6000]
    pixels = np.stack([x % 256, y % 256, (x + y) // 40 % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.bmp")
    script = f"""
import re, runpy, sys
sys.argv[:] = ["nearest.py", "upscale", {str(tmp_path / "large.bmp")!r}]
try:
    runpy.run_path({str(Path(__file__).with_name("nearest.py"))!r}, run_name="__main__")
finally:
    # Not ru_maxrss: a child process starts with its parent's.
    print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    peak = 1024 * int(outcome.stdout.rsplit("peak ", 1)[1])
    own = pixels.nbytes * (1 + 16)
    print(f"peak {peak / 1e6:.0f} MB, the pictures' own {own / 1e6:.0f} MB")
    assert peak < own + 1e9
    header = (tmp_path / "large_x4.png").read_bytes()[:24]
    assert struct.unpack(">II", header[16:]) == (24000, 16000)


# --------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize(
    "command",
    ["upscale", "demo", "evaluate", "train", "pack", "export-weights", "bench", "tune", "env"],
)
def test_help_teaches(run: Run, command: str) -> None:
    """Lines that fit, and examples that the command understands."""
    outcome = run(command, "--help")
    assert outcome.status == 0
    assert max(len(line) for line in outcome.out.splitlines()) <= 100
    if command == "upscale":
        assert "MAFDN's channel attention" in outcome.out
    if command in ("demo", "env"):  # which need no example
        return
    examples = re.findall(
        r"^  (?:.* -m )?sr[-_]kernels (.*?)(?:   .*)?$", outcome.out, re.MULTILINE
    )
    assert any(example.startswith(f"{command} ") for example in examples)
    for example in examples:
        arguments = example.split(" > ")[0].split()
        assert cli.build_parser().parse_args(arguments).command == arguments[0]


def test_version(run: Run) -> None:
    from sr_kernels import __version__

    assert run("--version").out == f"sr-kernels {__version__}\n"


def test_env(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    outcome = run("env")
    assert outcome.status == 0
    assert outcome.err == ""
    for words in ("torch", "libvips", "backends", "reference", "kernels chosen", "'7'", "GPU"):
        assert words in outcome.out


def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second replaces what the first wrote
        outcome = run("demo")
        assert outcome.status == 0
        assert size(tmp_path / "demo_x4.png") == (900, 600)
        assert "backend" in outcome.out
        assert "sr-kernels upscale" in outcome.out
    assert demo.PHOTOGRAPH.stat().st_size < 100_000


def test_demo_with_the_shipped_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in anything's place: the picture made smaller again is the photograph."""
    if not models.PRETRAINED["mafdn_x4"].is_file():
        pytest.skip("the weights mafdn_x4 are not in this copy of the repository")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    assert "MAFDN x4, backend cpu" in capsys.readouterr().out
    with Image.open(demo.PHOTOGRAPH) as photograph, Image.open("demo_x4.png") as large:
        small = large.resize(photograph.size, Image.Resampling.BICUBIC)
        difference = np.asarray(small).astype(int) - np.asarray(photograph)
    assert np.abs(difference).mean() < 2


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    assert "Traceback" in run("upscale", tmp_path / "none.png", "--debug").err


def test_unforeseen_errors_are_still_sentences(
    run: Run, photo: Path, nearest_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    net = nearest_class()
    monkeypatch.setattr(net, "forward", broken)
    outcome = run("upscale", photo, net=net)
    assert outcome.status == 1
    assert "ZeroDivisionError: division by zero" in outcome.err
    assert "Traceback" not in outcome.err
    assert files(photo.parent) == ["photo.png"]


def test_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "sr_kernels", "--version"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.stdout.startswith("sr-kernels ")


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(console.Progress, "BAR_AFTER", 0.0)
    monkeypatch.setattr(console.Progress, "BAR_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = console.Progress("photo.png")
    progress(1, 4)
    progress(4, 4)
    console.say("done")
    captured = capsys.readouterr()
    assert "photo.png [" in captured.err
    assert " 25%" in captured.err
    assert captured.err.endswith("\r\x1b[K")
    assert captured.out == "done\n"


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    progress = console.Progress("photo.png")
    progress(1, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console.Progress, "LINE_EVERY", 0.0)
    console.Progress("photo.png")(1, 4)
    assert re.fullmatch(r"sr-kernels: photo.png: 25%, about .* left\n", capsys.readouterr().err)


def test_the_device_and_dtype_reach_the_network(run: Run, photo: Path, nearest_class: Any) -> None:
    net = nearest_class()
    assert run("upscale", photo, "--dtype", "bfloat16", "--device", "cpu", net=net).status == 0
    assert net.weight.dtype == torch.bfloat16
    assert run("upscale", photo, "--backend", "reference", "--overwrite", net=net).status == 0
    assert net.backend == "reference"


# ------------------------------------------------------------------------ other people's networks


def test_other_networks_without_the_extra(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "sr_kernels.spandrel", raising=False)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    weights = tmp_path / "other.pth"
    torch.save({"a.weight": torch.zeros(1)}, weights)
    outcome = run("upscale", photo, "--weights", weights)
    assert outcome.status == 1
    for words in ("another network", "a.weight", "spandrel knows many more", "[spandrel]"):
        assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_broken_weights_of_ours_are_not_offered_to_spandrel(
    run: Run, photo: Path, tmp_path: Path
) -> None:
    state = models.mafdn(2, channels=8, num_blocks=1).state_dict()
    del state["fuse.bias"]
    torch.save(state, tmp_path / "mafdn.pth")
    outcome = run("upscale", photo, "--weights", tmp_path / "mafdn.pth")
    assert outcome.status == 1
    assert "fuse.bias is missing" in outcome.err
    assert "spandrel" not in outcome.err
