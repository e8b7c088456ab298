"""Files and command lines at random: each is taken, or refused in one line that the user can act on; none runs code."""

import ast
import copy
import dataclasses
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from typer.main import get_command

import smpq_ext
from python_tests.results import a_result
from smpq_ext import cli, inputs
from smpq_ext.core import FLOAT_BITS, Grid, Plan, Result, SmpqError
from smpq_ext.report import page, tables
from smpq_ext.store import SqliteStore

PACKAGE = Path(smpq_ext.__file__).parent
NETS = """
from collections import OrderedDict
from torch import nn

def net():
    layers = {"a": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "middle": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict(layers))

def no_layers():
    return nn.ReLU()
"""
NAMES: dict = {}
exec(NETS, NAMES)
MODEL = NAMES["net"]()


def saved():
    """The JSON objects of a small result and its plan, with grids and statistics that fit the model."""
    result = a_result(1, names=["a"])
    slots = len(result.space.slots)
    pairs = dict(pairs=np.full((slots, slots), 0.5), pair_errors=np.full((slots, slots), 0.1))
    attribution = dataclasses.replace(result.attribution, reason="odd: it missed least", **pairs)
    result = dataclasses.replace(result, trace=result.trace[:3], attribution=attribution)
    for name, width in result.plan.bits.items():
        if width != FLOAT_BITS:
            channels = {"a.weight": (4,), "head.weight": (2,)}.get(name, ())
            scale, zero = np.full(channels, 0.1, np.float32), np.zeros(channels, np.float32)
            result.plan.grids[name] = Grid(
                scale, zero, -(2 ** (width - 1)), 2 ** (width - 1) - 1, 0 if channels else None
            )
    result.plan.statistics["norm"] = np.zeros(4, np.float32), np.ones(4, np.float32)
    return result


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with a result, a model, weights and data."""
    folder = tmp_path_factory.mktemp("fuzz")
    saved().save(folder / "saved")
    (folder / "fuzz_nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    np.savez(folder / "good.npz", x=rng.random((8, 3)), y=np.arange(8) % 2)
    (folder / "notes.txt").write_text("hello")
    (folder / "images" / "a").mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (4, 3), np.uint8)).save(folder / "images" / "a" / "0.png")
    torch.save(MODEL.state_dict(), folder / "w.pt")
    SqliteStore(folder / "kept.sqlite").close()
    return folder


@pytest.fixture
def smpq(room, monkeypatch, capsys):
    """Runs a command line inside this process; it has to end well, or with one line and exit code 2."""
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("smpq_ext.doctor.examine", list)  # it measures, for seconds
    monkeypatch.setattr(cli, "app", get_command(cli.app))  # which the call would build anew, for milliseconds

    def run(*arguments):
        sys.argv = ["smpq", *arguments]
        code = cli.main()
        said, errors = capsys.readouterr()
        lines = errors.splitlines()
        assert code in (0, 2), errors
        if code == 2 and arguments:
            assert len(lines) == 1 and lines[0].startswith("smpq: ") and len(lines[0]) > 10, errors
        return code, said, errors

    monkeypatch.setattr(sys, "argv", sys.argv)
    return run


# --- JSON ------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["\ud800", "\x00", "<script>", "a.weight", "..", "x" * 5000]
)
NUMBERS = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, 1, -1, 2, 8, 16, 17, 31, 32, 33, 2**31, 2**63, 10**400, 1e100, -1e100, 1e-320, 1e300])
)


def nested(depth):
    return (
        nested(depth - 1) | st.lists(nested(depth - 1), max_size=3)
        if depth
        else st.none() | st.booleans() | NUMBERS | TEXT
    )


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ANY = nested(1) | st.dictionaries(TEXT, NUMBERS, max_size=2) | st.sampled_from([50, 300]).map(deep)


def places(node):
    """Every (container, key) of a tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items):
        yield node, key
        yield from places(child)


@st.composite
def mutated(draw, tree, values=ANY):
    """The tree with one to three of its nodes replaced, removed, doubled or moved."""
    tree = {"root": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        nodes = list(places(tree))
        parent, key = nodes[draw(st.integers(0, len(nodes) - 1))]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "insert", "copy"]))
        other, place = nodes[draw(st.integers(0, len(nodes) - 1))]
        value = copy.deepcopy(other[place]) if change == "copy" else draw(values)
        if change in ("replace", "copy") or parent is tree:
            parent[key] = value
        elif change == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, value)
        else:
            parent[draw(TEXT)] = value
    return tree["root"]


