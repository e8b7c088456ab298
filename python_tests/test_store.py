import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from contracts import EvaluatorContract, FakeEvaluator, StoreContract
from hypothesis import given, settings
from hypothesis import strategies as st

from smpq_ext.core import Slot, SmpqError, Space
from smpq_ext.store import MemoryStore, Recorded, SqliteStore, differences

ROOT = Path(__file__).parent.parent


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self):
        return MemoryStore()


def test_the_folder_of_a_file_is_made(tmp_path):
    path = tmp_path / "some" / "more" / "evaluations.sqlite"
    with closing(SqliteStore(path)) as store:
        store.append("study", {b"key": np.ones(1)})
        assert store.read("study")[b"key"] == 1
    (tmp_path / "file").touch()
    with pytest.raises(SmpqError, match=r"^store: cannot use .*Not a directory"):
        SqliteStore(tmp_path / "file" / "more" / "evaluations.sqlite")


class TestSqlite(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        store = SqliteStore(tmp_path / "store.db")
        yield store
        store.close()

    def test_another_process_opens_what_one_wrote(self, store):
        store.append("one", {b"k": np.array([1.0])})
        with closing(SqliteStore(store.path)) as again:
            assert again.read("one")[b"k"][0] == 1
            again.append("one", {b"l": np.array([2.0])})
        assert store.read("one").keys() == {b"k", b"l"}

    def test_opening_waits_for_no_writer(self, store):
        with closing(sqlite3.connect(store.path, isolation_level=None)) as writer:
            # not WAL: the switch to it fails where another process has the file open, instead of waiting
            assert writer.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            writer.execute("BEGIN IMMEDIATE")
            with closing(SqliteStore(store.path)) as again:
                assert again.read("one") == {}

    def test_a_batch_is_kept_whole_or_not_at_all(self, store):
        with pytest.raises(TypeError):
            store.append("one", {b"k": np.array([1.0]), b"l": object()})
        assert store.read("one") == {}
        store.append("one", {b"k": np.array([1.0])})
        assert store.read("one").keys() == {b"k"}


APPENDER = """
import sys
import time
import numpy as np
from smpq_ext.store import SqliteStore
store = SqliteStore(sys.argv[1])
for i in range(10**9):
    store.append("study", {f"{sys.argv[2]}{i}-{j}".encode(): np.array([i + j / 8, -i]) for j in range(3)})
    print(i, flush=True)
    time.sleep(0.005)  # SQLite's lock is not fair: without a pause, and where fsync is slow, the others never get it
"""


def appender(path, name):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(path), name], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def test_what_was_reported_survives_a_kill_also_of_several_writers(tmp_path):
    path = tmp_path / "store.db"
    writers = {name: appender(path, name) for name in "abc"}
    reported = {}
    for name, process in writers.items():
        for _ in range(10):
            reported[name] = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        reported[name] = max([reported[name], *map(int, process.stdout.read().split("\n")[:-1])])
        process.wait()
        process.stdout.close()
    with closing(SqliteStore(path)) as store:
        found = store.read("study")
    for name, last in reported.items():
        assert last >= 9
        for i in range(last + 1):
            for j in range(3):
                np.testing.assert_array_equal(found[f"{name}{i}-{j}".encode()], [i + j / 8, -i])
        # a batch that was not reported is there whole or not at all
        assert {j: f"{name}{last + 1}-{j}".encode() in found for j in range(3)} in (
            dict.fromkeys(range(3), True),
            dict.fromkeys(range(3), False),
        )


def test_many_may_create_and_open_it_at_once(tmp_path):
    names = [bytes([i]) for i in range(16)]
    together = Barrier(len(names))

    def use(path, name):
        together.wait()
        with closing(SqliteStore(path)) as store:
            store.append("study", {name: np.array([1.0])})
            return name in store.read("study")

    for attempt in range(5):
        path = tmp_path / f"{attempt}.db"
        with ThreadPoolExecutor(len(names)) as pool:
            assert all(pool.map(use, [path] * len(names), names))
        with closing(SqliteStore(path)) as store:
            assert store.read("study").keys() == set(names)


