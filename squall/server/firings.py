"""HAND: carries schedules out: keeps their state in the Store, looks what is due, and makes the calls.

A firing is a spawned call whose id follows from the schedule and the moment. It is in the journal before the schedule's
state says that it was made; a crash between the two has the next server make it again under the same id, which the
journal knows already. So nothing fires twice, whenever the server dies. Only what a deployed app's current version has
fires. When anything fires is `schedules`' to say. Owns the table `schedules`. Tested in `tests/unit/test_firings.py`
and `tests/integration/test_schedules.py`.
"""

from __future__ import annotations

import asyncio
import json
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from squall._clock import Clock, SystemClock
from squall._observe import Logger, count
from squall.exception import ConflictError, Error, InvalidError, NotFoundError
from squall.protocol.messages import ScheduleSpec, new_id, to_dict
from squall.server.database import Database
from squall.server.durable import Durable
from squall.server.journal import Added, Entry
from squall.server.objects import AppRecord, Scope
from squall.server.schedules import (
    MISSED_COUNTED,
    OVERLAP_LIMIT,
    Firing,
    Rule,
    State,
    firing_call_id,
    look,
    next_firing,
    pause,
    resume,
    rule_of,
    schedule_id_of,
    title_of,
)

log = Logger("server")

LOOK_EVERY_S = 1.0
"""At least this often, as the clock may jump."""
RETRY_S = 5.0
"""After a firing that could not be written down."""
SETTLE_S = 10.0
RECENT_LIMIT = 10
EMPTY_CALL = b"\x80\x05)}\x86."
"""`((), {})` as `protocol.payload` packs it, which a server must never load."""


@dataclass(eq=False)
class Live:
    """A schedule that is looked at."""

    schedule_id: str
    app: AppRecord
    tag: str
    spec: ScheduleSpec
    began_at: float
    rule: Rule
    state: State
    fired: int = 0
    skipped: int = 0
    running: list[str] = field(default_factory=list)
    """Calls of it that may not have ended."""
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT_LIMIT))
    submitting: bool = False
    not_before: float = 0.0
    """By the monotonic clock."""
    looked: State | None = None
    next_at: float | None = None
    """When it is next due, as of the state `looked`: working it out costs more than all the rest of a look."""

    @property
    def title(self) -> str:
        return title_of(self.tag, self.spec.method)


