"""Routing without weights: decisions, the context that carries them, losses and statistics read from it."""

from mllm.routing.context import RoutingContext
from mllm.routing.losses import BALANCE_LOSSES, z_loss
from mllm.routing.routers import Router
from mllm.routing.routing import GATES, Routing, route
from mllm.routing.stats import RoutingStats

__all__ = ["BALANCE_LOSSES", "GATES", "Router", "Routing", "RoutingContext", "RoutingStats", "route", "z_loss"]
