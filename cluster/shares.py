"""Several studies on one cluster: each has its fair part of it, which it may exceed while the others need less.

Their drivers tell each other what they could use through the key-value store of Ray's head, and each works out the
same parts. Nobody's trial is taken away: who has too many under way starts no other until some have ended.
"""

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

NAMESPACE = b"vaesearch.shares"
BEAT_S = 1.0
GONE_AFTER_S = 15.0  # without a beat
FORGOTTEN_AFTER_S = 600.0  # then its entry goes, too

EPSILON = 1e-9


@dataclass(frozen=True)
class Claim:
    """What a study could use. Two studies with trials of different sizes have different slots on the same cluster."""

    slots: int  # trials at once, had it the cluster to itself
    wanted: int  # trials that it has under way or could start
    used_s: float = 0.0  # of the whole cluster's time; the slot that not all can have goes to who had the least


def shared_out(claims: Mapping[str, Claim]) -> dict[str, int]:
    """How many trials each study may have under way: filled slot by slot, always that of the smallest part."""
    given = dict.fromkeys(claims, 0)
    free = 1.0
    while True:
        open_claims = [
            (given[name] / claim.slots, claim.used_s, name)
            for name, claim in claims.items()
            if given[name] < min(claim.wanted, claim.slots) and 1 / claim.slots <= free + EPSILON
        ]
        if not open_claims:
            return given
        name = min(open_claims)[2]
        given[name] += 1
        free -= 1 / claims[name].slots


class Shares:
    """One study's side of it, as long as its driver is on the cluster."""

    def __init__(self, study: str, slots: int, most: int) -> None:
        """slots: trials at once, had it the cluster to itself. most: by its own limit."""
        self._most = most
        self._key = f"{study}:{uuid.uuid4().hex}"
        self._claim = Claim(slots, 0)
        self._heard: dict[str, _Heard] = {}  # all entries, also of drivers that are gone
        self._others: dict[str, _Heard] = {}
        self._beats = 0
        self._beat_at: float | None = None
        self._allowed = most

    def slots_for(self, wanted: int, at_work: int) -> int:
        """How many trials may be under way now. wanted: how many could be; at_work: how many have a worker.

        To be called every second or so: who is silent is given up. Cheap.
        """
        now = time.monotonic()
        if self._beat_at is None or now - self._beat_at >= BEAT_S:
            used_s = 0.0 if self._beat_at is None else (now - self._beat_at) * at_work / self._claim.slots
            self._beat_at, self._beats = now, self._beats + 1
            self._listen(now)
            self._claim = replace(self._claim, wanted=min(wanted, self._most), used_s=self._used_before() + used_s)
            self._tell()
            others = {name: heard.claim for name, heard in self._others.items()}
            self._allowed = shared_out(others | {self._key: self._claim})[self._key]
        return self._allowed

    def leave(self) -> None:
        """To be called while the cluster is still joined."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._key, namespace=NAMESPACE)

    def _used_before(self) -> float:
        """Who comes later starts where the one with the least is, not with all that he missed."""
        if self._beats > 1 or not self._others:
            return self._claim.used_s
        return min(heard.claim.used_s for heard in self._others.values())

    def _tell(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        entry = {"beat": self._beats} | asdict(self._claim)
        _internal_kv_put(self._key, json.dumps(entry).encode(), overwrite=True, namespace=NAMESPACE)

    def _listen(self, now: float) -> None:
        """Clocks differ from host to host, so a driver counts as gone by how long its beat has stood still here."""
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

        found: dict[str, _Heard] = {}
        for key in _internal_kv_list(b"", namespace=NAMESPACE):
            name = key.decode()
            content = _internal_kv_get(key, namespace=NAMESPACE) if name != self._key else None
            if content is None:
                continue
            try:
                entry = json.loads(content)
                beat, claim = entry.pop("beat"), Claim(**entry)
            except (TypeError, ValueError, KeyError):
                continue  # of another version
            before = self._heard.get(name)
            at = before.at if before is not None and before.beat == beat else now
            if now - at < FORGOTTEN_AFTER_S:
                found[name] = _Heard(claim, beat, at)
            else:
                _internal_kv_del(key, namespace=NAMESPACE)
        self._heard = found
        self._others = {name: heard for name, heard in found.items() if now - heard.at < GONE_AFTER_S}


@dataclass(frozen=True)
class _Heard:
    claim: Claim
    beat: int
    at: float  # when it was new, by this host's clock
