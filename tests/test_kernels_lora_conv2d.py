"""The convolution kernels against the definition in float64: in Triton's interpreter, or compiled where a GPU is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from kernels_help import DEVICE, assert_as_good_as_torch, channels_last, needs_triton, poisoned  # noqa: F401
from torch import Tensor

from lorun_fast import adapters
from lorun_fast.reference import lora as reference

needs_triton()

from lorun_fast.kernels import _geometry, configs, lora_conv2d, lora_conv2d_backward  # noqa: E402
from lorun_fast.kernels.configs import BackwardTile, FactorTile, Tile  # noqa: E402

SMALL = Tile(4, 8, 16, 16, 4, 2)
STRIP = Tile(1, 16, 16, 16, 4, 2, True, 4)
HALF, FULL = torch.float16, torch.float32


def back(
    output: Tile = SMALL, image: Tile = SMALL, group: int = 4, programs: int = 2, strip: Tile | None = None
) -> BackwardTile:
    return BackwardTile(output, image, FactorTile(4, 8, 16, group, 16), programs, strip)


@dataclass
class Layer:
    """Random tensors of one layer, and its result three ways: kernel, PyTorch in the same dtype, float64."""

    c: int
    o: int
    h: int = 6
    w: int = 7
    k: int | tuple[int, int] = 3
    n: int = 1
    rank: int = 2
    dtype: torch.dtype = FULL
    stage: object = None
    merged: bool = False
    activation: str | None = None
    residual: bool = False
    bias: bool = True
    factors: torch.dtype | None = None
    geometry: dict = field(default_factory=lambda: {"padding": 1})
    device: str = DEVICE
    stages: int = 3

    def __post_init__(self):
        k = self.k if isinstance(self.k, tuple) else (self.k, self.k)
        fan = self.c * k[0] * k[1]

        def draw(*shape, scale=1.0, dtype=self.dtype):
            return (scale * torch.randn(*shape)).to(self.device, dtype)

        lead = () if self.stage is None else (self.stages,)
        if isinstance(self.stage, Tensor):
            self.stage = self.stage.to(self.device)
        self.x = channels_last(draw(self.n, self.c, self.h, self.w))
        self.weight = draw(*(lead if self.merged else ()), self.o, self.c, *k, scale=fan**-0.5)
        self.b = draw(self.o) if self.bias else None
        down, up = adapters.factor_shapes((self.o, self.c, *k), self.rank, "peft")
        factors = self.factors or self.dtype
        self.down = None if self.merged else draw(*lead, *down, scale=fan**-0.5, dtype=factors)
        self.up = None if self.merged else draw(*lead, *up, dtype=factors)
        shape = self.define(*self.inputs(torch.float64)).shape
        self.beside = channels_last(draw(*shape)) if self.residual else None
        self.dy = channels_last(draw(*shape))

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """x, weight, bias, down, up; in another dtype if given."""
        tensors = (self.x, self.weight, self.b, self.down, self.up)
        return [None if t is None else t.detach().to(dtype or t.dtype) for t in tensors]

    def define(self, x, weight, bias, down, up) -> Tensor:
        if not self.merged:
            return reference.lora_conv2d(
                x, weight, bias, down, up, scale=0.7, stage=self.stage, activation=self.activation, **self.geometry
            )
        weight = weight if self.stage is None else weight[self.stage]
        conv = reference.conv2d_per_sample if weight.ndim == 5 else F.conv2d
        g = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | self.geometry
        return reference.epilogue(conv(x, weight, bias, **g), self.activation, None)

    def arguments(self) -> dict:
        return {"scale": 0.7, "stage": self.stage, "activation": self.activation} | self.geometry

    def forward(self, tile: Tile | None) -> None:
        """Compares the kernel's result, written over NaN."""
        out = channels_last(torch.full_like(self.dy, torch.nan))
        got = lora_conv2d.forward(
            *self.inputs(), residual=self.beside, out=out, tile=tile, **self.arguments()
        )  # fmt: skip
        assert got is out
        with torch.no_grad():
            truth, torchs = (self.define(*self.inputs(dtype)) for dtype in (torch.float64, self.dtype))
        if self.beside is not None:
            truth, torchs = truth + self.beside.double(), torchs + self.beside
        assert_as_good_as_torch([got], [torchs], [truth])

    def gradients(self, dtype: torch.dtype) -> list[Tensor]:
        """Of x, down and up (merged: x and weight) and bias, in the order the kernel returns them."""
        tensors = self.inputs(dtype)
        order = (0, 1, 2) if self.merged else (0, 3, 4, 2)
        wanted = [tensors[i].requires_grad_() for i in order if tensors[i] is not None]
        return list(torch.autograd.grad(self.define(*tensors), wanted, self.dy.to(dtype)))

    def backward(self, tile: BackwardTile | None, output: Tensor | None = None, learns_bias: bool = True) -> tuple:
        """Compares the kernels' gradients; ``output``: the saved forward result, if the kernels may use it."""
        need = (True, True, self.bias and learns_bias)
        got = lora_conv2d_backward.backward(
            self.dy, *self.inputs(), output=output, need=need, tile=tile, **self.arguments()
        )  # fmt: skip
        found = [t for t in got if t is not None]
        own, truth = (self.gradients(dtype)[: len(found)] for dtype in (self.dtype, torch.float64))
        assert_as_good_as_torch(found, [t.to(f.dtype) for t, f in zip(own, found, strict=True)], truth)
        return got


