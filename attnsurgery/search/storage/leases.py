"""Coordinates several searches at one study: leases of trials, claims of candidates, a leader, takeover of lost trials.

Every search is a *member*, and every trial that it works on has a *lease* with its owner, host and process. A living
member renews both. A lease has expired if it was not renewed for its length by the reader's own clock, so the clocks of
machines need not agree. A trial with an expired lease is failed, which a database allows only one member to do, and
this member puts the same candidate back into the study for any free worker.

Two members may choose the same candidate, or both see room for one more. So each *claims* a trial before it works on
it: it writes its claim, then reads all others. Of two conflicting claims, at least the later one sees the earlier. A
higher trial number yields to a lower one, and any claim yields to a sure one. The lower number waits until the higher
one has yielded, or was sure before, and is then sure itself. This needs only reads and writes of the storage, so every
Optuna storage will do.
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
from attnsurgery.search.files import write_atomically

LEASE, CLAIM = "lease", "claim"
"""User attributes of a trial: its lease; the digest of its candidate, and whether the claim is sure."""
_MEMBER = "member:"
"""Prefix of the study's keys for members."""
_OWNER = ".owner"
"""File of a run directory with its member name."""
_SETTLED_S = 3.0
"""Time after which members that join at the same moment see each other, in s."""
_POLL_S = 0.1
"""Time between two reads of the claims, in s."""

Claimed = Literal["mine", "twin", "full"]
"""The result of a claim: the trial is this member's; another has the candidate; no more candidates are needed."""


class Sharing:
    """One member's view of the study.

    Args:
        study: shared by all members.
        folder: the run directory, which determines the member's name, so a resumed search has the same.
        lease_s: length of a lease, in s.
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
        """Numbers of this member's leased trials."""
        self._beat_at = 0.0
        self._observed: dict[str, tuple[Any, float]] = {}
        """The last value of each lease, and when this member first read it, on its own clock."""
        self.beat()

    def beat(self) -> None:
        """Renew this member's leases if a third of their length has passed."""
        if time.monotonic() - self._beat_at < self._lease_s / 3:
            return
        self._beat_at = time.monotonic()
        self._study.set_user_attr(f"{_MEMBER}{self._owner}", {**self._lease(), "joined": self._joined})
        running = {t.number: t for t in self._trials(TrialState.RUNNING)}
        for number in self._working & running.keys():
            with suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(running[number]._trial_id, LEASE, self._lease())

    def leave(self) -> None:
        """End the membership."""
        self._study.set_user_attr(f"{_MEMBER}{self._owner}", None)

    def leads(self) -> bool:
        """Whether this member does what must be done once; true of one living member at a time."""
        if time.monotonic() - self._joined_clock < _SETTLED_S:
            return False
        living = {name: member for name, member in self._members().items() if not self._stale(name, member)}
        first = min(living, key=lambda name: (living[name]["joined"], name), default=None)
        return first == f"{_MEMBER}{self._owner}"

    def is_mine(self, trial: FrozenTrial) -> bool:
        """Whether a trial is leased by this member, perhaps in an earlier run."""
        lease = trial.user_attrs.get(LEASE)
        return lease is not None and lease["owner"] == self._owner

    def lease(self, trial: FrozenTrial) -> None:
        """Lease a trial."""
        self._storage.set_trial_user_attr(trial._trial_id, LEASE, self._lease())
        self.works_on(trial.number)

    def leased(self) -> dict[str, Any]:
        """User attributes that make a new trial leased."""
        return {LEASE: self._lease()}

    def works_on(self, number: int) -> None:
        """Renew the lease of a trial from now on."""
        self._working.add(number)

    def release(self, number: int) -> None:
        """Stop renewing the lease of a trial, which is finished or put back."""
        self._working.discard(number)

    def elsewhere(self) -> list[FrozenTrial]:
        """Trials that other living members work on."""
        trials = (trial for trial in self._trials(TrialState.RUNNING) if trial.number not in self._working)
        return [trial for trial in trials if not self._stale(f"trial:{trial.number}", trial.user_attrs.get(LEASE))]

    def lost(self) -> list[FrozenTrial]:
        """Running trials whose lease has expired."""
        trials = (trial for trial in self._trials(TrialState.RUNNING) if trial.number not in self._working)
        return [trial for trial in trials if self._stale(f"trial:{trial.number}", trial.user_attrs.get(LEASE))]

    def inherit(self, trial: FrozenTrial, attributes: Mapping[str, Any] | None) -> None:
        """Fail a lost trial, and put its candidate back under a new number, unless another member was faster.

        Args:
            trial: the lost trial.
            attributes: user attributes of the new trial; None if the candidate was not complete.
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
        """Whether this member may work on a trial: another may have the same candidate, or enough are in work.

        Args:
            number: of the trial.
            digest: of its candidate.
            room: returns how many candidates are still needed, including those in work.
            finished_digests: returns the digests of all finished candidates.
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
            prior = [claim for trial_number, claim in claims.items() if trial_number < number or claim["sure"]]
            if digest in finished_digests() or any(claim["digest"] == digest for claim in prior):
                return self._withdraw(mine, "twin")
            if len(prior) >= room():
                return self._withdraw(mine, "full")
            if len(claims) < room() and all(claim["digest"] != digest for claim in claims.values()):
                self._storage.set_trial_user_attr(mine._trial_id, CLAIM, {"digest": digest, "sure": True})
                return "mine"
            time.sleep(_POLL_S)
            self.beat()

    def _withdraw(self, trial: FrozenTrial, result: Claimed) -> Claimed:
        self._storage.set_trial_user_attr(trial._trial_id, CLAIM, None)
        return result

    def _lease(self) -> dict[str, Any]:
        until = time.time() + self._lease_s
        return {"owner": self._owner, "host": self._host, "pid": os.getpid(), "until": until}

    def _members(self) -> dict[str, Mapping[str, Any]]:
        return {key: value for key, value in self._study.user_attrs.items() if key.startswith(_MEMBER) and value}

    def _stale(self, key: str, lease: Mapping[str, Any] | None) -> bool:
        """Whether a lease has expired, or its process on this machine is dead."""
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
    """The member name of a run directory, which is created once."""
    path = folder / _OWNER
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
