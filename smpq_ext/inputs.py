"""What the command line names: models, weights and data."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smpq_ext.core import SmpqError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
LARGEST_IMAGE = 1 << 14  # pixels along a side


def model(where: str, weights: Path | None = None) -> nn.Module:
    """The module that `file.py:function` or `package.module:function` returns, or is; with these weights, if given.

    Raises SmpqError.
    """
    value = _named("model", where)
    made = value if isinstance(value, nn.Module) else _called("model", where, value)
    if not isinstance(made, nn.Module):
        raise SmpqError(f"model: {where} gives a {type(made).__name__}, not an nn.Module; return the model itself")
    if weights is not None:
        state = _state(weights)
        try:
            made.load_state_dict(state)
        except Exception as error:
            raise SmpqError(f"weights: {weights} does not fit the model ({_first(error)})") from error
    return made


def data(
    where: str,
    batch_size: int | None = None,
    samples: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    targets: bool = True,
) -> Iterable[Any]:
    """Batches of (inputs, targets) from an .npz file, a folder of images, or `module:function`.

    A function may return batches, kept as given, or one pair of whole arrays, which is cut into batches as the others
    are: `samples` of them, evenly spread, in batches of `batch_size` (default 256). Without `targets` these may be
    missing. Raises SmpqError.
    """
    path = Path(where)
    folder = path.is_dir()
    if not folder and (image_size or mean or std):
        raise SmpqError(f"data: --image-size, --mean and --std are for a folder of images, and {where} is none")
    for name, value in (("batch-size", batch_size), ("samples", samples), ("image-size", image_size)):
        if value is not None and value < 1:
            raise SmpqError(f"{name}: a number above 0, not {value}")
    if image_size is not None and image_size > LARGEST_IMAGE:
        raise SmpqError(f"image-size: at most {LARGEST_IMAGE}, not {image_size}")
    pair: tuple[Tensor, Tensor | None]
    if folder:
        paths, labels = _listed(path, samples)
        pair = _pixels(paths, image_size, mean, std), labels
    elif path.suffix == ".npz":
        pair = _spread(_arrays(path, targets), samples)
    elif _is_reference(where):
        given = _called("data", where, _named("data", where))
        arrays = isinstance(given, tuple) and all(isinstance(x, Tensor | np.ndarray) for x in given)
        if not (arrays and len(given) == 2):
            if batch_size or samples:
                raise SmpqError(f"data: {where} gives batches of its own; leave --batch-size and --samples out")
            return given  # type: ignore[no-any-return]
        pair = _spread((_tensor(where, given[0]), _tensor(where, given[1])), samples)
    elif not path.exists():
        raise SmpqError(f"data: {where} is not there")
    else:
        raise SmpqError(f"data: {where} is no .npz file, folder of images or module:function")
    inputs, wanted = pair
    size = min(batch_size or 256, len(inputs))
    cut = torch.split(wanted, size) if wanted is not None else [None] * -(-len(inputs) // size)
    return list(zip(torch.split(inputs, size), cut, strict=True))


def _is_reference(where: str) -> bool:
    module, colon, name = where.rpartition(":")
    return bool(colon and module and name.isidentifier())


def _named(what: str, where: str) -> Any:
    """The object behind `file.py:name` or `package.module:name`."""
    source, _, name = where.rpartition(":")
    if not _is_reference(where):
        raise SmpqError(f"{what}: {where!r} is not of the form file.py:function or package.module:function")
    try:
        module = _file(Path(source), what) if source.endswith(".py") else _module(source)
    except SmpqError:
        raise
    except FileNotFoundError as error:
        if error.filename != source:
            raise SmpqError(f"{what}: importing {source} fails ({_first(error)})") from error
        raise SmpqError(f"{what}: the file {source} is not there") from error
    except (Exception, SystemExit) as error:
        raise SmpqError(f"{what}: importing {source} fails ({_first(error)})") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise SmpqError(f"{what}: {source} has no {name!r}") from error


def _file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(2, "not there", str(path))
    name, file = path.stem, str(path.resolve())
    for known in list(sys.modules.values()):
        if getattr(known, "__file__", None) == file:
            return known
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location(name, file)
    if name in sys.modules or spec is None or spec.loader is None:
        raise SmpqError(f"{what}: {path} cannot be imported, another module is called {name!r}; rename the file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _called(what: str, where: str, function: Callable[[], Any]) -> Any:
    if not callable(function):
        raise SmpqError(f"{what}: {where} is a {type(function).__name__}, not a function")
    try:
        return function()
    except SmpqError:
        raise
    except Exception as error:
        raise SmpqError(f"{what}: {where} fails ({_first(error)})") from error


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SmpqError(f"weights: the file {path} is not there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise SmpqError("weights: .safetensors needs the package safetensors; pip install safetensors") from error
    except Exception as error:
        raise SmpqError(f"weights: {path} is no .safetensors or .pt file of tensors ({_first(error)})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise SmpqError(f"weights: {path} holds no state_dict, names to tensors")
    return state


def _arrays(path: Path, targets: bool) -> tuple[Tensor, Tensor | None]:
    if not path.is_file():
        raise SmpqError(f"data: the file {path} is not there")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}  # bytes where a member is no .npy
    except Exception as error:
        raise SmpqError(f"data: {path} cannot be read as .npz ({_first(error)})") from error
    for x, y in (("inputs", "targets"), ("x", "y")):
        if x in arrays and (y in arrays or not targets):
            return _tensor(f"{x} in {path}", arrays[x]), _tensor(f"{y} in {path}", arrays[y]) if y in arrays else None
    held = ", ".join(arrays) or "nothing"
    raise SmpqError(f"data: {path} holds {held}; name the arrays inputs and targets, or x and y")


def _tensor(name: str, array: NDArray[Any] | Tensor) -> Tensor:
    """float32 or int64, with at least one sample. Raises SmpqError where it is not finite."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub":
            raise SmpqError(f"data: {name} is of type {array.dtype}; give numbers")
        with np.errstate(over="ignore"):  # said below
            array = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if not array.dim() or not len(array):
        raise SmpqError(f"data: {name} is empty")
    if not torch.isfinite(array).all():
        raise SmpqError(f"data: {name} holds NaN or infinity")
    return array


