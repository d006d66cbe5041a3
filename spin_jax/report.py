"""One page of one run or of several beside each other, from what they have left, finished or not.

    python -m spin_jax.report WORKDIR [WORKDIR...] [--out=FILE] [--max_prompts=N]

A run writes its own page after each iteration, WORKDIR/report.html. This writes it anew; of several runs to the file
given by --out. It needs no device and no network, and neither does the page. Exit status: 0 done, 2 a mistake that the
one line printed says how to mend.
"""

from collections import Counter
from collections.abc import Sequence

from absl import flags
from etils import epath

from spin_jax.errors import UserError
from spin_jax.reports import html, responses
from spin_jax.reports.record import RunRecord
from spin_jax.runtime import cli
from spin_jax.runtime.files import expand, write_whole

_OUT = flags.DEFINE_string(
    "out",
    None,
    "The file to write; report.html in the workdir without it.",
    allow_override=True,  # other commands have one, too
)
_PROMPTS = flags.DEFINE_integer(
    "max_prompts", responses.PROMPTS, "Prompts of each run to show at most: the worst, the best, and some between.", 0
)


def main(argv: list[str]) -> int:
    out, records = read(argv[1:])
    write_whole(out, html.page(records, _PROMPTS.value))
    print(out)
    return 0


def read(workdirs: Sequence[str]) -> tuple[epath.Path, dict[str, RunRecord]]:
    """(the file to write, the runs by names that tell them apart).

    Raises:
        UserError: no workdir is given, there is no run in one, or several have no --out.
    """
    if not workdirs:
        raise UserError("no workdir is given: python -m spin_jax.report runs/quickstart")
    if len(workdirs) > 1 and not _OUT.value:
        raise UserError(f"--out is missing: python -m spin_jax.report {' '.join(workdirs)} --out=report.html")
    paths = [path.resolve() if path.name in ("", "..") else path for path in map(expand, workdirs)]
    records = [RunRecord.load(path, damaged=True) for path in paths]
    for record in records:
        if not any((record.workdir / made).exists() for made in ("config.json", "iteration_0", "sft")):
            raise UserError(f"{record.workdir} holds no run: name the directory that its --workdir named")
    count = Counter(record.workdir.name for record in records)
    names = [record.workdir.name if count[record.workdir.name] == 1 else str(record.workdir) for record in records]
    return expand(_OUT.value or records[0].workdir / html.FILE), dict(zip(names, records, strict=True))


if __name__ == "__main__":
    cli.log_plainly()
    cli.run(main, words=True)
