"""Any open_clip image tower as a transformers model, so that LLaVA can hold it as its `vision_config`.

The tower is built by open_clip's own constructor from the `vision_cfg` dictionary kept in our config: reading a
checkpoint needs neither open_clip's weights nor a network. Importing this module registers the pair with
`AutoConfig` and `AutoModel`.

N images, P patches, D width. Hidden states are numbered as in transformers' CLIP: 0 is what enters the first block,
i > 0 is the output of block i - 1, so -2 is the second-last block. A convolutional tower has stages instead: hidden
state i is stage i, flattened row by row. Its stages have grids of different sizes; `joined` brings several onto one,
as one more hidden state, the last.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import _build_vision_tower
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm.common.errors import UserError

# Regularisers of contrastive pre-training, and a download. LLaVA needs every patch, and the same ones each time.
_SWITCHED_OFF = {"patch_dropout": 0.0, "timm_drop": 0.0, "timm_drop_path": None, "timm_model_pretrained": False}

_OPENAI_PREPROCESS = {
    "mean": list(OPENAI_DATASET_MEAN),
    "std": list(OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


class OpenClipVisionConfig(PreTrainedConfig):
    """What open_clip needs to build the tower, and what LLaVA and its processor need to know of it.

    Args:
        vision_cfg: open_clip's own dictionary, as found under `vision_cfg` in its model configs.
        embed_dim: width of open_clip's contrastive space.
        quick_gelu: whether the tower uses open_clip's QuickGELU, as OpenAI's weights do.
        image_size: side of the square input in pixels.
        patch_size: pixels a side that one feature of the layer LLaVA reads stands for.
        hidden_size: width D of that layer.
        num_hidden_layers: number of blocks (of stages in a convolutional tower).
        has_class_token: whether hidden states begin with a class token, as those of transformers' CLIP do.
        preprocess_cfg: open_clip's own dictionary of how pictures were prepared in pre-training: `mean` and `std` of
            pixels in 0..1 per channel, `interpolation` ("bicubic" …), `resize_mode` ("shortest", "longest", "squash").
        joined: of a convolutional tower, `[stage, side]` pairs that make one more hidden state. Of each, `side` x
            `side` averages over a patch of `patch_size` pixels become channels of that patch. The stage is a number, or
            "final" for what the trunk makes of its last stage (timm's `conv_head`).
    """

    model_type = "open_clip_vision"
    base_config_key = "vision_config"

    vision_cfg: dict[str, Any] | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    has_class_token: bool = True
    preprocess_cfg: dict[str, Any] | None = None
    joined: list[list[int | str]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_cfg = {**(self.vision_cfg or {}), **_SWITCHED_OFF}
        self.preprocess_cfg = {**_OPENAI_PREPROCESS, **(self.preprocess_cfg or {})}
        super().__post_init__(**kwargs)


class OpenClipVisionModel(PreTrainedModel):
    """An open_clip image tower: its own ViT or ResNet, or any timm trunk that has `forward_intermediates`.

    Class tokens: where the tower has one, every hidden state is `(N, 1 + P, D)` with the class token first; LLaVA's
    `vision_feature_select_strategy="default"` drops it and `"full"` keeps it. Where it has none (SigLIP, convolutions)
    hidden states are `(N, P, D)` and the strategy must be `"full"`, which `mllm.build` sees to. Of several prefix
    tokens only the first is kept: registers are scratch space, not features.

    A frozen tower stays in evaluation mode whatever `train()` says, so that batch statistics and dropout do not move.
    """

    config_class = OpenClipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # open_clip and timm attend in their own way whatever is asked for: any name is taken, so that the language model
    # beside the tower can have it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules: ClassVar = [
        "ResidualAttentionBlock",
        "CustomResidualAttentionBlock",
        "Block",
        "EvaBlock",
        "Bottleneck",
    ]

    def __init__(self, config: OpenClipVisionConfig):
        super().__init__(config)
        self.visual = build_visual(config)
        # Called as a module, the trunk runs the hooks on it: with them accelerate brings in the parameters that the
        # trunk holds directly (positions, class token). A bare call of `forward_intermediates` would pass them by.
        self._trunk.forward = self._trunk.forward_intermediates
        self._made_empty = any(parameter.is_meta for parameter in self.visual.parameters())
        self.post_init()

    @property
    def _trunk(self) -> nn.Module:
        """The module that owns `forward_intermediates`: open_clip's tower itself, or the timm model inside it."""
        return getattr(self.visual, "trunk", self.visual)

    @property
    def _blocks(self) -> nn.Module | None:
        """The transformer blocks; None for a tower made of stages."""
        if hasattr(self._trunk, "transformer"):
            return self._trunk.transformer.resblocks
        return self._trunk.blocks if hasattr(self._trunk, "num_prefix_tokens") else None

    def train(self, mode: bool = True) -> "OpenClipVisionModel":
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: `_init_weights` checks tensor by tensor, as in transformers' own models, so it can always be called."""
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """open_clip initialises its tower itself; transformers' own initialisation is not wanted.

        Only where transformers made the tower empty, to fill it from a file, what the file lacks is taken from a fresh
        tower: above all rotary tables, which are computed and never saved.
        """
        if module is not self or not self._made_empty:
            return
        lacking = {name: t for name, t in _tensors(self.visual).items() if not getattr(t, "_is_hf_initialized", False)}
        if lacking:
            with torch.device("cpu"):
                fresh = _tensors(build_visual(self.config))
            for name, tensor in lacking.items():
                init.copy_(tensor, fresh[name])

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Runs the tower up to the last hidden state asked for.

        Args:
            pixel_values: `(N, 3, H, W)`, normalised; cast to the tower's dtype.
            output_hidden_states: True for all, or the indices of some, the others then being None.

        Returns:
            `last_hidden_state`, the last block's output before any final norm (None where it was not asked for), and
            `hidden_states`, each `(N, [1 +] P, D)`.
        """
        num_states = self.config.num_hidden_layers + (self._blocks is not None or bool(self.config.joined))
        only_last = output_hidden_states is None or output_hidden_states is False
        if only_last:
            asked = {num_states - 1}
        elif output_hidden_states is True:
            asked = set(range(num_states))
        else:
            given = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
            asked = {range(num_states)[index] for index in given}
        states = self._states(pixel_values.to(self.dtype), asked)
        hidden_states = tuple(states.get(index) for index in range(num_states))
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states[-1], hidden_states=None if only_last else hidden_states
        )
        return output.to_tuple() if return_dict is False else output

    def _states(self, pixel_values: Tensor, asked: set[int]) -> dict[int, Tensor]:
        if self._blocks is None:
            stages = sorted(asked - {self.config.num_hidden_layers})
            states = dict(zip(stages, self._layers(pixel_values, stages), strict=True)) if stages else {}
            if self.config.num_hidden_layers in asked:
                states[self.config.num_hidden_layers] = self._joined(pixel_values)
            return states

        first_input: list[Tensor] = []
        handle = self._blocks[0].register_forward_pre_hook(lambda _, args: first_input.append(args[0]))
        try:
            layers = sorted({max(index - 1, 0) for index in asked})
            states = dict(zip((layer + 1 for layer in layers), self._layers(pixel_values, layers), strict=True))
        finally:
            handle.remove()
        if 0 in asked:
            num_tokens = next(iter(states.values())).shape[1]
            num_patches = num_tokens - self.config.has_class_token
            class_token, patches = first_input[0][:, : self.config.has_class_token], first_input[0][:, -num_patches:]
            states[0] = torch.cat([class_token, patches], dim=1)
        return {index: states[index] for index in asked}

    def _joined(self, pixel_values: Tensor) -> Tensor:
        """The stages of `joined` on one grid, `(N, P, D)`."""
        stages = sorted({stage for stage, _ in self.config.joined if stage != "final"})
        final, found = self._trunk(pixel_values, indices=stages)
        maps = {**dict(zip(stages, found, strict=True)), "final": final}
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        folded = [
            F.pixel_unshuffle(F.adaptive_avg_pool2d(maps[stage], (rows * side, columns * side)), side)
            for stage, side in self.config.joined
        ]
        return torch.cat(folded, dim=1).flatten(2).transpose(1, 2)

    def _layers(self, pixel_values: Tensor, layers: list[int]) -> list[Tensor]:
        """The outputs of these blocks or stages, each `(N, [1 +] P, D)`."""
        options = {"indices": layers, "stop_early": True, "intermediates_only": True, "output_fmt": "NCHW"}
        if self.config.has_class_token:  # open_clip's trunks and timm's ask for it by different names
            options["return_prefix_tokens" if hasattr(self.visual, "trunk") else "output_extra_tokens"] = True
        output = self._trunk(pixel_values, **options)

        if isinstance(output, dict):
            maps, prefixes = output["image_intermediates"], output.get("image_intermediates_prefix")
        elif self.config.has_class_token:
            maps, prefixes = zip(*output, strict=True)
        else:
            maps, prefixes = output, None
        patches = [feature_map.flatten(2).transpose(1, 2) for feature_map in maps]
        if prefixes is None:
            return patches
        return [torch.cat([prefix[:, :1], p], dim=1) for prefix, p in zip(prefixes, patches, strict=True)]


def build_visual(config: OpenClipVisionConfig) -> nn.Module:
    """open_clip's own tower for this config, initialised as open_clip does."""
    return _build_vision_tower(config.embed_dim, dict(config.vision_cfg), config.quick_gelu)


def wrap_visual(
    visual: nn.Module,
    model_cfg: dict[str, Any],
    *,
    preprocess_cfg: dict[str, Any] | None = None,
    vision_feature_layer: int | list[int] = -2,
    joined: Sequence[tuple[int | str, int]] = (),
    patch_size: int | None = None,
) -> OpenClipVisionModel:
    """Copies an open_clip tower into an `OpenClipVisionModel`, measuring on one blank image what its config must say.

    Args:
        visual: open_clip's image tower (`clip.visual`).
        model_cfg: the open_clip model config it was built from: `embed_dim`, `vision_cfg`, `quick_gelu`.
        preprocess_cfg: open_clip's; by default the one open_clip left on the tower, then OpenAI's.
        vision_feature_layer: the hidden state(s) LLaVA will read; decides `hidden_size` and `patch_size`.
        joined: see `OpenClipVisionConfig`; LLaVA then reads the joined state, -1, whatever `vision_feature_layer` says.
        patch_size: pixels a side of a joined feature.

    Raises:
        UserError: the tower takes pictures that are not square, or `joined` is given for one that has no stages.
    """
    trunk = getattr(visual, "trunk", visual)
    preprocess_cfg = preprocess_cfg or getattr(visual, "preprocess_cfg", {})
    image_size = visual.image_size if isinstance(visual.image_size, int) else max(visual.image_size)
    if visual.image_size not in (image_size, (image_size, image_size), [image_size, image_size]):
        raise UserError(f"The tower takes pictures of {visual.image_size} pixels; only square ones are supported.")
    pixel = next(visual.parameters())
    blank = pixel.new_zeros(1, 3, image_size, image_size)
    with torch.no_grad():
        maps = visual.eval().forward_intermediates(blank, intermediates_only=True)["image_intermediates"]
    class_token = getattr(trunk, "class_embedding", getattr(trunk, "cls_token", None))  # open_clip's name, timm's name
    layer = vision_feature_layer if isinstance(vision_feature_layer, int) else vision_feature_layer[-1]
    if joined:
        _check_joined(joined, patch_size, image_size, num_stages=len(maps))
        if class_token is not None or not hasattr(visual, "trunk") or hasattr(trunk, "num_prefix_tokens"):
            raise UserError("`joined` is for timm's convolutional towers; this one has no stages of timm's.")
    config = OpenClipVisionConfig(
        vision_cfg=dict(model_cfg["vision_cfg"]),
        embed_dim=model_cfg["embed_dim"],
        quick_gelu=model_cfg.get("quick_gelu", False),
        image_size=image_size,
        patch_size=patch_size if joined else image_size // maps[layer].shape[-1],
        hidden_size=maps[layer].shape[1],
        num_hidden_layers=len(maps),
        has_class_token=class_token is not None,
        preprocess_cfg={key: preprocess_cfg[key] for key in _OPENAI_PREPROCESS if key in preprocess_cfg},
    )
    if joined:
        config.joined = [list(pair) for pair in joined]
    tower = OpenClipVisionModel(config).to(dtype=pixel.dtype)
    tower.visual.load_state_dict(visual.state_dict())
    if joined:
        with torch.no_grad():
            config.hidden_size = tower.eval()(blank).last_hidden_state.shape[-1]
    return tower.eval()


def _check_joined(joined: Sequence[tuple[int | str, int]], patch_size: int | None, side: int, num_stages: int) -> None:
    unknown = [stage for stage, _ in joined if stage != "final" and stage not in range(num_stages)]
    if unknown:
        raise UserError(f"joined: no stage {unknown[0]!r}; the tower has 0 to {num_stages - 1}, and 'final'.")
    if not patch_size or side % patch_size:
        raise UserError(f"patch_size {patch_size} must be given with `joined`, and divide the picture's side, {side}.")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


AutoConfig.register("open_clip_vision", OpenClipVisionConfig, exist_ok=True)
AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel, exist_ok=True)