class TestUnusableFiles:
    def test_no_database(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("not a database, but long enough to be looked at " * 50)
        with pytest.raises(SmpqError, match=r"notes\.txt"):
            SqliteStore(path)
        assert path.read_text().startswith("not a database")

    def test_another_schema(self, tmp_path):
        path = tmp_path / "store.db"
        SqliteStore(path).close()
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA user_version = 7")
        with pytest.raises(SmpqError, match="version 7"):
            SqliteStore(path)

    def test_a_database_of_someone_else(self, tmp_path):
        path = tmp_path / "photos.db"
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE photos (name)")
        before = path.read_bytes()
        with pytest.raises(SmpqError, match="version 0"):
            SqliteStore(path)
        assert path.read_bytes() == before

    def test_a_damaged_file(self, tmp_path):
        path = tmp_path / "store.db"
        with closing(SqliteStore(path)) as store:
            store.append("one", {str(i).encode(): np.arange(64.0) for i in range(500)})
        data = bytearray(path.read_bytes())
        data[8192:-100] = os.urandom(len(data) - 8292)
        path.write_bytes(data)
        with closing(SqliteStore(path)) as store, pytest.raises(SmpqError, match="damaged"):
            store.read("one")

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(SmpqError, match="cannot use"):
            SqliteStore(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
class TestRefusedWrites:
    @pytest.fixture
    def store(self):
        """Ten rows in a store that every user may reach."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            with closing(SqliteStore(Path(folder) / "store.db")) as store:
                store.append("one", {bytes([i]): np.arange(64.0) for i in range(10)})
                yield store

    def test_a_full_disk_loses_only_what_was_not_reported(self, store):
        import resource

        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(store.path).stat().st_size + 4096, before[1]))
        reported = 10
        try:
            with pytest.raises(SmpqError, match=r"store: cannot use .*store\.db"):
                for reported in range(10, 1000):
                    store.append("one", {reported.to_bytes(2): np.arange(64.0)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert 10 < reported == len(store.read("one")) < 30
        store.append("one", {b"more": np.arange(64.0)})  # there is room again
        with closing(SqliteStore(store.path)) as again:
            assert len(again.read("one")) == reported + 1

    def test_a_file_that_cannot_be_written_answers_what_it_knows(self, store):
        path, user = Path(store.path), os.geteuid()
        path.chmod(0o444)
        path.parent.chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with closing(SqliteStore(path)) as again:
                assert len(again.read("one")) == 10
                with pytest.raises(SmpqError, match=r"store: cannot use .*store\.db .*readonly"):
                    again.append("one", {b"more": np.arange(64.0)})
                assert len(again.read("one")) == 10
            with pytest.raises(SmpqError, match="store: cannot use"):
                SqliteStore(path.with_name("other.db"))
        finally:
            os.seteuid(user)
            path.parent.chmod(0o755)


SPACE = Space(tuple(Slot(f"l{i}", "weight", 8, 8, 1) for i in range(3)), ((2, 4, 8), (2, 8), (2, 4, 8)))
DAMAGE = np.array([[3.0, 1.0, 0.1], [5.0, 0.3, 0], [2.0, 0.7, 0.2]])
ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=30)


def recorded(store=None, **settings):
    evaluator = FakeEvaluator(SPACE, DAMAGE, **settings)
    return evaluator, Recorded(evaluator, store or MemoryStore())


class TestRecorded:
    @settings(deadline=None)
    @given(st.lists(ROWS, min_size=1, max_size=4), st.integers(1, 9))
    def test_answers_as_the_evaluator_and_asks_each_row_once(self, requests, batch):
        evaluator, memory = recorded(rows_per_batch=batch)
        plain = FakeEvaluator(SPACE, DAMAGE)
        for request in requests:
            rows = np.array(request, np.int8)
            np.testing.assert_array_equal(memory.by_group(rows), plain.by_group(rows))
            np.testing.assert_allclose(memory(rows), plain(rows), rtol=1e-12)
        distinct = {row for request in requests for row in request}
        computed = [tuple(row) for request in evaluator.requests for row in request]
        assert sorted(computed) == sorted(distinct)
        assert max(len(request) for request in evaluator.requests) <= batch
        assert memory.computed == len(distinct)
        assert memory.asked == 2 * sum(len(request) for request in requests)

    def test_replay_computes_nothing_and_gives_the_same_bits(self, tmp_path):
        rows = np.array([[0, 0, 0], [2, 1, 2], [1, 0, 1]], np.int8)
        mixtures = np.random.default_rng(0).random((4, 3, 3)).astype(np.float32)
        with closing(SqliteStore(tmp_path / "s.db")) as store:
            _, memory = recorded(store)
            values = memory(rows), memory(mixtures)
        with closing(SqliteStore(tmp_path / "s.db")) as store:
            evaluator, again = recorded(store)
            # in another order and one by one: a value does not depend on the company it was asked in
            assert np.concatenate([again(row[None]) for row in rows[::-1]])[::-1].tobytes() == values[0].tobytes()
            assert again(mixtures).tobytes() == values[1].tobytes()
        assert len(evaluator.requests) == 1 and again.computed == 0  # one row is asked to see whether it is the same

    @pytest.mark.parametrize("highest", [0.3, 1e-6])  # a value near 0 would not show the change
    def test_a_study_whose_values_have_changed_is_refused(self, highest):
        damage = DAMAGE + np.array([[0, 0, highest / 3 - 0.1], [0, highest / 3 - 0.3, 0], [0, 0, highest / 3 - 0.2]])
        rows, store = np.array([[0, 0, 0], [2, 1, 2], [2, 1, 1]], np.int8), MemoryStore()
        known = Recorded(FakeEvaluator(SPACE, damage), store)(rows)
        np.testing.assert_allclose(known[1], -highest)
        for factor, same in ((1.0001, True), (1.01, False)):
            other = FakeEvaluator(SPACE, damage)
            other.by_group = lambda m, factor=factor, ask=other.by_group: factor * ask(m)
            if same:
                np.testing.assert_array_equal(Recorded(other, store)(rows), known)
            else:
                with pytest.raises(SmpqError, match=r"store: .* has .* now; .*the fingerprint does not see"):
                    Recorded(other, store)

    def test_each_batch_is_stored_before_the_next_is_asked(self):
        store = MemoryStore()
        evaluator, memory = recorded(store, rows_per_batch=2)
        seen = []
        by_group = evaluator.by_group
        evaluator.by_group = lambda m: seen.append(len(store.read("fake"))) or by_group(m)
        memory(np.array([[a, b, 0] for a in range(3) for b in range(2)], np.int8))
        assert seen == [0, 2, 4]

    def test_a_one_hot_mixture_is_its_assignment(self):
        evaluator, memory = recorded()
        rows = np.array([[0, 1, 2], [2, 0, 1]], np.int8)
        memory(rows)
        assert memory(SPACE.one_hot(rows)).tobytes() == memory(rows).tobytes()
        assert len(evaluator.requests) == 1
        memory(SPACE.one_hot(rows) * np.float32(0.5))
        assert memory.computed == 4

    def test_other_studies_are_not_looked_at(self):
        store = MemoryStore()
        _, memory = recorded(store)
        memory(SPACE.lowest()[None])
        other = FakeEvaluator(SPACE, DAMAGE)
        other.fingerprint = "other"
        again = Recorded(other, store)
        again(SPACE.lowest()[None])
        assert again.computed == 1

    def test_passes_through_what_an_evaluator_has(self):
        evaluator, memory = recorded()
        for name in ("fingerprint", "space", "slots", "rows_per_batch"):
            assert getattr(memory, name) == getattr(evaluator, name)
        assert memory.groups is evaluator.groups

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_named_and_not_kept(self, bad):
        store = MemoryStore()
        evaluator, memory = recorded(store)
        by_group = evaluator.by_group
        evaluator.by_group = lambda m: np.where((m == [2, 1, 1]).all(axis=1, keepdims=True), bad, by_group(m))
        rows = np.array([[0, 0, 0], [2, 1, 1], [1, 1, 1]], np.int8)
        with pytest.raises(SmpqError, match=r"row 1 .*bits 8 8 4"):
            memory(rows)
        assert len(store.read("fake")) == 2
        evaluator.by_group = by_group
        assert np.isfinite(memory(rows)).all()
        assert memory.computed == 4

    def test_no_rows_have_no_values(self):
        _, memory = recorded()
        assert memory.by_group(np.zeros((0, 3), np.int8)).shape == (0, 2)
        assert memory(np.zeros((0, 3, 3), np.float32)).shape == (0,)

    @pytest.mark.parametrize(
        "wrong", [np.zeros((2, 4), np.int8), np.zeros(3, np.int8), np.zeros((2, 3)), np.zeros((2, 3, 2))]
    )
    def test_other_shapes_are_refused(self, wrong):
        with pytest.raises(ValueError, match="rows: expected"):
            recorded()[1](wrong)


EVERY = np.array([[a, b, c] for a in range(3) for b in range(2) for c in range(3)], np.int8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a store of several pages and of the journal beside it, as a kill in a transaction leaves them."""
    path = tmp_path_factory.mktemp("damage") / "store.db"
    with closing(SqliteStore(path)) as store:
        recorded(store)[1](EVERY[::2])
        store.append("fake", {b"m" + bytes([i]) * 32: np.arange(2.0) for i in range(99)})
        writer = store._database
        writer.execute("PRAGMA cache_size = 1")  # pages reach the file before the end
        writer.execute("BEGIN IMMEDIATE")
        writer.executemany("INSERT INTO evaluations VALUES ('fake', ?, x'', x'')", [(bytes([i]),) for i in range(99)])
        found = path.read_bytes(), path.with_name("store.db-journal").read_bytes()
        writer.execute("ROLLBACK")
    assert len(found[0]) > 3 * 4096 and len(found[1]) > 4096
    return found


def computed(database, journal):
    """How many rows are computed when all are asked of these files, and when they are asked again."""
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        path.write_bytes(database)
        path.with_name("store.db-journal").write_bytes(journal)
        for _ in range(2):
            with closing(SqliteStore(path)) as store:
                evaluator, memory = recorded(store)
                np.testing.assert_array_equal(memory.by_group(EVERY), evaluator.by_group(EVERY))
                counts.append(memory.computed)
    return counts


def test_a_transaction_that_was_cut_off_costs_what_it_would_have_added(files):
    assert computed(*files) == [9, 0]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_is_said_or_asked_again_and_no_value_is_wrong(files, data):
    damaged = [bytearray(file) for file in files]
    file = damaged[data.draw(st.integers(0, 1))]
    if data.draw(st.booleans()):
        del file[data.draw(st.integers(0, len(file))) :]
    else:
        places = st.tuples(st.integers(0, len(file) - 1), st.integers(1, 255))
        for place, change in data.draw(st.lists(places, min_size=1, max_size=20)):
            file[place] ^= change
    try:
        computed(*damaged)
    except SmpqError as error:
        assert str(error).startswith("store: ")


def test_a_changed_bit_of_a_value_is_found(tmp_path):
    path, value = tmp_path / "store.db", np.array([0.7310585786300049])
    with closing(SqliteStore(path)) as store:
        store.append("one", {b"key": value})
    data = bytearray(path.read_bytes())
    data[data.index(value.tobytes())] ^= 1
    path.write_bytes(data)
    with closing(SqliteStore(path)) as store, pytest.raises(SmpqError, match=r"damaged .*checksum"):
        store.read("one")


def test_a_study_is_told_from_the_nearest_that_is_known(tmp_path):
    def digests(**changed):
        return {part: f"{changed.get(part, 7):064x}"[::-1] for part in ("weights", "data", "loss")}

    for store in (MemoryStore(), SqliteStore(tmp_path / "store.db")):
        assert differences(store, "a", digests()) == ()
        assert differences(store, "b", digests(loss=1, data=1)) == ("data", "loss")
        assert differences(store, "c", digests(loss=1)) == ("loss",)
        assert differences(store, "d", digests(loss=1, weights=2)) == ("weights",)
        assert differences(store, "a", digests()) == differences(store, "d", digests()) == ()
    store.close()


class TestRecordedIsAnEvaluator(EvaluatorContract):
    @pytest.fixture
    def evaluator(self):
        return Recorded(FakeEvaluator(SPACE, DAMAGE), MemoryStore())
