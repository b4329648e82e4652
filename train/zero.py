"""The DeepSpeed dictionary, generated in one place from a run's settings."""

from typing import Any

from train.config import TrainConfig


def deepspeed_config(config: TrainConfig, *, accumulation: int) -> dict[str, Any]:
    """The dictionary `TrainingArguments(deepspeed=…)` takes.

    Precision. The frozen base is loaded in bf16 and trained weights are fp32; DeepSpeed's `torch_autocast` computes in
    bf16. Its `bf16` section was tried and left: it casts every weight, the router too, and keeps fp32 masters in
    another optimizer for each stage, so that the second loss of a toy model differed by 8e-3 between stages 0 and 2.
    Here those two are equal, and stage 3 is within 2e-3 after five steps: it rounds a linear's product before it adds
    the bias. `lower_precision_safe_modules: []` keeps gradients of LoRA linears from being reduced in bf16.
    """
    zero: dict[str, Any] = {
        "stage": config.deepspeed.zero,
        "overlap_comm": False,  # small trainable sets: nothing to overlap, and one order of collectives on all ranks
        "contiguous_gradients": True,
    }
    if config.deepspeed.zero == 3:
        zero["stage3_param_persistence_threshold"] = config.deepspeed.persist_below
    if config.deepspeed.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.deepspeed.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "torch_autocast": {
            "enabled": config.model.dtype == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "train_micro_batch_size_per_gpu": config.run.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.run.batch_size,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,  # with offload, torch's AdamW does: the trained set is small
        "steps_per_print": 10**9,  # the trainer logs
    }
