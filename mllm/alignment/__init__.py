"""Router alignment (RoMA, 2511.07419): routers learn to route a sample like its successful neighbours.

    embeddings = base_embeddings(model, data)
    neighbours = nearest(embeddings, candidates_N=score(model, data).exact_N)
    aligner = align_routers(model, data, AlignSettings(), neighbours=neighbours, steps=100)
    save_router_adapter("runs/routers", aligner)        # and load_router_adapter(model, "runs/routers")

`model` is one with a MOLE adapter or a native mixture of experts; `data` is `EncodedRows`, `TokenRows`, or the
`CachedStates` of either, which run the end of the model alone.
"""

from mllm.alignment.adapter import load_router_adapter, save_router_adapter
from mllm.alignment.align import Aligner, AlignmentBatches, AlignmentLoss, AlignSettings, align_routers
from mllm.alignment.data import AlignmentData, EncodedRows, TokenRows
from mllm.alignment.embeddings import base_embeddings, embed
from mllm.alignment.mixing import mixing, neighbours_mean
from mllm.alignment.neighbours import Neighbours, nearest
from mllm.alignment.routes import prepare, routed_layers
from mllm.alignment.success import answered, score, successful
from mllm.alignment.tail import CachedStates, cache_states
from mllm.alignment.vectors import sample_vectors

__all__ = [
    "AlignSettings",
    "Aligner",
    "AlignmentBatches",
    "AlignmentData",
    "AlignmentLoss",
    "CachedStates",
    "EncodedRows",
    "Neighbours",
    "TokenRows",
    "align_routers",
    "answered",
    "base_embeddings",
    "cache_states",
    "embed",
    "load_router_adapter",
    "mixing",
    "nearest",
    "neighbours_mean",
    "prepare",
    "routed_layers",
    "sample_vectors",
    "save_router_adapter",
    "score",
    "successful",
]