def _spread(pair: tuple[Tensor, Tensor | None], samples: int | None) -> tuple[Tensor, Tensor | None]:
    inputs, targets = pair
    if targets is not None and len(inputs) != len(targets):
        raise SmpqError(f"data: {len(inputs)} inputs but {len(targets)} targets")
    kept = _evenly(len(inputs), samples)
    return inputs[kept], None if targets is None else targets[kept]


def _evenly(count: int, samples: int | None) -> list[int]:
    """Indices evenly spread over [0, count), so that sorted classes all take part."""
    if samples is None:
        return list(range(count))
    if samples > count:
        raise SmpqError(f"samples: {samples} are asked for, the data has {count}")
    return [i * count // samples for i in range(samples)]


def _listed(folder: Path, samples: int | None) -> tuple[list[Path], Tensor]:
    """The images of a folder with one subfolder per class, in the order of the names."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(p, k) for k, c in enumerate(classes) for p in sorted(c.rglob("*")) if p.suffix.lower() in IMAGES]
    if not found:
        raise SmpqError(f"data: {folder} holds no images in one subfolder per class")
    found = [found[i] for i in _evenly(len(found), samples)]
    return [p for p, _ in found], torch.tensor([k for _, k in found])


def _pixels(paths: list[Path], size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Images as float32 [n, channels, height, width]: the middle square at `size`, (x / 255 - mean) / std.

    One channel where every image is grey, else three.
    """
    from PIL import Image

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                grey = image.mode in ("1", "L")
                images.append(image.convert("L" if grey else "RGB"))
        except Exception as error:  # a damaged file is not always an OSError
            raise SmpqError(f"data: {path} cannot be read as an image ({_first(error)})") from error
        if size is not None:
            w, h = images[-1].size
            side = min(w, h)
            left, top = (w - side) // 2, (h - side) // 2
            box = (left, top, left + side, top + side)
            images[-1] = images[-1].resize((size, size), Image.Resampling.BICUBIC, box)
    if len({image.size for image in images}) > 1:
        raise SmpqError("data: the images differ in size; give --image-size")
    if any(image.mode == "RGB" for image in images):
        images = [image.convert("RGB") for image in images]
    stacked = np.stack([np.asarray(image, np.float32).reshape(*image.size[::-1], -1) for image in images])
    x = torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and len(value) not in (1, x.shape[1]):
            raise SmpqError(f"{name}: one number or one for each of {x.shape[1]} channels, not {len(value)}")
        if name == "std" and value is not None and 0 in value:
            raise SmpqError("std: 0 divides nothing")
    shift, scale = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean or [0.0], std or [1.0]))
    return ((x - shift) / scale).contiguous()


def _first(error: BaseException) -> str:
    """The kind of an exception and what it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
