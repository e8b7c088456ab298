"""The command line: smpq search | report | list | doctor."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shlex
import sys
import time
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from smpq_ext.core import Result, SmpqError

app = typer.Typer(
    help="How many bits does each layer of a trained PyTorch model deserve?",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError = typer.BadParameter.__mro__[2]  # click's ClickException, which newer typers carry inside
DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Loss(str, Enum):  # noqa: UP042
    """What the search keeps low."""

    CROSS_ENTROPY = "cross-entropy"
    KL = "kl"


class Switch(str, Enum):  # noqa: UP042
    """An option that decides for itself unless told."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@app.command()
def search(
    model: Annotated[str, typer.Option(help="The model: file.py:function or package.module:function.")],
    data: Annotated[
        str,
        typer.Option(
            help="Calibration data: an .npz file with arrays inputs and targets (or x and y), a folder of images with "
            "a subfolder per class, or module:function giving batches (inputs, targets)."
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(help="Such as weight-bits=3, or weight-bits=3,activation-bits=4, or bytes=250000, or bitops=0.1."),
    ],
    bits: Annotated[str, typer.Option(help="Widths to choose from.")] = "2,3,4,6,8",
    activation_bits: Annotated[
        str | None, typer.Option(help="Widths for activations; 'none' for weights only.", show_default="as --bits")
    ] = None,
    method: Annotated[str, typer.Option(help="One of those that `smpq list` shows.")] = "shapley",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, such as interactions=true; may be repeated."),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="At most so many passes over the data.", show_default="30 for each slot")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="As many passes as these pay for, in place of --evaluations.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of every random choice.")] = 0,
    loss: Annotated[
        Loss, typer.Option(help="kl: the divergence from the float model, needs no targets.")
    ] = Loss.CROSS_ENTROPY,
    renormalize: Annotated[
        Switch, typer.Option(help="Re-estimate BatchNorm statistics for every assignment.")
    ] = Switch.AUTO,
    fixed: Annotated[
        list[str] | None,
        typer.Option(
            help="slot=width or layer=width, 'float' for no quantization; may be repeated; 'none' to fix nothing.",
            show_default="first and last layer at 8",
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A state_dict for the model, .safetensors or .pt.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cuda.")] = "cpu",
    batch_size: Annotated[int | None, typer.Option(help="Samples in a batch.", show_default="256")] = None,
    samples: Annotated[int | None, typer.Option(help="Use so many, evenly spread.", show_default="all")] = None,
    image_size: Annotated[int | None, typer.Option(help="Scale the middle square of every image to this.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of the pixels in [0, 1]: one number, or one per channel.", show_default="0")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Of the pixels in [0, 1]: one number, or one per channel.", show_default="1")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for plan.json, result.json, figures, report.html.")] = Path(
        "smpq_out"
    ),
    store: Annotated[
        Path | None, typer.Option(help="File that keeps every evaluation.", show_default="OUT/evaluations.sqlite")
    ] = None,
    debug: DEBUG = False,
) -> None:
    """Find the widths that keep the loss lowest within a budget, and verify them.

    Running the same command again goes on where the last run stopped. Several processes share the work:
    torchrun --standalone --nproc-per-node N -m smpq_ext.cli search ...
    """
    options: dict[str, Any] = {
        "bits": _widths("bits", bits),
        "activation_bits": None if activation_bits is None else _widths("activation-bits", activation_bits),
        "budget": budget,
        "method": method,
        "loss": None if loss is Loss.CROSS_ENTROPY else loss.value,
        "evaluations": evaluations,
        "seconds": seconds,
        "seed": seed,
        "renormalize": "auto" if renormalize is Switch.AUTO else renormalize is Switch.ON,
        "fixed": None if fixed is None else _fixed(fixed),
    }
    settings = _settings(set_ or [])
    pixels = (_numbers("mean", mean), _numbers("std", std))
    bar: _Bar | None = None
    kept: Any = None
    try:
        import torch

        from smpq_ext import distributed, inputs
        from smpq_ext.driver import Study
        from smpq_ext.store import SqliteStore

        device = distributed.join(device)
        if distributed.rank() > 0:
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        torch.manual_seed(seed)  # a model or data that draw numbers draw the same ones again, so that a run can go on
        network = _moved(inputs.model(model, weights), device)
        samples_ = inputs.data(data, batch_size, samples, image_size, *pixels, targets=loss is not Loss.KL)
        out.mkdir(parents=True, exist_ok=True)
        kept = distributed.kept(lambda: SqliteStore(store or out / "evaluations.sqlite"))
        bar = _Bar(kept)
        study = Study(network, samples_, store=kept, progress=bar, settings=settings, **options)
        bar.begin(study)
        result = study.run()
        bar.end()
    except KeyboardInterrupt:
        if bar is not None:
            bar.end()
        several = distributed.ranks() > 1  # interrupted at different points, they can ask nothing of each other
        known = "those of all finished batches" if several else bar.known() if bar is not None else 0
        _say(f"interrupted, {known} evaluations are saved; to go on: {_command()}")
        raise typer.Exit(130) from None
    finally:
        if kept is not None:
            kept.close()
    if distributed.rank() == 0:
        _finish(result, out)
    distributed.leave()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="What `smpq search --out` wrote.")],
    debug: DEBUG = False,
) -> None:
    """Draw the figures and the page of a saved result again."""
    _finish(Result.load(folder), folder, save=False)


