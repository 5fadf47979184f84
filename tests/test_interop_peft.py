"""Adapter weights from and to PEFT, against its own layers and files."""

from __future__ import annotations

import copy

import pytest
import torch
from optional_packages import interop_module
from torch import nn

import lorun_fast as lf

interop, peft = interop_module("peft")

CONV = {"in_channels": 6, "out_channels": 10, "kernel_size": 3}
BASES = {
    "conv": (lambda: nn.Conv2d(6, 10, 3, padding=1), (2, 6, 9, 8)),
    "conv_strided_no_bias": (
        lambda: nn.Conv2d(6, 10, (5, 3), stride=(2, 1), padding="valid", bias=False),
        (2, 6, 9, 8),
    ),
    "conv_1x1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 5, 4)),
    "conv_1x1_dilated": (lambda: nn.Conv2d(6, 10, 1, dilation=2), (2, 6, 5, 4)),
    "conv_reflect_unpadded": (lambda: nn.Conv2d(6, 10, 3, padding_mode="reflect"), (2, 6, 9, 8)),
    "linear": (lambda: nn.Linear(6, 10), (2, 5, 6)),
    "linear_no_bias": (lambda: nn.Linear(6, 10, bias=False), (7, 6)),
}


def peft_layer(base: nn.Module, **configs: dict) -> nn.Module:
    """PEFT's layer on a copy of ``base`` with one random adapter per keyword: name={LoraConfig arguments}."""
    holder = nn.ModuleDict({"layer": copy.deepcopy(base)})
    for name, config in configs.items():
        holder = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["layer"], **config), holder, name)
    layer = holder["layer"]
    for part in [*layer.lora_A.values(), *layer.lora_B.values()]:
        nn.init.normal_(part.weight, std=0.3)
    return layer.eval()


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BASES)
def test_adapters_of_a_layer_become_stages(name):
    make, shape = BASES[name]
    # Different ranks, scales and both ways to compute a scale.
    layer = peft_layer(make(), a={"r": 2, "lora_alpha": 3}, b={"r": 4, "lora_alpha": 8}, c={"r": 3, "use_rslora": True})
    x = torch.randn(shape)
    ours = interop.from_peft(layer)
    assert (ours.stages, ours.rank, ours.form) == (3, 4, "peft")
    plain = make()
    for k, adapter in enumerate("abc"):
        layer.set_adapter(adapter)
        same(ours(x, k), layer(x))
        assert not torch.allclose(layer(x), layer.get_base_layer()(x), atol=1e-2)
    assert type(plain) is next(kind for kind in (nn.Conv2d, nn.Linear) if isinstance(ours, kind))


def test_one_scale_is_kept_and_names_choose_the_order():
    layer = peft_layer(nn.Linear(6, 10), a={"r": 2, "lora_alpha": 3}, b={"r": 2, "lora_alpha": 3})
    ours = interop.from_peft(layer, ["b", "a"])
    assert ours.scale == 1.5
    assert torch.equal(ours.down[0], layer.lora_A["b"].weight)
    assert torch.equal(ours.up[1], layer.lora_B["a"].weight)
    assert interop.from_peft(layer, "b").stages == 1


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "peft") for name in BASES] + [(name, "loralib") for name in ("conv_1x1", "conv_1x1_dilated", "linear")],
)
def test_stages_of_a_layer_become_adapters(name, form):
    make, shape = BASES[name]
    base = make()
    kind = lf.LoRALinear if isinstance(base, nn.Linear) else lf.LoRAConv2d
    ours = kind.from_base(base, stages=3, rank=4, form=form, scale=0.7)
    nn.init.normal_(ours.up, std=0.3)
    x = torch.randn(shape)
    theirs = interop.to_peft(ours).eval()
    assert isinstance(theirs, peft.tuners.lora.LoraLayer)
    same(theirs(x), ours(x, 0))
    for k in range(3):
        theirs.set_adapter(f"stage_{k}")
        same(theirs(x), ours(x, k))
        one = interop.to_peft(ours, k).eval()
        assert list(one.lora_A) == ["default"]
        same(one(x), ours(x, k))
    # Back again: the same factors to the last bit, and a scale to rounding.
    back = interop.from_peft(theirs)
    assert torch.equal(back.down.flatten(), ours.down.flatten())
    assert torch.equal(back.up, ours.up)
    assert back.scale == pytest.approx(0.7)


