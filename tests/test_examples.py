"""The examples run, and print what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"


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
    assert all("faster" in row for row in rows[:3])


def test_a_denoiser_learns_noise_levels_that_it_was_not_trained_on():
    rows = example("adapt_pretrained_denoiser").main(["--steps", "60", "--size", "24"])
    (_, base_low, low), _, (_, base_high, high) = rows
    assert high > base_high + 1 and low > base_low - 0.5


def test_an_exported_network_runs_in_a_fresh_process(printed):
    size, difference = printed("export_and_run")
    assert size.startswith("package: ")
    assert float(difference.split()[-1]) < 1e-5
