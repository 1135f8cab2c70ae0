"""Calibration: matrices in few bits that are right for the inputs they meet, and what each costs the model.

The float32 decoder runs once over the calibration text, piece by piece. At every matrix product the second moments of
the inputs are summed up. To measure what a matrix in few bits costs, some of its rows are quantised with error feedback
for these moments (`kernels.gptq`), and a copy of two held-out sequences goes on with their products in place of the
exact ones, all other matrices as they are; at the end, the divergence of its predictions from the exact ones, scaled up
to all rows, is the loss of that one matrix. Other formats have losses in proportion to the errors of their products.
Then a format is chosen for each matrix (`calibration_choice`), and all of them are quantised.

The head is measured in parts: few of the tokens of a large vocabulary are ever likely, and vocabularies list common
tokens first, so the first rows can deserve more bits than the others.

Matrices that are used inside loops (experts) meet inputs that no piece shows: they are not measured, and their scales
are searched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engine.errors import ExportError
from ..kernels.gptq import ErrorFeedback
from ..kernels.quantize import Blocks, dequantize, quantize
from .calibration_choice import Chosen, Measured
from .calibration_inputs import Product, embedded, head_outputs, products_of, sequence_length
from .piecewise import LazyGraph, Piecewise, Values, place_rows
from .plan import Span, Storage, StoredBlocks
from .state_scales import StateRanges

__all__ = ["Calibration"]

# Added to the moments, in units of their mean: what some thousand tokens do not know about all the inputs there are.
_DAMPING = 0.1
# The head meets the most varied inputs of all, and a table that is also looked up must be near its own values.
_HEAD_DAMPING = 0.3
# Feedback works on so many columns at most: time and memory of the moments grow with the square.
_MOST_COLUMNS = 2048
_SAMPLE = 256  # rows of a matrix that are quantised to measure it
_FIRST_PART = 4096  # rows of the first part of the head; every further one ends at twice the place
_LIKELY = 1e-4  # tokens that the exact model gives this probability anywhere are compared
_LIKELY_ROWS = 4096  # of them at most
_PROBES = 2  # held-out sequences
_PROBE_TOKENS = (48, 128)  # of each, at least and at most
_PROBE_NUMBERS = 50_000_000  # that all inexact copies of one of them may carry along


@dataclass(slots=True)
class _Loss:
    """What is known of a matrix: the loss of its sampled rows in the format `reference`, by how much that counts for
    all rows, and the errors of products in all formats."""

    reference: Storage
    share: float
    errors: dict[Storage, float]
    sampled: float = 0.0

    def of(self, storage: Storage) -> float:
        worst = self.errors[self.reference]
        return self.sampled * self.share * (self.errors[storage] / worst if worst else 0.0)


class Calibration:
    """A float32 decoder with its embedding tables, run over sequences of token ids; files are written to `folder`.

    `text(columns, length)` gives sequences of at most that length, enough for moments of so many columns.
    `formats(columns)` are those that a matrix may get, smallest first; none for one that stays in floats. First
    `observe`, then `measured`, then `quantise`.
    """

    def __init__(
        self,
        embed: Callable[[LazyGraph], None],
        decoder: Callable[[LazyGraph], None],
        text: Callable[[int, int], Sequence[Sequence[int]]],
        formats: Callable[[int], Sequence[Storage]],
        folder: Path,
    ):
        self._folder = folder
        self._decoder = LazyGraph("decoder")
        decoder(self._decoder)
        self._products = products_of(self._decoder)
        self.states = StateRanges(self._decoder)
        widest = max((product.shape[1] for product in self._products), default=1)
        sequences = text(min(widest, _MOST_COLUMNS), sequence_length(self._decoder))
        used = np.unique(np.concatenate([[0], *map(np.asarray, sequences)]))
        self._embed = LazyGraph("embed", used)
        embed(self._embed)
        self._shapes = self._embed.survey.seen | self._decoder.survey.seen
        self._formats = {key: list(formats(shape[1])) for key, shape in self._shapes.items()}
        self._measures = any(len(each) > 1 for each in self._formats.values())
        probes, kept = self._hold_out(sequences) if self._measures else ([], list(sequences))
        self.tokens = sum(map(len, kept))
        # Sequences of `self._piecewise`: those that give moments, the probes, and streams with one inexact matrix.
        self._kept, self._probes = len(kept), probes
        self._streams: list[tuple[_Loss, int]] = []  # what is inexact in a stream, and the probe it began as
        self._losses: dict[str, _Loss] = {}
        self._lookups: dict[str, _Loss] = {}
        self._replaced: dict[int, Values] = {}  # by sequence: weights of the next piece
        self._last: tuple[tuple[bool, list[Path]], list[ErrorFeedback]] | None = None
        self._head_losses: dict[tuple[int, int], dict[Storage, float]] = {}  # by rows
        self._piecewise = Piecewise(self._decoder, embedded(self._embed, self._decoder, [*kept, *probes]))

    def _hold_out(self, sequences: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        """Sequences to measure losses on, cut short, and the others, which give the moments."""
        shape = self._decoder.graph.inputs[0].shape
        assert shape is not None
        carried = max(1, len(self._products)) * int(shape[-1])  # type: ignore[call-overload]
        low, high = _PROBE_TOKENS
        length = min(max(_PROBE_NUMBERS // carried, low), high)
        if len(sequences) <= _PROBES:
            return [sequence[:length] for sequence in sequences], list(sequences)
        places = {index * len(sequences) // _PROBES for index in range(_PROBES)}
        return (
            [sequences[place][:length] for place in sorted(places)],
            [sequence for index, sequence in enumerate(sequences) if index not in places],
        )

    # --- running the model

    def observe(self, progress: Callable[[str], None]) -> None:
        """Run over the text: moments and losses."""
        if self._measures:
            for key in self._embed.survey.seen:
                self._add_table_streams(key)
        for index, product in enumerate(self._products):
            progress(f"calibration: matrix {index + 1} of {len(self._products)}")
            self._observe(product)
        if self._measures:
            progress("calibration: losses")
            self._compare()

    def _add_table_streams(self, key: str) -> None:
        """Streams whose looked-up rows are inexact."""
        name, formats = f"{key}.some", self._formats[key]
        if not formats:
            return
        rows = self._embed.read(name)
        inexact = {storage: dequantize(quantize(rows, storage.bits, storage.block)) for storage in formats}
        errors = {storage: float(np.square(values - rows).mean()) for storage, values in inexact.items()}
        loss = self._lookups[key] = _Loss(formats[0], 1.0, errors)
        weights = {name: inexact[formats[0]]}
        for probe, values in enumerate(embedded(self._embed, self._decoder, self._probes, weights)):
            self._piecewise.sequences.append(values)
            self._streams.append((loss, probe))

    def _observe(self, product: Product) -> None:
        """Run up to `product`: the moments of its inputs, and streams that go on with an inexact matrix."""
        groups = _groups(product.shape[1])
        known = self._moments_path(product, 0).is_file()
        moments = [] if known else [np.zeros((stop - start,) * 2, np.float32) for start, stop in groups]
        states = self.states.names(self._piecewise.at, product.at)

        def see(index: int, values: Values) -> None:
            if index < self._kept:
                self.states.see(values, states)
            if index < self._kept and moments:
                x = values[product.input].reshape(-1, product.shape[1])
                for total, (start, stop) in zip(moments, groups, strict=True):
                    part = x[:, start:stop]
                    total += part.T @ part

        replaced, self._replaced = self._replaced, {}
        self._piecewise.run(product.at, [product.input, *states], see, lambda index: replaced.get(index, {}))
        for index, total in enumerate(moments):
            np.save(self._moments_path(product, index), total)
        # The head is compared in another way: its outputs are the largest arrays of all, and few of them are wanted.
        if self._measures and product is not self._products[-1] and self._formats[product.key]:
            self._add_streams(product)

    def _add_streams(self, product: Product) -> None:
        """A copy of each probe whose next piece has some rows of the matrix inexact."""
        rows = np.unique(np.linspace(0, product.shape[0] - 1, _SAMPLE).astype(np.int64))
        turned = self._decoder.read(product.weight).copy()  # [columns, rows]
        formats = self._formats[product.key]
        errors, inexact = self._try_formats(product, np.ascontiguousarray(turned[:, rows].T), formats)
        turned[:, rows] = inexact[formats[0]].T
        loss = self._losses[product.key] = _Loss(formats[0], product.shape[0] / len(rows), errors)
        for probe in range(len(self._probes)):
            self._replaced[len(self._piecewise.sequences)] = {product.weight: turned}
            self._piecewise.sequences.append(dict(self._piecewise.sequences[self._kept + probe]))
            self._streams.append((loss, probe))

    def _try_formats(
        self, product: Product, matrix: np.ndarray, formats: Sequence[Storage]
    ) -> tuple[dict[Storage, float], dict[Storage, np.ndarray]]:
        """Mean squared errors of products, and what is left of some rows of a matrix, in each format."""
        errors = dict.fromkeys(formats, 0.0)
        inexact = {storage: np.empty_like(matrix) for storage in formats}
        for (start, stop), feedback in zip(_groups(product.shape[1]), self._feedback(product), strict=True):
            part = np.ascontiguousarray(matrix[:, start:stop])
            for storage in formats:
                blocks = _checked(product.key, feedback, part, storage, polish=False)
                inexact[storage][:, start:stop] = dequantize(blocks)
                errors[storage] += float(feedback.errors(part, inexact[storage][:, start:stop]).mean())
        return errors, inexact

    # --- losses

    def _compare(self) -> None:
        """Compare the predictions of all streams with the exact ones."""
        head = self._products[-1]
        after = self._piecewise.sequences[self._kept :]
        # The second half of each: a token without anything before it is no example of anything.
        hidden = [values[head.input].reshape(-1, head.shape[1]) for values in after]
        hidden = [rows[len(rows) // 2 :] for rows in hidden]
        count = len(self._probes)
        likely = self._likely(head, hidden[:count])
        matrix = np.concatenate(list(place_rows(self._decoder.read_rows(head.weight), likely)))
        exact = [self._predictions(head, rows @ matrix.T) for rows in hidden[:count]]
        for (loss, probe), rows in zip(self._streams, hidden[count:], strict=True):
            inexact = self._predictions(head, rows @ matrix.T)
            loss.sampled += _divergence(exact[probe], inexact) / count
        self._compare_head(head, likely, matrix, hidden[:count], exact)

    def _compare_head(
        self,
        head: Product,
        likely: np.ndarray,
        matrix: np.ndarray,
        hidden: Sequence[np.ndarray],
        exact: Sequence[np.ndarray],
    ) -> None:
        """The losses of the head's parts; `matrix` are its rows `likely`."""
        formats = self._formats[head.key]
        _, rounded = self._try_formats(head, matrix, formats)
        for start, stop in _head_parts(head.shape[0]):
            inside = (likely >= start) & (likely < stop)
            losses = self._head_losses[start, stop] = dict.fromkeys(formats, 0.0)
            for storage in formats if inside.any() else ():
                partly = np.where(inside[:, None], rounded[storage], matrix)
                for rows, expected in zip(hidden, exact, strict=True):
                    found = self._predictions(head, rows @ partly.T)
                    losses[storage] += _divergence(expected, found) / len(hidden)
        if head.key in self._lookups:
            # Feedback leaves the rows themselves with larger errors than a search does.
            for storage in formats:
                self._lookups[head.key].errors[storage] = float(np.square(rounded[storage] - matrix).mean())

    def _likely(self, head: Product, hidden: Sequence[np.ndarray]) -> np.ndarray:
        """Tokens that the exact model finds likely somewhere, ascending. Only their probabilities are compared, among
        each other: the others have next to none."""
        largest = np.zeros(head.shape[0], np.float32)
        for rows in hidden:
            logits = np.concatenate([rows @ part.T for part in self._decoder.read_rows(head.weight)], axis=1)
            np.maximum(largest, np.exp(self._predictions(head, logits)).max(0), out=largest)
        best = np.argsort(-largest, kind="stable")[:_LIKELY_ROWS]
        return np.sort(best[largest[best] >= min(_LIKELY, float(largest[best[0]]))])

    def _predictions(self, head: Product, products: np.ndarray) -> np.ndarray:
        """Log-probabilities from outputs of the head's matrix."""
        logits = head_outputs(self._piecewise, head, products)
        logits = logits - logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)

    def measured(self) -> list[Measured]:
        """The losses of every matrix that may be quantised, in the order of the graphs."""
        found = []
        for key, (rows, columns) in self._shapes.items():
            formats = self._formats[key]
            known = [losses[key] for losses in (self._losses, self._lookups) if key in losses]
            if formats and self._head_losses and key == self._products[-1].key:
                found += self._measured_head(key, columns)
            elif formats and known:
                losses = {each: sum(loss.of(each) for loss in known) for each in formats}
                found.append(Measured(key, 0, rows, columns, losses))
            elif formats:
                # Nothing is known: the smallest blocks of the fewest bits.
                safest = min(formats, key=lambda storage: (storage.bits, storage.block))
                found.append(Measured(key, 0, rows, columns, {safest: None}))
        return found

    def _measured_head(self, key: str, columns: int) -> list[Measured]:
        looked_up = np.concatenate([np.asarray(ids) for ids in self._probes])
        found = []
        for (start, stop), losses in self._head_losses.items():
            if key in self._lookups:
                share = float(((looked_up >= start) & (looked_up < stop)).mean())
                losses = {each: loss + share * self._lookups[key].of(each) for each, loss in losses.items()}
            found.append(Measured(key, start, stop, columns, losses))
        return found

    # --- quantising

    def quantise(self, chosen: Sequence[Chosen], progress: Callable[[str], None]) -> dict[str, list[Span]]:
        """Quantise the matrices of all products that were observed: the formats of all matrices' rows, by key."""
        products = {product.key: product for product in self._products}
        found: dict[str, list[Span]] = {}
        for index, each in enumerate(chosen):
            progress(f"quantising: matrix {index + 1} of {len(chosen)}")
            start, stop, blocks = each.measured.start, each.measured.stop, None
            if each.measured.key in products:
                product, path = products[each.measured.key], self._folder / f"blocks-{index}"
                blocks = self._quantise(product, start, stop, each.storage, path)
            found.setdefault(each.measured.key, []).append(Span(start, stop, each.storage, blocks))
        return found

    def _quantise(self, product: Product, start: int, stop: int, storage: Storage, path: Path) -> StoredBlocks:
        feedbacks = self._feedback(product)
        groups = _groups(product.shape[1])

        def parts() -> Iterator[Blocks]:
            for rows in self._slices(product, start, stop):
                found = [
                    _checked(product.key, feedback, rows[:, first:last], storage)
                    for (first, last), feedback in zip(groups, feedbacks, strict=True)
                ]
                codes, scales = ([getattr(each, part) for each in found] for part in ("codes", "scales"))
                yield Blocks(storage.bits, storage.block, np.concatenate(codes, 1), np.concatenate(scales, 1))

        return StoredBlocks.write(path, storage, (stop - start, product.shape[1]), parts())

    def _slices(self, product: Product, start: int, stop: int) -> Iterator[np.ndarray]:
        """Rows of the matrix [rows, columns] of a product, in slices if it is a table."""
        if product.weight != product.key:
            yield self._decoder.read(product.weight).T[start:stop]
            return
        at = 0
        for rows in self._decoder.read_rows(product.weight):
            part = rows[max(0, start - at) : max(0, stop - at)]
            at += len(rows)
            if len(part):
                yield part

    def _moments_path(self, product: Product, group: int) -> Path:
        # Named by the first product that reads these inputs: names of values are not names of files.
        first = next(other.at for other in self._products if other.input == product.input)
        return self._folder / f"moments-{first}-{group}.npy"

    def _feedback(self, product: Product) -> list[ErrorFeedback]:
        """For each group of columns. Products over the same inputs come one after the other and share them."""
        head = product is self._products[-1]
        paths = [self._moments_path(product, group) for group in range(len(_groups(product.shape[1])))]
        if self._last is None or self._last[0] != (head, paths):
            self._last = None  # before the next ones take memory
            try:
                found = [ErrorFeedback(np.load(path), _HEAD_DAMPING if head else _DAMPING) for path in paths]
            except ValueError as error:
                raise ExportError(
                    f"the inputs of weight {product.key!r} cannot be used for calibration: {error}"
                ) from None
            self._last = (head, paths), found
        return self._last[1]


def _divergence(exact: np.ndarray, inexact: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of log-probabilities [rows, tokens]."""
    return max(0.0, float((np.exp(exact) * (exact - inexact)).sum(-1, dtype=np.float64).mean()))


def _groups(columns: int) -> list[tuple[int, int]]:
    """Spans of at most `_MOST_COLUMNS` columns that blocks of any size fit into."""
    count = -(-columns // _MOST_COLUMNS)
    step = -(-columns // count // 128) * 128 if count > 1 else columns
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def _head_parts(rows: int) -> list[tuple[int, int]]:
    """The parts in which the rows of a head are measured."""
    ends = [0, *itertools.takewhile(lambda end: end < rows, (_FIRST_PART << power for power in range(32))), rows]
    return list(itertools.pairwise(ends))


def _checked(key: str, feedback: ErrorFeedback, rows: np.ndarray, storage: Storage, *, polish: bool = True) -> Blocks:
    try:
        return feedback.quantize(rows, storage.bits, storage.block, polish=polish)
    except ValueError as error:
        raise ExportError(f"weight {key!r} cannot be quantised: {error}") from None