def test_nothing_is_shared():
    layer = peft_layer(nn.Conv2d(**CONV), a={"r": 2})
    ours = interop.from_peft(layer)
    x = torch.randn(1, 6, 8, 8)
    before = ours(x)
    layer.merge()
    theirs = interop.to_peft(ours)
    theirs.merge()
    assert torch.equal(ours(x), before)
    same(layer.base_layer(x), before)
    same(theirs.base_layer(x), before)


def test_dropout_is_left_out_with_a_warning():
    layer = peft_layer(nn.Linear(6, 10), a={"r": 2, "lora_dropout": 0.25})
    with pytest.warns(UserWarning, match=r"adapter 'a': its dropout of 0\.25 is left out"):
        ours = interop.from_peft(layer)
    x = torch.randn(3, 6)
    same(ours(x), layer(x))


def merged_layer() -> nn.Module:
    layer = peft_layer(nn.Linear(6, 10), a={"r": 2})
    layer.merge()
    return layer


def transposed_linear() -> nn.Module:
    layer = peft_layer(nn.Linear(6, 10), a={"r": 2})
    layer.fan_in_fan_out = True
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft_layer(nn.Conv2d(**CONV), a={"r": 2, "use_dora": True}), "got the variant D"),
        (lambda: peft_layer(nn.Linear(6, 10), a={"r": 2, "lora_bias": True}), r"it has a bias \(lora_bias=True\)"),
        (
            lambda: peft_layer(nn.Conv2d(**CONV, dilation=2, padding=1), a={"r": 2}),
            r"dilation=\(2, 2\): PEFT's adapter",
        ),
        (
            lambda: peft_layer(nn.Conv2d(**CONV, padding=1, padding_mode="circular"), a={"r": 2}),
            "padding_mode='circular': PEFT's adapter pads with zeros",
        ),
        (lambda: peft_layer(nn.Conv2d(**CONV, groups=2), a={"r": 2}), "groups=2: PEFT's adapter mixes all"),
        (lambda: peft_layer(nn.Conv1d(6, 10, 3), a={"r": 2}), "nn.Conv2d or nn.Linear, got one on Conv1d"),
        (lambda: peft_layer(nn.Embedding(6, 10), a={"r": 2}), "expected some of \\(none\\)"),
        (merged_layer, r"adapters a are merged into the base weight: unmerge\(\) first"),
        (transposed_linear, r"\(fan_in_fan_out=True\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
def test_what_our_forms_cannot_express_raises(make, message):
    with pytest.raises(ValueError, match=message):
        interop.from_peft(make())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lf.LoRAConv2d(**CONV, stages=2), "form 'loralib' has no counterpart in PEFT"),
        (lf.LoRAConv2d(**CONV, stages=2, form="peft", dilation=2), r"dilation=\(2, 2\)"),
        (lf.LoRAConv2d(**CONV, stages=2, form="peft", padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lf.LoRAConvTranspose2d(**CONV, stages=2, form="peft"), "no adapters for transposed convolutions"),
        (lf.LoRAConv2d(6, 10, 1, groups=2, stages=2), "groups=2"),
    ],
)
def test_what_peft_cannot_express_raises(layer, message):
    with pytest.raises(ValueError, match=message):
        interop.to_peft(layer)


