"""What the tests of the benchmarks share. They need the packages of sr_kernels[bench]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from sr_kernels.benchmarks.run import Settings
from sr_kernels.benchmarks.table import Row
from threads import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture
def toy_settings() -> Settings:
    return Settings(threads=1, seconds=0.0, memory=False, apart=False)


@pytest.fixture
def row() -> Row:
    """A timed row of ours, of a made-up device."""
    return Row(
        op="shift_conv_block",
        mode="forward",
        shape="1x60x180x320",
        dtype="float32",
        provider="cpu",
        cache="warm",
        threads=2,
        device="Abacus, 2 cores",
        versions="torch 0.0",
        commit="0123456789",
        date="2000-01-01",
        run="20000101T000000Z-1",
        median_ms=10.0,
        p20_ms=9.5,
        p80_ms=11.0,
        samples=7,
        memory_mb=14.0,
        error=1e-6,
        other_load=0.0,
        bytes=2.8e7,
        flops=1.7e9,
        exponentials=0.0,
        bound="flops",
        floor_ms=8.0,
        fraction=0.8,
        copy_gbs=20.0,
        matmul_gflops=200.0,
        exp_gs=1.0,
    )


@pytest.fixture
def rows(row: Row) -> list[Row]:
    """A table: an operator and a network, two providers each, the network at two sizes."""
    slower = replace(row, provider="eager", median_ms=30.0, memory_mb=60.0)
    result = [slower, row]
    for height, factor in ((180, 1.0), (360, 4.0)):
        network = replace(row, op="elan_light_x4", shape=f"1x3x{height}x320")
        for provider, base in (("eager", 300.0), ("cpu", 100.0)):
            result.append(
                replace(
                    network, provider=provider, median_ms=base * factor, memory_mb=base * factor
                )
            )
    return result
