"""Our sensing operators as deepinv physics, our stages as deepinv priors.

The other way round needs nothing from here: a deepinv denoiser is a module with ``forward(x, sigma)``, which
:func:`lorun_fast.adapt` takes as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorun_fast.interop._packages import require
from lorun_fast.operators import SensingOperator
from lorun_fast.stages import Stages

deepinv = require("deepinv")

from deepinv.optim import PnP  # noqa: E402
from deepinv.physics import LinearPhysics  # noqa: E402


def physics(op: SensingOperator, img_size: tuple[int, int, int] | None = None, **kwargs) -> OperatorPhysics:
    """One of our operators as a deepinv LinearPhysics.

    op: BlockCS, CASSI, BlurDownsample, or an operator of your own. img_size: (C, H, W) of the images, which BlockCS
        needs unless H and W are whole blocks, and which deepinv uses where it has no image at hand.
    kwargs: LinearPhysics's own: noise_model, solver, max_iter, tol, implicit_backward_solver.
    """
    return OperatorPhysics(op, img_size, **kwargs)


def prior(staged: Stages) -> list[PnP]:
    """One plug-and-play prior per stage, for deepinv's unfolded algorithms with as many iterations.

    PGD(unfold=True, prior=prior(staged), max_iter=len(staged), trainable_params=["stepsize"], ...) unfolds as LoRun
    does; the stages share their parameters as before. deepinv passes its ``sigma_denoiser`` on to denoisers that
    take a noise level; leave it out, and "g_param" out of trainable_params, for one that takes none.
    """
    if not isinstance(staged, Stages):
        raise TypeError(f"staged: expected a staged denoiser, as adapt() returns it, got {type(staged).__name__}")
    return [PnP(stage) for stage in staged]


class OperatorPhysics(LinearPhysics):
    """A sensing operator behind deepinv's interface; made by :func:`physics`.

    Measurements have a channel axis, as deepinv's have: CASSI's are (N, 1, H, W + step*(L-1)); the others as they are.
    Keyword arguments of A and A_adjoint are ignored. ``operator`` is the operator itself.
    """

    def __init__(self, op: SensingOperator, img_size: tuple[int, int, int] | None = None, **kwargs):
        if not isinstance(op, SensingOperator):
            raise TypeError(f"op: expected a SensingOperator, got {type(op).__name__}")
        super().__init__(**kwargs)
        self.operator = op
        if img_size is None and op.task == "cassi":
            img_size = (op.bands, *op.mask.shape[-2:])
        self.img_size = None if img_size is None else tuple(img_size)
        for t in op.state_dict().values():
            self.to(t.device)

    def A(self, x: Tensor, **_) -> Tensor:
        """Phi x. x: (N, C, H, W)."""
        size = tuple(x.shape[-2:])
        if self.img_size is not None and size != self.img_size[1:]:
            raise ValueError(f"x: expected images of {self.img_size[1:]}, got {size}: make one physics per image size")
        y = self.operator(x)
        whole = self.operator.image_size(y, None) if self.img_size is None else None
        if whole not in (None, size):
            raise ValueError(
                f"x: expected {whole} for a y that gives no other size, got {size}: "
                f"use physics(op, img_size={(x.shape[1], *size)})"
            )
        return y.unsqueeze(1) if self.operator.task == "cassi" else y

    def A_adjoint(self, y: Tensor, **_) -> Tensor:
        """Phi^T y."""
        return self.operator.adjoint(self._own(y), self._size())

    def initial(self, y: Tensor) -> Tensor:
        """The operator's own start, for deepinv's ``init`` and ``custom_init``."""
        return self.operator.initial(self._own(y), self._size())

    def norm(self) -> Tensor:
        """The largest singular value of Phi; deepinv's compute_norm and compute_sqnorm estimate it (or its square)."""
        return self.operator.norm()

    def prox_l2(self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, **kwargs) -> Tensor:
        """argmin_v gamma ||Phi v - y||^2 / 2 + ||v - z||^2 / 2: the operator's closed form, else deepinv's solver.

        gamma: positive; a number, 0-d, or one per sample. kwargs: the solver's; without effect on a closed form.
        ``operator.prox`` has conjugate gradients of its own, without deepinv's settings.
        """
        if type(self.operator).prox is SensingOperator.prox:
            return super().prox_l2(z, y, gamma, **kwargs)
        if z is None or isinstance(z, float | int):
            z = torch.full_like(self.A_adjoint(y), float(z or 0))
        mu = 1 / gamma
        if isinstance(mu, Tensor):
            mu = mu.to(z.device)
        return self.operator.prox(z, self._own(y), mu)

    def _own(self, y: Tensor) -> Tensor:
        return y.squeeze(1) if self.operator.task == "cassi" else y

    def _size(self) -> tuple[int, int] | None:
        return None if self.img_size is None else self.img_size[1:]
