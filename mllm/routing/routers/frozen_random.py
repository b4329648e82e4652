"""The learned router's control: the same map with the same initialisation, never trained."""

from __future__ import annotations

import torch

from mllm.routing.routers.base import RouterSpec
from mllm.routing.routers.learned import LearnedRouter as _Learned


class FrozenRandomRouter(_Learned):
    """A random linear router that stays as it was drawn: what routing gains by learning is measured against it.

    Its weights are buffers: saved with the adapter, never trained, whatever asks for their gradient.
    """

    learns = False

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__(spec)
        for name, parameter in list(self.named_parameters(recurse=False)):
            delattr(self, name)
            # PEFT's low_cpu_mem_usage makes parameters without memory until the adapter is loaded. It knows of no
            # such buffers and would fail to move them.
            frozen = torch.zeros(parameter.shape) if parameter.is_meta else parameter.detach()
            self.register_buffer(name, frozen)