@st.composite
def damaged(draw, data):
    """The bytes with one to four slices cut out or replaced, or the end cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, len(data)]))
        data = data[:start] + draw(st.binary(max_size=8)) + data[start + length :]
    return data


def loaded(read, *arguments):
    """What `read` gives, or None where it refuses in one line."""
    try:
        return read(*arguments)
    except SmpqError as error:
        assert str(error) and "\n" not in str(error)
        return None


def uses(result):
    """All that a result is for, but the drawing."""
    checked = page.render(result, {})
    assert "<script" not in checked
    for table in (tables.layers, tables.costs, tables.losses, tables.run, tables.left_out):
        table(result).text(most=5)
    applied(result.plan)


def applied(plan):
    """The tiny model at the plan, run once, where the plan fits it."""
    try:
        model = smpq_ext.apply(MODEL, plan)
    except SmpqError:
        return
    model(torch.zeros(2, 3))


@settings(max_examples=1500)
@given(data=st.data())
def test_result_json_of_any_shape_is_read_or_refused(data, room):
    folder = room / "mutated"
    files = {name: (room / "saved" / name).read_text() for name in ("result.json", "plan.json")}
    folder.mkdir(exist_ok=True)
    name = data.draw(st.sampled_from(list(files)))
    files[name] = json.dumps(data.draw(mutated(json.loads(files[name]))))
    for name, text in files.items():
        (folder / name).write_text(text)
    if (result := loaded(Result.load, folder)) is not None:
        uses(result)


@settings(max_examples=1500)
@given(data=st.data())
def test_plan_json_of_any_shape_is_read_or_refused(data):
    if (plan := loaded(Plan.from_json, data.draw(mutated(saved().plan.to_json())))) is not None:
        applied(plan)
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).to_json() == plan.to_json()


@settings(max_examples=500)
@given(data=st.data())
def test_damaged_json_is_read_or_refused(data, room):
    folder = room / "damaged"
    folder.mkdir(exist_ok=True)
    broken = data.draw(st.sampled_from(["result.json", "plan.json"]))
    for name in ("result.json", "plan.json"):
        text = (room / "saved" / name).read_bytes()
        (folder / name).write_bytes(data.draw(damaged(text)) if name == broken else text)
    if (result := loaded(Result.load, folder)) is not None:
        uses(result)


@settings(max_examples=60)
@given(data=st.data())
def test_a_result_that_is_read_can_be_drawn(data, room, smpq):
    folder = room / "drawn"
    folder.mkdir(exist_ok=True)
    tree = data.draw(mutated(json.loads((room / "saved" / "result.json").read_text()), NUMBERS | TEXT))
    (folder / "result.json").write_text(json.dumps(tree))
    (folder / "plan.json").write_text((room / "saved" / "plan.json").read_text())
    if smpq("report", "drawn")[0] == 0:
        for figure in (folder / "figures").iterdir():
            ElementTree.parse(figure)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("result.json", '"measured_loss": 0.4567', '"measured_loss": "0.4567"', "measured_loss: a number"),
        ("result.json", '"measured_loss": 0.4567', '"measured_loss": NaN', "measured_loss: a number"),
        ("result.json", '"evaluations": 1234', '"evaluations": Infinity', "evaluations: a whole number"),
        ("result.json", '"evaluations": 1234', '"evaluations": true', "evaluations: a whole number"),
        ("result.json", '"evaluations": 1234', '"evaluations": 1, "evaluations": 1', "a key is there twice"),
        ("result.json", '"evaluations": 1234', '"evaluations": ' + "9" * 5000, "result.json: Exceeds the limit"),
        ("result.json", '"evaluations": 1234', '"evaluations": ' + "[" * 100_000, "recursion"),
        ("result.json", '"evaluations": 1234', '"evaluations": 1, "more": 1', "'more' is no field"),
        ("result.json", '"evaluations": 1234,', "", "evaluations is missing"),
        ("result.json", '"weight-bits": 3.0', '"weight-bits": 0', "budget: 'weight-bits' is a number above 0"),
        ("result.json", '"scores": [', '"scores": [[1.0],', "scores: a number"),
        ("result.json", '"scores": [', '"scores": [[1.0, 1.0, 1.0, 1.0, 1.0],', "scores: numbers of shape (2, 5)"),
        ("result.json", '"kind": "weight"', '"kind": "bias"', "space.slots[0].kind: weight or activation"),
        ("result.json", '"layer": "a"', '"layer": "\\ud800"', "space.slots[0].layer: text"),
        ("plan.json", '"version": 1', '"version": 2', "version 2 is not known"),
        ("plan.json", '"axis": 0', '"axis": null', "grids['a.weight'].scale, zero_point: one number each"),
        ("plan.json", '"quant_min": -', '"quant_min": ', "quant_min, quant_max: ascending codes"),
        ("plan.json", '"head.weight": 8', '"head.weight": 20', "bits of 'head.weight': a width from 1 to 16"),
        ("plan.json", '"head.weight": 8', '"head.weight": 4', "plan: 'head.weight' has width 4"),
        ("plan.json", '"statistics": {"norm": [', '"statistics": {"norm": [[0.0], ', "['norm']: a list of 2"),
    ],
)
def test_the_field_that_is_wrong_is_named(file, old, new, said, smpq, room, tmp_path):
    saved().save(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    code, _, errors = smpq("report", str(tmp_path))
    assert code == 2 and said in errors


def test_folders_in_place_of_files_are_refused(smpq, tmp_path):
    (tmp_path / "result.json").mkdir()
    assert "Is a directory" in smpq("report", str(tmp_path))[2]


def test_what_is_not_finite_is_saved_as_null_and_read_as_infinite(tmp_path):
    result = saved()
    result.attribution.standard_errors[:] = np.inf, np.nan
    result.score_errors[:] = np.inf
    result.save(tmp_path)
    again = Result.load(tmp_path)
    assert np.isinf(again.score_errors).all() and np.isinf(again.attribution.standard_errors).all()
    page.write(again, tmp_path)


# --- weights, data and stores ----------------------------------------------------------------------------------------


def as_npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def as_pt(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def as_image(kind):
    file = io.BytesIO()
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(5, 4, 3)).save(file, kind)
    return file.getvalue()


WEIGHTS = save(MODEL.state_dict())
HEADER = json.loads(WEIGHTS[8 : 8 + int.from_bytes(WEIGHTS[:8], "little")])


@st.composite
def safetensors(draw):
    """Bytes whose header is a mutated one."""
    header = json.dumps(draw(mutated(HEADER))).encode()
    length = draw(st.sampled_from([len(header)] * 5 + [0, 2**31, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + WEIGHTS[8 + int.from_bytes(WEIGHTS[:8], "little") :]


def weights_of(path):
    inputs.model("fuzz_nets:net", path)


@pytest.mark.filterwarnings("ignore")  # of torch, about what it reads
@pytest.mark.parametrize(
    ("name", "contents", "cases"),
    [
        ("w.safetensors", safetensors(), 800),
        ("w.safetensors", damaged(WEIGHTS), 200),
        ("w.safetensors", st.binary(max_size=64), 200),
        ("w.pt", damaged(as_pt(MODEL.state_dict())), 100),
        ("w.pt", damaged(pickle.dumps({"a": 1})), 100),
        ("w.pt", nested(1).map(lambda x: as_pt({"a": x, 1: torch.zeros(1)})), 50),
    ],
)
def test_weights_of_any_shape_are_read_or_refused(name, contents, cases, room, monkeypatch):
    monkeypatch.syspath_prepend(str(room))

    @settings(max_examples=cases)
    @given(contents=contents)
    def check(contents):
        (room / f"any{name}").write_bytes(contents)
        loaded(weights_of, room / f"any{name}")

    check()


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it reads
@pytest.mark.parametrize(
    ("name", "contents", "cases"),
    [
        ("any.npz", damaged(as_npz(x=np.zeros((4, 3)), y=np.arange(4))), 300),
        ("any.npz", st.binary(max_size=64), 100),
        *((f"images/{kind}/0/0.{kind}", damaged(as_image(kind)), 60) for kind in ("png", "gif", "bmp", "tiff", "jpeg")),
        ("any.sqlite", None, 200),
    ],
)
def test_data_of_any_shape_are_read_or_refused(name, contents, cases, room):
    path = room / "any" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = (room / "kept.sqlite").read_bytes()

    def read():
        if path.suffix == ".sqlite":
            store = SqliteStore(path)
            store.read("study")
            store.close()
        else:
            inputs.data(str(path if path.suffix == ".npz" else path.parent.parent))

    @settings(max_examples=cases)
    @given(contents=damaged(whole) if contents is None else contents)
    def check(contents):
        path.write_bytes(contents)
        loaded(read)

    check()


class Payload:
    """Its pickle makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_file_runs_code(room, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(room))
    evil = Payload(tmp_path / "ran")
    array = np.empty(1, object)
    array[0] = evil
    plain = pickle.dumps(evil)
    pickle.loads(plain)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with zipfile.ZipFile(tmp_path / "zipped.npz", "w") as file:
        file.writestr("x.npy", plain)
        file.writestr("y.npy", plain)
    files = {"zipped.pt": as_pt({"a": evil}), "plain.pt": plain, "plain.npz": plain, "plain.safetensors": plain}
    files |= {"array.npz": as_npz(x=array, y=array), "old.pth": io.BytesIO()}
    torch.save({"a": evil}, files["old.pth"], _use_new_zipfile_serialization=False)
    files["old.pth"] = files["old.pth"].getvalue()
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    for path in [tmp_path / name for name in (*files, "zipped.npz")]:
        with pytest.raises(SmpqError, match=r"^(data|weights): "):
            inputs.data(str(path)) if path.suffix == ".npz" else weights_of(path)
        assert not (tmp_path / "ran").exists(), path.name


