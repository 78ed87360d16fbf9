"""Several searches at one study, each on a machine of its own: who works on what, who goes first, what was left.

Every search is a *member*, and every trial that it works on has a *lease*, which names its owner, host and process.
Both are renewed while it lives. What is not renewed for the length of a lease belongs to nobody, by the reader's own
clock: the clocks of machines need not agree. A trial so lost is failed, which a database lets only one member do, and
this one puts the same candidate back into the study for whoever is free.

Two members may come to the same candidate, or both see room for one more. So each *claims* a trial before it works on
it: it writes the claim, then reads all others. Of two that clash, at least the later one sees the earlier. The higher
number gives way to a lower one, and any to one that is sure; the lower one waits until the higher has given way or was
sure before. Then it is sure itself. Nothing but reading and writing is asked of the storage, so any of Optuna's does.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from attnsurgery.samplers import AGAIN
from attnsurgery.search.files import write_whole

LEASE, CLAIM = "lease", "claim"
"""User attributes of a trial: who works on it; which candidate it is, and whether that is sure."""
_MEMBER = "member:"
_OWNER = ".owner"
_SETTLED_S = 3.0
"""Members that join at the same time see each other after so long."""
_POLL_S = 0.1

Claimed = Literal["mine", "twin", "full"]


class Sharing:
    """One member's view of the study.

    Args:
        folder: the run directory, which gives the member its name: who goes on there has it too.
        lease_s: seconds.
    """

    def __init__(self, study: optuna.Study, folder: Path, lease_s: float) -> None:
        self._study = study
        self._storage = study._storage
        self._lease_s = lease_s
        self._owner = _owner(folder)
        self._host = socket.gethostname()
        self._joined = time.time()
        self._joined_clock = time.monotonic()
        self._working: set[int] = set()
        """Trials of ours that are leased."""
        self._beat_at = 0.0
        self._observed: dict[str, tuple[Any, float]] = {}
        """What was last read of a lease, and when it was new, on our clock."""
        self.beat()

    def beat(self) -> None:
        """Renew what is ours, if a third of a lease has passed since."""
        if time.monotonic() - self._beat_at < self._lease_s / 3:
            return
        self._beat_at = time.monotonic()
        self._study.set_user_attr(f"{_MEMBER}{self._owner}", {**self._lease(), "joined": self._joined})
        running = {t.number: t for t in self._trials(TrialState.RUNNING)}
        for number in self._working & running.keys():
            with suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(running[number]._trial_id, LEASE, self._lease())

    def leave(self) -> None:
        """Nothing is ours any more."""
        self._study.set_user_attr(f"{_MEMBER}{self._owner}", None)

    def leads(self) -> bool:
        """True of one living member at a time: it does what must be done once."""
        if time.monotonic() - self._joined_clock < _SETTLED_S:
            return False
        living = {name: member for name, member in self._members().items() if not self._stale(name, member)}
        first = min(living, key=lambda name: (living[name]["joined"], name), default=None)
        return first == f"{_MEMBER}{self._owner}"

    def is_mine(self, trial: FrozenTrial) -> bool:
        """Leased by this member, perhaps in a run before."""
        lease = trial.user_attrs.get(LEASE)
        return lease is not None and lease["owner"] == self._owner

    def lease(self, trial: FrozenTrial) -> None:
        """Work on it from now on."""
        self._storage.set_trial_user_attr(trial._trial_id, LEASE, self._lease())
        self.works_on(trial.number)

    def leased(self) -> dict[str, Any]:
        """User attributes with which a trial is leased from its beginning."""
        return {LEASE: self._lease()}

    def works_on(self, number: int) -> None:
        """A trial of that number is leased."""
        self._working.add(number)

    def release(self, number: int) -> None:
        """It is finished, or put back."""
        self._working.discard(number)

    def elsewhere(self) -> list[FrozenTrial]:
        """Trials that living members work on."""
        trials = (trial for trial in self._trials(TrialState.RUNNING) if trial.number not in self._working)
        return [trial for trial in trials if not self._stale(f"trial:{trial.number}", trial.user_attrs.get(LEASE))]

    def lost(self) -> list[FrozenTrial]:
        """Trials whose member is gone."""
        trials = (trial for trial in self._trials(TrialState.RUNNING) if trial.number not in self._working)
        return [trial for trial in trials if self._stale(f"trial:{trial.number}", trial.user_attrs.get(LEASE))]

    def inherit(self, trial: FrozenTrial, attributes: Mapping[str, Any] | None) -> None:
        """Fail a lost trial, and put its candidate back under a new number, unless another member was faster.

        Args:
            attributes: that go with it; None where it was not asked for completely, and is nothing to go on with.
        """
        try:
            self._storage.set_trial_user_attr(trial._trial_id, AGAIN, True)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return
        if attributes is not None:
            again = create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=dict(attributes),
            )
            self._study.add_trial(again)

    def claim(
        self, number: int, digest: str, room: Callable[[], int], finished_digests: Callable[[], set[str | None]]
    ) -> Claimed:
        """Whether this member may work on a trial: another may have the same candidate, or the last place.

        Args:
            room: how many candidates are still wanted, those that are worked on counted.
            finished_digests: digests of all finished candidates.
        """
        mine = self._study.get_trials(deepcopy=False)[number]
        self.lease(mine)
        self._storage.set_trial_user_attr(mine._trial_id, CLAIM, {"digest": digest, "sure": False})
        while True:
            claims = {
                trial.number: trial.user_attrs[CLAIM]
                for trial in self._trials(TrialState.RUNNING)
                if trial.number != number
                and trial.user_attrs.get(CLAIM)
                and (self.is_mine(trial) or not self._stale(f"trial:{trial.number}", trial.user_attrs.get(LEASE)))
            }
            first = [claim for number_of_claim, claim in claims.items() if number_of_claim < number or claim["sure"]]
            if digest in finished_digests() or any(claim["digest"] == digest for claim in first):
                return self._give_way(mine, "twin")
            if len(first) >= room():
                return self._give_way(mine, "full")
            if len(claims) < room() and all(claim["digest"] != digest for claim in claims.values()):
                self._storage.set_trial_user_attr(mine._trial_id, CLAIM, {"digest": digest, "sure": True})
                return "mine"
            time.sleep(_POLL_S)
            self.beat()

    def _give_way(self, trial: FrozenTrial, why: Claimed) -> Claimed:
        self._storage.set_trial_user_attr(trial._trial_id, CLAIM, None)
        return why

    def _lease(self) -> dict[str, Any]:
        until = time.time() + self._lease_s
        return {"owner": self._owner, "host": self._host, "pid": os.getpid(), "until": until}

    def _members(self) -> dict[str, Mapping[str, Any]]:
        return {key: value for key, value in self._study.user_attrs.items() if key.startswith(_MEMBER) and value}

    def _stale(self, key: str, lease: Mapping[str, Any] | None) -> bool:
        """True of a lease that is not renewed any more, or whose process is seen to be dead."""
        if lease and lease["host"] == self._host and not _alive(lease["pid"]):
            return True
        value, since = self._observed.get(key, (None, 0.0))
        if since == 0.0 or value != lease:
            self._observed[key] = (lease, time.monotonic())
            return False
        return time.monotonic() - since > self._lease_s

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))


def _owner(folder: Path) -> str:
    """The name of a run directory among members, made once."""
    path = folder / _OWNER
    if not path.exists():
        write_whole(path, secrets.token_hex(8))
    return path.read_text()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
