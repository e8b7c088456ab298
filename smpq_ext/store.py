"""Every evaluation, kept as soon as it is known: running again is resuming."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Assignments, Evaluator, Mixtures, SmpqError, Store, Values

SCHEMA = 2
SAME, SAME_ZERO = 4e-3, 1e-5  # share of a value by which rounding on another machine may move it, and of one near 0
SHOWS = 1e-3  # a value that is not near 0


class SqliteStore:
    """Evaluations in an SQLite file that several processes may share; what `append` returned from survives a crash.

    The folder of the file is made where there is none.

    Raises SmpqError where the file cannot be opened or written, is no such database, is damaged (every row has a
    checksum, which SQLite's own pages have not), or has another schema version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with self._clear_errors():
            Path(self.path).absolute().parent.mkdir(parents=True, exist_ok=True)
            # autocommit, so that transactions are where they are written
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._database.close()
                raise

    def _open(self) -> None:
        # no write lock on a finished file: SQLite grants it in no order, and writers would starve beside many openers
        version = self._version()
        if version == 0:
            with self._database:
                self._database.execute("BEGIN IMMEDIATE")
                version = self._version()  # again: several processes may create the file at once
                (tables,) = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if version == 0 and tables == 0:
                    self._database.execute(
                        "CREATE TABLE evaluations (study TEXT, key BLOB, groups BLOB, checksum BLOB, "
                        "PRIMARY KEY (study, key)) WITHOUT ROWID"
                    )
                    self._database.execute(f"PRAGMA user_version = {SCHEMA}")
                    version = SCHEMA
        if version != SCHEMA:
            raise SmpqError(
                f"store: {self.path} has schema version {version}, this release reads {SCHEMA}; name another file"
            )
        # the journal stays a rollback journal: a switch to WAL does not wait for other processes that open the file
        self._database.execute("PRAGMA synchronous = FULL")

    def _version(self) -> int:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        return int(version)

    def read(self, study: str) -> dict[bytes, NDArray[np.float64]]:
        """All that is known of the study: key to values [groups]."""
        with self._clear_errors():
            rows = self._database.execute(
                "SELECT key, groups, checksum FROM evaluations WHERE study = ?", (study,)
            ).fetchall()
            if any(checksum != _checksum(study, key, groups) for key, groups, checksum in rows):
                raise ValueError("a row does not have its checksum")
            return {key: np.frombuffer(groups, "<f8").astype(np.float64) for key, groups, _ in rows}

    def append(self, study: str, rows: Mapping[bytes, NDArray[np.float64]]) -> None:
        """Add rows, values [groups] by key, in one transaction; a key that is known keeps its first values."""
        values = {key: np.asarray(groups, "<f8").tobytes() for key, groups in rows.items()}
        data = [(study, key, groups, _checksum(study, key, groups)) for key, groups in values.items()]
        with self._clear_errors(), self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?)", data)

    def close(self) -> None:
        """Close the file; the store cannot be used any more."""
        self._database.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise SmpqError(f"store: cannot use {self.path} ({error})") from error
        except (sqlite3.DatabaseError, ValueError) as error:
            raise SmpqError(
                f"store: {self.path} is damaged or no store of this library ({error}); name another file"
            ) from error


def _checksum(study: str, key: bytes, groups: bytes) -> bytes:
    # of the repr, for damage may turn bytes into another type or move them from one column into the next
    return hashlib.sha256(repr((study, key, groups)).encode()).digest()[:8]


class MemoryStore:
    """Evaluations in memory, for tests and for searches that need no resuming."""

    def __init__(self) -> None:
        self._studies: dict[str, dict[bytes, bytes]] = {}

    def read(self, study: str) -> dict[bytes, NDArray[np.float64]]:
        """All that is known of the study: key to values [groups]."""
        return {key: np.frombuffer(groups).copy() for key, groups in self._studies.get(study, {}).items()}

    def append(self, study: str, rows: Mapping[bytes, NDArray[np.float64]]) -> None:
        """Add rows, values [groups] by key; a key that is known keeps its first values."""
        known = self._studies.setdefault(study, {})
        for key, groups in rows.items():
            known.setdefault(key, np.asarray(groups, np.float64).tobytes())