MIXED = torch.tensor([2, 0])
SAME_STAGES = torch.tensor([1, 1])


def of(*args, **kwargs):
    """A Layer to be drawn when its test runs."""
    return functools.partial(Layer, *args, **kwargs)


FORWARD = {
    "mixed stages, gelu, residual": (of(5, 7, n=2, stage=MIXED, activation="gelu", residual=True), SMALL),
    "one stage of three, no bias": (of(5, 7, stage=1, bias=False), SMALL),
    "stride 2, 31 to 28 channels, fp16": (
        of(31, 28, 9, 9, dtype=HALF, geometry={"stride": 2, "padding": 1}),
        Tile(4, 8, 32, 32, 4, 2),
    ),
    "strides, paddings and dilations of their own": (
        of(3, 4, 9, 11, k=(5, 3), geometry={"stride": (1, 2), "padding": (3, 0), "dilation": (2, 1)}),
        SMALL,
    ),
    "blocks of channels, descriptors, fp16": (of(24, 40, dtype=HALF, rank=3), Tile(8, 8, 16, 32, 4, 2, True)),
    "1 x 1": (of(20, 5, k=1, n=2, stage=SAME_STAGES, geometry={}), Tile(1, 32, 16, 16, 4, 2)),
    "1 x 1, padded": (of(3, 4, k=1), SMALL),
    "merged weights per sample": (of(5, 7, n=2, stage=MIXED, merged=True, activation="silu"), SMALL),
    "same padding": (of(5, 7, k=(2, 3), geometry={"padding": "same"}), SMALL),
    "strip, descriptors, mixed, residual, fp16": (
        of(16, 16, 6, 21, n=2, stage=MIXED, dtype=HALF, residual=True, activation="relu", factors=FULL),
        STRIP,
    ),
    "strip, 13 channels, dilation 2, fp16": (
        of(13, 9, 9, 18, dtype=HALF, geometry={"padding": 1, "dilation": 2}),
        STRIP,
    ),
    "strip, 5 x 5, merged weight": (of(4, 3, 5, 17, k=5, merged=True, geometry={"padding": (2, 0)}), STRIP),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward(case):
    make, tile = FORWARD[case]
    make().forward(tile)


BACKWARD = {
    "mixed stages, gelu": (of(5, 7, n=2, stage=MIXED, activation="gelu"), back()),
    "more patches than programs": (of(3, 4, h=9, k=1, geometry={}), back(group=1, programs=1)),
    "one stage of three": (of(5, 7, stage=1), back()),
    "stride 2, fp16": (
        of(6, 7, 9, 8, dtype=HALF, activation="silu", geometry={"stride": (2, 1), "padding": 1}),
        back(),
    ),
    "1 x 1, blocks of channels": (of(20, 40, k=1, activation="leaky_relu", geometry={}), back(group=1)),
    "blocks of channels, dilation 2": (
        of(18, 8, rank=3, geometry={"padding": 1, "dilation": 2}, bias=False),
        back(Tile(4, 8, 16, 16, 4, 2, True), Tile(4, 8, 16, 16, 4, 2, True), group=2),
    ),
    "merged weights per sample": (of(5, 7, n=2, stage=MIXED, merged=True, activation="relu"), back(group=1)),
    "strip, mixed, fp16": (
        of(16, 8, 6, 21, n=2, stage=SAME_STAGES, dtype=HALF),
        back(image=Tile(1, 16, 16, 16, 4, 2, True, 4)),
    ),
    "u by strips, descriptors, mixed, fp16": (
        of(16, 8, 9, 21, n=2, stage=MIXED, dtype=HALF, factors=FULL),
        back(strip=STRIP),
    ),
    "u by strips, 5 x 5, 13 to 9 channels": (of(13, 9, 7, 18, k=5, geometry={"padding": (2, 1)}), back(strip=STRIP)),
    "u by strips, dilation 2": (of(4, 3, 11, 17, geometry={"padding": 1, "dilation": 2}), back(strip=STRIP)),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_backward(case, poisoned):  # noqa: F811
    make, tile = BACKWARD[case]
    make().backward(tile)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_forward_and_backward(activation, poisoned):  # noqa: F811
    layer = Layer(3, 4, 3, 5, k=1, activation=activation, residual=True, geometry={})
    layer.forward(SMALL)
    layer.backward(back(group=1))


KNOWN = {
    "mixed stages, 5 to 7 channels": (of(5, 7, 3, 5, n=2, stage=MIXED, activation="relu"), back()),
    "1 x 1, blocks of channels, fp16": (of(20, 40, 3, k=1, dtype=HALF, activation="leaky_relu", geometry={}), back()),
    "stride 2": (of(3, 4, 5, 7, activation="leaky_relu", geometry={"stride": 2, "padding": 1}), back()),
    "merged weights per sample": (of(5, 7, k=1, n=2, stage=MIXED, merged=True, activation="relu", geometry={}), back()),
    "strip, fp16": (
        of(16, 8, 4, 21, n=2, stage=SAME_STAGES, dtype=HALF, activation="relu", bias=False),
        back(image=Tile(1, 16, 16, 16, 4, 2, True, 4)),
    ),
    "u by strips": (of(5, 7, 6, 19, n=2, stage=MIXED, activation="leaky_relu"), back(strip=STRIP)),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOWN)
def test_the_sign_of_the_saved_output_is_the_derivative(case, poisoned):  # noqa: F811
    make, tile = KNOWN[case]
    layer = make()
    output = lora_conv2d.forward(*layer.inputs(), tile=SMALL, **layer.arguments())
    assert (output > 0).any() and (output <= 0).any()
    layer.backward(tile, output)


def test_a_saved_output_of_any_layout_will_do(poisoned):  # noqa: F811
    layer = Layer(3, 4, 3, 5, k=1, activation="relu", geometry={})
    output = lora_conv2d.forward(*layer.inputs(), tile=SMALL, **layer.arguments())
    for saved in (output.contiguous(), _geometry.padded_like(output, output.shape).copy_(output)):
        layer.backward(back(group=1), saved)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_nothing_is_computed_again_where_the_output_is_saved(activation, poisoned):  # noqa: F811
    layer = Layer(3, 4, 3, 5, k=1, activation=activation, geometry={})
    arguments = layer.arguments() | {"tile": back(group=1), "need": (True, True, True)}
    ones = channels_last(torch.ones_like(layer.dy))
    all_positive = lora_conv2d_backward.backward(layer.dy, *layer.inputs(), output=ones, **arguments)
    without = lora_conv2d_backward.backward(layer.dy, *layer.inputs(), **(arguments | {"activation": None}))
    assert all(torch.equal(a, b) for a, b in zip(all_positive, without, strict=True))


def test_an_output_that_does_not_tell_the_derivative_is_not_used(poisoned):  # noqa: F811
    layer = Layer(3, 4, 3, 5, k=1, activation="gelu", geometry={})
    layer.backward(back(group=1), channels_last(torch.ones_like(layer.dy)))


def test_backward_takes_at_most_three_launches_and_gives_what_is_asked(monkeypatch, poisoned):  # noqa: F811
    names = []
    run = lora_conv2d_backward.Launch.run
    monkeypatch.setattr(
        lora_conv2d_backward.Launch, "run", lambda self: (names.append(self.kernel.fn.__name__), run(self))[1]
    )
    layer = Layer(3, 4, 3, 5, k=1, activation="relu", geometry={})
    layer.backward(back(group=1))
    assert names == ["output_side", "input_side", "reduce_parts"]
    names.clear()
    layer.backward(back(group=1, strip=STRIP))
    assert names[0] == "output_side"  # ReLU whose result was not saved: a convolution is computed again
    names.clear()
    dx, d_down, d_up, d_bias = lora_conv2d_backward.backward(
        layer.dy, *layer.inputs(), need=(True, False, False), tile=back(group=1), **layer.arguments()
    )
    assert dx is not None and d_down is d_up is d_bias is None and "reduce_parts" not in names


def test_stages_that_took_no_part_have_zero_gradient(poisoned):  # noqa: F811
    _, d_down, d_up, _ = Layer(3, 4, 3, 5, k=1, n=2, stage=SAME_STAGES, geometry={}).backward(back(group=1))
    assert (d_down[[0, 2]] == 0).all() and (d_up[[0, 2]] == 0).all() and (d_down[1] != 0).any()


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize(("tile", "k"), [(SMALL, 1), (STRIP, 3)], ids=["patches", "strips"])
def test_a_stage_out_of_range_turns_its_sample_to_nan_and_no_other(tile, k, wrong):
    layer = Layer(3, 4, 3, 5, k=k, n=2, stage=SAME_STAGES, dtype=HALF, geometry={"padding": k // 2})
    arguments = layer.arguments() | {"stage": torch.tensor([1, wrong], device=DEVICE)}
    y = lora_conv2d.forward(*layer.inputs(), tile=tile, **arguments)
    dx, *_ = lora_conv2d_backward.backward(
        layer.dy, *layer.inputs(), need=(True, False, False), tile=back(image=tile), **arguments
    )
    for result in (y, dx):
        assert result[1].isnan().all() and result[0].isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_zeros_and_nan_go_through_an_activation_as_in_torch(activation, poisoned):  # noqa: F811
    layer = Layer(3, 4, 3, 5, k=1, activation=activation, bias=False, geometry={})
    layer.x.zero_()
    layer.backward(back(group=1))
    layer.x[0, :, 1, 2] = torch.nan
    y = lora_conv2d.forward(*layer.inputs(), tile=SMALL, **layer.arguments())
    assert torch.equal(y.isnan(), layer.define(*layer.inputs()).isnan()) and y.isnan().any()


def test_the_same_bits_every_time(poisoned):  # noqa: F811
    layer = Layer(3, 4, 5, 9, k=1, activation="silu", geometry={})
    runs = [
        lora_conv2d_backward.backward(layer.dy, *layer.inputs(), tile=back(group=1), **layer.arguments())
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))


def test_a_sample_does_not_depend_on_its_batch_mates():
    layer = Layer(3, 4, 3, 5, k=1, n=2, stage=MIXED, dtype=HALF, geometry={})
    x, *rest = layer.inputs()
    both = lora_conv2d.forward(x, *rest, tile=SMALL, **layer.arguments())
    alone = lora_conv2d.forward(x[1:], *rest, tile=SMALL, **(layer.arguments() | {"stage": layer.stage[1:]}))
    assert torch.equal(both[1:], alone)


def test_layouts_are_read_in_place_or_copied(poisoned):  # noqa: F811
    layer = Layer(5, 7, 4, 6, k=1, dtype=HALF, geometry={})
    want = lora_conv2d.forward(*layer.inputs(), tile=SMALL, **layer.arguments())
    x, *rest = layer.inputs()
    padded = _geometry.padded_like(x, x.shape).copy_(x)
    assert padded.stride(3) == 8 and padded.stride(1) == 1
    sliced = channels_last(torch.cat([x, x, x], 3))[..., 6:12]
    for one in (padded, sliced, x.contiguous()):
        assert torch.equal(lora_conv2d.forward(one, *rest, tile=SMALL, **layer.arguments()), want)
    into = _geometry.padded_like(x, want.shape)
    assert torch.equal(lora_conv2d.forward(padded, *rest, out=into, tile=SMALL, **layer.arguments()), want)


def test_pixels_that_are_no_row_are_read_and_written_in_place(poisoned):  # noqa: F811
    layer = Layer(5, 7, 4, 6, k=1, residual=True, geometry={})
    want = lora_conv2d.forward(*layer.inputs(), residual=layer.beside, tile=SMALL, **layer.arguments())
    beside, into = (channels_last(torch.cat([layer.beside] * 2, 3))[..., 3:9].copy_(layer.beside) for _ in range(2))
    got = lora_conv2d.forward(*layer.inputs(), residual=beside, out=into, tile=SMALL, **layer.arguments())
    assert got is into and torch.equal(got, want)
    layer.dy = into
    layer.backward(back(group=1))


def test_padded_storage_admits_descriptors():
    x = torch.empty(1, 28, 4, 4, dtype=HALF)
    assert not _geometry.Layout.of(channels_last(x)).describable
    assert _geometry.Layout.of(_geometry.padded_like(x, x.shape)).describable


def test_bad_input_raises_before_a_launch():
    layer = Layer(3, 4, 5, 5)
    with pytest.raises(ValueError, match="expected 3 channels"):
        lora_conv2d.forward(torch.zeros(1, 2, 5, 5), *layer.inputs()[1:])
    with pytest.raises(ValueError, match="'same'"):
        lora_conv2d.forward(*layer.inputs(), stride=2, padding="same")
    with pytest.raises(ValueError, match="channels that lie together"):
        lora_conv2d.forward(*layer.inputs(), padding=1, out=torch.empty(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"residual: expected \(1, 4, 5, 5\), got \(1, 4, 5, 4\)"):
        lora_conv2d.forward(*layer.inputs(), padding=1, residual=torch.empty(1, 4, 5, 4))


def _device_layer(problem) -> Layer:
    """A problem of kernels/check.py on a smaller image, which no tile divides."""
    k = problem.k
    return Layer(
        problem.channels,
        problem.out or problem.channels,
        problem.px,
        problem.px,
        k,
        n=problem.batch,
        rank=adapters.rank(problem.channels, problem.out or problem.channels, 10),
        dtype=getattr(torch, problem.dtype),
        stage=torch.tensor([8, 0, 8]) if problem.mixed else None,
        merged=problem.form == "merged",
        activation=problem.activation,
        residual=problem.residual and not problem.backward,
        factors=getattr(torch, problem.factors) if problem.factors else None,
        geometry={"padding": k // 2, "stride": problem.stride},
        device="cuda",
        stages=9,
    )


def _shipped():
    from lorun_fast.kernels import check

    return [p for p in check.problems() if p.form != "merge"]


@pytest.mark.gpu
@pytest.mark.parametrize("problem", _shipped(), ids=lambda p: p.name)
def test_every_shipped_configuration_on_the_device(problem, poisoned, monkeypatch):  # noqa: F811
    from lorun_fast.kernels import check

    tile = check.tile_of(problem, configs.architecture(torch.device("cuda")))
    problem = check.small(problem)
    # PyTorch's own error is what a kernel may have twice: in fp32 not that of tf32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = _device_layer(problem)
    if problem.backward:
        with torch.no_grad():
            output = layer.define(*layer.inputs()) if problem.knows else None
        layer.backward(tile, output, learns_bias=problem.activation is not None)
    else:
        layer.forward(tile)


@pytest.mark.gpu
def test_the_device_has_a_shipped_architecture():
    major, minor = torch.cuda.get_device_capability()
    assert configs.architecture(torch.device("cuda")) <= 10 * major + minor
