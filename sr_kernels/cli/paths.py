"""Which files are read and which are written."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sr_kernels.cli import images
from sr_kernels.cli.errors import Failure, UsageError


@dataclass(frozen=True)
class Job:
    """One picture: where it is read, where its result goes, and in which format."""

    source: Path
    target: Path
    kind: str


@dataclass(frozen=True)
class Plan:
    """jobs in the order of their paths; ignored: files of the tree that are no pictures by name."""

    jobs: list[Job]
    is_folder: bool
    ignored: int = 0


def check_input(source: Path) -> None:
    if not source.exists():
        raise Failure(f"{source} does not exist")
    if not source.is_dir() and not source.is_file():
        raise Failure(f"{source} is neither a file nor a folder")


def make_plan(source: Path, output: str | None, kind: str | None, tag: str) -> Plan:
    """The pictures to do.

    output: the -o argument; kind: the --format argument; tag: what is added to names ("_x4").
    """
    if source.is_dir():
        return _folder_plan(source, output, kind, tag)
    return Plan([_file_job(source, output, kind, tag)], is_folder=False)


def _file_job(source: Path, output: str | None, kind: str | None, tag: str) -> Job:
    name = source.stem + tag
    if output is None:
        kind = kind or "png"
        target = source.with_name(name + images.DEFAULT_SUFFIX[kind])
    elif Path(output).is_dir() or output.endswith(("/", os.sep)):
        kind = kind or "png"
        target = Path(output) / (name + images.DEFAULT_SUFFIX[kind])
    else:
        target = Path(output)
        implied = images.SUFFIXES.get(target.suffix.lower())
        if kind is None and implied is None:
            raise UsageError(
                f"the format cannot be told from the name {output}: give it one of the endings "
                f"{', '.join(sorted(images.SUFFIXES))}, or say --format"
            )
        if kind is not None and implied not in (None, kind):
            raise UsageError(f"--format {kind} contradicts the ending of -o {output}")
        kind = kind or implied
    assert kind is not None
    if not target.parent.is_dir():
        raise Failure(f"the folder {target.parent} of the output does not exist")
    if target.is_dir():
        raise Failure(f"the output {target} is a folder")
    _check_distinct(source, target)
    return Job(source, target, kind)


def _folder_plan(source: Path, output: str | None, kind: str | None, tag: str) -> Plan:
    kind = kind or "png"
    inside = source.resolve()
    if output is None:
        if inside.parent == inside:
            raise UsageError(f"say with -o where the results of {source} shall go")
        root = inside.with_name(inside.name + tag)
        if not source.is_absolute():
            root = Path(os.path.relpath(root))
    else:
        root = Path(output)
    if root.exists() and not root.is_dir():
        raise UsageError(
            f"the input {source} is a folder, so the output must be one too, but {root} is a file"
        )
    resolved = root.resolve()
    if resolved == inside or inside in resolved.parents:
        raise UsageError(
            f"the output folder {root} lies inside the input folder {source}: the next run would "
            "take results for inputs; choose a folder beside it"
        )
    found: list[Path] = []
    ignored = 0

    def unreadable(error: OSError) -> None:
        raise Failure(f"the folder {error.filename} cannot be read: {error.strerror}")

    for folder, folders, names in os.walk(source, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in images.SUFFIXES:
                found.append(Path(folder, name))
            else:
                ignored += 1
    if not found:
        raise Failure(
            f"no pictures in {source} (looked for names ending in "
            f"{', '.join(sorted(images.SUFFIXES))})"
        )
    jobs = []
    # a.jpg and a.png of one folder would both become a_x4.png: these two keep their old ending.
    stems = Counter(path.with_suffix("") for path in found)
    for path in found:
        stem = path.stem
        if stems[path.with_suffix("")] > 1:
            stem += "_" + path.suffix[1:]
        name = stem + tag + images.DEFAULT_SUFFIX[kind]
        target = root / path.relative_to(source).with_name(name)
        _check_distinct(path, target)
        jobs.append(Job(path, target, kind))
    for target, count in Counter(job.target for job in jobs).items():
        if count > 1:
            sources = ", ".join(str(job.source) for job in jobs if job.target == target)
            raise Failure(f"{sources} would all be written to {target}; rename one")
    return Plan(jobs, is_folder=True, ignored=ignored)


def _check_distinct(source: Path, target: Path) -> None:
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise UsageError(f"the output {target} is the input itself")