def differences(store: Store, fingerprint: str, digests: Mapping[str, str]) -> tuple[str, ...]:
    """The parts that tell a study from the nearest other one in the store, none where it is known; keeps its digests.

    digests: part -> hexadecimal digest.
    """
    names = sorted(digests)
    study, key = f"digests of {', '.join(names)}", fingerprint.encode()
    own = np.array([float(int(digests[name][:12], 16)) for name in names])  # 48 bits: any store can keep them exactly
    known = store.read(study)
    if key in known:
        return ()
    store.append(study, {key: own})
    apart = [np.flatnonzero(own != other) for other in known.values()]
    return tuple(names[k] for k in min(apart, key=len, default=()))


class Recorded:
    """An evaluator that asks another one only for rows that the store does not know, and keeps each batch at once.

    An assignment is its own key, a mixture goes by its sha256, and a one-hot mixture by the assignment that it is: the
    two may differ by rounding, and the one asked first stands. `asked` counts the rows asked, `computed` those that the
    inner evaluator had to answer, those of parts by their share of the samples.

    Raises SmpqError naming the row whose value is not finite: it is not stored, the others of its batch are, where the
    inner evaluator tells them; and where a row that the store knows has another value now.
    """

    def __init__(self, evaluator: Evaluator, store: Store) -> None:
        self.evaluator = evaluator
        self.fingerprint = evaluator.fingerprint
        self.space = evaluator.space
        self.slots = evaluator.slots
        self.groups = evaluator.groups
        self.rows_per_batch = evaluator.rows_per_batch
        self._asked = self._computed = 0.0
        self._parts: dict[int, tuple[tuple[float, Recorded], ...]] = {}  # with their shares, by how many
        self._store = store
        # as bytes, which Python keeps by themselves: arrays would lie between the blocks of forwards, and fray the heap
        self._known = {key: groups.tobytes() for key, groups in store.read(self.fingerprint).items()}
        self._derivatives: dict[bytes, NDArray[np.float64]] | None = None  # as known, once they are asked
        self._check()

    def _check(self) -> None:
        """Ask once more for what is known: no fingerprint sees everything.

        That is the assignment of the highest widths, where rounding differs least between machines, of those whose
        value is not near 0, where a change would not show; of all, where there are none.
        """
        known = [key for key in self._known if key[:1] == b"a"]
        if not known:
            return
        values = {key: float(np.frombuffer(self._known[key]) @ self.groups) for key in known}
        key = max(known, key=lambda key: (abs(values[key]) > SHOWS, sum(key[1:])))
        row, before = np.frombuffer(key[1:], np.int8)[None], values[key]
        now = float(np.asarray(self.evaluator.by_group(row), np.float64)[0] @ self.groups)
        if not abs(now - before) <= SAME * abs(before) + SAME_ZERO:
            raise SmpqError(
                f"store: an assignment whose value it has as {before:.6g} has {now:.6g} now; something has changed "
                "that the fingerprint does not see, such as what the model or the loss reads from elsewhere, or the "
                "loss is random; give another store"
            )

    @property
    def asked(self) -> int:
        of_parts = sum(share * part.asked for parts in self._parts.values() for share, part in parts)
        return round(self._asked + of_parts)

    @property
    def computed(self) -> int:
        of_parts = sum(share * part.computed for parts in self._parts.values() for share, part in parts)
        return round(self._computed + of_parts)

    def __call__(self, mixtures: Mixtures | Assignments) -> Values:
        """Mixtures [n, slots, candidates] or assignments [n, slots] to values [n]."""
        # a row's sum must not depend on how many rows were asked with it, as a matrix product's would
        return np.asarray((self.by_group(mixtures) * self.groups).sum(axis=1), np.float64)

    def by_group(self, mixtures: Mixtures | Assignments) -> NDArray[np.float64]:
        """The same for each group of calibration samples, [n, groups]."""
        rows: Any = np.asarray(mixtures)
        keys = self._keys(rows)
        self._asked += len(rows)
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        # Sorted, so that the rows of a batch share what comes before they part.
        unknown = sorted((i for key, i in first.items() if key not in self._known), key=lambda i: rows[i].tobytes())
        batch = max(self.rows_per_batch, 1)
        for start in range(0, len(unknown), batch):
            wanted = unknown[start : start + batch]
            values = np.asarray(self.evaluator.by_group(rows[wanted]), np.float64)
            self._computed += len(wanted)
            good = [bool(np.isfinite(v).all()) for v in values]
            fresh = {keys[i]: v.copy() for i, v, g in zip(wanted, values, good, strict=True) if g}
            self._store.append(self.fingerprint, fresh)
            self._known |= {key: groups.tobytes() for key, groups in fresh.items()}
            if not all(good):
                bad = wanted[good.index(False)]
                raise SmpqError(f"evaluation: row {bad} has no finite value, {self._describe(rows[bad])}")
        return np.frombuffer(b"".join(self._known[key] for key in keys)).reshape(len(rows), len(self.groups)).copy()

    def derivatives(self, mixtures: Mixtures) -> NDArray[np.float64]:
        """Of the value by the shares of mixtures [n, slots, candidates]; kept, too, and asked once."""
        study = f"{self.fingerprint} derivatives"
        keys = self._keys(mixtures)
        self._asked += len(keys)
        if self._derivatives is None:
            self._derivatives = self._store.read(study)
        new = [k for k, key in enumerate(keys) if key not in self._derivatives]
        if new:
            found = self.evaluator.derivatives(mixtures[new])
            if not np.isfinite(found).all():
                raise SmpqError("evaluation: the derivatives of the loss by the shares of a mixture are not finite")
            self._computed += len(new)
            fresh = {keys[k]: row.ravel() for k, row in zip(new, found, strict=True)}
            self._store.append(study, fresh)
            self._derivatives |= fresh
        return np.array([self._derivatives[key] for key in keys]).reshape(mixtures.shape)

    def parts(self, most: int) -> tuple[tuple[float, Recorded], ...]:
        """At most so many, each on groups of samples of its own, with its share of the value."""
        most = min(most, len(self.groups))
        if most not in self._parts:
            parts = self.evaluator.parts(most)
            self._parts[most] = tuple((share, Recorded(part, self._store)) for share, part in parts if len(parts) > 1)
        return self._parts[most] or ((1.0, self),)

    def _keys(self, rows: NDArray[Any]) -> list[bytes]:
        slots, width = len(self.space.slots), self.space.width_count
        if rows.shape[1:] == (slots,) and rows.dtype.kind in "iu":
            return [b"a" + row.tobytes() for row in rows.astype(np.int8)]
        if rows.shape[1:] == (slots, width) and rows.dtype.kind == "f":
            mixtures = np.ascontiguousarray(rows, np.float32) + np.float32(0)  # -0 is 0
            one_hot = self.space.is_one_hot(mixtures)
            chosen = mixtures.argmax(axis=2).astype(np.int8)
            return [
                b"a" + c.tobytes() if hot else b"m" + hashlib.sha256(m.tobytes()).digest()
                for hot, c, m in zip(one_hot, chosen, mixtures, strict=True)
            ]
        raise ValueError(
            f"rows: expected integers [n, {slots}] or floats [n, {slots}, {width}], got {rows.dtype} {rows.shape}"
        )

    def _describe(self, row: NDArray[Any]) -> str:
        if row.ndim == 2:
            return "a mixture"
        return "bits " + " ".join(str(c[int(a)]) for c, a in zip(self.space.candidates, row, strict=True))
