"""The list of cases, and what each is said to cost."""

import re
from pathlib import Path

import pytest
import torch
from sr_kernels.benchmarks import cases, networks, operators
from sr_kernels.benchmarks.cases import Case
from sr_kernels.benchmarks.run import PHOTOGRAPH
from sr_kernels.benchmarks.work import Work, bound
from torch.utils.flop_counter import FlopCounterMode

from sr_kernels.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_of_the_file_is_defined_and_the_other_way_round():
    content = cases.read()
    assert list(content["operators"]) == list(operators.OPERATORS)
    assert list(content["networks"]) == list(networks.NETWORKS)


@pytest.mark.parametrize(
    ("text", "expected"), [("180x320", (1, 180, 320)), ("4x64X48", (4, 64, 48))]
)
def test_sizes_are_read(text, expected):
    assert cases.parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "180", "180x", "0x5", "1x2x3x4", "axb", "-1x5", "\u00b2x5", "\u0665x5"]
)
def test_a_wrong_size_is_named(text):
    with pytest.raises(ValueError, match="size is"):
        cases.parse_size(text)


def test_an_unknown_operator_is_named_with_what_there_is():
    with pytest.raises(ValueError, match=r"op is 'conv3d'; available are shift_conv2d, .*mafdn_x4"):
        cases.select(ops=["conv3d"])


def test_filters():
    chosen = cases.select(ops=["pixel_attention"], sizes=["8x8", "2x4x6"], channels=[5, 7])
    assert [c.shape for c in chosen] == ["1x5x8x8", "1x7x8x8", "2x5x4x6", "2x7x4x6"]
    assert {c.mode for c in chosen} == {"forward"}
    assert len(cases.select(ops=["elan_x4"], sizes=["8x8", "1x8x8"], modes=["both"] * 2)) == 1
    both = cases.select(ops=["elan_x4"], sizes=["8x8"], modes=["both"], dtypes=["bfloat16"])
    assert both == [Case("elan_x4", 1, 0, 8, 8, "both", "bfloat16")]
    assert both[0].shape == "1x3x8x8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["conv3x3"], "modes": ["both"]}, "op is 'conv3x3', whose only mode is forward"),
        ({"ops": ["elan_x4"], "quick": True}, "op is 'elan_x4', which has no case in the quick"),
    ],
)
def test_what_would_select_nothing_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cases.select(**arguments)


def test_autocast_is_for_networks():
    case = Case("elan_x4", 1, 0, 8, 8, "both", "bfloat16_autocast")
    assert (case.autocast, case.storage, case.arithmetic) == (True, "float32", "bfloat16")
    plain = Case("elan_x4", 1, 0, 8, 8, "both", "bfloat16")
    assert (plain.autocast, plain.storage, plain.arithmetic) == (False, "bfloat16", "bfloat16")
    chosen = cases.select(dtypes=["float16_autocast"])
    assert chosen
    assert all(case.is_network for case in chosen)
    mixed = cases.select(ops=["channel_gate"], dtypes=["float32", "float16_autocast"])
    assert {case.dtype for case in mixed} == {"float32"}
    with pytest.raises(ValueError, match="'channel_gate', but autocast is measured with networks"):
        cases.select(ops=["channel_gate"], dtypes=["float16_autocast"])


def test_other_peoples_networks_need_a_checkout(monkeypatch, tmp_path):
    assert "imdn_x4" in {case.op for case in cases.select()}
    monkeypatch.setattr(cases, "THIRD_PARTY", tmp_path / "absent.py")
    assert "imdn_x4" not in {case.op for case in cases.select()}
    with pytest.raises(ValueError, match="op is 'imdn_x4', which only a checkout has"):
        cases.select(ops=["imdn_x4"])


def test_every_command_of_the_documentation_selects_its_cases(capsys):
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = re.findall(r"^    sr-kernels (bench .*--(?:op|quick).*?)(?: *#.*)?$", text, re.M)
    assert len(commands) > 8
    for command in commands:
        # Weights need files, and listing them nothing.
        words = command.partition("--weights")[0].split()
        assert main([*words, "--list"]) == 0, command
        listed = capsys.readouterr().out.splitlines()
        for size in (word for word in words if re.fullmatch(r"[0-9x]*x[0-9x]*", word)):
            batch, height, width = cases.parse_size(size)
            shape = rf" {batch}x\d+x{height}x{width} "
            assert any(re.search(shape, line) for line in listed), (command, size)


def test_the_quick_set_is_a_small_part_and_has_training_and_networks():
    quick, everything = cases.select(quick=True), cases.select()
    assert set(quick) < set(everything)
    assert len(quick) * 3 < len(everything)
    assert Case("elan_light_x4", 1, 0, 64, 96) in quick
    missing = {"grouped_attention_block", "apply_grouped_attention_block", "channel_moments"}
    assert set(operators.OPERATORS) - {c.op for c in quick} == missing
    assert "both" in {c.mode for c in quick}


