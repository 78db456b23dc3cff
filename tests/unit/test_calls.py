"""Whose calls are whose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from squall.server.calls import CallInfo, Calls
from squall.server.objects import FunctionRecord, Scope


def test_an_input_is_called_by_inputs_of_its_own_workspace_only() -> None:
    """Whoever learns an input's id could otherwise hang calls into a graph that others look at."""
    function = cast(FunctionRecord, SimpleNamespace(app=SimpleNamespace(scope=Scope("mine"))))
    known = SimpleNamespace(data=CallInfo(function, "fu-1", 0.0, "", ""))
    calls = cast(Calls, SimpleNamespace(dispatch=SimpleNamespace(calls={"fc-1": known})))
    assert Calls._is_of_workspace(calls, "in-1-0", "mine")
    assert not Calls._is_of_workspace(calls, "in-1-0", "other")
    assert not Calls._is_of_workspace(calls, "in-2-0", "mine")
    assert not Calls._is_of_workspace(calls, "rubbish", "mine")
