"""Block compressive sensing as a module."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from lorun_fast.operators.base import SensingOperator, as_matrix, proximal_weight
from lorun_fast.ops import block_cs as ops
from lorun_fast.ops._checks import check_image, finite, pair, whole


class BlockCS(SensingOperator):
    """y = Phi x, block by block.

    phi: (m, B*B), fp32 or fp64 tensor or array; each row acts on a row-major B x B block.
    block_size: B. Default 32.
    learn: make Phi a trainable parameter instead of a buffer.

    Images are (N, 1, H, W) of any size: zero-padded at the right and bottom to whole blocks, cropped after.
    Measurements are (N, m, ceil(H/B), ceil(W/B)). ``size`` = (H, W) tells what y alone cannot: without it
    images come back in whole blocks.

    Raises ValueError for a Phi of another shape, or with NaN or infinite entries.
    """

    task = "cs"
    # Whether Phi was found to have orthonormal rows; which one was looked at, and how often it had been changed then.
    _orthonormal: bool = False
    _looked_at: tuple[weakref.ref[Tensor], int] | None = None

    def __init__(self, phi: Tensor, block_size: int = 32, *, learn: bool = False):
        super().__init__()
        block_size = whole("block_size", block_size, 1)
        phi = as_matrix("phi", phi, (2,))
        if phi.shape[1] != block_size * block_size:
            raise ValueError(
                f"phi: expected (m, {block_size * block_size}) for block_size={block_size}, "
                f"got shape {tuple(phi.shape)}"
            )
        self.block_size = block_size
        if learn:
            self.phi = nn.Parameter(phi.detach().clone().contiguous())
        else:
            self.register_buffer("phi", phi.contiguous())

    @classmethod
    def gaussian(
        cls,
        ratio: float,
        block_size: int = 32,
        *,
        seed: int = 0,
        learn: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> BlockCS:
        """A Gaussian Phi with orthonormal rows, the same for the same seed.

        ratio: m / B^2 in (0, 1]; m = round(ratio * B^2), at least 1 (so 256 of 1024 at 0.25). dtype: fp32 or fp64.
        """
        if not 0 < finite("ratio", ratio) <= 1:
            raise ValueError(f"ratio: expected a fraction in (0, 1], got {ratio}")
        n = whole("block_size", block_size, 1) ** 2
        if whole("seed", seed, -(2**63)) >= 2**64:
            raise ValueError(f"seed: expected a whole number of 64 bits, got {seed}")
        if dtype not in (torch.float32, torch.float64):  # an integer's rows would be zeros
            raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
        m = max(1, math.floor(ratio * n + 0.5))
        # On the CPU, whose generator draws the same everywhere, then to the default device as a module's parameters.
        generator = torch.Generator("cpu").manual_seed(int(seed))
        q, r = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64, device="cpu"))
        # QR leaves the signs open; fixing R's diagonal makes the draw unique across LAPACK versions.
        phi = (q * r.diagonal().sign()).mT.to(torch.get_default_device(), dtype)
        made = cls(phi, block_size, learn=learn)
        made._orthonormal = True
        return made

    @property
    def ratio(self) -> float:
        """m / B^2."""
        return self.phi.shape[0] / self.phi.shape[1]

    def extra_repr(self) -> str:
        learned = ", learned" if isinstance(self.phi, nn.Parameter) else ""
        return f"m={self.phi.shape[0]}, block_size={self.block_size}, ratio={self.ratio:.4g}{learned}"

    def config(self) -> dict:
        return {"block_size": self.block_size, "learn": isinstance(self.phi, nn.Parameter)}

    @classmethod
    def from_config(cls, config: dict, state: dict[str, Tensor]) -> BlockCS:
        return cls(state["phi"], config["block_size"], learn=config["learn"])

    def image_size(self, y: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
        """``size``, or the size of y's whole blocks."""
        check_image("y", y, 4, "(N, m, ceil(H/B), ceil(W/B))")
        if size is not None:
            return pair(size)
        shape = y.shape
        return shape[-2] * self.block_size, shape[-1] * self.block_size

    def forward(self, x: Tensor) -> Tensor:
        return ops.block_cs(x, self._beside("phi", x), block_size=self.block_size)

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            size = self.image_size(y, size)
        return ops.block_cs_adjoint(y, self._beside("phi", y), block_size=self.block_size, size=size)

    def gradient_step(self, x: Tensor, y: Tensor, rho: float | Tensor) -> Tensor:
        return ops.block_cs_step(x, y, self._beside("phi", x), rho, block_size=self.block_size)

    def initial(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Phi^T y."""
        return self.adjoint(y, size)

    def norm(self) -> Tensor:
        """The largest singular value of Phi (of the whole operator when H and W are whole blocks, a bound else)."""
        return torch.linalg.matrix_norm(self.phi, 2)

    def prox(self, x: Tensor, y: Tensor, mu: float | Tensor) -> Tensor:
        """argmin_v ||Phi v - y||^2 / 2 + mu ||v - x||^2 / 2 = x + Phi^T (Phi Phi^T + mu)^-1 (y - Phi x), exact.

        mu: positive; a number, 0-d, (N,), or broadcastable to (N, 1, 1, 1); a tensor's sign is not read.
        Where a fixed Phi has orthonormal rows and H, W are whole blocks: a gradient step of 1 / (1 + mu). Else an
        m x m matrix is factorised at each call, for each sample where mu is. Differentiable in x, y, mu and Phi.
        The rows are looked at once, and again where Phi is another or was changed in place (but by way of ``.data``,
        which torch does not count); torch.compile and export, which cannot read values, rely on the last look.
        """
        b, phi = self.block_size, self._beside("phi", x)
        check_image("x", x, 4, "(N, 1, H, W)")
        mu = proximal_weight(mu, x)
        learns = phi.requires_grad and torch.is_grad_enabled()  # away from orthonormal rows, too
        if x.shape[-2] % b == 0 and x.shape[-1] % b == 0 and not learns and self.has_orthonormal_rows():
            return self.gradient_step(x, y, 1 / (1 + mu if mu.ndim == 1 else 1 + mu[..., None, None]))
        return ops.block_cs_prox(x, y, phi, mu, block_size=b)

    def has_orthonormal_rows(self) -> bool:
        """Whether Phi Phi^T is the identity, to 1e-4. While traced: what was found before, False for a parameter."""
        phi, known = self.phi, self._looked_at
        if torch.compiler.is_compiling() or phi.is_meta:
            # A program outlives the values of a parameter.
            return self._orthonormal and not isinstance(phi, nn.Parameter)
        # An inference tensor does not count its changes: a fixed one has none, a learned one is looked at every time.
        counted = not phi.is_inference()
        changes = phi._version if counted else 0
        tells = counted or not isinstance(phi, nn.Parameter)
        if not (tells and known is not None and known[0]() is phi and known[1] == changes):
            self._orthonormal = _orthonormal_rows(phi)
            self._looked_at = weakref.ref(phi), changes
        return self._orthonormal

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_looked_at": None}  # a weak reference is not pickled

    def _load_from_state_dict(self, *args, **kwargs):
        self._orthonormal, self._looked_at = False, None
        super()._load_from_state_dict(*args, **kwargs)


@torch.no_grad()
def _orthonormal_rows(phi: Tensor) -> bool:
    gram = phi.double() @ phi.double().mT
    worst = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()
    return worst.item() <= 1e-4
