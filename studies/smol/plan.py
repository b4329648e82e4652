"""What is trained, on what, for how long. Everything that decides a run stands here."""

from dataclasses import dataclass, field

from mllm.bases.fetched import home

WORK = home() / "smol-training"  # features, texts, checkpoints, log: outside the repository
SEED = 0

# Licences whose terms shipped weights can keep. They are then shared alike: CC BY-SA 4.0. NonCommercial photos and the
# GPL questions of chartqa stay out.
LICENCES = ("CC BY 2.0", "CC BY-SA 2.0", "no known copyright restrictions")  # of a coco_mini photo
SOURCES = {
    "blood_cells": "MIT",
    "coco_mini": "each photo's own: CC BY 2.0, CC BY-SA 2.0, no known copyright restrictions",
    "deepform": "labels MIT; US public records as released in VRDU under Creative Commons",
    "fara_forms": "US public records as released in VRDU under Creative Commons",
    "grocery": "MIT",
    "nih_chest_xray": "no restrictions (NIH Clinical Center)",
    "nlvr": "CC BY 4.0",
    "pneumonia_mnist": "CC BY 4.0",
    "vqa_rad": "CC0 1.0",
    "wtq_tables": "CC BY-SA 4.0",
    "miniworld": "drawn by this repository",
    "speech": "written by SmolLM2-135M-Instruct (Apache-2.0)",
}

VALIDATION = 10  # every tenth picture of train is kept for choosing
SCENES = 600  # of miniworld, with a caption and QUESTIONS questions each
QUESTIONS = 4
PROMPTS, HELD_OUT_PROMPTS = 400, 48  # text-only turns
ANSWER_TOKENS = 48  # kept of the language model's own answer to each


@dataclass(frozen=True)
class Stage:
    """One stage: what of the data an epoch takes, and how fast is learned."""

    epochs: float
    projector_rate: float
    adapter_rate: float = 0.0  # 0: the language model stays as it is
    tokens: int = 2048  # a step, padding included
    falls: bool = True  # the rate falls to nothing, along a cosine; else it stays
    captions: dict[str, float] = field(default_factory=dict)  # share of each source's captions that an epoch takes
    questions: dict[str, float] = field(default_factory=dict)
    speech: float = 0.0


# Small print cannot be read at 36 tokens a picture: of documents' questions, whose answers can then only be guessed, an
# epoch takes few. Of captions that hardly differ from each other it takes some.
CAPTIONS = {
    "blood_cells": 1.0, "coco_mini": 1.0, "deepform": 0.3, "fara_forms": 0.3, "grocery": 1.0, "nih_chest_xray": 0.5,
    "nlvr": 0.5, "pneumonia_mnist": 0.5, "miniworld": 0.5,
}  # fmt: skip
ASKED = {
    "blood_cells": 1.0, "coco_mini": 1.0, "deepform": 0.35, "fara_forms": 0.5, "grocery": 1.0, "nih_chest_xray": 1.0,
    "nlvr": 1.0, "pneumonia_mnist": 1.0, "vqa_rad": 1.0, "wtq_tables": 0.25, "miniworld": 0.5,
}  # fmt: skip
STAGES = {
    "align": Stage(epochs=0.6, projector_rate=1e-3, captions=CAPTIONS),
    "instruct": Stage(
        epochs=3, tokens=1024, projector_rate=5e-4, adapter_rate=8e-4, falls=False,
        captions={source: share / 3 for source, share in CAPTIONS.items()}, questions=ASKED, speech=1.0,
    ),
    "settle": Stage(
        epochs=0.1, tokens=1024, projector_rate=5e-4, adapter_rate=8e-4,
        captions={source: share / 3 for source, share in CAPTIONS.items()}, questions=ASKED, speech=1.0,
    ),
}  # fmt: skip

RANK, ALPHA = 16, 32
