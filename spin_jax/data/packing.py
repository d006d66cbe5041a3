"""Make batches of pairs: choose which pairs share a row, lay them out, and count their FLOPs."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from spin_jax.config import TrainConfig
from spin_jax.data.batch import HostBatch, PackedRows, Shape, empty_batch
from spin_jax.data.bin_packing import Packed, best_fit, few_lengths, pack, round_up
from spin_jax.data.pairs import Pair
from spin_jax.devices import sharding
from spin_jax.models import ModelConfig, flops_per_token, unembed_flops

# ---- packing


@dataclasses.dataclass(frozen=True)
class Packing:
    """How batches are cut into rows.

    Attributes:
        num_shards: devices that split rows, times micro-batches. The number of rows is a multiple of it.
        multiple: the length of a row, in tokens, is a multiple of it.
        row_length: mean length of rows, at most; a longer pair makes rows as long as itself.
        shapes: shapes that the batches of a stage have, at most. Each is a program to compile.
    """

    num_shards: int
    multiple: int
    row_length: int
    shapes: int = 3

    def rows(self, sizes: np.ndarray) -> int:
        """Choose the number of rows, the same for all batches, that needs the fewest slots (rows times their length,
        summed over the batches). Of equals take the smallest.

        On average rows are no longer than `row_length` or the longest pair. No batch takes more slots than rows with
        one pair each, all as long as the longest pair: that is the bound which the compile check compiles.

        Args:
            sizes: slots of each pair, int [batches, pairs].
        """
        longest, pairs = sizes.max(), sizes.shape[1]
        fewest = max(1, round(sizes.sum(axis=1).mean() / max(self.row_length, longest) / self.num_shards))
        most = max(fewest, math.ceil(pairs / self.num_shards))
        bound = most * self.num_shards * round_up(longest, self.multiple)
        best, best_slots = most * self.num_shards, math.inf
        for rows in range(fewest * self.num_shards, most * self.num_shards + 1, self.num_shards):
            shortest = np.maximum(sizes.max(axis=1), sizes.sum(axis=1) / rows)
            if rows * (np.ceil(shortest / self.multiple) * self.multiple).sum() >= best_slots:
                continue  # not even perfect packing would help
            lengths = [pack(batch, rows, self.multiple).length for batch in sizes.tolist()]
            taken = rows * sum(few_lengths(lengths, self.shapes))
            if rows * max(lengths) <= bound and taken < best_slots:
                best, best_slots = rows, taken
        return best


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of a stage: which pairs share a row, and the shape of each batch.

    Attributes:
        batches: for each batch, for each row, the numbers of its pairs.
        shapes: of each batch. Few are different: batches of the same length have the same shape.
        fill: share of all slots that is not padding.
        saved: how many times more slots a row for each response would take, padded to the longest of its batch.
    """

    batches: list[list[list[int]]]
    shapes: list[Shape]
    fill: float
    saved: float

    def __str__(self) -> str:
        programs = sorted(set(self.shapes))
        lengths = ", ".join(str(shape.length) for shape in programs)
        return (
            f"{len(self.batches)} batches of {programs[0].rows} rows of {lengths} tokens, {self.fill:.1%} full: "
            f"{self.saved:.1f} times fewer slots than a padded row for each response"
        )


def plan_training(pairs: Sequence[Pair], order: np.ndarray, packing: Packing) -> Plan:
    """Pack the batches of `order` [steps, batch_size] into rows, of the lengths that need the fewest slots in all.

    All batches have the same number of rows, so that the programs differ in the length of rows alone.
    """
    sizes = np.array([slots(pair) for pair in pairs])
    rows = packing.rows(sizes[order])
    packed = [pack(sizes[chosen].tolist(), rows, packing.multiple) for chosen in order]
    lengths = few_lengths([length for length, _ in packed], packing.shapes)
    batches = [
        Packed(length, [[int(chosen[i]) for i in row] for row in in_rows])
        for chosen, length, (_, in_rows) in zip(order, lengths, packed, strict=True)
    ]
    return _plan(pairs, batches, packing)


def plan_scoring(pairs: Sequence[Pair], at_a_time: int, packing: Packing) -> Plan:
    """Pack all pairs into batches of about `at_a_time` pairs, in any order, with rows of one length: one program."""
    sizes = [slots(pair) for pair in pairs]
    length = round_up(max(packing.row_length, *sizes), packing.multiple)
    in_rows = best_fit(sizes, length)
    batches = math.ceil(len(pairs) / at_a_time)
    rows = round_up(len(in_rows) / batches, packing.num_shards)
    batches = [in_rows[i : i + rows] for i in range(0, len(in_rows), rows)]
    batches[-1] += [[] for _ in range(rows - len(batches[-1]))]
    return _plan(pairs, [Packed(length, batch) for batch in batches], packing)


def _plan(pairs: Sequence[Pair], batches: Sequence[Packed], packing: Packing) -> Plan:
    """Make a plan of batches. For each length of rows, choose the shape that holds all batches of that length."""
    targets: dict[int, int] = {}
    used = padded = total = 0
    for length, rows in batches:
        targets_of_rows = [sum(len(y) for i in row for y in pairs[i].responses) for row in rows]
        targets[length] = max(targets.get(length, 1), *targets_of_rows)
        chosen = [pairs[i] for i in itertools.chain(*rows)]
        used += sum(slots(pair) for pair in chosen)
        total += len(rows) * length
        padded += _padded_slots(chosen, packing.multiple)
    most = max(len(row) for _, rows in batches for row in rows)
    responses = max(len(pair.responses) for pair in pairs)
    shapes = [
        Shape(len(rows), length, round_up(targets[length], packing.multiple), most, responses)
        for length, rows in batches
    ]
    return Plan([rows for _, rows in batches], shapes, used / total, padded / total)