def test_the_package_unpickles_nothing():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in ("eval", "exec") and not called.endswith(("_object", "_object_list")), path
                assert called != "torch.load" or given.get("weights_only") == "True", path
                assert called != "np.load" or given.get("allow_pickle") == "False", path


# --- the command line ------------------------------------------------------------------------------------------------

WORDS = """- -- = , 0 -1 1.5 nan inf 1e400 none ² ٣ \udcff 中 %s {} [red] * ~ . .. : a:b a.py:b =8 a=8 a=float \x00"""
ODD = st.sampled_from([*WORDS.split(" "), "", " ", "\n", "9" * 30, "9" * 5000, "a=" + "9" * 5000, "x" * 5000])
ODD |= st.text(st.characters(exclude_characters="/"), max_size=6)
GOOD = {
    "--model": ["fuzz_nets.py:net", "fuzz_nets:net", "fuzz_nets.py:no_layers", "fuzz_nets.py:absent", "absent.py:net"],
    "--data": ["good.npz"] * 9 + ["images"] * 3 + ["notes.txt", "absent.npz", "fuzz_nets.py:net", "."],
    "--budget": [
        "weight-bits=3",
        "weight-bits=3,activation-bits=4",
        "bytes=20",
        "bitops=0.1",
        "weight-bits=3,weight-bits=4",
    ],
    "--bits": ["2,4,8", "8,2", "2,2", "4", "1,16", "0", "17"],
    "--activation-bits": ["none", "2,4", "8"],
    "--method": ["uniform", "single", "sqnr", "absent"],
    "--evaluations": ["1", "40", "0", "-3"],
    "--seconds": ["0", "-1"],
    "--seed": ["0", "9223372036854775807", "-1"],
    "--loss": ["kl", "cross-entropy", "mse"],
    "--renormalize": ["auto", "on", "off", "maybe"],
    "--fixed": ["none", "a=8", "middle=float", "head.weight=4", "absent=3", "0=99"],
    "--weights": ["w.pt", "notes.txt", "absent.safetensors", "images"],
    "--device": ["cpu", "cuda:99", "warp", "meta", "cpu:3", "mps"],
    "--batch-size": ["1", "3", "0"],
    "--samples": ["1", "5", "9", "0"],
    "--image-size": ["4", "0", "-4"],
    "--mean": ["0.5", "0.5,0.5,0.5", "nan", "inf"],
    "--std": ["0.5", "0", "1,2", "nan"],
    "--out": ["out", "notes.txt", "notes.txt/out", "x" * 300, "saved"],
    "--store": ["kept.sqlite", "notes.txt", "absent/store", "images", ":memory:"],
}
NEEDED = ["--model", "--data", "--budget"]


