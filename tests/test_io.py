"""Saved networks: one file rebuilds everything; damaged or foreign files give one clear error."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from apps_help import small_files
from safetensors.torch import load_file, save_file
from torch import nn

import lorun_fast as lf
from lorun_fast.denoisers import register_denoiser
from lorun_fast.io import read_config

Y = torch.rand(2, 16, 3, 2, generator=torch.Generator().manual_seed(1))


def network(sharing="lora", denoiser=None, **kwargs) -> lf.LoRun:
    denoiser = lf.ResUNet(channels=(4, 8), blocks=1) if denoiser is None else denoiser
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8, learn=True), denoiser, stages=3, sharing=sharing, **kwargs)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_one_file_rebuilds_the_network(tmp_path, sharing, form):
    net = network(sharing, form=form, gamma=30)
    lf.save(net, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors")
    assert torch.equal(again(Y), net(Y))
    assert (again.sharing, again.form, again.gamma, again.stages) == (sharing, form, 30, 3)
    assert isinstance(again.op.phi, nn.Parameter)
    assert not again.training


def test_half_precision_storage_loads_as_fp32(tmp_path):
    net = network()
    lf.save(net, tmp_path / "full.safetensors")
    lf.save(net, tmp_path / "half.safetensors", dtype=torch.float16)
    again = lf.load(tmp_path / "half.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for a, b in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size


def test_partial_adapters_and_scale_survive(tmp_path):
    staged = lf.adapt(lf.ResUNet(channels=(4, 8), blocks=1), stages=3, include="body.*", scale=0.25)
    net = network(denoiser=staged)
    lf.save(net, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors")
    assert set(again.denoiser.adapted) == set(staged.adapted)
    assert {layer.scale for layer in again.denoiser.adapted.values()} == {0.25}
    assert torch.equal(again(Y), net(Y))


class Own(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width = width
        self.a, self.b = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, z):
        return z + self.b(torch.relu(self.a(z)))

    def config(self):
        return {"width": self.width}


def test_a_denoiser_of_ones_own_is_passed_to_load(tmp_path):
    net = network(denoiser=Own())
    lf.save(net, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"its base denoiser Own is not registered: pass load\(path, denoiser=...\)"):
        lf.load(tmp_path / "net.safetensors")
    assert torch.equal(lf.load(tmp_path / "net.safetensors", denoiser=Own())(Y), net(Y))


def test_tensors_of_any_kind_are_kept(tmp_path):
    """Tied ones, ones in another layout, and whole numbers, which no storage type narrows."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3, padding=1)
            self.alias = self.a
            self.norm.num_batches_tracked.fill_(2049)  # float16 counts to 2048

        def forward(self, z):
            return z + self.b(self.norm(self.alias(z)))

    net = network("tied", denoiser=Tied()).to(memory_format=torch.channels_last)
    lf.save(net, tmp_path / "net.safetensors")
    again = lf.load(tmp_path / "net.safetensors", denoiser=Tied())
    torch.testing.assert_close(again(Y), net(Y))
    lf.save(net, tmp_path / "half.safetensors", dtype=torch.float16)
    assert lf.load(tmp_path / "half.safetensors", denoiser=Tied()).denoiser.base.norm.num_batches_tracked == 2049


def test_a_class_is_not_known_by_its_name_alone(tmp_path):
    class ResCNN(Own):
        config = None

    net, path = network(denoiser=ResCNN()), tmp_path / "net.safetensors"
    lf.save(net, path)
    with pytest.raises(ValueError, match="its base denoiser ResCNN is not registered"):
        lf.load(path)
    assert torch.equal(lf.load(path, denoiser=ResCNN())(Y), net(Y))


def test_a_registered_denoiser_needs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lorun_fast.denoisers._REGISTRY", {})
    register_denoiser(Own)
    net = network(denoiser=Own(6))
    lf.save(net, tmp_path / "net.safetensors")
    assert torch.equal(lf.load(tmp_path / "net.safetensors")(Y), net(Y))
    with pytest.raises(TypeError, match=r"needs a method config\(\)"):
        register_denoiser(nn.Identity)


