"""lf.show_config(): what it says is what is there."""

from __future__ import annotations

from importlib import metadata

import torch

import lorun_fast as lf
from lorun_fast import _native
from lorun_fast.config import _backend
from lorun_fast.ops._library import UNAVAILABLE


def test_show_config_returns_what_it_prints(capsys, monkeypatch):
    monkeypatch.setenv("LORUN_TEST_VARIABLE", "yes")
    config = lf.show_config()
    text = capsys.readouterr().out
    assert config["versions"]["torch"] == torch.__version__ and torch.__version__ in text
    assert config["cpu"]["threads"] == torch.get_num_threads()
    assert config["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert len(config["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert config["environment"]["LORUN_TEST_VARIABLE"] == "yes" and "LORUN_TEST_VARIABLE=yes" in text
    assert config["extension"]["loaded"] == _native.available()
    assert config["extension"]["reason"] == _native.reason()
    for op in ("block_cs", "block_cs_adjoint", "block_cs_step", "lora_conv2d"):
        assert op in text


def test_the_version_is_the_installed_ones():
    assert lf.__version__ == lf.show_config(quiet=True)["versions"]["lorun_fast"] == metadata.version("lorun_fast")


def test_every_slower_backend_has_a_reason():
    for devices in lf.show_config(quiet=True)["ops"].values():
        for served in devices.values():
            assert served["reason"] or served["backend"] not in ("none", "reference (PyTorch)"), served


def test_without_the_extension_the_reference_serves(monkeypatch, capsys):
    monkeypatch.setattr(_native, "available", lambda: False)
    monkeypatch.setattr(_native, "reason", lambda: "nobody built it")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    config = lf.show_config()
    assert config["ops"]["block_cs"]["cpu"] == {"backend": "reference (PyTorch)", "reason": "nobody built it"}
    assert "not loaded: nobody built it" in capsys.readouterr().out


def test_quiet_prints_nothing(capsys):
    assert lf.show_config(quiet=True)["versions"]["lorun_fast"]
    assert capsys.readouterr().out == ""


def test_the_dispatcher_agrees(monkeypatch):
    """The table against an op that really has, or lacks, a CPU kernel of its own."""
    served = lf.show_config(quiet=True)["ops"]["block_cs_step"]["cpu"]["backend"]
    table = torch._C._dispatch_dump_table("lorun_fast::block_cs_step")
    line = next(line for line in table.splitlines() if line.startswith("CPU:"))
    assert (served == "C++") == ("[kernel]" in line)


def test_a_kernel_for_one_generation_of_gpus_says_which(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    for reason, expected in (("it needs 9.0", "reference (PyTorch)"), (None, "CUDA")):
        monkeypatch.setitem(UNAVAILABLE, "fused_conv2d", lambda device, reason=reason: reason)
        assert _backend("fused_conv2d", "cuda") == (expected, reason or "")
        assert _backend("block_cs", "cuda") == ("CUDA", "")