def test_bad_arguments():
    layer = peft_layer(nn.Linear(6, 10), a={"r": 2})
    with pytest.raises(ValueError, match="adapters: expected some of a, got b"):
        interop.from_peft(layer, ["a", "b"])
    with pytest.raises(ValueError, match="adapters: expected some of a, got none"):
        interop.from_peft(layer, [])
    with pytest.raises(ValueError, match="expected a module with LoRA layers of PEFT, got a Linear without any"):
        interop.from_peft(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="source: expected a module, got dict"):
        interop.from_peft({})
    with pytest.raises(TypeError, match="StagedDenoiser, got Linear"):
        interop.to_peft(nn.Linear(2, 2))
    with pytest.raises(IndexError, match="stage: expected 0 to 2, got 3"):
        interop.to_peft(lf.LoRALinear(4, 4, stages=3), 3)
    with pytest.raises(TypeError, match="stage: expected a whole number, got True"):
        interop.to_peft(lf.LoRALinear(4, 4, stages=3), True)


class Denoiser(nn.Module):
    """conv1 and body.conv1 end alike; body.conv1 has another width."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 3, padding=1)
        self.body = nn.ModuleDict({"conv1": nn.Conv2d(20, 30, 3, padding=1), "mix": nn.Conv2d(30, 20, 1)})
        self.gate = nn.Linear(20, 20)
        self.conv2 = nn.Conv2d(20, 1, 3, padding=1)

    def forward(self, z):
        x = torch.relu(self.conv1(z))
        x = x + self.body["mix"](torch.relu(self.body["conv1"](x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return z + self.conv2(x)


Z = torch.randn(2, 1, 12, 10, generator=torch.Generator().manual_seed(3))


def random_staged(denoiser: nn.Module | None = None, **kwargs) -> lf.StagedDenoiser:
    staged = lf.adapt(denoiser or Denoiser(), stages=3, gamma=20, form="peft", scale=0.5, **kwargs).eval()
    for p in staged.adapter_parameters():
        nn.init.normal_(p, std=0.2)
    return staged


def test_a_staged_denoiser_becomes_a_peft_model_and_comes_back():
    staged = random_staged(exclude="body.conv1")
    model = interop.to_peft(staged).eval()
    assert isinstance(model, peft.PeftModel)
    assert not isinstance(model.get_base_model().body["conv1"], peft.tuners.lora.LoraLayer)
    same(model(Z), staged(Z, stage=0))
    for k in range(3):
        model.set_adapter(f"stage_{k}")
        same(model(Z), staged(Z, stage=k))
    back = interop.from_peft(model)
    assert set(back.adapted) == set(staged.adapted)
    assert not any(p.requires_grad for p in back.base_parameters())
    for k in range(3):
        same(back(Z, stage=k), staged(Z, stage=k))
    one = interop.to_peft(staged, 2).eval()
    assert list(one.peft_config) == ["default"]
    same(one(Z), staged(Z, stage=2))


def test_peft_files_round_trip(tmp_path):
    """Saved by PEFT's own save_pretrained, read back by PEFT alone and by us."""
    denoiser = Denoiser()
    staged = random_staged(denoiser)
    interop.to_peft(staged).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(denoiser, tmp_path / "stage_0", adapter_name="stage_0")
    for k in (1, 2):
        model.load_adapter(tmp_path / f"stage_{k}", adapter_name=f"stage_{k}")
    again = interop.from_peft(model.eval())
    for k in range(3):
        model.set_adapter(f"stage_{k}")
        same(model(Z), staged(Z, stage=k))
        same(again(Z, stage=k), staged(Z, stage=k))


def test_a_model_adapted_by_peft_becomes_staged():
    """Adapters on different layers, injected without a PeftModel around them."""
    model = Denoiser()
    for name, targets in (("coarse", ["gate", "conv2"]), ("fine", ["mix"])):
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=targets), model, name)
    for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
        for part in layer.lora_B.values():
            nn.init.normal_(part.weight, std=0.2)
    model.eval()
    staged = interop.from_peft(model, ["fine", "coarse"])
    assert set(staged.adapted) == {"gate", "conv2", "body.mix"}
    for k, name in enumerate(["fine", "coarse"]):
        for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)):
            layer.set_adapter(name)
        same(staged(Z, stage=k), model(Z))
    assert set(interop.from_peft(model, "fine").adapted) == {"body.mix"}


