"""An early-fusion model of text and image tokens whose FFNs are experts by modality (MoMa, 2407.21770).

Importing this registers the model type "moma" with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mllm.moma.config import MomaConfig, layers_at_equal_flops
from mllm.moma.modeling import MomaForCausalLM, MomaModel
from mllm.moma.upcycling import from_language_model, language_model_config, upcycle, upcycled_config

__all__ = [
    "MomaConfig",
    "MomaForCausalLM",
    "MomaModel",
    "from_language_model",
    "language_model_config",
    "layers_at_equal_flops",
    "upcycle",
    "upcycled_config",
]

AutoConfig.register(MomaConfig.model_type, MomaConfig)
AutoModel.register(MomaConfig, MomaModel)
AutoModelForCausalLM.register(MomaConfig, MomaForCausalLM)
