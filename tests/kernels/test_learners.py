"""The kernels that AdaptiveMLP, AdaptiveGatedMLP and ExpertMLP share: sizes beyond a tile, types, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import thresher.kernels.ops  # noqa: F401
from tests.kernels.back_ends import (
    demand,
    library,
    model,
    run,
    through_casts,
    with_constants,
)
from tests.kernels.cases import Array
from thresher.kernels.activations import ACTIVATIONS
from thresher.kernels.registry import OPERATORS
from thresher.runtime.backends.onnx_runtime import CPU, session_options

NAMES = ("AdaptiveMLP", "AdaptiveGatedMLP", "ExpertMLP")
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
kernels = pytest.mark.parametrize("back_end", ["native", "triton"])


@pytest.fixture(autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    demand(request.getfixturevalue("back_end") if "back_end" in request.fixturenames else "native")


def operands(
    name: str, tokens: int = 5, width: int = 4, hidden: int = 3, learners: int = 2, seed: int = 0
) -> dict[str, Array]:
    """Inputs of an operator by name, in its order."""
    rng = np.random.default_rng(seed)
    up, bias = (learners, width, hidden), (learners, hidden)
    sizes = {"x": (2, tokens, width), "w1": up, "v": up, "w2": (learners, hidden, width)}
    found: dict[str, Array] = {
        key: (rng.standard_normal(size) / size[1] ** 0.5).astype(np.float32)
        for key, size in (sizes | {"b1": bias, "c": bias}).items()
    }
    found["b2"] = rng.standard_normal(width).astype(np.float32)
    found["k"] = rng.integers(-1, learners + 2, (2, tokens))
    found["run"] = rng.random((2, tokens, learners)) < 0.5
    return {key: found[key] for key in OPERATORS[name].inputs}


def attributes(name: str, arguments: dict[str, Array], activation: str = "gelu") -> dict[str, Any]:
    count = "experts" if name == "ExpertMLP" else "learners"
    return {count: len(arguments["w1"]), "activation": activation}


def expected(name: str, arguments: dict[str, Array], activation: str = "gelu") -> Array:
    """The definition in float64."""
    given = [
        torch.from_numpy(v).double() if v.dtype == np.float32 else torch.from_numpy(v)
        for v in arguments.values()
    ]
    found: Array = getattr(torch.ops.thresher, OPERATORS[name].torch_name)(
        *given, activation
    ).numpy()
    return found


@kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "width", "hidden", "learners"),
    [
        (1, 1, 1, 1),
        (29, 70, 45, 3),  # no width fills its vectors, nor the depth its blocks
        (300, 96, 33, 2),
        (700, 32, 64, 4),  # three parts of tokens
        (7, 16, 200, 16),
    ],
)
def test_every_size(
    back_end: str, name: str, tokens: int, width: int, hidden: int, learners: int
) -> None:
    arguments = operands(name, tokens, width, hidden, learners)
    (y,) = run(back_end, name, arguments, **attributes(name, arguments))
    assert_allclose(y, expected(name, arguments), atol=2e-5)


def chosen(arguments: dict[str, Array]) -> dict[str, Array]:
    """Tokens and their choice, without the weights."""
    return {n: v for n, v in arguments.items() if n in ("x", "k", "run")}


def held(name: str, arguments: dict[str, Array]) -> bytes:
    """A model that holds the weights as constants."""
    ranks = tuple(value.ndim for value in arguments.values())
    made = model(name, ranks, "float32", tuple(attributes(name, arguments).items()))
    weights = {n: v for n, v in arguments.items() if n not in chosen(arguments)}
    return bytes(with_constants(made, weights).SerializeToString())


@pytest.mark.parametrize("name", NAMES)
def test_constant_weights_are_packed_once(name: str) -> None:
    """Which changes no bit of what they come to, also for two runs at once and other tokens later."""
    import onnxruntime as ort

    arguments = operands(name, 60, 40, 33, 3)
    options = session_options(2, library())
    session = ort.InferenceSession(held(name, arguments), options, providers=[CPU])
    feeds = [chosen(operands(name, tokens, 40, 33, 3, tokens)) for tokens in (60, 61, 7)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda fed: session.run(None, fed)[0], feeds))
    for fed, y in zip(feeds, found, strict=True):
        given = attributes(name, arguments)
        (apart,) = run("native", name, arguments | fed, **given)
        assert_array_equal(y, apart)
    wide = feeds[0] | {"x": np.zeros((2, 60, 41), np.float32)}
    with pytest.raises(Exception, match=r"x is \[B, N, D\] for w1 \[L, D, H\], not \[2, 60, 41\]"):
        session.run(None, wide)


@kernels
@pytest.mark.parametrize("name", NAMES)
def test_nobody_and_everybody(back_end: str, name: str) -> None:
    arguments = operands(name, 40, 24, 40, 3)
    choice = "run" if name == "ExpertMLP" else "k"
    for value in (0, 3):
        arguments[choice] = np.full_like(arguments[choice], value)
        (y,) = run(back_end, name, arguments, **attributes(name, arguments))
        assert_allclose(y, expected(name, arguments), atol=2e-5)
        assert value or (y == arguments["b2"]).all()


@kernels
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens_and_no_neurons_are_no_crash(back_end: str, name: str) -> None:
    none = operands(name, tokens=0)
    (y,) = run(back_end, name, none, **attributes(name, none))
    assert y.shape == none["x"].shape
    empty = operands(name, hidden=1)
    empty |= {n: v[..., :0] for n, v in empty.items() if n in ("w1", "b1", "v", "c")}
    empty["w2"] = empty["w2"][:, :0]
    (y,) = run(back_end, name, empty, **attributes(name, empty))
    assert_array_equal(y, np.broadcast_to(empty["b2"], y.shape))


def test_activations_over_their_whole_range() -> None:
    """One neuron that is the value itself: what is left is the activation, to some units in the last place."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, 1e-30, -1e-30, 100.0, -100.0]])
    one = np.ones((1, 1, 1), np.float32)
    arguments = {
        "x": x.astype(np.float32)[None, :, None], "k": np.ones((1, len(x)), np.int64),
        "w1": one, "b1": one[0] * 0, "w2": one, "b2": one[0, 0] * 0,
    }  # fmt: skip
    for name in ACTIVATIONS:
        (y,) = run("native", "AdaptiveMLP", arguments, learners=1, activation=name)
        wanted = ACTIVATIONS[name](torch.from_numpy(arguments["x"]).double()).numpy()
        assert_allclose(y, wanted, rtol=1e-6, atol=1.2e-6, err_msg=name)
    spoilt = arguments | {
        "x": np.array([[[np.nan], [np.inf]]], np.float32),
        "k": np.ones((1, 2), int),
    }
    for name in set(ACTIVATIONS) - {"relu", "identity"}:
        (y,) = run("native", "AdaptiveMLP", spoilt, learners=1, activation=name)
        assert_array_equal(y[0, :, 0], [np.nan, np.inf], err_msg=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("element", list(TYPES))
def test_every_type_of_tokens(name: str, element: str) -> None:
    arguments = operands(name, 33, 40, 50, 3)
    rounded = {
        n: torch.from_numpy(v).to(TYPES[element]).float().numpy() if v.dtype == np.float32 else v
        for n, v in arguments.items()
    }
    (y,) = through_casts(name, element, **attributes(name, arguments)).run(None, rounded)
    unit = max(torch.finfo(TYPES[element]).eps, 1e-7)
    assert_allclose(y, expected(name, rounded), rtol=unit, atol=unit)


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_neighbours_change_nothing(name: str) -> None:
    arguments = operands(name, 160, 96, 128, 3)
    several = partial(through_casts, name, "float32", **attributes(name, arguments))
    (one,), (four,) = (several(threads=threads).run(None, arguments) for threads in (1, 4))
    assert_array_equal(one, four)
    half = {
        n: v[:1] if v.shape[0] == 2 and n in ("x", "k", "run") else v for n, v in arguments.items()
    }
    assert_array_equal(several(threads=1).run(None, half)[0], one[:1])


@pytest.mark.parametrize(
    ("name", "spoilt", "said"),
    [
        ("AdaptiveMLP", {"x": (5, 4)}, r"x is \[B, N, C\], not \[5, 4\]"),
        ("AdaptiveMLP", {"k": (2, 4)}, r"k is \[B, N\], not \[2, 4\]"),
        ("AdaptiveMLP", {"w1": (3, 4, 3)}, r"w1 is \[L, D, H\] of x \[B, N, D\] and L learners"),
        ("AdaptiveMLP", {"w1": (2, 5, 3)}, r"w1 is .*, not \[2, 5, 3\]"),
        ("AdaptiveMLP", {"b1": (2, 4)}, r"b1 is \[L, H\] for w1"),
        ("AdaptiveMLP", {"w2": (2, 4, 3)}, r"w2 is \[L, H, D\] for w1"),
        ("AdaptiveMLP", {"b2": (3,)}, r"b2 is \[D\] of x \[B, N, D\], not \[3\]"),
        ("AdaptiveGatedMLP", {"v": (2, 4, 2)}, "v is shaped as w1, not"),
        ("AdaptiveGatedMLP", {"c": (2, 2)}, "c is shaped as b1, not"),
        ("ExpertMLP", {"run": (2, 5, 3)}, r"run is \[B, N, L\], not \[2, 5, 3\]"),
    ],
)
def test_hostile_shapes_are_an_error(name: str, spoilt: dict[str, Any], said: str) -> None:
    arguments = operands(name)
    given = attributes(name, arguments)
    arguments |= {n: np.zeros(shape, arguments[n].dtype) for n, shape in spoilt.items()}
    session = through_casts(name, "float32", **given)
    with pytest.raises(Exception, match=f"{name}: {said}"):
        session.run(None, arguments)


def test_an_unknown_activation_is_an_error() -> None:
    with pytest.raises(Exception, match="AdaptiveMLP: no activation tanh"):
        through_casts("AdaptiveMLP", "float32", learners=2, activation="tanh")