@app.command("list")
def list_() -> None:
    """Show the methods, estimators and solvers."""
    import ast
    import importlib.util

    from smpq_ext import registry
    from smpq_ext.report.tables import Table

    for room in ("methods", "estimators", "solvers"):
        rows = []
        for name in registry.names(room):
            spec = importlib.util.find_spec(f"smpq_ext.{room}.{name}")  # read, not imported: some import torch
            source = Path(spec.origin).read_text() if spec is not None and spec.origin else ""
            rows.append((name, (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]))
        typer.echo(Table((room, ""), tuple(rows), words=True).text() + "\n")


@app.command()
def doctor() -> None:
    """Look at the installation: versions, kernels, GPU, and a self-check. Exits with 1 where something is wrong."""
    from smpq_ext.doctor import examine

    bad = 0
    for finding in examine():
        mark = {True: "ok ", False: "BAD", None: "   "}[finding.good]
        typer.echo(f"{mark} {finding.name}: {finding.text}")
        bad += finding.good is False
    if bad:
        raise typer.Exit(1)


def main() -> int:
    """Run the command line; what the user can mend is one line on standard error and exit code 2."""
    logging.getLogger("smpq_ext").addHandler(logging.NullHandler())  # notes are printed with the search
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal has no letters for is no error
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(app(standalone_mode=False) or 0)
    except typer.Abort:
        _say("interrupted")
        return 130
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        line, code = _explain(error)
        _say(line)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """One line on an error, and the exit code: 2 where it is about what the user gave, 1 where the fault is ours."""
    if isinstance(error, SmpqError):
        return str(error), 2
    if isinstance(error, UsageError):
        return error.format_message(), 2  # type: ignore[attr-defined]
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    layer = None
    if "torch" in sys.modules:
        from smpq_ext.engine.samples import failed_layer

        layer = failed_layer(error)
    if layer is not None:
        return f"model: its forward fails in {layer} ({what}); do the data fit it? --debug shows the traceback", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"disk: {error.strerror}; what was evaluated is kept in the store: free some, and run it again", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"memory: it is used up ({what}); give fewer --samples, or smaller ones", 2
    return f"internal error ({what}); please report it with what --debug shows", 1


