"""The command line: every bad input is one line and exit code 2; a search can be cut off and goes on."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from python_tests.results import a_result
from smpq_ext import cli, registry
from smpq_ext.core import Result

ROOT = Path(__file__).parent.parent

NETS = """
import os
import signal
import sqlite3
import time
from contextlib import closing
import numpy as np
import torch
from torch import nn

def net(last=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, last),
    )

ready = net()
words = "words"

class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, x):
        if "HOLD_AT" in os.environ:
            with closing(sqlite3.connect(os.environ["HOLD_IN"])) as store:
                (known,) = store.execute("SELECT count(*) FROM evaluations WHERE length(study) = 64").fetchone()
            if known >= int(os.environ["HOLD_AT"]):
                signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
                print("held", flush=True)
                time.sleep(600)
        return self.inner(x - x.mean(0))  # mixes the samples, so that evaluations run one by one

def held():
    return Held()

def number():
    return 3

def raises():
    raise RuntimeError("two\\nlines")

def nan_weights():
    broken = net()
    with torch.no_grad():
        broken[3].weight[0] = float("nan")
    return broken

def no_layers():
    return nn.Sequential(nn.Flatten(), nn.ReLU())

class Log(nn.Module):
    def forward(self, x):
        return torch.log(-1 - x.abs())

def nan_loss():
    return nn.Sequential(net(), Log())

def two_classes():
    return net(2)

def batches():
    for k in range(2):
        yield torch.full((8, 1, 8, 8), k / 2), torch.arange(8) % 3

def arrays():
    return np.random.default_rng(0).random((32, 1, 8, 8)), np.arange(32) % 3

def floats():
    return np.zeros((8, 1, 8, 8)), np.zeros(8)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with models and data, good and bad."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_nets.py").write_text(NETS)
    (folder / "cli_broken.py").write_text("import no_such_package_at_all\n")
    (folder / "cli_syntax.py").write_text("def (\n")
    (folder / "cli_missing.py").write_text("open('no_such_file')\n")
    rng = np.random.default_rng(0)
    x, y = rng.random((48, 1, 8, 8)), np.arange(48) % 3
    np.savez(folder / "good.npz", inputs=x, targets=y)
    np.savez(folder / "xy.npz", x=x.astype(np.float32), y=y)
    np.savez(folder / "only_x.npz", x=x)
    np.savez(folder / "other.npz", a=x, b=y)
    np.savez(folder / "uneven.npz", x=x, y=y[:-1])
    np.savez(folder / "nan.npz", x=np.where(x > 0.9, np.nan, x), y=y)
    np.savez(folder / "shape.npz", x=x[:, :, :5, :5], y=y)
    np.savez(folder / "words.npz", x=np.array(["a", "b"]), y=y[:2])
    np.savez(folder / "empty.npz", x=x[:0], y=y[:0])
    (folder / "not.npz").write_text("hello")
    (folder / "no.pt").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    (folder / "garbage.sqlite").write_text("no database " * 100)
    for c in "abc":
        (folder / "images" / c).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (10, 8), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / c / f"{i}.png")
    (folder / "mixed" / "a").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.zeros((8 + i, 8), np.uint8)).save(folder / "mixed" / "a" / f"{i}.png")
    (folder / "broken" / "a").mkdir(parents=True)
    (folder / "broken" / "a" / "0.png").write_text("hello")
    (folder / "bare").mkdir()
    return folder


@pytest.fixture
def smpq(room, monkeypatch, capsys):
    """Runs a command line inside this process; returns exit code, standard output and standard error."""
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["smpq", *map(str, arguments)])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def search(model="cli_nets.py:net", data="good.npz", budget="weight-bits=3", **options):
    """The arguments of a small search."""
    given = {"bits": "2,4,8", "method": "single", "out": "out"} | options
    rest = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["search", "--model", model, "--data", data, "--budget", budget, *rest]


