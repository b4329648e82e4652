"""The model: Llama's attention, rotary positions and norms, with FFNs that are experts by modality.

B batch, S sequence, T = B·S tokens, D width, E experts, I inner width of an expert, K slots for a token's picks,
N picks of all tokens, M those of one expert. MoMa, 2407.21770; order of norms as in Chameleon, 2405.09818.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple

from mllm.common.errors import UserError
from mllm.common.names import check_keys
from mllm.moma.cache import ids_layer, remember
from mllm.moma.config import MomaConfig
from mllm.moma.context import MomaContext
from mllm.moma.depth import attend_chosen
from mllm.moma.expert_choice import MODES, AuxiliaryRouter, ChoiceRouter, ExpertChoice, auxiliary_loss, mean_over_ranks
from mllm.moma.places import PlaceEmbeddings, places
from mllm.routing import (
    BALANCE_LOSSES,
    BalanceWindow,
    Choice,
    ExpertLayout,
    RouterSpec,
    Routing,
    TokenRouter,
    z_loss,
)
from mllm.routing.layout import ALL

Norm = Callable[[Tensor], Tensor]


# -- FFNs --------------------------------------------------------------------------------------------------------------


def sorted_grouped_mm(experts: MomaExperts, hidden_ND: Tensor, expert_N1: Tensor, weight_N1: Tensor) -> Tensor:
    """transformers' "grouped_mm" for rows that come sorted by expert, one pick each: without its sort and copies."""
    if hidden_ND.is_cuda and torch.cuda.get_device_capability(hidden_ND.device) < (8, 0):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_ND, expert_N1, weight_N1)  # which knows older cards
    offsets_E = (expert_N1 <= torch.arange(experts.num_experts, device=expert_N1.device)).sum(0, dtype=torch.int32)
    dtype, device = experts.gate_up_proj.dtype, hidden_ND.device.type
    is_aligned = all(size % 8 == 0 for size in experts.down_proj.shape[1:])  # rows of two-byte types of 16 bytes
    if torch.is_autocast_enabled(device) and is_aligned:  # of which grouped_mm knows nothing
        dtype = torch.get_autocast_dtype(device)
    up_EJD, down_EDI = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)
    gate_up_NJ = F.grouped_mm(hidden_ND.to(dtype), up_EJD.mT, offs=offsets_E)
    return F.grouped_mm(experts._apply_gate(gate_up_NJ), down_EDI.mT, offs=offsets_E) * weight_N1


EXPERT_FUNCTIONS = ExpertsInterface()
EXPERT_FUNCTIONS["grouped_mm"] = sorted_grouped_mm


@use_experts_implementation(experts_interface=EXPERT_FUNCTIONS)
class MomaExperts(nn.Module):
    """E SwiGLU FFNs in two stacked parameters, for rows sorted by expert, one pick each (K = 1).

    transformers' `experts_implementation` says how they are computed. What is written here is "eager", the definition:
    one expert after the other.
    """

    def __init__(self, config: MomaConfig) -> None:
        super().__init__()
        self.num_experts = config.layout.num_experts
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_ND: Tensor, expert_ids_NK: Tensor, expert_weights_NK: Tensor) -> Tensor:
        output_ND = torch.zeros_like(hidden_ND)
        for e in range(self.num_experts):
            row_M, slot_M = (expert_ids_NK == e).nonzero(as_tuple=True)
            gate_MI, up_MI = F.linear(hidden_ND[row_M], self.gate_up_proj[e]).chunk(2, dim=-1)
            expert_MD = F.linear(self.act_fn(gate_MI) * up_MI, self.down_proj[e])
            expert_MD = expert_MD * expert_weights_NK[row_M, slot_M, None]
            output_ND = output_ND.index_add(0, row_M, expert_MD.to(output_ND.dtype))
        return output_ND