class _Bar:
    """Says what a search will take, shows how far it is, and knows what is saved."""

    SILENCE = 30.0  # seconds between lines where there is no terminal

    def __init__(self, store: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.store, self.study = store, None
        console = Console(stderr=True)
        count = TextColumn("{task.completed}/{task.total} {task.fields[left]}")
        columns = (TextColumn("{task.description}"), BarColumn(), count)
        from smpq_ext.distributed import rank

        self.silent = rank() > 0
        self.progress = Progress(*columns, console=console, disable=self.silent or not console.is_terminal)
        self.task = self.progress.add_task("", total=None, left="")
        self.start = self.last = time.perf_counter()

    def begin(self, study: Any) -> None:
        """Print what a search will take at most, from a measured evaluation."""
        self.study = study
        for note in study.notes:
            typer.echo(f"note: {note}")
        for name, reason in study.engine.left_out.items():
            typer.echo(f"not quantized: {name}: {reason}")
        self.total = study.problem.evaluations
        self.pace = study.seconds_per_evaluation
        known = self.known()
        typer.echo(
            f"{len(study.engine.slots)} slots, at most {self.total} evaluations at {self.pace:.3g} s (measured): "
            f"{_duration(self.total * self.pace)}, and what the search itself computes"
            + (f"; {known} evaluations are known already" if known else "")
        )
        self.start = self.last = time.perf_counter()
        self.progress.start()

    def __call__(self, stage: str, done: int, total: int) -> None:
        parts = [part for part in (self.study.problem.evaluator, self.study.problem.holdout) if part]  # type: ignore[attr-defined]
        asked, computed = sum(p.asked for p in parts), sum(p.computed for p in parts)
        now = time.perf_counter()
        pace = (now - self.start) / computed if computed else self.pace
        left = f"at most {_duration((self.total - asked) * pace)} left"
        self.progress.update(self.task, description=stage, completed=asked, total=self.total, left=left)
        if self.progress.disable and not self.silent and now - self.last > self.SILENCE:
            self.last = now
            typer.echo(f"{stage}: {asked}/{self.total}, {left}", err=True)

    def end(self) -> None:
        self.progress.stop()

    def known(self) -> int:
        """How many evaluations of this search the store holds."""
        if self.study is None:
            return 0
        problem = self.study.problem
        prints = {part.fingerprint for part in (problem.evaluator, problem.holdout, problem.model) if part is not None}
        return sum(len(self.store.read(fingerprint)) for fingerprint in prints)


def _finish(result: Result, folder: Path, save: bool = True) -> None:
    """Write and show a result."""
    from smpq_ext.report import page, tables

    if save:
        result.save(folder)
    path = page.write(result, folder)
    blocks = [tables.layers(result).text(most=40), tables.costs(result).text(), tables.losses(result).text()]
    if result.finding:
        blocks.append(f"finding: {result.finding}")
    typer.echo("\n" + "\n\n".join(blocks))
    typer.echo(f"\n{result.evaluations} evaluations, {sum(result.seconds.values()):.1f} s; report: {path}")


def _moved(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise SmpqError(f"device: {device!r} cannot be used ({error})") from error


def _widths(name: str, text: str) -> tuple[int, ...]:
    if name == "activation-bits" and text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SmpqError(f"{name}: whole numbers separated by commas, such as 2,4,8, not {text!r}") from None


def _numbers(name: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise SmpqError(f"{name}: numbers separated by commas, such as 0.485,0.456,0.406, not {text!r}") from None


def _fixed(entries: list[str]) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for entry in entries:
        name, equals, width = entry.rpartition("=")
        if entry == "none":
            continue
        if not equals or not ((width.isdecimal() and len(width) < 5) or width == "float"):
            raise SmpqError(
                f"fixed: layer=width or slot=width, such as conv1=8, fc.weight=float, or none, not {entry!r}"
            )
        if name in found:
            raise SmpqError(f"fixed: {name} is given twice")
        found[name] = int(width) if width.isdecimal() else width
    return found


def _settings(entries: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier():
            raise SmpqError(f"set: name=value, such as interactions=true, not {entry!r}")
        if name in found:
            raise SmpqError(f"set: {name} is given twice")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(0.0, seconds):.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{minutes} min" if minutes < 60 else f"{hours:.1f} h"


def _command() -> str:
    """The command that was given, as it can be given again."""
    program = ["smpq"] if Path(sys.argv[0]).stem == "smpq" else ["python", "-m", "smpq_ext.cli"]
    return shlex.join([*program, *sys.argv[1:]])


def _say(line: str) -> None:
    """One line on standard error, whatever the message."""
    text = " ".join(line.split())
    if not text:  # the help was shown instead
        return
    print(f"smpq: {text if len(text) <= 600 else text[:600] + ' ...'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