BAD = {
    "model: 'net.py' is not of the form": search("net.py"),
    "model: the file absent.py is not there": search("absent.py:net"),
    "model: cli_nets.py has no 'absent'": search("cli_nets.py:absent"),
    "model: importing absent fails": search("absent:net"),
    "model: importing cli_broken.py fails (ModuleNotFoundError": search("cli_broken.py:net"),
    "model: importing cli_syntax.py fails (SyntaxError": search("cli_syntax.py:net"),
    "model: importing cli_missing.py fails (FileNotFoundError": search("cli_missing.py:net"),
    "model: cli_nets.py:number gives a int": search("cli_nets.py:number"),
    "model: cli_nets.py:raises fails (RuntimeError: two lines)": search("cli_nets.py:raises"),
    "model: cli_nets.py:words is a str": search("cli_nets.py:words"),
    "model: the parameter 3.weight of layer '3' holds NaN": search("cli_nets.py:nan_weights"),
    "model: no layer to quantize": search("cli_nets.py:no_layers"),
    "weights: the file absent.pt is not there": search(weights="absent.pt"),
    "weights: no.pt is no .safetensors or .pt file": search(weights="no.pt"),
    "weights: two.pt does not fit the model": search(weights="two.pt"),
    "device: 'warp' cannot be used": search(device="warp"),
    "data: absent is not there": search(data="absent"),
    "data: the file absent.npz is not there": search(data="absent.npz"),
    "data: notes.txt is no .npz file": search(data="notes.txt"),
    "data: not.npz cannot be read": search(data="not.npz"),
    "data: other.npz holds a, b; name the arrays": search(data="other.npz"),
    "data: only_x.npz holds x; name the arrays": search(data="only_x.npz"),
    "data: 48 inputs but 47 targets": search(data="uneven.npz"),
    "data: x in nan.npz holds NaN": search(data="nan.npz"),
    "data: x in words.npz is of type": search(data="words.npz"),
    "data: x in empty.npz is empty": search(data="empty.npz"),
    "data: bare holds no images": search(data="bare"),
    "data: the images differ in size": search(data="mixed"),
    "data: broken/a/0.png cannot be read as an image": search(data="broken"),
    "data: importing absent fails": search(data="absent:batches"),
    "data: cli_nets.py:raises fails": search(data="cli_nets.py:raises"),
    "data: cli_nets.py:batches gives batches of its own": search(data="cli_nets.py:batches", samples=3),
    "data: --image-size, --mean and --std are for a folder": search(image_size=8),
    "mean: one number or one for each of 1 channels": search(data="images", mean="0.1,0.2"),
    "mean: numbers separated by commas": search(data="images", mean="a"),
    "std: 0 divides nothing": search(data="images", std="0"),
    "samples: 99 are asked for": search(samples=99),
    "samples: a number above 0": search(samples=0),
    "batch-size: a number above 0": search(batch_size=-1),
    "model: its forward fails in layer '6' (Linear) on the inputs of item 0 (RuntimeError": search(data="shape.npz"),
    "loss: cross-entropy over 2 classes": search("cli_nets.py:two_classes"),
    "loss: the targets are of type": search(data="cli_nets.py:floats"),
    "Invalid value for '--loss'": search(loss="mse"),
    "bits: widths from 1 to 16": search(bits="2,99"),
    "bits: whole numbers": search(bits="2,x"),
    "activation-bits: whole numbers": search(activation_bits="2,2.5"),
    "budget: 'weight-bits=0' must be a number above 0": search(budget="weight-bits=0"),
    "budget: 'weight-bits=nan' must be": search(budget="weight-bits=nan"),
    "budget: 'watts=3' is not a limit": search(budget="watts=3"),
    "budget: 'three' in": search(budget="weight-bits=three"),
    "budget: 'activation-bits=3' limits nothing": search(budget="activation-bits=3", activation_bits="none"),
    "weight-bits": search(budget="weight-bits=1"),  # cannot be reached
    "method: 'magic' is not known": search(method="magic"),
    "evaluations: a positive integer, not 0": search(evaluations=0),
    "seconds: a positive number below 1e+09, not -1.0": search(seconds=-1),
    "evaluations: 3 are too few": search(evaluations=3),
    "Invalid value for '--seed'": search(seed=9999999999999999999999),
    "fixed: layer=width": search(fixed="0"),
    "fixed: 'absent' is no slot": search(fixed="absent=8"),
    "fixed: 0: a width from 1 to 16": search(fixed="0=99"),
    "store: garbage.sqlite is damaged": search(store="garbage.sqlite"),
    "store: cannot use cli_nets.py/store": search(store="cli_nets.py/store"),
    "notes.txt: File exists": search(out="notes.txt"),
    "Missing option '--model'": ["search"],
    "No such option": [*search(), "--no-such-option"],
    "No such command": ["absent"],
    "result: cannot read": ["report", "bare"],
}


@pytest.mark.parametrize("start", BAD)
def test_a_bad_input_is_one_line_and_exit_code_2(start, room, smpq):
    import torch

    torch.save({"a": torch.zeros(2)}, room / "two.pt")
    code, _, errors = smpq(*BAD[start])
    assert code == 2, errors
    assert errors.count("\n") == 1 and errors.startswith("smpq: ") and "Traceback" not in errors
    assert start in errors