def test_every_listed_shape_fits_its_operator():
    """Built at toy size; of the listed size, what windows must divide."""
    for case in cases.select():
        if case.is_network:
            continue
        problem = operators.OPERATORS[case.op](_toy(case))
        assert set(problem.maps) <= set(problem.inputs)
        if "window" in case.op or "attention_block" in case.op:
            side = 8 if case.op == "window_attention" else 16
            assert case.height % side == case.width % side == 0, case
            heads = operators.SWIN_HEADS if case.op == "window_attention" else 3
            assert case.channels % heads == 0, case


def _toy(case, mode="forward"):
    return Case(case.op, 1, case.channels, 16, 32, mode)


@pytest.mark.parametrize("op", operators.OPERATORS)
def test_work_agrees_with_torchs_count(op):
    """torch counts convolutions and matrix products alone; ours may add what it does not count,
    and must be below where the definition computes more than needed."""
    case = Case(op, 2, 60, 16, 32)
    problem = operators.OPERATORS[op](case)
    function = problem.stock(problem.inputs)
    with FlopCounterMode(display=False) as counter:
        out = function(**problem.inputs)
    work = problem.work["forward"]
    counted = counter.get_total_flops()
    if op in ("channel_gate", "channel_attention"):  # sums, which torch does not count
        assert counted < work.flops < 10 * case.pixels * case.channels
    else:
        assert counted <= work.flops <= 1.25 * counted + 10 * case.pixels * case.channels
    size = 4 * (sum(t.numel() for t in problem.inputs.values()) + out.numel())
    if op in ("grouped_window_reuse", "apply_grouped_attention_block"):
        size += 4 * out.numel()  # and q, as large, from which the scores come
    assert work.bytes == pytest.approx(size, rel=5e-3)


def test_the_cost_of_elan_light_is_the_published_one():
    """102 GFLOP for a 320x180 input, padded to 320x192 for the windows."""
    case = Case("elan_light_x4", 1, 0, 192, 320)
    model, weights = networks.load(case, None, PHOTOGRAPH)
    assert weights == "elan_light_x4"
    work = networks.work(case, model)["forward"]
    # 0.6 M parameters a pixel, and 24 times P v, 12 times q q^T, windows of 16, 64, 256 tokens.
    parameters = sum(p.numel() for p in model.parameters() if p.dim() == 4 and p.requires_grad)
    products = 2 * 20 * (16 + 64 + 256) * (24 + 12)
    assert work.flops == pytest.approx(192 * 320 * (2 * parameters + products), rel=0.02)
    assert work.flops == pytest.approx(102e9, rel=0.005)
    assert work.exponentials == 192 * 320 * 12 * (16 + 64 + 256)


def test_the_cost_of_other_peoples_elan_is_that_of_ours():
    """Theirs keeps the scores, too, and writes the shift as a depthwise convolution."""
    ours, theirs = (Case(op, 1, 0, 64, 64) for op in ("elan_light_x4", "elan_light_foreign_x4"))
    a, b = (
        networks.work(case, networks.load(case, None, PHOTOGRAPH)[0])["forward"]
        for case in (ours, theirs)
    )
    assert b.exponentials == a.exponentials
    assert b.bytes == pytest.approx(a.bytes, rel=0.05)
    depthwise = 12 * 2 * (60 + 120) * 9 * 2 * 64 * 64
    assert b.flops == pytest.approx(a.flops + depthwise, rel=1e-3)


def test_weights_of_other_peoples_networks_are_loaded(tmp_path):
    case = Case("imdn_x4", 1, 0, 16, 16)
    network, _ = networks.load(case, None, PHOTOGRAPH)
    state = {f"module.{name}": value + 1 for name, value in network.state_dict().items()}
    torch.save({"params": state}, tmp_path / "imdn.pth")
    loaded, name = networks.load(case, tmp_path / "imdn.pth", PHOTOGRAPH)
    assert name == "imdn.pth"
    assert torch.equal(loaded.c[0].weight, network.c[0].weight + 1)
    with pytest.raises(ValueError, match=r"weights for pan_x4 are .*imdn\.pth, which does not fit"):
        networks.load(Case("pan_x4", 1, 0, 16, 16), tmp_path / "imdn.pth", PHOTOGRAPH)


def test_random_weights_give_unit_scale_activations():
    """Fresh batch statistics would give logits near 47,000."""
    case = Case("elan_light_x4", 1, 0, 32, 32)
    model, _ = networks.load(case, None, PHOTOGRAPH)
    x = networks.photograph(PHOTOGRAPH, 1, 32, 32, model.rgb_range)
    seen = []
    norm = model.body[5].modules_gmsa["gmsa_0"].project_inp[1]
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.backend = "reference"
    with torch.no_grad():
        model(x)
    assert 0.3 < float(seen[0].std()) < 3


def test_the_slowest_of_the_three_is_the_bound():
    rates = {"bytes_per_s": 10.0, "flops_per_s": 100.0, "exps_per_s": 1.0}
    assert bound(Work(100, 100, 1), **rates).name == "bytes"
    assert bound(Work(100, 2000, 1), **rates).seconds == 20
    assert bound(Work(100, 2000, 30), **rates).name == "exponentials"
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)


def test_the_photograph_fills_the_batch_with_different_pictures():
    x = networks.photograph(PHOTOGRAPH, 3, 20, 30, 255.0)
    assert x.shape == (3, 3, 20, 30)
    assert 100 < float(x.max()) <= 255
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(x[1], x[2])