class Firings:
    def __init__(self, durable: Durable, database: Database, clock: Clock | None = None) -> None:
        self.durable = durable
        self.database = database
        self.clock = clock or SystemClock()
        self.tell: Callable[[AppRecord, str, str], None] = lambda app, tag, text: None
        """Set by `main`: writes a line of the platform's own to an app's output."""
        self._live: dict[str, Live] = {}
        self._syncing: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    # -- which schedules there are

    def switched(self, app: AppRecord) -> None:
        """An app has another version, or is here again after a restart."""
        before = self._syncing.get(app.app_id)
        task = asyncio.ensure_future(self._sync(app, before))
        self._syncing[app.app_id] = task
        task.add_done_callback(lambda done: self._synced(app, done))

    def _synced(self, app: AppRecord, done: asyncio.Task[None]) -> None:
        if self._syncing.get(app.app_id) is done:
            del self._syncing[app.app_id]
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("schedules could not be read and are tried again", app=app.name, error=str(error))
            asyncio.get_running_loop().call_later(RETRY_S, self._sync_again, app)

    def _sync_again(self, app: AppRecord) -> None:
        if app.state == "running" and app.app_id not in self._syncing:
            self.switched(app)

    async def _sync(self, app: AppRecord, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        if app.state != "running":
            return
        wanted = {
            schedule_id_of(app.app_id, tag, spec.method): (tag, spec)
            for tag, function in app.functions.items()
            for spec in function.spec.schedules
        }
        rows = {row.schedule_id: row for row in await self._rows(app.app_id)} if wanted or self._has(app) else {}
        now = self.clock.wall()
        for schedule_id, (tag, spec) in wanted.items():
            self._live[schedule_id] = self._taken_up(schedule_id, app, tag, spec, rows.get(schedule_id), now)
            self._save(self._live[schedule_id])
        gone = {one.schedule_id for one in self._of(app)} | set(rows)
        self._forget(gone - set(wanted))
        self._changed.set()

    def _taken_up(self, schedule_id: str, app: AppRecord, tag: str, spec: ScheduleSpec, row: Any, now: float) -> Live:
        """As it stood, if it says what it said; a schedule that was changed begins now, and stays paused if it was."""
        live = self._live.get(schedule_id)
        if live is not None and live.spec == spec and live.app is app:
            return live
        if row is None or row.rule != _text_of(spec):
            paused = row is not None and bool(row.paused)
            return Live(schedule_id, app, tag, spec, now, rule_of(spec, now), State(now, paused=paused))
        state = State(row.last, row.epoch, bool(row.paused))
        taken = Live(schedule_id, app, tag, spec, row.began_at, rule_of(spec, row.began_at), state)
        taken.fired, taken.skipped, taken.running = row.fired, row.skipped, json.loads(row.running)
        taken.recent.extend(json.loads(row.recent))
        return taken

    async def settled(self) -> None:
        """Wait until what was deployed before is known here; for at most SETTLE_S."""
        if self._syncing:
            await asyncio.wait(list(self._syncing.values()), timeout=SETTLE_S)

    def stopped(self, app: AppRecord) -> None:
        """An app was stopped for good: its schedules begin anew when it is deployed again."""
        self._forget({one.schedule_id for one in self._of(app)})

    def _has(self, app: AppRecord) -> bool:
        return any(one.app is app for one in self._live.values())

    def _of(self, app: AppRecord) -> list[Live]:
        return [one for one in self._live.values() if one.app.app_id == app.app_id]

    # -- firing

    async def rounds(self) -> None:
        """For as long as the server serves."""
        while True:
            self._changed.clear()
            delay = LOOK_EVERY_S
            if not self.durable.replaying:  # what it brings back counts for the limit on overlap
                try:
                    delay = min(delay, self.look())
                except Exception:  # a bug of ours: this must go on, or nothing would ever fire again
                    log.error("looking at the schedules failed", error=traceback.format_exc())
            try:
                await asyncio.wait_for(self._changed.wait(), delay)
            except asyncio.TimeoutError:
                continue

    def look(self) -> float:
        """Fire what is due; the seconds until the next is, as far as is known."""
        now, soonest = self.clock.wall(), LOOK_EVERY_S
        for live in list(self._live.values()):
            if live.app.state != "running" or live.submitting or self.clock.monotonic() < live.not_before:
                continue
            if live.looked is live.state and live.state.last <= now and (live.next_at is None or now < live.next_at):
                soonest = min(soonest, LOOK_EVERY_S if live.next_at is None else live.next_at - now)
                continue
            state, firing = look(live.rule, live.state, now)
            if firing is not None:
                self._fire(live, state, firing)
            elif state != live.state:
                log.warning("the clock was set back", schedule=live.title, app=live.app.name, epoch=state.epoch)
                live.state = state
                self._save(live)
            live.looked, live.next_at = live.state, next_firing(live.rule, live.state, now)
            if live.next_at is not None:
                soonest = min(soonest, live.next_at - now)
        return max(0.01, soonest)

    def _fire(self, live: Live, state: State, firing: Firing) -> None:
        live.running = [call_id for call_id in live.running if call_id in self.durable.dispatch.calls]
        if len(live.running) >= OVERLAP_LIMIT:
            live.state = state
            self._skip(live, firing, f"{len(live.running)} firings before it have not ended")
            return
        call_id = firing_call_id(live.schedule_id, firing.at, state.epoch)

        def told(outcome: Added | Error) -> None:
            live.submitting = False
            if isinstance(outcome, Added):
                live.state = replace(state, paused=live.state.paused)
                self._fired(live, firing, call_id)
            else:
                self._not_fired(live, outcome)

        live.submitting = True
        try:
            self._submit(live, call_id, told)
        except Error as error:  # too many wait: they are what the limit on overlap is for, too
            live.submitting, live.state = False, state
            self._skip(live, firing, error.message)

    def _submit(self, live: Live, call_id: str, told: Callable[[Added | Error], None]) -> None:
        app = live.app
        function_id = app.functions[live.tag].stable_id
        entry = Entry(
            call_id, function_id, app.app_id, app.scope.workspace, live.spec.method, live.schedule_id,
            self.clock.wall(), [(0, EMPTY_CALL)],
        )  # fmt: skip
        self.durable.submit(entry, told)

    def _fired(self, live: Live, firing: Firing, call_id: str) -> None:
        live.fired += 1
        live.running.append(call_id)
        live.recent.append(
            {"at": firing.at, "fired_at": self.clock.wall(), "missed": firing.missed, "call_id": call_id}
        )
        count("schedules_fired")
        if firing.is_late:
            count("schedules_late")
            self._say(live, f"the firing of {_stamp(firing.at)} comes {firing.late:,.0f} s late{_missed(firing)}")
        self._save(live)

    def _not_fired(self, live: Live, error: Error) -> None:
        live.not_before = self.clock.monotonic() + RETRY_S
        log.error("a firing could not be written down and is tried again", schedule=live.title, error=error.message)

    def _skip(self, live: Live, firing: Firing, reason: str) -> None:
        live.skipped += 1
        live.recent.append({"at": firing.at, "missed": firing.missed, "skipped": reason})
        count("schedules_skipped")
        self._say(live, f"the firing of {_stamp(firing.at)} is left out: {reason}")
        self._save(live)

    def _say(self, live: Live, text: str) -> None:
        log.warning(text, schedule=live.title, app=live.app.name)
        self.tell(live.app, live.tag, f"[schedule of `{live.title}`: {text}]\n")

    # -- looking and changing

    def rows(self, scope: Scope, app: AppRecord | None = None) -> list[dict[str, Any]]:
        """For `ListObjects`."""
        now = self.clock.wall()
        return [
            {
                "schedule_id": live.schedule_id,
                "app": live.app.name,
                "app_id": live.app.app_id,
                "function": live.title,
                "schedule": shown(live.spec),
                "next_at": next_firing(live.rule, live.state, now),
                "last_at": live.recent[-1]["at"] if live.recent else None,
                "paused": live.state.paused,
                "fired": live.fired,
                "skipped": live.skipped,
                "running": sum(call_id in self.durable.dispatch.calls for call_id in live.running),
                "recent": list(live.recent),
            }
            for live in self._live.values()
            if live.app.scope == scope and app in (None, live.app)
        ]

    def all_next(self, workspace: str | None = None) -> list[float | None]:
        """When each schedule fires next, None of those that are paused; of one workspace, or of all."""
        now = self.clock.wall()
        return [
            next_firing(live.rule, live.state, now)
            for live in self._live.values()
            if workspace in (None, live.app.scope.workspace)
        ]

    def next_of(self, app: AppRecord) -> float | None:
        """When the first of an app's schedules fires next."""
        now = self.clock.wall()
        found = [next_firing(one.rule, one.state, now) for one in self._of(app)]
        return min((at for at in found if at is not None), default=None)

    async def change(self, schedule_id: str, action: str, scope: Scope) -> str:
        """Pause, resume, or run once now. The id of the call, where one was made."""
        live = self._live.get(schedule_id)
        if live is None or live.app.scope.workspace != scope.workspace:
            raise NotFoundError(f"no schedule `{schedule_id[:80]}`", hint="see `squall schedule list`")
        if action == "run":
            return await self._run_now(live)
        if action not in ("pause", "resume"):
            raise InvalidError(f"`{action[:40]}` cannot be done to a schedule", hint="pause, resume or run")
        live.state = pause(live.state) if action == "pause" else resume(live.state, self.clock.wall())
        self._changed.set()
        await self._save(live)
        return ""

    async def _run_now(self, live: Live) -> str:
        if live.app.state != "running":
            raise ConflictError(f"app `{live.app.name}` is not running")
        call_id = new_id("fc")
        outcome: asyncio.Future[Added | Error] = asyncio.get_running_loop().create_future()
        self._submit(live, call_id, lambda found: None if outcome.done() else outcome.set_result(found))
        made = await outcome
        if isinstance(made, Error):
            raise made
        return call_id

    # -- the Store

    async def _rows(self, app_id: str) -> list[Any]:
        def work(connection: Any) -> list[Any]:
            from squall.server import tables

            table = tables.schedules
            return list(connection.execute(table.select().where(table.c.app_id == app_id)))

        return await self.database.read(work)

    def _save(self, live: Live) -> asyncio.Future[None]:
        """One that is lost costs nothing: what is fired again has the same id."""
        row = {
            "schedule_id": live.schedule_id,
            "app_id": live.app.app_id,
            "tag": live.tag,
            "method": live.spec.method,
            "rule": _text_of(live.spec),
            "began_at": live.began_at,
            "last": live.state.last,
            "epoch": live.state.epoch,
            "paused": live.state.paused,
            "fired": live.fired,
            "skipped": live.skipped,
            "running": json.dumps(live.running),
            "recent": json.dumps(list(live.recent)),
        }

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.schedules
            mine = table.c.schedule_id == row["schedule_id"]
            if not connection.execute(table.update().where(mine).values(row)).rowcount:
                connection.execute(table.insert(), row)

        done = self.database.write(work)
        done.add_done_callback(_log_failure)
        return done

    def _forget(self, schedule_ids: set[str]) -> None:
        for schedule_id in schedule_ids:
            self._live.pop(schedule_id, None)
        wanted = sorted(schedule_ids)

        def work(connection: Any) -> None:
            from squall.server import tables

            table = tables.schedules
            for start in range(0, len(wanted), 500):
                connection.execute(table.delete().where(table.c.schedule_id.in_(wanted[start : start + 500])))

        if wanted:
            self.database.write(work).add_done_callback(_log_failure)


def shown(spec: ScheduleSpec) -> str:
    """A schedule for people."""
    if spec.cron:
        return spec.cron if spec.timezone == "UTC" else f"{spec.cron} ({spec.timezone})"
    parts = [f"{number:g} {unit[:-1] if number == 1 else unit}" for unit, number in spec.period.items()]
    return f"every {' '.join(parts)}"


def _text_of(spec: ScheduleSpec) -> str:
    return json.dumps(to_dict(spec), sort_keys=True)


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _missed(firing: Firing) -> str:
    if not firing.missed:
        return ""
    number = f"{firing.missed} or more" if firing.missed >= MISSED_COUNTED else str(firing.missed)
    return f", and makes up for {number} before it that {'was' if firing.missed == 1 else 'were'} missed"


def _log_failure(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.error("the state of a schedule could not be stored", error=str(error))
