"""What low-rank experts cost, in parameters and in floating point operations, given what was routed.

T tokens, E real experts, I input width, O output width, R rank of one expert, F = Σ R. A multiply-add counts as two
operations, as in torch.utils.flop_counter, and only matrix products count. Forward pass only; the backward pass of what
is trained costs about twice that, of what is frozen once. `mllm.mole.cost` reads a model with this.
"""

from __future__ import annotations

from dataclasses import dataclass

from mllm.routing.routing import Routing


@dataclass(frozen=True)
class Cost:
    """What one forward pass spent on T tokens, padding included, inside the decoder layers.

      tokens               T
      total_parameters     of the whole model, what is outside the decoder layers too
      trained_parameters   of these, those that learn
      active_parameters    mean over tokens of those that a token uses: all but the experts that it did not pick
      base_flops           linears of the base model
      router_flops         routers
      expert_flops         experts, by the path that was run: "masked" computes all of them for every token
      needed_expert_flops  of these, what the real picks need: what the "sorted" path computes
      lora_flops           plain LoRA beside the experts

    Products of attention scores are left out: they grow with the square of the sequence and no routing changes them.
    """

    tokens: int
    total_parameters: int
    trained_parameters: int
    active_parameters: float
    base_flops: int
    router_flops: int
    expert_flops: int
    needed_expert_flops: int
    lora_flops: int

    @property
    def flops(self) -> int:
        """All that was computed."""
        return self.base_flops + self.router_flops + self.expert_flops + self.lora_flops

    @property
    def added_share(self) -> float:
        """What routers, experts and LoRA add to the base linears, as a share of these."""
        return (self.flops - self.base_flops) / self.base_flops


@dataclass(frozen=True)
class ExpertShape:
    """The low-rank weights beside one linear: I, O, the rank of each expert, and whether all share one A."""

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    shares_a: bool = False

    @property
    def rows_of_a(self) -> int:
        """Rows of A: those of one expert where all share it."""
        return self.ranks[0] if self.shares_a else sum(self.ranks)

    @property
    def parameters(self) -> int:
        """Of all experts."""
        return self.rows_of_a * self.in_features + sum(self.ranks) * self.out_features


def linear_flops(tokens: int, in_features: int, out_features: int) -> int:
    """One product [T, I] @ [I, O]."""
    return 2 * tokens * in_features * out_features


def lora_flops(shape: ExpertShape, tokens: int) -> int:
    """Plain LoRA: one expert that every token takes."""
    (rank,) = shape.ranks
    return linear_flops(tokens, shape.in_features, rank) + linear_flops(tokens, rank, shape.out_features)


def picks_E(routing: Routing) -> list[int]:
    """Real picks of each expert; null picks and empty slots are none."""
    return routing.expert_ids_TK[routing.is_real_TK].bincount(minlength=routing.num_experts).tolist()


def needed_flops(shape: ExpertShape, routing: Routing) -> int:
    """Every real pick through A and B of its expert: what `mllm.mole.experts.sorted_experts` computes."""
    return sum(
        linear_flops(picks, shape.in_features, rank) + linear_flops(picks, rank, shape.out_features)
        for picks, rank in zip(picks_E(routing), shape.ranks, strict=True)
    )


def masked_flops(shape: ExpertShape, tokens: int) -> int:
    """All ranks for all tokens: what `mllm.mole.experts.masked_experts` computes."""
    return linear_flops(tokens, shape.in_features, shape.rows_of_a) + linear_flops(
        tokens, sum(shape.ranks), shape.out_features
    )


def active_parameters(shape: ExpertShape, routing: Routing) -> float:
    """Mean over tokens of the expert parameters that a token uses. A shared A counts once for a token that uses it."""
    tokens = len(routing.expert_ids_TK)
    ranks_in_use = sum(picks * rank for picks, rank in zip(picks_E(routing), shape.ranks, strict=True)) / tokens
    rows_of_a = shape.ranks[0] * float(routing.is_real_TK.any(1).double().mean()) if shape.shares_a else ranks_in_use
    return rows_of_a * shape.in_features + ranks_in_use * shape.out_features