def test_models_that_cannot_be_staged_raise():
    config = peft.LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["conv2"])
    with pytest.raises(ValueError, match=r"conv2: fully trained \(modules_to_save\)"):
        interop.from_peft(peft.get_peft_model(Denoiser(), config))
    with pytest.raises(ValueError, match=r"body.conv1: expected LoRA layers, got peft.tuners.loha"):
        interop.from_peft(peft.get_peft_model(Denoiser(), peft.LoHaConfig(r=2, target_modules=["body.conv1"])))
    with pytest.raises(ValueError, match="gate: adapter 'default': it has a bias"):
        interop.from_peft(peft.get_peft_model(Denoiser(), peft.LoraConfig(target_modules=["gate"], lora_bias=True)))


def test_a_layer_under_two_names_raises():
    denoiser = Denoiser()
    denoiser.alias = denoiser.body["mix"]
    model = peft.get_peft_model(copy.deepcopy(denoiser), peft.LoraConfig(target_modules=["body.mix"]))
    with pytest.raises(ValueError, match=r"(alias|body.mix): the base of the adapted layer"):
        interop.from_peft(model)
    staged = lf.adapt(denoiser, stages=2, form="peft", include=["body.mix"])
    with pytest.raises(ValueError, match="alias: another name of an adapted layer"):
        interop.to_peft(staged)


def test_what_a_staged_denoiser_cannot_hand_to_peft_raises_by_name():
    with pytest.raises(ValueError, match=r"^conv1: form 'loralib' has no counterpart"):
        interop.to_peft(lf.adapt(Denoiser(), stages=2))


def test_adapt_does_not_take_pefts_factors_for_layers():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), peft_layer(nn.Conv2d(6, 10, 3), a={"r": 2}))
    with pytest.raises(ValueError, match=r"got 1.base_layer inside peft's 1: lorun_fast.interop.peft converts"):
        lf.adapt(net, stages=2)
    assert set(lf.adapt(net, stages=2, exclude="1.*").adapted) == {"0"}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"inside peft's base_model.model.0: .*, or exclude='base_model.model.0.*'"):
        lf.adapt(model, stages=2)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    staged = lf.adapt(model, stages=2, exclude="base_model.model.0.*")
    assert set(staged.adapted) == {"base_model.model.1"}
    x = torch.rand(2, 4)
    assert torch.equal(staged(x, stage=1), model(x))
    with pytest.raises(ValueError, match=r"inside peft's Linear: lorun_fast.interop.peft converts such layers$"):
        lf.adapt(peft_layer(nn.Linear(4, 4), a={"r": 2}), stages=2)


@pytest.mark.filterwarnings("ignore:.*`config.json`")
def test_our_own_denoisers_are_saved_by_peft(tmp_path):
    """Theirs is a method named config, where PEFT looks for a dict."""
    staged = random_staged(lf.ResCNN())
    model, z = interop.to_peft(staged), torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(model(z), staged(z, stage=0))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "stage_0" / "adapter_model.safetensors").exists()


def test_a_denoiser_that_is_a_layer():
    staged = lf.adapt(nn.Conv2d(1, 1, 3, padding=1), stages=2, form="peft")
    with pytest.raises(ValueError, match=r"got one that is a layer: convert staged.base"):
        interop.to_peft(staged)
    assert interop.to_peft(staged.base).lora_A


def test_convolutions_of_other_axes_are_not_carried_over():
    with pytest.raises(ValueError, match="exclude convolutions of other axes"):
        interop.to_peft(lf.LoRAConv3d(2, 3, 3, stages=2))


def test_attention_is_not_carried_over():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    with pytest.raises(ValueError, match=r"^attention: .* exclude convolutions of other axes and MultiheadAttention"):
        interop.to_peft(lf.adapt(Attention(), stages=2))
