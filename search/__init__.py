"""The study: what is searched, by which sampler, recorded where. `StudySpec`, `run_study`, `open_study`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.results import Study, list_studies, open_study
    from search.spec import StudySpec
    from search.sql import query
    from search.study import run_study

_HOMES = {
    "StudySpec": "search.spec",
    "Study": "search.results",
    "open_study": "search.results",
    "list_studies": "search.results",
    "query": "search.sql",
    "run_study": "search.study",
}

__all__ = ["Study", "StudySpec", "list_studies", "open_study", "query", "run_study"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ray and torch are slow, and not every use needs them."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'search' has no attribute {name!r}")
