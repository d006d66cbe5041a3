"""The generate stage: y' ~ p_t(.|x) for every prompt."""

import logging

from spin_jax.generation.engine import Engine, Progress, warn_if_endless
from spin_jax.generation.response_files import note_settings
from spin_jax.runtime import multihost, out_of_memory, preemption
from spin_jax.self_play.pairs import asked_examples, is_given, write_responses
from spin_jax.self_play.run import Run
from spin_jax.self_play.stages import external

_LOG = logging.getLogger(__name__)


@out_of_memory.tells("generate", out_of_memory.for_sampling)
def generate_responses(run: Run, t: int) -> None:
    """Sample y' ~ p_t(.|x) for every prompt, training and held-out, into `generated/pairs.parquet`.

    Raises:
        Stopped: another program is to write the responses, and has not done so yet.
    """
    directory = run.iteration(t) / "generated"
    if multihost.on_process_zero((directory / "pairs.parquet").exists):
        return
    examples = asked_examples(run)
    if not examples:
        return
    if is_given(run, t):
        _LOG.info("iteration %d takes the generated responses that %s holds", t, run.config.data.train)
        return
    model = run.store.identity_of(run.start_of(t))
    if run.config.generate.source == "external":
        if multihost.on_process_zero(lambda: external.exchange_files(run, t, directory, model)):
            return
        raise preemption.Stopped(
            f"iteration {t} waits for responses: let another program answer {directory / external.PROMPTS} with the "
            f"model in {run.start_of(t)}, as {external.REQUEST} says; then write {external.RESPONSES} beside them, and "
            "start the same command again"
        )
    multihost.on_process_zero(
        lambda: note_settings(directory, {f"model ({part})": content for part, content in model.items()})
    )
    responses = Engine.for_chat(run.model, run.config.generate, run.decode, run.chat).generate(
        run.store.params(run.start_of(t)),
        {example.row: run.asked(example.row) for example in examples},
        seed=run.config.seed,
        iteration=t,
        directory=directory,
        progress=Progress(f"iteration {t}: generate"),
    )
    multihost.on_process_zero(lambda: write_responses(run, directory, examples, responses, model))
    if t == 0:
        warn_if_endless(responses, run.config.generate.max_new_tokens)