class DenseFFN(LlamaMLP):
    """One FFN for all tokens, or for those of a mixture of depths."""

    def __init__(self, config: MomaConfig, inner: int | None = None) -> None:
        sizes = copy(config)
        sizes.intermediate_size = inner or config.intermediate_size
        super().__init__(sizes)

    def forward(self, hidden_BSD: Tensor, is_worked_T: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        if is_worked_T is None:
            output_BSD = super().forward(hidden_BSD)
        else:
            hidden_TD, token_M = hidden_BSD.flatten(0, 1), is_worked_T.nonzero()[:, 0]
            worked_MD = super().forward(hidden_TD[token_M]).to(hidden_TD.dtype)
            output_BSD = torch.zeros_like(hidden_TD).index_copy(0, token_M, worked_MD).view_as(hidden_BSD)
        return output_BSD if norm is None else norm(output_BSD)


class ExpertFFN(nn.Module):
    """Routes tokens, and sums what their experts make of them, each times its gate.

    Every pick goes through the expert function as a token of its own, so that a token may meet any number of experts
    and none is computed in vain.
    """

    def __init__(self, config: MomaConfig, context: MomaContext, name: str) -> None:
        super().__init__()
        self.routing_context, self.name = context, name
        self.router = _router(config)
        self.experts = MomaExperts(config)
        self.shared_expert: DenseFFN | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = DenseFFN(config, config.shared_expert_intermediate_size)

    def forward(self, hidden_BSD: Tensor, is_worked_T: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        """is_worked_T: the tokens of a mixture of depths, None for all. norm: of each expert's output, by itself."""
        hidden_TD = hidden_BSD.flatten(0, 1)
        routing = self._route(hidden_TD, is_worked_T)
        token_N, slot_N, _ = routing.sorted_picks
        expert_N1 = routing.expert_ids_TK[token_N, slot_N, None]
        weight_N1 = routing.expert_weights_TK[token_N, slot_N, None]
        picked_ND = hidden_TD.index_select(0, token_N)  # whose backward is quicker than that of hidden_TD[token_N]
        if norm is None:
            output_ND = self.experts(picked_ND, expert_N1, weight_N1)
        else:
            output_ND = norm(self.experts(picked_ND, expert_N1, torch.ones_like(weight_N1))) * weight_N1
        # Added up in fp32: some tokens meet many experts.
        sum_TD = torch.zeros_like(hidden_TD, dtype=torch.float32).index_add(0, token_N, output_ND.float())
        output_BSD = sum_TD.to(hidden_BSD.dtype).view_as(hidden_BSD)
        if self.shared_expert is not None:
            output_BSD = output_BSD + self.shared_expert(hidden_BSD, is_worked_T, norm)
        return output_BSD

    def _route(self, hidden_TD: Tensor, is_worked_T: Tensor | None) -> Routing:
        context, tokens = self.routing_context, self.routing_context.on(hidden_TD.device)
        is_open_T = ~tokens.is_pad_T if is_worked_T is None else is_worked_T & ~tokens.is_pad_T
        if isinstance(self.router, ChoiceRouter):
            choice = self.router.choose(hidden_TD, tokens, is_open_T)
            context.record_choice(f"{self.name}.router", choice)
            routing = choice.routing()
        else:
            routing = self.router(hidden_TD, tokens)
            is_open_T1 = is_open_T[:, None]
            routing = replace(
                routing,
                is_taken_TK=routing.is_taken_TK & is_open_T1,
                expert_weights_TK=routing.expert_weights_TK * is_open_T1,
            )
        context.record(self.name, routing, trainable=self.router.is_trainable)
        return routing


def _router(config: MomaConfig) -> ChoiceRouter | TokenRouter:
    if config.is_modal:
        return TokenRouter("oracle_modality", RouterSpec(config.hidden_size, config.layout), Choice(gate="none"))
    if config.routing == "expert_choice":
        return _choice_router(config, config.layout, noise=config.router_noise)
    spec = RouterSpec(config.hidden_size, config.layout, null_logits=config.null_logits)
    return TokenRouter("learned", spec, Choice(config.num_experts_per_tok, gate="softmax"))


def _choice_router(config: MomaConfig, layout: ExpertLayout, **options: float) -> ChoiceRouter:
    return ChoiceRouter(
        config.hidden_size,
        layout,
        momentum=config.threshold_momentum,
        is_global=config.choice_batch == "global",
        with_auxiliary=config.causal_routing == "aux",
        **options,
    )


# -- layers ------------------------------------------------------------------------------------------------------------


class MomaDecoderLayer(GradientCheckpointingLayer):
    """Attention, then FFN, each with its norm and residual; with a depth router, for the tokens that it chooses.

    A chosen token becomes x + s · (layer(x) - x), s its sigmoid score; the others stay as they are.
    """

    def __init__(self, config: MomaConfig, layer: int, context: MomaContext) -> None:
        super().__init__()
        self.norm_position, self.routing_context, self.name = config.norm_position, context, f"layers.{layer}"
        self.self_attn = LlamaAttention(config, layer)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = DenseFFN(config) if config.is_dense else ExpertFFN(config, context, f"{self.name}.ffn")
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.depth_router: ChoiceRouter | None = None
        if config.has_depth_router(layer):
            one = ExpertLayout({ALL: 1}, {})
            self.depth_router = _choice_router(config, one, share=config.mixture_of_depths)

    def forward(
        self,
        hidden_BSD: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.depth_router is None:

            def attend(hidden_BSD: Tensor) -> Tensor:
                options = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
                return self.self_attn(hidden_BSD, position_embeddings=position_embeddings, **options)[0]

            return self._block(hidden_BSD, attend, None)

        choice = self._choose_depth(hidden_BSD)
        is_worked_BS = choice.is_chosen_TE.view(hidden_BSD.shape[:2])

        def attend_worked(hidden_BSD: Tensor) -> Tensor:
            document_BS = self.routing_context.on(hidden_BSD.device).document_BS
            return attend_chosen(
                self.self_attn, hidden_BSD, is_worked_BS, position_embeddings, past_key_values, document_BS
            )

        output_BSD = self._block(hidden_BSD, attend_worked, is_worked_BS.flatten())
        weight_BS1 = (choice.scores_TE * choice.is_chosen_TE).view(*is_worked_BS.shape, 1)
        return hidden_BSD + (weight_BS1 * (output_BSD - hidden_BSD)).to(hidden_BSD.dtype)

    def _choose_depth(self, hidden_BSD: Tensor) -> ExpertChoice:
        tokens = self.routing_context.on(hidden_BSD.device)
        choice = self.depth_router.choose(hidden_BSD.flatten(0, 1), tokens, ~tokens.is_pad_T)
        self.routing_context.record_choice(f"{self.name}.depth_router", choice)
        return choice

    def _block(self, hidden_BSD: Tensor, attend: Norm, is_worked_T: Tensor | None) -> Tensor:
        if self.norm_position == "pre":
            hidden_BSD = hidden_BSD + attend(self.attention_norm(hidden_BSD))
            return hidden_BSD + self.ffn(self.ffn_norm(hidden_BSD), is_worked_T)
        hidden_BSD = hidden_BSD + self.attention_norm(attend(hidden_BSD))
        if self.norm_position == "post":
            return hidden_BSD + self.ffn_norm(self.ffn(hidden_BSD, is_worked_T))
        return hidden_BSD + self.ffn(hidden_BSD, is_worked_T, self.ffn_norm)


# -- models ------------------------------------------------------------------------------------------------------------


class MomaPreTrainedModel(LlamaPreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = MomaConfig
    _no_split_modules: ClassVar = ["MomaDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar = ["router", "depth_router"]
    _can_record_outputs: ClassVar = {"hidden_states": MomaDecoderLayer, "attentions": LlamaAttention}
    _can_compile_fullgraph = False  # picks differ in number from batch to batch
    # What transformers finds out by reading a class's file it keeps on the class, where we would inherit Llama's "no".
    _can_set_experts_implementation_cached_value = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but weights missing or left over are a UserError, unless `output_loading_info` is set.

        There every weight learns; here auxiliary routers learn in their stage only.
        """
        asks = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if not asks:
            check_keys(f"The checkpoint {args[0]}", cls.__name__, info)
        for module in model.modules():
            if isinstance(module, AuxiliaryRouter):
                module.requires_grad_(False)
        return (model, info) if asks else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MomaExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, AuxiliaryRouter):
            init.normal_(module.inner, std=std)
            init.normal_(module.outer, std=std)
        elif isinstance(module, ChoiceRouter):
            init.normal_(module.weight, std=std)
            init.constant_(module.threshold, 0.5)
            init.zeros_(module.batches_seen)
            init.copy_(module.allowed_PE, module.layout.allowed_PX)  # not saved, like all that follows from the config
            init.copy_(module.is_lone_E, module._is_lone())
        elif isinstance(module, TokenRouter) and module.layout.is_grouped:
            init.copy_(module.allowed_PX, module.layout.allowed_PX)


class MomaModel(MomaPreTrainedModel, LlamaModel):
    """Tokens to hidden states. `routing_context` holds the routing of the last forward, as in the rest of mllm.

    Attributes:
        routing_mode: how experts choose now, a key of `mllm.moma.expert_choice.MODES`, which says what each means.
        evaluation_routing: what `set_evaluation_routing` was told.
    """

    def __init__(self, config: MomaConfig) -> None:
        super(LlamaModel, self).__init__(config)  # past LlamaModel, which would build Llama's layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.routing_context = MomaContext(config.image_token_start, config.codebook_size)
        self.evaluation_routing: str | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_places = PlaceEmbeddings(config) if config.image_side else None
        self.layers = nn.ModuleList(
            [MomaDecoderLayer(config, layer, self.routing_context) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def routing_mode(self) -> str:
        if not self.config.chooses_over_batch:
            return "token"
        return "batch" if self.training else self.evaluation_routing or self.config.causal_routing

    def set_evaluation_routing(self, mode: str | None) -> None:
        """How experts choose in `eval()`: "threshold", "aux" or "batch_leaky"; None goes by config.causal_routing.

        Figures made with "batch_leaky" are not a language model's: say so beside them.
        Raises UserError for another name, for "aux" without auxiliary routers, and where no batch chooses.
        """
        known = [known for known in MODES if known not in ("batch", "token")]
        if mode is not None and (mode not in known or not self.config.chooses_over_batch):
            raise UserError(f"Evaluation routing is one of {', '.join(known)}, for expert choice; got {mode!r}.")
        if mode == "aux" and self.config.causal_routing != "aux":
            raise UserError("The model has no auxiliary routers; train them first: begin_auxiliary_stage().")
        self.evaluation_routing = mode

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel.forward. Nothing is cached while training, nor of packed rows: with a cache transformers lets
        the documents of a row see each other.
        """
        mode = self.routing_mode
        if mode.startswith("batch") and past_key_values is not None and past_key_values.get_seq_length():
            raise UserError("Experts cannot choose among the tokens of a cache's next step alone; use a causal mode.")
        if self.config.mixture_of_depths is not None and attention_mask is not None and attention_mask.dim() != 2:
            raise UserError(
                "mixture_of_depths makes its masks itself: expected an attention_mask [B, S], or position_ids that "
                f"start anew in each document, got one of shape {list(attention_mask.shape)}."
            )
        self.routing_context.carry(self)
        self.routing_context.begin(
            mode=mode,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids if past_key_values is None else None,
            expects_gradient=self.training and torch.is_grad_enabled(),
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.training or self.routing_context.is_packed)
        try:
            if self.embed_places is not None:
                if use_cache and past_key_values is None:
                    past_key_values = DynamicCache(config=self.config)
                input_ids, inputs_embeds = None, self._embed(input_ids, inputs_embeds, past_key_values)
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        finally:
            self.routing_context.end()
        if mode == "batch":
            self._track_thresholds()
        return output

    def _embed(self, ids_BS: Tensor | None, inputs_embeds: Tensor | None, past: Cache | None) -> Tensor:
        if ids_BS is None or inputs_embeds is not None:
            raise UserError(
                "A model with image_side knows a token's place by its id: give input_ids, not inputs_embeds."
            )
        ids_BL = ids_BS if past is None else remember(past, ids_layer(self.config), ids_BS)
        place_BL = places(ids_BL, self.embed_places.begin, self.routing_context.is_image(ids_BL))
        return self.embed_tokens(ids_BS) + self.embed_places(place_BL[:, -ids_BS.shape[1] :])

    def _track_thresholds(self) -> None:
        # After the layers and not in them: recomputation would count a batch twice. One message for all layers.
        choices = self.routing_context.choices
        cutoffs = mean_over_ranks(torch.cat([choice.cutoff_E.to(self.device) for choice in choices.values()]))
        sizes = [len(choice.cutoff_E) for choice in choices.values()]
        for name, cutoff_E in zip(choices, cutoffs.split(sizes), strict=True):
            self.get_submodule(name).track(cutoff_E)


class MomaForCausalLM(MomaPreTrainedModel, LlamaForCausalLM):
    """One stream of text and image tokens, next token prediction over both.

    While training, the loss holds what the router needs: the balance and z losses of token choice, or in the auxiliary
    stage the auxiliary loss instead of the cross entropy. In evaluation it is the cross entropy alone.

    Attributes:
        balance_window: picks of the optimizer step so far, for balance="global_batch" where a step has several
            micro-batches; whoever sets it resets it before each step. None: the loss is of this forward.
    """

    def __init__(self, config: MomaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # past LlamaForCausalLM, which would build a LlamaModel
        self.model = MomaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.balance_window: BalanceWindow | None = None
        self.post_init()

    @property
    def routing_context(self) -> MomaContext:
        """Modality, routings and choices of the last forward."""
        return self.model.routing_context

    @property
    def routing_mode(self) -> str:
        """See MomaModel."""
        return self.model.routing_mode

    @property
    def evaluation_routing(self) -> str | None:
        """See MomaModel."""
        return self.model.evaluation_routing

    def set_evaluation_routing(self, mode: str | None) -> None:
        """See MomaModel."""
        self.model.set_evaluation_routing(mode)

    def begin_auxiliary_stage(self) -> None:
        """Freeze the model but for its auxiliary routers, which are added where there are none (MoMa, stage 2).

        From now on the training loss is theirs, and evaluation and generation go by them. What they learn is which
        tokens the batch chooses, without noise. Raises UserError for a model in which nothing is chosen over a batch.
        """
        if not self.config.chooses_over_batch:
            raise UserError("Auxiliary routers stand in for choice over a batch, and this model makes none.")
        self.config.causal_routing = "aux"
        self.requires_grad_(False)
        for router in self._choice_routers():
            if router.auxiliary is None:
                router.add_auxiliary()
                router.auxiliary.apply(self._init_weights)
            router.auxiliary.requires_grad_(True)

    def _choice_routers(self) -> list[ChoiceRouter]:
        return [module for module in self.modules() if isinstance(module, ChoiceRouter)]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As LlamaForCausalLM.forward."""
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if labels is not None and self.training:
            output.loss = self._training_loss(output.loss, labels, kwargs.get("num_items_in_batch"))
        return output

    def _training_loss(self, cross_entropy: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        # Trainer hands over the labels of all micro-batches of a step and adds the losses up: a mean is then weighed by
        # this micro-batch's part of them.
        share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch
        if any(router.trains_auxiliary for router in self._choice_routers()):
            return share * auxiliary_loss(list(self.routing_context.choices.values()))
        return cross_entropy + share * self.routing_loss() if self._has_routing_loss else cross_entropy

    @property
    def _has_routing_loss(self) -> bool:
        config = self.config
        weighted = config.z_loss_weight > 0 or (config.balance != "none" and config.balance_loss_weight > 0)
        return config.routing == "token_choice" and not config.is_modal and weighted

    def routing_loss(self) -> Tensor:
        """Weighted balance and z loss of the last forward, for token choice; see `mllm.routing.losses`.

        The training loss holds it already. With a `balance_window` each call adds the forward's picks to it.
        """
        config, context = self.config, self.routing_context
        is_counted_T, loss = ~context.is_pad_T, torch.zeros((), device=context.sample_T.device)
        if config.balance != "none":
            grouped = config.layout.is_grouped
            options = {"window": self.balance_window} if config.balance == "global_batch" else {}
            loss = loss + config.balance_loss_weight * BALANCE_LOSSES[config.balance](
                router_probs_LTX=context.stack("router_probs_TX"),
                picks_LTX=context.stack("picks_TX"),
                is_counted_T=is_counted_T,
                sample_T=context.sample_T,
                population_T=context.modality_T if grouped else torch.zeros_like(context.sample_T),
                target=config.target,
                **options,
            )
        if config.z_loss_weight:
            logits_LTX = context.stack("router_logits_TX")
            loss = loss + config.z_loss_weight * z_loss(router_logits_LTX=logits_LTX, is_counted_T=is_counted_T)
        return loss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate. Raises UserError where experts would choose over the batch."""
        if self.routing_mode.startswith("batch"):
            raise UserError(
                f"routing_mode is {self.routing_mode!r}: experts would choose among all tokens of the batch, which are "
                "not there yet when generating. Call eval(), and set_evaluation_routing(None)."
            )
        return super().generate(*args, **kwargs)
