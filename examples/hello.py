"""The smallest useful program: square numbers in containers, and add the results up here.

squall run examples/hello.py
squall run examples/hello.py --n 100
squall run examples/hello.py::square --x 7
"""

import squall

app = squall.App("hello")


@app.function(cpu=0.5, memory=256)
def square(x: int) -> int:
    return x * x


@app.local_entrypoint()
def main(n: int = 1000) -> None:
    print(sum(square.map(range(n))))
