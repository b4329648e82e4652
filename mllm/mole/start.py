"""Routers that begin by telling the domains apart, by what the rows' pictures look like before anything is trained.

Experts start equal (B = 0), so a router that starts at random gets no reason to send a domain anywhere, and what it
does meanwhile mixes the domains in every expert. N rows, D width of the language model, C domains, E experts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mllm.common.errors import UserError
from mllm.mole.model import routed_modules

SHRINKAGE = 0.1  # of the covariance towards a multiple of one
ROWS_OF_A_DOMAIN = 256  # where D is 192, fewer erred on new rows (docs/conflicts.md)
LOGIT_SPREAD = 5.0  # standard deviation of the logits that routers start with: decided, yet with gradient


class Start(NamedTuple):
    """The share of rows that a discriminant of the other half has right, and whether routers were set."""

    right: float
    is_set: bool


@torch.no_grad()
def start_routers(model: nn.Module, pictures_ND: Tensor, domains: Sequence[str]) -> Start:
    """Sets the routers' weights on the picture as `MoleConfig.router_start` says, if that tells rows apart.

    pictures_ND [N, D]: each row's mean picture embedding, as in `RoutingContext.picture_TD`; best more than D rows a
    domain. `domains[n]` is one of `expert_domains`; clusters do not look at them. Experts of the same class start with
    the same weights here; what they read of the token keeps them apart. Experts of a domain without rows stay as they
    are.
    Call it before training, on all ranks alike.

    Where a discriminant of one half of the rows has at most half more of the other half right than chance would,
    nothing is set, since a confident split by noise would be worse than none.

    Raises:
        UserError: there is nothing to set (see `MoleConfig.starts_from_pictures`), or a domain that no expert is for.

    Example:
        >>> import torch, mllm, peft
        >>> base, processor = mllm.load("miniworld")
        >>> config = mllm.MoleConfig(r=2, num_experts=2, expert_domains=["general", "document"])
        >>> model = peft.get_peft_model(base, config)
        >>> domains = ["general", "document"] * 8
        >>> pictures = torch.randn(16, base.config.get_text_config().hidden_size)
        >>> pictures[::2] += 5  # general pictures look different
        >>> mllm.start_routers(model, pictures, domains)
        Start(right=1.0, is_set=True)
    """
    modules = list(routed_modules(model))
    config = modules[0].config if modules else None
    if config is None or not config.starts_from_pictures:
        raise UserError(
            "start_routers needs a model with MOLE whose routers learn and read pictures, and for "
            'router_start="domains" the expert_domains (see MoleConfig).'
        )
    pictures_ND = pictures_ND.float()
    if config.router_start == "clusters":
        class_N, num_classes = clusters(pictures_ND, config.num_experts), config.num_experts
    else:
        class_N, num_classes = _numbers(domains, config.expert_domains), len(config.expert_domains)
    found, class_N = class_N.to(pictures_ND.device).unique(return_inverse=True)
    right = share_told(pictures_ND, class_N, len(found))
    if right <= 1.5 / len(found):
        return Start(right, is_set=False)
    weight_CD, bias_C = linear_discriminant(pictures_ND, class_N, len(found))
    scale = LOGIT_SPREAD / (pictures_ND @ weight_CD.T + bias_C).std()
    due_EC = config.layout.due_PDE(num_classes).any(0).T.to(weight_CD)[:, found]
    set_E = due_EC.any(1).cpu()
    due_EC = due_EC[set_E] / due_EC[set_E].sum(1, keepdim=True)  # of several classes: half-way between them
    for module in modules:
        (router,) = module.mole_router.values()
        weight, bias = router.router.weight, router.router.bias
        rows = set_E.nonzero().flatten().to(weight.device)
        weight[rows, -weight_CD.shape[1] :] = (scale * due_EC @ weight_CD).to(weight)
        bias[rows] = (scale * due_EC @ bias_C).to(bias)
    return Start(right, is_set=True)


def share_told(features_ND: Tensor, class_N: Tensor, num_classes: int) -> float:
    """The share of rows that the discriminant of the other half has right; each class is halved at random.

    0 where a class has one row only.
    """
    half_N, generator = torch.zeros_like(class_N), torch.Generator().manual_seed(0)
    for c in range(num_classes):
        rows = (class_N == c).nonzero().flatten()
        half_N[rows] = torch.randperm(len(rows), generator=generator).to(rows) % 2
    if class_N.bincount(minlength=num_classes).min() < 2:
        return 0.0
    right = 0
    for half in range(2):
        seen, asked = half_N == half, half_N != half
        weight_CD, bias_C = linear_discriminant(features_ND[seen], class_N[seen], num_classes)
        right += ((features_ND[asked] @ weight_CD.T + bias_C).argmax(1) == class_N[asked]).sum().item()
    return right / len(class_N)


def _numbers(domains: Sequence[str], known: Sequence[str]) -> Tensor:
    unknown = sorted(set(domains) - set(known))
    if unknown:
        raise UserError(
            f"start_routers got rows of {', '.join(unknown)}, for which no expert is meant; the expert_domains are "
            f"{', '.join(known)}."
        )
    return torch.tensor([known.index(domain) for domain in domains])


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


def clusters(features_ND: Tensor, num_clusters: int, *, seed: int = 0, tries: int = 10, steps: int = 30) -> Tensor:
    """[N] the cluster of each row: k-means on standardised features, the best of several starts (Lloyd 1982).

    Raises UserError where there are fewer rows than clusters.
    """
    if len(features_ND) < num_clusters:
        raise UserError(f"{num_clusters} clusters need at least as many rows, got {len(features_ND)}.")
    features_ND = (features_ND - features_ND.mean(0)) / features_ND.std(0).clamp(min=1e-6)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(tries):
        centres_CD = features_ND[torch.randperm(len(features_ND), generator=generator)[:num_clusters]]
        for _ in range(steps):
            distance_NC = torch.cdist(features_ND, centres_CD)
            nearest_N = distance_NC.argmin(1)
            lonely_N = distance_NC.min(1).values.argsort(descending=True)  # they restart clusters that ran empty
            centres_CD = torch.stack(
                [
                    features_ND[nearest_N == c].mean(0) if (nearest_N == c).any() else features_ND[lonely_N[c]]
                    for c in range(num_clusters)
                ]
            )
        if len(nearest_N.unique()) == num_clusters:
            found.append((distance_NC.min(1).values.square().sum().item(), nearest_N))
    if not found:
        raise UserError(f"the pictures do not fall into {num_clusters} clusters; set MoleConfig.router_start='random'.")
    return min(found, key=lambda each: each[0])[1]
