"""The examples run, and print what they promise; so does the code of the README."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import lorun_fast as lf

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def printed(capsys):
    def lines(name: str, *arguments: str) -> list[str]:
        example(name).main(list(arguments))
        return capsys.readouterr().out.splitlines()

    return lines


def test_a_foreign_network_restores_the_same_image(printed):
    first, *rows = printed("foreign_cassi_network", "--size", "16", "--bands", "6", "--stages", "3", "--repeats", "1")
    assert float(first.split()[-1]) < 1e-5
    assert [row.split("  ")[0] for row in rows] == [
        "prox step, forward and backward", "training", "inference, merged", "parameters",
    ]  # fmt: skip
    assert all(re.search(r" ms  \d+\.\dx (faster|slower)$", row) for row in rows[:3])


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(3.0, 1.5, "2.0x faster"), (0.7, 1.0, "1.4x slower"), (1.0, 1.0, "1.0x faster"), (0.01, 0.1, "10.0x slower")],
)
def test_a_loss_is_not_called_a_gain(before, after, said):
    assert example("foreign_cassi_network").compared(before, after) == said


def test_a_denoiser_learns_noise_levels_that_it_was_not_trained_on():
    rows = example("adapt_pretrained_denoiser").main(["--steps", "60", "--size", "24"])
    (_, base_low, low), _, (_, base_high, high) = rows
    assert high > base_high + 1 and low > base_low - 0.5


def test_an_exported_network_runs_in_a_fresh_process(printed):
    size, difference = printed("export_and_run")
    assert size.startswith("package: ")
    assert float(difference.split()[-1]) < 1e-5


@pytest.mark.parametrize("arguments", [[], ["--gradient"], ["--coils", "3"]])
def test_a_network_behind_an_operator_of_its_own(arguments):
    measured, restored = example("own_operator").main(["--steps", "40", "--size", "32", *arguments])
    assert restored > measured + 1


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """Paragraph by paragraph, with tensors that fit the names it leaves open."""
    monkeypatch.chdir(tmp_path)
    names = {"my_denoiser": lf.ResUNet(channels=(4, 8), blocks=1), "z": torch.rand(3, 1, 8, 8)}
    adapt, network, layers = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(adapt, names)
    assert names["x"].shape == (3, 1, 8, 8)
    names["x"] = torch.rand(1, 1, 40, 50)
    for paragraph in network.split("\n\n"):
        exec(paragraph, names)
    assert names["xhat"].shape == (1, 1, 40, 50) and names["net"].stages == 9
    names |= {"x": torch.rand(2, 64, 6, 5), "stage": 4, "conv": torch.nn.Conv2d(64, 64, 3, padding=1)}
    names |= {"weight": names["conv"].weight, "bias": names["conv"].bias}
    names |= dict(zip(("down", "up"), (torch.rand(9, 7, 64, 3, 3), torch.zeros(9, 64, 7)), strict=True))
    expected = names["conv"](names["x"]).relu()
    *convolutions, depthwise, attention, layout = layers.split("\n\n")
    for paragraph, close in zip(convolutions, (1e-5, 1e-4, 0.02, 0.02), strict=True):
        if "packed" in paragraph:  # from here on in 16 bits
            names |= {name: names[name].detach().bfloat16() for name in ("x", "weight", "bias")}
        exec(paragraph, names)
        torch.testing.assert_close(names["y"].float(), expected, rtol=close, atol=close)
    names["taps"] = torch.rand(64, 1, 3, 3).bfloat16()
    exec(depthwise, names)
    expected = torch.nn.functional.conv2d(names["x"], names["taps"], names["bias"], padding=1, groups=64)
    torch.testing.assert_close(names["y"], expected, rtol=0.02, atol=0.02)
    names |= {"qkv": torch.rand(2, 30, 24), "temperature": torch.ones(4)}
    exec(attention, names)
    assert names["y"].shape == (2, 30, 8)
    names["x"] = before = torch.rand(2, 64, 6, 5)
    exec(layout, names)
    assert torch.equal(names["x"], before.bfloat16()) and names["x"].is_contiguous(memory_format=torch.channels_last)
