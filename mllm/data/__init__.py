"""From records on disk to batches: conversation → source → mixture → encoder → collator."""

from mllm.data.check import CheckReport, check_mixture
from mllm.data.collate import Collator
from mllm.data.conversation import Conversation, Turn
from mllm.data.encoded import BadRow, EncodedMixture
from mllm.data.images import ImageError, open_image
from mllm.data.mixture import Mixture, MixtureConfig, SourceConfig, load_mixture
from mllm.data.sources import Source
from mllm.data.template import ConversationEncoder

__all__ = [
    "BadRow",
    "CheckReport",
    "Collator",
    "Conversation",
    "ConversationEncoder",
    "EncodedMixture",
    "ImageError",
    "Mixture",
    "MixtureConfig",
    "Source",
    "SourceConfig",
    "Turn",
    "check_mixture",
    "load_mixture",
    "open_image",
]
