"""Text-only turns: what the language model itself answers before it is trained, so that it keeps its English."""

from random import Random

import torch
from rich.progress import track
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from studies.smol.plan import ANSWER_TOKENS, HELD_OUT_PROMPTS, PROMPTS, SEED

TOPICS = (
    """
rain, the moon, bread, a bicycle, honey bees, chess, coffee, glaciers, the heart, libraries, magnets, maps,
music, oceans, paper, photosynthesis, pianos, planets, poetry, railways, recycling, rice, rivers, robots,
salt, sharks, shadows, silk, sleep, snow, soap, spiders, stars, steam engines, sugar, tea, telescopes, tigers,
time zones, tomatoes, trees, vaccines, volcanoes, water, whales, windmills, winter, wolves, yoga, zoos,
airports, algebra, ants, apples, bridges, butterflies, candles, castles, clocks, clouds, computers, cotton,
dance, deserts, dictionaries, dinosaurs, doctors, dreams, earthquakes, elections, electricity, elephants,
exercise, farming, fire, football, forests, friendship, gardens, geometry, glass, gold, gravity, history,
horses, ice cream, insurance, islands, jazz, kindness, kites, languages, lightning, markets, milk, mirrors,
money, mountains, museums, newspapers, painting, parrots, passwords, penguins, photography, pottery
""".replace("\n", " ")
    .strip()
    .split(", ")
)
FORMS = (
    "What is interesting about {}?",
    "Explain {} to a child.",
    "Write one sentence about {}.",
    "Tell me a short story about {}.",
    "Give me three facts about {}.",
    "Why do people care about {}?",
    "Write a friendly message that mentions {}.",
    "What should a beginner know about {}?",
    "List four words that go with {}.",
    "Is it true that everyone likes {}? Answer briefly.",
    "What question would you ask an expert on {}?",
    "Write a short poem about {}.",
)


def prompts() -> tuple[list[str], list[str]]:
    """For training, and held out: no topic is in both."""
    rng = Random(SEED)
    topics = rng.sample(TOPICS, len(TOPICS))
    ours, kept = topics[12:], topics[:12]
    trained = rng.sample([form.format(topic) for topic in ours for form in FORMS], PROMPTS)
    return trained, rng.sample([form.format(topic) for topic in kept for form in FORMS], HELD_OUT_PROMPTS)


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: list[str]
) -> list[tuple[str, bool]]:
    """The model's own answers, drawn at temperature 0.7, and whether each came to its end in ANSWER_TOKENS."""
    torch.manual_seed(SEED)
    tokenizer, texts = processor.tokenizer, []
    for start in track(range(0, len(asked), 40), "own answers"):
        rendered = [
            processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            for text in asked[start : start + 40]
        ]
        batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
        written = model.generate(
            **batch, max_new_tokens=ANSWER_TOKENS, do_sample=True, temperature=0.7, top_p=0.95, top_k=0
        )
        written = written[:, batch["input_ids"].shape[1] :]
        ended = (written == tokenizer.eos_token_id).any(1).tolist()
        texts += zip(tokenizer.batch_decode(written, skip_special_tokens=True), ended, strict=True)
    return [(text.strip(), ended) for text, ended in texts]