@pytest.mark.parametrize("sharing", ["lora", "tied", "untied"])
def test_an_older_file_loads(tmp_path, sharing):
    """Written as version 1 was before it knew data_step, noise_map and notes."""
    torch.manual_seed(0)
    layers = {"head": (4, 1, 3), "down.0": (8, 4, 2), "up.0": (8, 4, 2), "tail": (1, 4, 3)}
    for level, width in (("encoder.0", 4), ("body", 8), ("decoder.0", 4)):
        layers |= {f"{level}.0.{conv}": (width, width, 3) for conv in ("conv1", "conv2")}
    bases = [f"denoiser.copies.{k}" for k in range(2)] if sharing == "untied" else ["denoiser.base"]
    tensors = {"step_size": torch.tensor([0.5, 1.5]), "op.phi": 0.03 * torch.rand(16, 64)}
    for base in bases:
        tensors |= {f"{base}.{name}.weight": 0.2 * torch.randn(a, b, k, k) for name, (a, b, k) in layers.items()}
    config = {
        "version": 1,
        "network": {"stages": 2, "gamma": 10, "form": "loralib", "sharing": sharing},
        "operator": {"type": "BlockCS", "config": {"block_size": 8, "learn": False}},
        "denoiser": {
            "type": "ResUNet",
            "config": {
                "in_channels": 1, "out_channels": 1, "channels": [4, 8], "blocks": 1, "noise_level": False,
                "residual": True,
            },
        },
    }  # fmt: skip
    if sharing == "lora":
        config["adapters"] = {name: {"rank": 1, "form": "loralib", "scale": 0.5} for name in layers}
        for name, (a, b, k) in layers.items():
            tensors[f"denoiser.base.{name}.down"] = 0.2 * torch.randn(2, k, (a if name == "up.0" else b) * k)
            tensors[f"denoiser.base.{name}.up"] = 0.2 * torch.randn(2, (b if name == "up.0" else a) * k, k)
    save_file(tensors, tmp_path / "net.safetensors", metadata={"lorun_fast": json.dumps(config)})
    net = lf.load(tmp_path / "net.safetensors")
    assert (net.stages, net.gamma, net.form, net.sharing) == (2, 10, "loralib", sharing)
    assert (net.data_step, net.noise_map, net.training) == ("gradient", "measurement", False)
    state = net.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], t) for name, t in tensors.items())
    x = net.op.initial(Y)
    for k in range(2):
        base = net.denoiser.copies[k] if sharing == "untied" else net.denoiser.base
        plain = lf.ResUNet(**config["denoiser"]["config"])
        weights = {}
        for name, layer in dict(plain.named_modules()).items():
            if name in layers:
                weights[name] = base.get_submodule(name).weight.detach()
                if sharing == "lora":
                    down, up = (tensors[f"denoiser.base.{name}.{factor}"][k] for factor in ("down", "up"))
                    weights[name] = weights[name] + 0.5 * (up @ down).view(layer.weight.shape)
        plain.load_state_dict({f"{name}.weight": w for name, w in weights.items()})
        x = plain(net.op.gradient_step(x, Y, tensors["step_size"][k]))
    torch.testing.assert_close(net(Y), x)


