"""Ways to make a build wrong. Each returns a `Mutation`, which patches the product for the time of one measurement."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from siglance.export import exporter
from siglance.export.builder import GraphBuilder
from siglance.export.checkpoint import Weights

Mutation = Callable[[pytest.MonkeyPatch], None]
Build = Callable[..., list[ir.Value]]


def together(*mutations: Mutation) -> Mutation:
    """All of them at once."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        for mutation in mutations:
            mutation(patch)

    return apply


def replaced(target: object, name: str, make: Callable[[Any], Any]) -> Mutation:
    """The function `name` of a module or class becomes `make(right function)`."""
    return lambda patch: patch.setattr(target, name, make(getattr(target, name)))


def constant(target: object, name: str, value: object) -> Mutation:
    """Another value for a constant or a function of a module."""
    return lambda patch: patch.setattr(target, name, value)


# --- configurations


def config(change: Callable[[Any], Any], graph: str | None = None) -> Mutation:
    """`change` what a family has read from config.json; with `graph` for the builder of that graph alone."""

    def wrong(find: Callable[..., Any]) -> Callable[..., Any]:
        def find_wrong(values: dict[str, Any]) -> Any:
            family = find(values)
            if graph is None:
                return dataclasses.replace(family, read=lambda values: change(family.read(values)))

            def graphs(facts: Any) -> dict[str, Any]:
                right = family.graphs(facts)
                return right | {graph: lambda builder, weights, facts, options: right[graph](
                    builder, weights, change(facts), options
                )}  # fmt: skip

            return dataclasses.replace(family, graphs=graphs)

        return find_wrong

    return replaced(exporter, "find_family", wrong)


def facts(graph: str | None = None, **values: Any) -> Mutation:
    """Other values in the configuration of the decoder; a function is called with the right value."""

    def change(read: Any) -> Any:
        text = getattr(read, "text", read)
        new = {key: value(getattr(text, key)) if callable(value) else value for key, value in values.items()}
        text = dataclasses.replace(text, **new)
        return dataclasses.replace(read, text=text) if hasattr(read, "text") else text

    return config(change, graph)


def each_layer(**values: Any) -> Mutation:
    """Other values in the facts of every layer of Gemma 4; a function is called with (layer facts, all layers)."""

    def change(layers: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            dataclasses.replace(
                layer,
                **{key: value(layer, layers) if callable(value) else value for key, value in values.items()},
            )
            for layer in layers
        )

    return facts(layers=change)


# --- weights


def weights(pattern: str, change: Callable[[np.ndarray], Any]) -> Mutation:
    """`change` the tensors whose name, as families call it, matches `pattern` in full."""

    def wrong(read: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def read_wrong(self: Weights, name: str, *arguments: Any) -> np.ndarray:
            values = read(self, name, *arguments)
            return np.asarray(change(values), values.dtype) if re.fullmatch(pattern, name) else values

        return read_wrong

    return replaced(Weights, "read", wrong)


# --- nodes


def around(pattern: str, make: Callable[[GraphBuilder, list[Any], Build], Any]) -> Mutation:
    """Something else instead of the nodes whose path matches `pattern` in full.

    A path is the name of the graph, the scopes and the name: "decoder/layers.0/q_norm". `make(graph, inputs, build)`
    returns a value, or a list for nodes with several; `build(*inputs, **attributes)` makes the right node, with other
    inputs or attributes if they are given. Nodes that `make` adds are not matched.
    """

    def wrong(right: Callable[..., list[ir.Value]]) -> Callable[..., list[ir.Value]]:
        busy = []

        def ops(self: GraphBuilder, operator: str, inputs: Any, outputs: Any, **options: Any) -> list[ir.Value]:
            path = "/".join([self.name, *self._scopes, options.get("name") or operator])

            def build(*others: Any, **more: Any) -> list[ir.Value]:
                return right(self, operator, others or inputs, outputs, **options | more)

            if busy or not re.fullmatch(pattern, path):
                return build()
            busy.append(path)
            try:
                made = make(self, list(inputs), build)
            finally:
                busy.pop()
            return made if isinstance(made, list) else [made]

        return ops

    return replaced(GraphBuilder, "ops", wrong)


def without(pattern: str) -> Mutation:
    """The nodes are left out: what goes in comes out."""
    return around(pattern, lambda graph, inputs, build: inputs[0])


def attributes(pattern: str, **values: Any) -> Mutation:
    """Other attributes of the nodes."""
    return around(pattern, lambda graph, inputs, build: build(**values))


def then(pattern: str, change: Callable[[GraphBuilder, ir.Value], ir.Value]) -> Mutation:
    """`change` the first output of the nodes."""

    def make(graph: GraphBuilder, inputs: list[Any], build: Build) -> list[ir.Value]:
        first, *others = build()
        return [change(graph, first), *others]

    return around(pattern, make)


def scaled(pattern: str, factor: float) -> Mutation:
    """The first output of the nodes times `factor`."""
    return then(pattern, lambda graph, value: graph.op("Mul", value, number(graph, factor)))


def number(graph: GraphBuilder, value: float, dtype: type = np.float32) -> ir.Value:
    return graph.constant(np.array(value, dtype), "mutant")


def permuted(pattern: str, order: Callable[[], np.ndarray]) -> Mutation:
    """The last axis of the first output in another order."""
    return then(
        pattern,
        lambda graph, value: graph.op("Gather", value, graph.constant(np.asarray(order(), np.int64), "order"), axis=-1),
    )
