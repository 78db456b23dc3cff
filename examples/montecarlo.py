"""Estimate pi with random points, many batches at once, and print the estimate as it sharpens.

squall run examples/montecarlo.py --batches 40 --points 200000
"""

import random

import squall

app = squall.App("montecarlo")


@app.function(cpu=1, retries=2)
def hits(seed: int, points: int) -> int:
    """How many of `points` random points of the unit square lie in the quarter circle."""
    draw = random.Random(seed).random
    return sum(draw() ** 2 + draw() ** 2 <= 1.0 for _ in range(points))


@app.local_entrypoint()
def main(batches: int = 20, points: int = 100_000) -> None:
    inside = 0
    pairs = ((seed, points) for seed in range(batches))
    # The order of the batches does not matter, so results are taken as they come.
    for done, count in enumerate(hits.starmap(pairs, order_outputs=False), 1):
        inside += count
        if done % max(1, batches // 5) == 0:
            print(f"{done:4} batches: pi is about {4 * inside / (done * points):.5f}")