def test_notes_are_kept_in_the_header(tmp_path):
    lf.save(network(), tmp_path / "net.safetensors", notes={"data": "photographs"})
    assert read_config(tmp_path / "net.safetensors")["notes"] == {"data": "photographs"}


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.safetensors"
    lf.save(network(), path)
    before = path.read_bytes()
    with small_files(1000), pytest.raises(OSError, match="File too large"):
        lf.save(network("tied"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_link_is_followed_and_permissions_are_those_of_any_other_file(tmp_path):
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    usual = os.umask(0o027)
    try:
        lf.save(network(), target)
        assert target.stat().st_mode & 0o777 == 0o640
        target.chmod(0o600)
        link.symlink_to(target)
        lf.save(network("tied"), link)
    finally:
        os.umask(usual)
    assert link.is_symlink() and lf.load(target).sharing == "tied"
    assert target.stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 2


def test_a_name_as_long_as_a_name_may_be(tmp_path):
    path = tmp_path / f"{'n' * 243}.safetensors"
    lf.save(network(), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unreadable_files(tmp_path):
    path = tmp_path / "net.safetensors"
    lf.save(network(), path)
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="found no such file"):
        lf.load(tmp_path / "absent.safetensors")
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"not a network at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected a complete safetensors file, got a damaged one"):
            lf.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="got a safetensors file without its header"):
        lf.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={"lorun_fast": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="expected format version 1 or older, got 99"):
        lf.load(path)


def test_tensors_that_do_not_fit_the_config(tmp_path):
    net, path = network("tied"), tmp_path / "net.safetensors"
    lf.save(net, path)
    header = {"lorun_fast": json.dumps(read_config(path))}
    whole = {k: v.detach().clone() for k, v in net.state_dict().items()}
    less = {k: v for k, v in whole.items() if k != "step_size"}
    more = {"extra": torch.zeros(1)}
    for state, message in (
        (less, r"got 1 missing \(step_size\) and 0 unknown"),
        (whole | more, r"got 0 missing \(\) and 1 unknown \(extra\)"),
        (less | more, r"got 1 missing \(step_size\) and 1 unknown \(extra\)"),
    ):
        save_file(state, path, metadata=header)
        with pytest.raises(ValueError, match=message):
            lf.load(path)


def test_pretrained_names():
    with pytest.raises(ValueError, match="got 'cs-99'"):
        lf.load_pretrained("cs-99")


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    path = tmp_path / "net.safetensors"
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), lf.ResCNN(channels=8, blocks=1), stages=2)
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point type, got torch.int8"):
        lf.save(net, path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point type, got 'float16'"):
        lf.save(net, path, dtype="float16")
    with pytest.raises(TypeError, match=r"notes: expected what JSON can hold, got {'a': <object"):
        lf.save(net, path, notes={"a": object()})
    with pytest.raises(FileNotFoundError, match=r"missing/net.safetensors: expected a folder to write into"):
        lf.save(net, tmp_path / "missing" / "net.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "expected lorun_fast's header to be JSON"),
        ("[1]", "expected denoiser, network, operator, version in lorun_fast's header"),
        ('{"version": "1"}', "expected denoiser, network, operator, version in lorun_fast's header"),
        ('{"version": 1}', "expected denoiser, network, operator in lorun_fast's header"),
        ('{"version": 99}', "expected format version 1 or older, got 99"),
    ],
)
def test_headers_of_others(tmp_path, header, message):
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"lorun_fast": header})
    with pytest.raises(ValueError, match=f"net.safetensors: {message}"):
        lf.load(path)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("network", "gamma", None, "expected network.gamma in lorun_fast's header, found none"),
        ("network", "form", None, "expected network.form in lorun_fast's header, found none"),
        ("operator", "config", None, "expected operator.config in lorun_fast's header, found none"),
        ("denoiser", "type", None, "expected denoiser.type in lorun_fast's header, found none"),
        ("adapters", None, None, "expected adapters in lorun_fast's header, found none"),
        ("operator", "type", ["BlockCS"], "expected operator.type in lorun_fast's header"),
        ("denoiser", "type", ["ResUNet"], "expected denoiser.type in lorun_fast's header"),
        ("adapters", "head", [7], "expected stages and adapters in lorun_fast's header, got .*list"),
        ("adapters", "head", {"rank": "1"}, "expected stages and adapters in lorun_fast's header, got rank: expected"),
        ("network", "stages", "2", "expected stages and adapters in lorun_fast's header, got stages: expected"),
        ("operator", "config", {}, "expected the arguments of a BlockCS in lorun_fast's header, got no 'block_size'"),
        ("denoiser", "config", {"width": 3}, "expected the arguments of a ResUNet in lorun_fast's header, got .*width"),
        ("network", "colour", "red", "expected the arguments of a LoRun in lorun_fast's header, got .*colour"),
    ],
)
def test_headers_that_lack_something(tmp_path, part, field, value, message):
    net, path = network(), tmp_path / "net.safetensors"
    lf.save(net, path)
    header = read_config(path)
    if value is not None:
        header[part][field] = value
    elif field is not None:
        del header[part][field]
    else:
        del header[part]
    tensors = {name: t.detach().clone() for name, t in net.state_dict().items()}
    save_file(tensors, path, metadata={"lorun_fast": json.dumps(header)})
    with pytest.raises(ValueError, match=f"net.safetensors: {message}"):
        lf.load(path)


