"""Routers that begin by telling the domains apart, by what the rows' pictures look like before anything is trained.

Experts start equal (B = 0), so a router that starts at random gets no reason to send a domain anywhere, and what it
does meanwhile mixes the domains in every expert. N rows, D width of the language model, C domains, E experts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mllm.errors import UserError
from mllm.mole.model import routed_modules

SHRINKAGE = 0.1  # of the covariance towards a multiple of one
ROWS_OF_A_DOMAIN = 64
LOGIT_SPREAD = 5.0  # standard deviation of the logits that routers start with: decided, yet with gradient


@torch.no_grad()
def start_routers(model: nn.Module, pictures_ND: Tensor, domains: Sequence[str]) -> float:
    """Sets the routers' weights on the picture to the linear discriminant of the domains; returns its share right.

    pictures_ND [N, D]: each row's mean picture embedding, as in `RoutingContext.picture_TD`; some dozens a domain do.
    `domains[n]` is one of `expert_domains`. Experts of the same domain start with the same weights here and differ by
    what they read of the token ("both") or not at all ("picture"). Call it before training, on all ranks alike.

    Raises:
        UserError: the routers do not read pictures, no expert_domains, or a domain without a row.
    """
    modules = list(routed_modules(model))
    config = modules[0].config if modules else None
    if config is None or config.router_reads not in ("picture", "both") or not config.teaches_domains:
        raise UserError(
            "start_routers needs a model with MOLE whose routers learn and read pictures, and its expert_domains "
            "(MoleConfig.router_reads, expert_domains, domain_loss_weight)."
        )
    known = config.expert_domains
    missing = sorted(set(known) - set(domains)) + sorted(set(domains) - set(known))
    if missing:
        raise UserError(f"start_routers needs rows of each of {', '.join(known)} and of no other; see {missing[0]!r}.")
    class_N = torch.tensor([known.index(domain) for domain in domains], device=pictures_ND.device)
    weight_CD, bias_C = linear_discriminant(pictures_ND.float(), class_N, len(known))
    logits_NC = pictures_ND.float() @ weight_CD.T + bias_C
    scale = LOGIT_SPREAD / logits_NC.std().clamp(min=1e-6)
    due_EC = config.layout.due_PDE(len(known)).any(0).T.to(weight_CD)
    due_EC /= due_EC.sum(1, keepdim=True)  # an expert of several domains starts half-way between them
    for module in modules:
        (router,) = module.mole_router.values()
        weight, bias, num_experts = router.router.weight, router.router.bias, config.num_experts
        weight[:num_experts, -weight_CD.shape[1] :] = (scale * due_EC @ weight_CD).to(weight)
        bias[:num_experts] = (scale * due_EC @ bias_C).to(bias)
    return (logits_NC.argmax(1) == class_N).float().mean().item()


def start_rows(domains: Sequence[str], rows: Iterable[int]) -> list[int]:
    """The first rows of each domain, as many as `start_routers` has use for."""
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        if taken[domains[row]] < ROWS_OF_A_DOMAIN:
            taken[domains[row]] += 1
            chosen.append(row)
    return chosen


def linear_discriminant(features_ND: Tensor, class_N: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant with equal priors: weight [C, D] and bias [C] of the most probable class.

    Normal classes of one covariance Σ and means μ_c have log-odds x Σ⁻¹ μ_c - μ_c Σ⁻¹ μ_c / 2; Σ is shrunk, since
    there may be fewer rows than features.
    """
    means_CD = torch.stack([features_ND[class_N == c].mean(0) for c in range(num_classes)])
    rest_ND = features_ND - means_CD[class_N]
    covariance = rest_ND.T @ rest_ND / len(features_ND)
    covariance.diagonal().add_(SHRINKAGE * covariance.diagonal().mean().clamp(min=1e-12))
    centre_D = means_CD.mean(0)
    weight_CD = torch.linalg.solve(covariance, (means_CD - centre_D).T).T
    return weight_CD, -(weight_CD * (means_CD + centre_D)).sum(1) / 2
