"""DeepSpeed's launcher of one machine's ranks, which is killed when what started it ends. `train.launch` starts it."""

import os

from deepspeed.launcher.launch import main

from mllm.common.processes import end_with_parent
from train.lock import STARTER

if __name__ == "__main__":
    end_with_parent(os.environ.get(STARTER))
    os.environ[STARTER] = str(os.getpid())  # of the ranks
    main()