def test_a_denoiser_of_another_width(tmp_path):
    path = tmp_path / "net.safetensors"
    lf.save(lf.LoRun(lf.BlockCS.gaussian(0.5, 4), lf.ResCNN(channels=8, blocks=1), stages=2), path)
    with pytest.raises(ValueError, match=r"expected the tensors of this ResCNN, got others: size mismatch"):
        lf.load(path, denoiser=lf.ResCNN(channels=16, blocks=1))


def test_a_denoiser_of_another_kind(tmp_path):
    path = tmp_path / "net.safetensors"
    lf.save(network(denoiser=Own()), path)
    with pytest.raises(ValueError, match=r"net.safetensors: expected the layers of a Own, got a ResCNN: .*nothing"):
        lf.load(path, denoiser=lf.ResCNN(channels=8, blocks=1))
    with pytest.raises(TypeError, match=r"denoiser: expected the base module, as it was before adapt\(\), got <class"):
        lf.load(path, denoiser=Own)
    with pytest.raises(TypeError, match=r"denoiser: expected the base module, .* got StagedDenoiser"):
        lf.load(path, denoiser=lf.adapt(Own(), 3))


def test_adapters_that_are_a_list(tmp_path):
    path = tmp_path / "net.safetensors"
    lf.save(network(), path)
    save_file({"a": torch.zeros(1)}, path, metadata={"lorun_fast": json.dumps(read_config(path) | {"adapters": [1]})})
    with pytest.raises(ValueError, match=r"net.safetensors: expected adapters in lorun_fast's header"):
        lf.load(path)


def test_what_is_no_path(tmp_path):
    for path in (None, 3, b"net.safetensors"):
        with pytest.raises(TypeError, match=f"path: expected a str or a path, got {path!r}"):
            lf.load(path)
        with pytest.raises(TypeError, match=f"path: expected a str or a path, got {path!r}"):
            lf.save(network(), path)
    with pytest.raises(IsADirectoryError, match=f"{tmp_path.name}: expected a file to write, found a folder"):
        lf.save(network(), tmp_path)


def test_notes_that_hold_themselves(tmp_path):
    notes = {}
    notes["notes"] = notes
    with pytest.raises(ValueError, match=r"notes: expected what JSON can hold, got .*Circular"):
        lf.save(network(), tmp_path / "net.safetensors", notes=notes)


def test_a_device_that_is_none(tmp_path):
    """Told before the file is read."""
    for device in ("foo", "xpu:77", 1.5):
        with pytest.raises(ValueError, match=f"device: expected one that this torch reaches, got {device!r}"):
            lf.load(tmp_path / "missing.safetensors", device=device)


def test_a_folder_is_not_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a saved network \(.safetensors\), found a folder"):
        lf.load(tmp_path)