def test_a_loss_that_is_not_finite_is_one_line_too(smpq):
    code, _, errors = smpq(*search("cli_nets.py:nan_loss"))
    assert code == 2 and errors.count("\n") == 1 and ("finite" in errors or "NaN" in errors)


def test_debug_shows_the_traceback(smpq):
    code, _, errors = smpq(*search(data="shape.npz"), "--debug")
    assert code == 2 and "Traceback" in errors and errors.splitlines()[-1].startswith("smpq: model: its forward fails")


def test_a_fault_of_ours_is_exit_code_1(smpq, monkeypatch):
    monkeypatch.setattr(registry, "names", lambda room: 1 / 0)
    code, _, errors = smpq("list")
    assert code == 1 and errors.startswith("smpq: internal error (ZeroDivisionError") and errors.count("\n") == 1


def test_a_search_writes_everything_and_running_it_again_asks_nothing(smpq, room):
    given = search(budget="weight-bits=4,activation-bits=4", method="shapley", out="whole", evaluations=120)
    code, said, errors = smpq(*given)
    assert (code, errors) == (0, ""), errors
    assert "slots, at most 120 evaluations at" in said and "known" not in said
    assert "plan, measured" in said and "plan, predicted" in said and "report: whole/report.html" in said
    assert {p.name for p in (room / "whole").iterdir()} >= {"plan.json", "result.json", "report.html", "figures"}
    result, page = Result.load(room / "whole"), (room / "whole" / "report.html").read_bytes()
    assert result.cost["weight-bits"] <= 4 and result.cost["activation-bits"] <= 4
    before = rows(room / "whole" / "evaluations.sqlite")

    code, said, _ = smpq(*given)
    assert code == 0 and f"{before} evaluations are known already" in said
    assert rows(room / "whole" / "evaluations.sqlite") == before
    assert Result.load(room / "whole").plan.bits == result.plan.bits

    result.save(room / "whole")
    (room / "whole" / "report.html").unlink()
    assert smpq("report", "whole")[0] == 0
    assert (room / "whole" / "report.html").read_bytes() == page


@pytest.mark.parametrize(
    "given",
    [
        search("cli_nets.py:ready", "xy.npz", samples=20, batch_size=7, renormalize="off"),
        search("cli_nets:net", "cli_nets.py:batches", activation_bits="none", fixed="none"),
        search(data="cli_nets:arrays", samples=9, loss="kl", budget="bytes=400"),
        search(data="only_x.npz", loss="kl", budget="bitops=0.9", fixed="6=float"),
        search(data="images", image_size=8, mean="0.5", std="0.25", samples=12, method="uniform"),
    ],
)
def test_models_and_data_come_in_many_ways(given, smpq, room, tmp_path):
    code, said, errors = smpq(*given, "--out", tmp_path)
    assert (code, errors) == (0, ""), errors
    assert (tmp_path / "report.html").exists() and "plan, measured" in said