def slots(pair: Pair) -> int:
    """Return how many slots of a row a pair takes: its prompt once, and its responses without their last tokens, which
    predict nothing."""
    return len(pair.prompt) + sum(max(len(y) - 1, 0) for y in pair.responses)


def _padded_slots(pairs: Sequence[Pair], multiple: int) -> int:
    """Return the slots that pairs would take if each response had a row of its own, after a copy of its prompt."""
    lengths = [len(pair.prompt) + len(y) for pair in pairs for y in pair.responses if len(y)]
    return len(lengths) * round_up(max(lengths), multiple)


# ---- layout


def pack_batch(
    model: ModelConfig,
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[int]],
    shape: Shape,
    *,
    responses: Sequence[str] = (),
    mean_over: str = "pairs",
    reference_logps: np.ndarray | None = None,
) -> HostBatch:
    """Lay out those of `pairs` that `rows` names.

    Args:
        responses: names of a pair's responses, for the names of `host_metrics`.
        mean_over: "pairs" or "tokens", as `Objective.mean_over`. It decides the weights of pairs.
        reference_logps: log p_t of the responses, [pairs of the batch, Y], row after row. None writes NaN, for an
            objective or a program that does not read them.
    """
    chosen = [pairs[i] for i in itertools.chain(*rows)]
    arrays = empty_batch(shape)
    weight = 1 / (len(chosen) if mean_over == "pairs" else sum(len(y) for pair in chosen for y in pair.responses))
    for row, numbers in enumerate(rows):
        slot = target = 0
        for place, number in enumerate(numbers):
            first_id = place * shape.responses
            slot, target = _write(arrays.rows, pairs[number], row, first_id, slot, target)
            arrays.weights_BP[row, place] = weight
    arrays.reference_logps_BPY[:] = np.nan if reference_logps is None else 0
    if reference_logps is not None:
        arrays.reference_logps_BPY[_places(rows)] = reference_logps
    host_metrics = {}
    for y, name in enumerate(responses):
        host_metrics[f"lengths/{name}"] = float(np.mean([len(pair.responses[y]) for pair in chosen]))
        host_metrics[f"truncated/{name}"] = float(np.mean([pair.truncated[y] for pair in chosen]))
    tokens = sum(slots(pair) for pair in chosen)
    return HostBatch(
        arrays,
        np.array([pair.row for pair in chosen]),
        host_metrics | {"fill": tokens / arrays.rows.tokens_BT.size},
        tokens,
        sum(forward_flops(model, pair) for pair in chosen),
    )


def of_pairs(x_BP: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Select the values of pairs, [pairs, ...], row after row, from those for each place of a batch, [B, P, ...]."""
    return x_BP[_places(rows)]


def _places(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, place in the row) of each pair of a batch, row after row."""
    places = [(row, place) for row, numbers in enumerate(rows) for place in range(len(numbers))]
    return tuple(np.array(places).T)


def _write(rows: PackedRows, pair: Pair, row: int, first_id: int, slot: int, target: int) -> tuple[int, int]:
    """Write a pair into its row from `slot` and `target` on. Return where the next pair goes."""
    prompt, end = len(pair.prompt), slot + slots(pair)
    rows.tokens_BT[row, slot : slot + prompt] = pair.prompt
    rows.positions_BT[row, slot : slot + prompt] = np.arange(prompt)
    rows.visible_until_BT[row, slot:end] = end
    last_of_prompt, at = slot + prompt - 1, slot + prompt
    for y, response in enumerate(pair.responses):
        inputs = max(len(response) - 1, 0)
        rows.tokens_BT[row, at : at + inputs] = response[:-1]
        rows.positions_BT[row, at : at + inputs] = prompt + np.arange(inputs)
        rows.visible_until_BT[row, at : at + inputs] = at + inputs
        those = slice(target, target + len(response))
        rows.predictor_index_BR[row, those] = np.r_[last_of_prompt, at : at + inputs][: len(response)]
        rows.targets_BR[row, those] = response
        rows.response_ids_BR[row, those] = first_id + y
        at, target = at + inputs, target + len(response)
    return end, target


def forward_flops(model: ModelConfig, pair: Pair) -> float:
    """Return the matmul FLOPs of a forward pass over a pair, with its prompt once. With a sliding window, count for
    each token the keys inside its window."""
    prompt, tokens, seen = len(pair.prompt), 0, 0.0
    spans = [(0, prompt)] + [(prompt, prompt + max(len(y) - 1, 0)) for y in pair.responses]
    for first, end in spans:
        tokens += end - first
        keys = ((_keys_seen(end, w) - _keys_seen(first, w), share) for w, share in model.window_shares.items())
        seen += sum(share * count for count, share in keys)
    targets = sum(map(len, pair.responses))
    return tokens * flops_per_token(model, seen / tokens) + targets * unembed_flops(model)


def _keys_seen(tokens: int, window: int | None) -> int:
    """Return how many keys the first tokens of a sequence see: the sum of min(k, window) for k = 1 to `tokens`."""
    growing = min(tokens, window or tokens)
    return growing * (growing + 1) // 2 + (tokens - growing) * growing


def make_packing(settings: TrainConfig, mesh: Mesh, micro_batches: int = 1) -> Packing:
    """Return how to pack pairs into rows on a mesh, by `config.train`.

    Args:
        micro_batches: the config's for training. Scoring, which keeps nothing for a backward pass, takes 1, with the
            pairs of one micro-batch at a time.
    """
    num_shards = sharding.num_shards(mesh, "rows") * micro_batches
    return Packing(num_shards, settings.length_multiple, settings.row_length, settings.row_shapes)
