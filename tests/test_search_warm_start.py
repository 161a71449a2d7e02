"""What did well before is tried first, behind the default; a study that has begun keeps what it began with."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from test_search_study import stored_in, with_

from search import cli
from search.arm import Arm
from search.results import Study, open_study, ranked
from search.spec import StudySpec
from search.study import run_study
from search.warm_start import warm_started
from vae.config import InputError

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture
def fresh(small_study: Study, small_spec: StudySpec) -> StudySpec:
    """Another study in the storage of the small one, which is not run."""
    return with_(small_spec, name="fresh")


def test_the_best_of_a_study_come_first_behind_the_default(small_study: Study, fresh: StudySpec) -> None:
    said: list[str] = []
    spec = warm_started(fresh, small_study.name, said.append)
    leaders = ranked(small_study.rows())
    assert len(spec.sampler.first) == len(leaders) > 1
    arm = Arm(spec, 0, [], {})
    _, default = arm.ask(0)
    assert default.items() >= Arm(fresh, 0, [], {}).ask(0)[1].items()
    for turn, leader in enumerate(leaders, 1):
        _, params = arm.ask(turn)
        assert params == {name: leader.params[name] for name in params}
        assert params["activation"] == leader.activation
    assert said == [f"small: tried first, behind the default: the best {len(leaders)} that fit"]
    assert warm_started(fresh, str(small_study.path)) == spec
    own = fresh.model_copy(update={"sampler": fresh.sampler.model_copy(update={"first": ({"latent_dim": 3},)})})
    assert warm_started(own, small_study.name).sampler.first == ({"latent_dim": 3}, *spec.sampler.first)
    assert StudySpec.model_validate(spec.dump()) == spec


def test_what_lies_outside_of_the_space_is_left_to_the_sampler(small_study: Study, fresh: StudySpec) -> None:
    said: list[str] = []
    best = ranked(small_study.rows())[0]
    narrow = with_(fresh, space={"activation": "silu", "latent_dim": {"low": 60, "high": 64}}, budget={"trials": 2})
    spec = warm_started(narrow, small_study.name, said.append)
    assert spec.sampler.first[0]["learning_rate"] == best.learning_rate
    assert all("latent_dim" not in configuration for configuration in spec.sampler.first)
    assert said[1] == "small: values outside of the space are left to the sampler: latent_dim"
    assert "has room for 1 of them" in said[2]
    fixed = with_(fresh, space={"activation": "silu", "latent_dim": 63, "dropout": 0.1, "learning_rate": 0.01})
    with pytest.raises(InputError, match="that is searched here"):
        warm_started(fixed, small_study.name)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_of_a_file_of_ones_own(fresh: StudySpec, tmp_path: Path, suffix: str) -> None:
    columns = {
        "value": [3.0, 1.0, 2.0, None, 1.5],
        "activation": ["tanh", "silu", "step", "tanh", "silu"],
        "latent_dim": [4.0, 8.0, None, 2.0, 8.0],
        "note": ["a", "b", "c", "d", "e"],
    }
    file = tmp_path / f"mine{suffix}"
    pyarrow.csv.write_csv(pa.table(columns), file) if suffix == ".csv" else pq.write_table(pa.table(columns), file)
    first = warm_started(fresh, str(file)).sampler.first
    assert first == ({"activation": "silu", "latent_dim": 8}, {"activation": "tanh", "latent_dim": 4})
    assert isinstance(first[0]["latent_dim"], int)


def test_of_a_table_of_ours_only_healthy_trials_count_and_of_optunas_its_own_names(
    fresh: StudySpec, small_study: Study, tmp_path: Path
) -> None:
    columns = {
        "state": ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"],
        "status": ["collapsed", "ok", "ok", "ok"],
        "objective": [None] * 4,
        "val_nelbo": [1.0, 3.0, 0.5, 2.0],
        "latent_dim": [2, 3, 4, 8.5],
    }
    pq.write_table(pa.table(columns), tmp_path / "ours.parquet")
    assert warm_started(fresh, str(tmp_path / "ours.parquet")).sampler.first == ({"latent_dim": 3},)
    small_study.to_optuna().trials_dataframe().to_csv(tmp_path / "optuna.csv")
    first = warm_started(fresh, str(tmp_path / "optuna.csv")).sampler.first
    best = small_study.summary().best
    assert best is not None
    assert first[0]["learning_rate"] == pytest.approx(best.learning_rate)
    assert first[0]["activation"] == best.activation


def test_without_a_value_rows_count_in_their_order(fresh: StudySpec, tmp_path: Path) -> None:
    rates = [0.001 * (1 + index) for index in range(9)]
    pyarrow.csv.write_csv(pa.table({"learning_rate": rates}), tmp_path / "rates.csv")
    first = warm_started(fresh, str(tmp_path / "rates.csv")).sampler.first
    assert [configuration["learning_rate"] for configuration in first] == rates[:5]


def test_what_cannot_be_taken_over_is_refused(fresh: StudySpec, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("colour\nred\n")
    pyarrow.csv.write_csv(pa.table({"learning_rate": [5.0]}), tmp_path / "far.csv")
    pyarrow.csv.write_csv(pa.table({"learning_rate": [0.005], "objective": ["3,5"]}), tmp_path / "text.csv")
    for source, why in (
        ("nowhere", "no study there"),
        (str(tmp_path / "none.csv"), "cannot be read"),
        (str(tmp_path / "bad.csv"), "no column is named"),
        (str(tmp_path / "far.csv"), "no configuration"),
        (str(tmp_path / "text.csv"), "no trial that ended well has a number"),
    ):
        with pytest.raises(InputError, match=why):
            warm_started(fresh, source)
    comparison = with_(fresh, goal="compare-activations", comparison={"settings": 2})
    with pytest.raises(InputError, match="best-model"):
        warm_started(comparison, "small")


def test_a_study_that_has_begun_keeps_what_it_began_with(
    small_study: Study, small_spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_(stored_in(small_spec, tmp_path), name="warm", budget={"trials": 3, "max_epochs": 4})
    begun = run_study(warm_started(spec, str(small_study.path)))
    leaders = ranked(small_study.rows())
    assert [row.learning_rate for row in begun.rows()[1:]] == [row.learning_rate for row in leaders[:2]]
    assert warm_started(spec, "a study that is gone") == spec
    again = run_study(spec, extend=1)
    assert again.spec.sampler.first == begun.spec.sampler.first
    assert again.rows()[3].learning_rate == leaders[2].learning_rate
    monkeypatch.setattr(sys, "argv", ["vaesearch", "run", str(begun.path / "study.toml"), "--warm-start", "gone"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert len(open_study(begun.path).rows()) == 4