def test_weights_are_read_from_safetensors_and_pt(smpq, room, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(room))
    import cli_nets

    state = {name: x + 1 if x.is_floating_point() else x for name, x in cli_nets.net().state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    plans = []
    for weights in ("w.safetensors", "w.pt"):
        code, _, errors = smpq(*search(weights=tmp_path / weights, out=tmp_path))
        assert code == 0, errors
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
    assert plans[0] == plans[1]
    smpq(*search(out=tmp_path))
    assert json.loads((tmp_path / "plan.json").read_text())["fingerprint"] != plans[0]["fingerprint"]


def test_image_folders_give_the_middle_square_and_the_class_of_the_folder(room):
    from smpq_ext import inputs

    ((x, y),) = inputs.data(str(room / "images"), samples=6)
    assert x.shape == (6, 1, 10, 8) and y.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(room / "images" / "a" / "0.png") as image:
        assert np.allclose(x[0, 0], np.asarray(image) / 255)
    ((square, _),) = inputs.data(str(room / "images"), samples=6, image_size=8, mean=[0.5], std=[0.5])
    assert square.shape == (6, 1, 8, 8)
    assert np.allclose(square, (x[:, :, 1:9] - 0.5) / 0.5, atol=1e-6)


def rows(store):
    """How many evaluations a store holds."""
    with closing(sqlite3.connect(store)) as database:
        return database.execute("SELECT count(*) FROM evaluations WHERE length(study) = 64").fetchone()[0]


def start(room, *arguments, **environment):
    command = [sys.executable, "-m", "smpq_ext.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, cwd=room, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_settings_of_the_method_are_given_by_name(smpq, room):
    line = search(budget="weight-bits=4,activation-bits=4", method="shapley", out="settings", evaluations=120)
    assert smpq(*line, "--set", "interactions=true", "--set", "finalists=3")[0] == 0
    assert Result.load(room / "settings").attribution.pairs is not None
    for wrong, said in {
        "interactions": "set: name=value",
        "seed=3": "settings: the method 'shapley' has no 'seed'",
        "model=3": "settings: the method 'shapley' has no 'model'",
        "finalists=abc": "finalists: a positive whole number is needed",
        "depth=3": "settings: the method 'shapley' has no 'depth'",
        "stop=soon": "stop: 'intervals' or 'plan'",
    }.items():
        code, _, err = smpq(*line, "--set", wrong)
        assert code == 2 and said in err


@pytest.mark.parametrize(("option", "entry", "name"), [("set", "stop=plan", "stop"), ("fixed", "conv1=8", "conv1")])
def test_what_is_given_twice_is_refused(smpq, option, entry, name):
    code, _, err = smpq(*search(out="twice"), f"--{option}", entry, f"--{option}", entry)
    assert code == 2 and f"{option}: {name} is given twice" in err


def test_a_search_that_is_cut_off_goes_on(room, smpq):
    whole = search("cli_nets.py:held", bits="2,3,4,5,6,8", out="uncut")
    assert smpq(*whole)[0] == 0
    cut = search("cli_nets.py:held", bits="2,3,4,5,6,8", out="cut")
    store, total = room / "cut" / "evaluations.sqlite", rows(room / "uncut" / "evaluations.sqlite")
    for how, code, known in ((signal.SIGINT, 130, total // 4), (signal.SIGKILL, -9, total // 2)):
        with start(room, *cut, HOLD_IN="cut/evaluations.sqlite", HOLD_AT=str(known)) as process:
            try:
                assert "held\n" in iter(process.stdout.readline, ""), process.stderr.read()
                process.send_signal(how)
                _, errors = process.communicate(timeout=300)
            finally:
                process.kill()
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        if how is signal.SIGINT:
            said = f"smpq: interrupted, {known} evaluations are saved; to go on: python -m smpq_ext.cli search"
            assert errors.splitlines()[-1].startswith(said)
        assert rows(store) == known
    code, said, _ = smpq(*cut)
    assert code == 0 and f"{known} evaluations are known already" in said
    assert Result.load(room / "cut").plan.to_json() == Result.load(room / "uncut").plan.to_json()
    assert rows(store) == total


def test_report_list_and_help_do_not_load_torch(tmp_path):
    a_result().save(tmp_path)
    code = """
import sys
from smpq_ext import cli
for arguments in (["list"], ["report", sys.argv[1]], ["--help"], ["search", "--help"]):
    sys.argv[1:] = arguments
    assert cli.main() == 0, arguments
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["budget", "cost", "seconds"])
def test_a_result_of_another_shape_is_one_line_too(name, smpq, tmp_path):
    a_result().save(tmp_path)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: [1.0, 2.0]}))
    code, _, errors = smpq("report", tmp_path)
    assert code == 2 and errors.count("\n") == 1 and name in errors


def test_list_shows_everything_that_the_registry_knows(smpq):
    code, said, _ = smpq("list")
    lines = [line.split(maxsplit=1) for line in said.splitlines() if line]
    assert code == 0
    for room in ("methods", "estimators", "solvers"):
        for name in registry.names(room):
            assert any(line[0] == name and len(line) == 2 for line in lines), name


def test_no_command_shows_the_help(smpq):
    code, said, errors = smpq()
    assert code == 2 and "search" in said + errors


def test_doctor_tells_what_runs(smpq):
    from smpq_ext import ops

    code, said, _ = smpq("doctor")
    assert code == (0 if ops.compiled else 1)
    assert "python: 3." in said and "torch: 2." in said and "GPU:" in said
    assert "the kernels equal their specification bit for bit" in said and "of a copy's bandwidth" in said


def test_doctor_says_why_the_kernels_are_not_loaded(smpq, monkeypatch):
    import smpq_ext

    monkeypatch.setitem(sys.modules, "smpq_ext._C", None)
    monkeypatch.delattr(smpq_ext, "_C", raising=False)
    code, said, _ = smpq("doctor")
    assert code == 1 and "BAD kernels: not loaded (" in said and "pip install" in said
