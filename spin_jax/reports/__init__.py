"""What a run shows for itself. A report is one file, and one entry here; all are written after each iteration."""

from spin_jax.registry import Registry

REPORTS: Registry = Registry(
    {
        "summary": "spin_jax.reports.summary:summary",
        "scores": "spin_jax.reports.scores:scores",
        "html": "spin_jax.reports.html:html",
    }
)