def test_a_path_that_is_no_utf8(tmp_path):
    net = lf.LoRun(lf.BlockCS.gaussian(0.5, 4), lf.ResCNN(channels=4, blocks=1), stages=2)
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    for call in (lambda: lf.save(net, path), lambda: lf.load(path)):
        with pytest.raises(ValueError, match=r"path: expected a name in UTF-8, got b'.*\\xff.safetensors'"):
            call()
    assert not list(tmp_path.iterdir())
    lf.save(net, tmp_path / "über-网络.safetensors")
    assert lf.load(tmp_path / "über-网络.safetensors").stages == 2


class Bases(nn.Module):
    """A base with all that a state may hold: a norm's statistics, a layer of two names, a complex parameter, a flag."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.alias, self.norm, self.last = self.first, nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)
        self.gain = nn.Parameter(torch.rand(1, 4, 1, 1, dtype=torch.complex64))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, z):
        return self.last(torch.relu(self.norm(self.first(z) * self.gain.real)))


@pytest.mark.parametrize("make", [Bases, lambda: nn.Conv2d(1, 1, 3, padding=1)], ids=["module", "layer"])
def test_a_file_without_its_base(tmp_path, make):
    base = make()
    net = lf.LoRun(lf.BlockCS.gaussian(0.25, 8), base, stages=3, step_size=0.7)
    for p in net.denoiser.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    net.eval()
    path = tmp_path / "adapters.safetensors"
    lf.save(net, path, base=False)
    kept = {name for name in load_file(path) if name.startswith("denoiser.")}
    assert kept == {f"denoiser.{name}" for name in net.denoiser.state_dict() if name.endswith((".down", ".up"))}
    again = lf.load(path, denoiser=base)
    assert torch.equal(again(Y), net(Y)) and again.step_size[0].item() == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"its base, a \w+, is not in the file: pass load\(path"):
        lf.load(path)
    with torch.no_grad():
        next(base.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(ValueError, match="expected the base that its adapters were saved with, to the bit, got a"):
        lf.load(path, denoiser=base)
    with pytest.raises(ValueError, match="to the bit, got a ResCNN with other tensors"):
        lf.load(path, denoiser=lf.ResCNN(channels=4, blocks=1))


def test_statistics_belong_to_the_base(tmp_path):
    base = Bases()
    path = tmp_path / "adapters.safetensors"
    lf.save(lf.LoRun(lf.BlockCS.gaussian(0.25, 8), base, stages=2), path, base=False, dtype=torch.float16)
    lf.load(path, denoiser=base)
    base.norm.running_mean += 1
    with pytest.raises(ValueError, match="to the bit"):
        lf.load(path, denoiser=base)
    with pytest.raises(ValueError, match="to the bit"):
        lf.load(path, denoiser=Bases().half())


@pytest.mark.parametrize("sharing", ["tied", "untied"])
def test_networks_without_adapters_keep_their_base(tmp_path, sharing):
    with pytest.raises(ValueError, match=f"base: expected True for sharing='{sharing}', got False"):
        lf.save(network(sharing), tmp_path / "net.safetensors", base=False)
    assert not list(tmp_path.iterdir())


def test_a_registered_base_that_is_not_in_the_file(tmp_path):
    base = lf.ResUNet(channels=(4, 8), blocks=1)
    path = tmp_path / "adapters.safetensors"
    lf.save(network(denoiser=base), path, base=False)  # network() draws the base's weights anew
    with pytest.raises(ValueError, match="its base, a ResUNet, is not in the file"):
        lf.load(path)
    with pytest.raises(ValueError, match="to the bit"):
        lf.load(path, denoiser=base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_defaults_do_not_reach_a_loaded_network(dtype):
    expected = lf.load_pretrained("cs-1")
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            net = lf.load_pretrained("cs-1")
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, ours), (_, theirs) in zip(net.state_dict().items(), expected.state_dict().items(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_what_is_no_file_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe: expected a file to write, found what is none"):
        lf.save(lf.LoRun(lf.BlockCS.gaussian(0.25, 8), lf.ResCNN(channels=4, blocks=1), stages=1), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and len(list(tmp_path.iterdir())) == 1
