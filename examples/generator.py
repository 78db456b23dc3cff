"""A generator in a container: values arrive here one by one, while the rest is still being computed.

squall run examples/generator.py --limit 50
"""

from collections.abc import Iterator

import squall

app = squall.App("generator")


@app.function()
def primes(limit: int) -> Iterator[int]:
    """The primes below `limit`, by trial division."""
    found: list[int] = []
    for n in range(2, limit):
        if all(n % p for p in found if p * p <= n):
            found.append(n)
            yield n


@app.local_entrypoint()
def main(limit: int = 100) -> None:
    for prime in primes.remote_gen(limit):
        print(prime, end=" ", flush=True)
    print()
