"""Routing without experts: decisions, the context that carries them, losses and statistics read from it."""

from mllm.routing.context import RoutingContext, Tokens, routing_context
from mllm.routing.layout import MODALITIES, ExpertLayout
from mllm.routing.losses import BALANCE_LOSSES, BalanceWindow, Target, z_loss
from mllm.routing.routers import ROUTERS, Router, RouterSpec, find_router
from mllm.routing.routing import GATES, Routing, SortedPicks, route
from mllm.routing.stats import RoutingStats
from mllm.routing.token_router import Choice, TokenRouter

__all__ = [
    "BALANCE_LOSSES", "GATES", "MODALITIES", "ROUTERS", "BalanceWindow", "Choice", "ExpertLayout", "Router",
    "RouterSpec", "Routing", "RoutingContext", "RoutingStats", "SortedPicks", "Target", "TokenRouter", "Tokens",
    "find_router", "route", "routing_context", "z_loss",
]  # fmt: skip
