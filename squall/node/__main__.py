"""`python -m squall.node`: the agent of this machine, for the server of `$SQUALL_HOME`. With `--sweep` it undoes what
an agent left that was killed, and ends."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import sys
import time
from typing import TextIO

import uvloop

from squall import _observe, config
from squall.config import Config
from squall.exception import ConflictError, Error, InvalidError
from squall.node import linux
from squall.node.agent import Agent
from squall.node.native import NativeRuntime
from squall.node.network import Network
from squall.node.runtime import ProcessRuntime, Runtime

log = _observe.Logger("agent")

LOCK_TIMEOUT = 10.0
"""An earlier agent may still be undoing what it had."""


def choose_runtime(settings: Config) -> tuple[Runtime, Network | None, list[str]]:
    """The best runtime that works here, or the one asked for. Raises InvalidError when that one cannot work."""
    problems = NativeRuntime.problems()
    if settings.runtime == "process" or (settings.runtime == "auto" and problems):
        for problem in problems if settings.runtime == "auto" else []:
            log.warning("the native runtime does not work here", problem=problem)
        return ProcessRuntime(settings.home), None, []
    if problems:
        raise InvalidError(f"runtime `native` does not work here: {problems[0]}", hint="`squall doctor` says more")
    network_problems = Network.problems()
    # Before any thread: every mount of ours stays in a namespace of the agent's own and ends with it.
    linux.enter_private_mounts()
    network = None if network_problems else Network(settings.home)
    warnings = [f"containers have no network: {problem}" for problem in network_problems]
    runtime = NativeRuntime(settings.home, network, zygotes_bytes=settings.zygotes_mib << 20)
    return runtime, network, warnings


def take_lock(settings: Config) -> TextIO:
    """One agent a home: it holds this lock for as long as it lives, with its pid in the file, by which a new server
    finds it. Raises ConflictError when there is another that does not end."""
    file = settings.agent_lock.open("a+")
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConflictError(
                    f"start a node agent for `{settings.home}`: another one, pid {_pid_in(settings)}, serves it",
                    hint="`squall down` ends it with its server",
                ) from None
            time.sleep(0.02)  # nothing runs yet that this could hold up
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _pid_in(settings: Config) -> str:
    return settings.agent_lock.read_text()[:20]


async def serve(settings: Config) -> None:
    agent = Agent(settings, *choose_runtime(settings))
    gc.freeze()  # what a container leaves here has few cycles: have the collector look rarely, and not at the code
    gc.set_threshold(20_000, 20, 50)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, agent.end, f"received {signal.Signals(signum).name}")
    await agent.run()


async def sweep(settings: Config) -> None:
    """Undo what an agent of this home left that was killed, as the next one would at its start."""
    runtime, _, _ = choose_runtime(settings)
    await runtime.start()
    await runtime.close()


def stop_ignoring() -> None:
    """A shell has a server that it starts in the background, or with `nohup`, ignore what a terminal sends; containers
    would inherit it, and a Ctrl-\\ in theirs end nothing. No terminal sends this process anything: it has none."""
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)


def main() -> int:
    stop_ignoring()
    try:
        settings = config.load()
        _observe.configure(settings.log_level, format=settings.log_format)
        settings.node_dir.mkdir(parents=True, exist_ok=True, mode=0o711)
        with take_lock(settings):
            uvloop.run((sweep if "--sweep" in sys.argv[1:] else serve)(settings))
    except Error as error:
        log.error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
