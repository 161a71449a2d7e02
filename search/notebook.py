"""A study as the last line of a notebook's cell: where it stands and who leads."""

from pathlib import Path

import jinja2

from search.leaderboard import counts
from search.progress import params_text, shapes_differ, unit_of
from search.results import Study

LEADERS_SHOWN = 5


def study_html(study: Study) -> str:
    """A few lines of HTML without styles of its own, so that the notebook's apply."""
    summary = study.summary()
    leaders = summary.leaders[:LEADERS_SHOWN]
    template = (Path(__file__).parent / "templates" / "notebook.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        summary=summary,
        unit=unit_of(leaders[0]) if leaders else "",
        leaders=[(row, params_text(row, shapes_differ(leaders))) for row in leaders],
        counts=counts(summary),
    )
