"""The checker of histories finds each kind of fault, and none in a history that is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from history import Delivery, Event, Joined, Publish, Told, faults, given_up, read, write

RIGHT: list[Event] = [
    *(Joined("ann", 0), Joined("bob", 0), Joined("eve", 2.5)),
    *(Publish("one", 1, 2, "1"), Publish("two", 3, 4, "2"), Publish("refused", 3, 4), Publish("late", 3, 4)),
    *(Delivery("ann", 1.5, "1", "one"), Delivery("ann", 3.5, "2", "two"), Delivery("ann", 5, "3", "late")),
    *(Delivery("bob", 1.6, "1", "one"), Delivery("bob", 3.6, "2", "two"), Delivery("bob", 5, "3", "late")),
    *(Delivery("eve", 3.6, "2", "two"), Delivery("eve", 5, "3", "late")),
]


def without(*gone: Event) -> list[Event]:
    return [event for event in RIGHT if event not in gone]


def test_a_right_history_has_no_fault(tmp_path: Path) -> None:
    """Refused publishes may arrive or not, and a client owes nothing from before it joined."""
    assert faults(RIGHT) == []
    write(tmp_path / "history", RIGHT)
    assert read(tmp_path / "history") == RIGHT


def test_a_client_that_was_told_may_lack_all_from_before() -> None:
    lost = Delivery("bob", 1.6, "1", "one")
    assert faults([*without(lost), Told("bob", 2)]) == []
    assert faults([*without(lost), Told("bob", 0.5)]) == ["lost: bob never got one (1)"]


MINORITY: list[Event] = [
    *(Publish("alone", 4.1, 4.3, "2b"), Delivery("bob", 4.2, "2b", "alone"), Told("bob", 4.5)),
    *(Delivery("bob", 4.6, "1", "one"), Delivery("bob", 4.7, "2", "two")),
]


def test_a_minority_may_lose_what_its_clients_alone_had() -> None:
    """They are told. A message that comes again for all has another id; one that others had, too, is not given up."""
    assert faults(RIGHT + MINORITY) == []
    assert (given_up(RIGHT), given_up(RIGHT + MINORITY)) == (set(), {"2b"})
    again = [Delivery(client, 6, "4", "alone") for client in ("ann", "bob", "eve")]
    assert faults(RIGHT + MINORITY + again) == []
    assert faults(RIGHT + MINORITY + again + again[1:2])[0] == "double: bob got alone as 4 and as 4"
    assert faults(RIGHT + MINORITY[:2])[0] == "lost: ann never got alone (2b)"
    assert faults([*RIGHT, *MINORITY, Delivery("ann", 4.2, "2b", "alone")]) == ["lost: eve never got alone (2b)"]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (without(Delivery("bob", 3.6, "2", "two")), "lost: bob"),
        (without(Delivery("eve", 3.6, "2", "two")), "lost: eve"),
        ([*RIGHT, Delivery("ann", 6, "2", "two")], "double: ann"),
        ([*RIGHT, Delivery("ann", 6, "4", "one")], "double: ann"),
        ([*RIGHT, Delivery("ann", 6, "4", "one")], "divergent: one is 4 for ann, and 1"),
        ([*without(Delivery("bob", 5, "3", "late")), Delivery("bob", 5, "4", "late")], "divergent: late is 4 for bob"),
        ([*without(Delivery("ann", 1.5, "1", "one")), Delivery("ann", 4, "1", "one")], "disorder: ann"),
        ([*RIGHT, Publish("back", 6, 7, "0")], "disorder: back"),
        ([*RIGHT, Delivery("bob", 7, "9", "nobody's")], "invented: bob"),
        ([*RIGHT, Publish("one", 8, 9)], "bad history"),
    ],
)
def test_a_wrong_history_has_its_fault(wrong: list[Event], kind: str) -> None:
    assert any(fault.startswith(kind) for fault in faults(wrong))


def test_the_tool_prints_the_faults_and_fails(tmp_path: Path) -> None:
    write(tmp_path / "history", without(Delivery("bob", 3.6, "2", "two")))
    tool = Path(__file__).with_name("history.py")
    ended = subprocess.run([sys.executable, tool, tmp_path / "history"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "lost: bob never got two (2)\n1 faults\n")