@st.composite
def search(draw, odd=4):
    """The arguments of a search; of its values about one in `odd` is an odd one."""
    options = NEEDED + draw(st.lists(st.sampled_from(list(GOOD)), max_size=5))
    found = ["search"]
    for option in options:
        good = draw(st.integers(0, odd))
        found += [option, draw(st.sampled_from(GOOD[option])) if good else draw(ODD)]
    return found


STRAY = ODD | st.sampled_from(
    ["search", "report", "list", "doctor", "-h", "--help", "--debug", "--no-such", "saved", *GOOD]
)


@settings(max_examples=2500)
@given(arguments=st.lists(STRAY, max_size=6))
def test_any_words_are_understood_or_refused(arguments, smpq):
    smpq(*(a for a in arguments if a != "--debug"))


@settings(max_examples=2500)
@given(arguments=search())
def test_any_search_that_is_no_model_s_is_refused(arguments, smpq):
    assert smpq(*arguments, "--model", "fuzz_nets.py:no_layers")[0] == 2


@pytest.mark.filterwarnings("ignore")  # of torch, about devices
@settings(max_examples=40)
@given(arguments=search(odd=20))
def test_any_search_ends_with_a_plan_or_a_line(arguments, smpq, monkeypatch):
    monkeypatch.setattr("smpq_ext.driver.Study.seconds_per_evaluation", 1e-3)  # it takes one to measure
    smpq(*arguments, "--model", "fuzz_nets.py:net", "--method", "uniform")
