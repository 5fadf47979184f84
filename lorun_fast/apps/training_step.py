"""One step of training, as it is or recorded as CUDA graphs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from lorun_fast.apps.batches import Batch
from lorun_fast.network import LoRun


class Step:
    """The loss of a batch, its gradients, clipped, and what AdamW makes of them.

    recipe: the task's (see apps/tasks). peaks: (parameters, peak learning rate) of each group. clip: the norm above
    which gradients are scaled. dtype: of autocast; float32 for none.

    Called with a batch, returns (loss, gradient norm), 0-d and on the device. A batch whose gradient overflows is left
    out instead of poisoning the optimizer's state.
    """

    def __init__(
        self,
        net: LoRun,
        recipe,
        peaks: list[tuple[list[nn.Parameter], float]],
        clip: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.net, self.recipe, self.clip, self.dtype, self.device = net, recipe, clip, dtype, device
        self.parameters = [p for parameters, _ in peaks for p in parameters]
        groups = [{"params": parameters, "peak": peak, "lr": self._rate(peak)} for parameters, peak in peaks]
        on_gpu = device.type == "cuda"
        # On a GPU nothing of a step waits for the device: the rate and whether there is an update are read there.
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=on_gpu, capturable=on_gpu)

    def _rate(self, value: float) -> float | Tensor:
        return torch.tensor(value, device=self.device) if self.device.type == "cuda" else value

    def set_rates(self, factor: float) -> None:
        """Every group's learning rate, as a part of its peak."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(group["peak"] * factor)
            else:
                group["lr"] = group["peak"] * factor

    def load_state_dict(self, state: dict) -> None:
        """Of the optimizer. Its moments: rates follow from the step, and how it computes from the device."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.on_device(batch.to(self.device))

    def on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same for a batch that is there already, and without a word to the host where that is a GPU."""
        with self.autocast():
            loss = self.recipe.loss(self.net, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if self.device.type == "cuda":
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # where not 0, AdamW leaves all as it is
            self.optimizer.step()
        elif torch.isfinite(norm):
            self.optimizer.step()
        return loss.detach(), norm


class RecordedStep:
    """A step as CUDA graphs, one for each kind of batch: one launch by the host instead of thousands.

    A kind's first batches train as they are, while libraries choose their algorithms and the optimizer its state.
    """

    AS_THEY_ARE = 2

    def __init__(self, step: Step):
        self.step = step
        self.stream = torch.cuda.Stream(step.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: Counter[tuple] = Counter()
        self.recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, tuple[Tensor, Tensor]]] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        kind, current = batch.kind(), torch.cuda.current_stream(self.step.device)
        if kind not in self.recorded and self.seen[kind] < self.AS_THEY_ARE:
            self.seen[kind] += 1
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                loss, norm = self.step(batch)
            current.wait_stream(self.stream)
            return loss, norm
        if kind not in self.recorded:
            self.recorded[kind] = self._record(batch.to(self.step.device))
        graph, held, results = self.recorded[kind]
        held.copy_(batch)
        graph.replay()
        loss, norm = (t.clone() for t in results)
        return loss, norm

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, tuple[Tensor, Tensor]]:
        self.step.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: those that draw batches pin memory meanwhile, which would end a recording of all.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            results = self.step.on_device(batch)
        return graph, batch, results
