"""How fast miniworld draws, and how many draws 100,000 distinct samples of a domain take."""

import json
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks.store import store
from data_recipes.miniworld import CONVENTIONS, DOMAINS, draw_scene

WANTED = 100_000


def main() -> None:
    figures = {}
    for domain in DOMAINS:
        start, seen, index = time.perf_counter(), set(), 0
        while len(seen) < WANTED:
            scene, rng = draw_scene(domain, "train", index)
            scene.paint(rng)
            question = scene.ask(rng, CONVENTIONS[domain])
            seen.add((scene.caption, question.text, question.answer))
            index += 1
        rate = index / (time.perf_counter() - start)
        figures[domain] = {"distinct": len(seen), "draws": index, "samples_per_second_per_core": round(rate)}
    print(json.dumps(figures, indent=2))
    store("miniworld", figures)


if __name__ == "__main__":
    main()
