"""The pairs of a run: write them when their responses are sampled, and read them back for scoring and training."""

import collections
import dataclasses
from collections.abc import Sequence

from etils import epath

from spin_jax.data.pairs import Pair, read_model, read_sampled, whole_sequence, write_pairs_parquet
from spin_jax.data.sources import Example
from spin_jax.data.tokenize import Tokenised
from spin_jax.errors import UserError
from spin_jax.generation.response_files import Response, forget_parts
from spin_jax.runtime import multihost
from spin_jax.self_play.run import Run
from spin_jax.self_play.workdir import check_model
from spin_jax.training.programs import reads_generated


def write_responses(
    run: Run,
    directory: epath.Path,
    examples: Sequence[Example],
    responses: Sequence[Response],
    model: dict[str, str],
) -> None:
    """Write `pairs.parquet`, with a row for each response, those to one prompt together; then delete the parts.

    Args:
        model: identifies the model that wrote the responses.
    """
    texts = [run.chat.codec.decode(response.tokens) for response in responses]
    asked = [example for example in examples for _ in range(run.config.generate.responses)]
    answered = [
        dataclasses.replace(example, generated=text, truncated=response.truncated)
        for example, text, response in zip(asked, texts, responses, strict=True)
    ]
    columns = {
        "generated_tokens": [response.tokens.tolist() for response in responses],
        "generated_logprobs": [response.logprobs.tolist() for response in responses],
        "held_out": [run.is_held_out(response.row) for response in responses],
    }
    write_pairs_parquet(directory / "pairs.parquet", answered, columns, model)
    forget_parts(directory)


def is_given(run: Run, t: int) -> bool:
    """Whether iteration t takes its generated responses from the data."""
    return run.has_responses and (t == 0 or run.config.generate.source == "data")


def is_sampled(run: Run, t: int) -> bool:
    """Whether iteration t trains on responses that are sampled for it."""
    return reads_generated(run.config.spin) and not is_given(run, t)


def asked_examples(run: Run) -> list[Example]:
    """Return the examples whose prompts the opponent answers: only held-out ones if the objective reads no generated
    response."""
    return (run.train_examples if reads_generated(run.config.spin) else []) + run.held_out_examples


def pairs_of(run: Run, t: int) -> tuple[list[Pair], list[Pair]]:
    """Return the (training, held-out) pairs of iteration t.

    Raises:
        UserError: they are missing, or another model wrote them.
    """
    if t not in run.pairs:
        path = run.iteration(t) / "generated" / "pairs.parquet"
        asked = asked_examples(run)
        if not asked:
            sampled = {}
        elif multihost.on_process_zero(path.exists):
            complaint = f"{path} was written by another model than that in {run.start_of(t)}"
            check_model(
                read_model(path), run.store.identity_of(run.start_of(t)), complaint, f"delete {path.parent}, and go on"
            )
            sampled = read_sampled(path)
        elif is_given(run, t):
            sampled = {e.row: [(e.generated or "", e.truncated)] for e in asked}
        else:
            raise UserError(f"{path} is missing: run the generate stage of iteration {t} first")
        if absent := [example.row for example in asked if example.row not in sampled]:
            raise UserError(f"{path} has no response to row {absent[0]}: data or loss changed; give another --workdir")
        train, held_out = (
            [(example, response) for example in examples for response in sampled.get(example.row, [None])]
            for examples in (run.train_examples, run.held_out_examples)
        )
        pairs = multihost.parallel_map(lambda one: run.pair(one[0], one[1], t), train + held_out)
        run.pairs[t] = pairs[: len(train)], pairs[len(train) :]
    return run.pairs[t]


def iterations_mixed(run: Run, t: int) -> range:
    """Return the iterations whose pairs iteration t trains on, newest first: t, and `config.spin.previous_iterations`
    before it, unless their pairs are the same."""
    differ = reads_generated(run.config.spin) and run.config.generate.source != "data"
    previous = run.config.spin.previous_iterations if differ else 0
    return range(t, max(0, t - previous) - 1, -1)


def mixed_pairs(run: Run, t: int) -> list[Pair]:
    """Return the pairs that iteration t trains on, those of the newest iteration first."""
    return [pair for s in iterations_mixed(run, t) for pair in pairs_of(run, s)[0]]


def with_proto(run: Run, pairs: Sequence[Pair]) -> list[Pair]:
    """Add a third response to pairs, "proto": what theta_0 wrote to the same prompt at iteration 0.

    The k-th pair of a prompt gets theta_0's k-th response. If there are fewer of those, begin again with the first.
    """
    protos, seen = collections.defaultdict(list), collections.Counter()
    for first in pairs_of(run, 0)[0]:
        protos[first.row].append(first)
    found = []
    for pair in pairs:
        of_row, number = protos[pair.row], seen[pair.row, pair.iteration]
        seen[pair.row, pair.iteration] += 1
        (_, proto), (_, truncated) = of_row[number % len(of_row)].responses, of_row[number % len(of_row)].truncated
        responses, ends = (*pair.responses, proto), (*pair.truncated, truncated)
        found.append(dataclasses.replace(pair, responses=responses, truncated=ends))
    return found


def sft_pairs(run: Run) -> list[Pair]:
    """Return the training examples as pairs without a generated response; `config.sft.loss_on` says what is learned."""
    pairs = [sft_pair(run, example) for example in run.train_examples]
    return [whole_sequence(pair) for pair in pairs] if run.config.sft.loss_on == "all" else pairs


def sft_pair(run: Run, example: Example, tokens: Tokenised | None = None) -> Pair:
    return run.pair(example, tokens=tokens)
