"""What our commands leave out of the libraries' chatter."""

import logging
import warnings

from transformers.utils import logging as transformers_logging


def quieten() -> None:
    """Silence what libraries say on every start and nobody can act on."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("accelerate", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
