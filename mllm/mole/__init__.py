"""MOLE, a PEFT method: sparse LoRA experts on a language model's MLP blocks. Importing this registers it with PEFT."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from mllm.mole.config import PEFT_TYPE, MoleConfig
from mllm.mole.layer import MoleBlock, MoleLayer, MoleLinear
from mllm.mole.model import BiasBalance, MoleModel, routing_loss
from mllm.mole.objective import RoutingLossMixin, RoutingObjective
from mllm.mole.start import start_routers
from mllm.routing import routing_context

__all__ = [
    "BiasBalance",
    "MoleBlock",
    "MoleConfig",
    "MoleLayer",
    "MoleLinear",
    "MoleModel",
    "RoutingLossMixin",
    "RoutingObjective",
    "routing_context",
    "routing_loss",
    "start_routers",
]

# peft.utils.register_peft_method takes only names of PEFT's own enum; what it fills are these three dictionaries.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MoleConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = MoleModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = MoleModel.prefix
