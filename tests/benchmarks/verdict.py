"""How often the verdict on a comparison is wrong, and how often it is none: `search.statistics` on simulated studies.

    python tests/benchmarks/verdict.py              # all parts, about four minutes on one core
    python tests/benchmarks/verdict.py coverage     # one of them

A study takes its seeds from `seeds.parquet`, models of one configuration, without replacement: each of its activations
has R of them, and two activations that are both relu differ by their seeds alone. Whatever is called best there is an
error; with a shift added to all but one of them, it is what was to be found. The region of practical equivalence is
half a seed's SD, or 0.1 nat if that is more, the default, which is wide against the SD of seeds here, 0.06 nat.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from search.statistics import ROPE_FLOOR, Interval, Verdict, judge, mean_interval, wilson

TABLE = Path(__file__).with_name("seeds.parquet")
DRAWS = 20  # of the bootstrap, which has no part in the verdict
LEVEL = 0.95
SD_SHIFTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)  # of a seed's SD
NAT_SHIFTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
REGIMES = {  # SD of seeds, of images, and of what is of both, and images
    "seeds alone": (1.0, 0.0, 0.0, 1),
    "seeds": (1.0, 1.0, 0.5, 100),
    "both": (0.3, 3.0, 1.0, 100),
    "images": (0.02, 2.0, 0.3, 100),
    "seed x image": (0.02, 0.05, 2.0, 100),
}
EFFECTS: Mapping[str, Callable[[np.random.Generator, int], "Floats"]] = {  # of seeds: mean 0, variance 1
    "normal": lambda rng, count: rng.standard_normal(count),
    "gamma(4)": lambda rng, count: (rng.gamma(4, size=count) - 4) / 2,  # skewness 1
    "exponential": lambda rng, count: rng.exponential(size=count) - 1,  # skewness 2
}

# Shapes: S seeds of the pool, R seeds of a study, N images.

Floats = NDArray[np.float64]


def read_pool(path: Path = TABLE) -> dict[str, Floats]:
    """Activation -> (S, N) in nats; row s is seed s for all."""
    rows = pq.read_table(path).to_pylist()
    names = dict.fromkeys(row["activation"] for row in rows)
    return {name: np.array([row["nll"] for row in rows if row["activation"] == name], dtype=float) for name in names}


def studies(pool: Floats, names: int, seeds: int, count: int, seed: int = 0) -> Iterator[dict[str, Floats]]:
    """pool (S, N) -> `count` times as many names, each (R, N), no seed twice in a study."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        picked = rng.permutation(len(pool))[: names * seeds].reshape(names, seeds)
        yield {f"relu {at}": pool[rows] for at, rows in enumerate(picked)}


# ---- the parts


def same_called_best(pool: Floats, names: int, seeds: int, count: int, rope_floor: float) -> tuple[int, int]:
    """Of `count` studies of one activation under several names: those with a "best", those with any name out."""
    verdicts = [
        judge(study, draws=DRAWS, rope_floor=rope_floor, level=LEVEL) for study in studies(pool, names, seeds, count)
    ]
    return sum(found.kind == "best" for found in verdicts), sum(len(found.group) < names for found in verdicts)


def power(pool: Floats, shifts: Sequence[float], seeds: int, count: int, rope_floor: float) -> list[int]:
    """Of `count` studies of two, one of them worse by each of the shifts in nats: how often the other is best."""
    found = [0] * len(shifts)
    for study in studies(pool, 2, seeds, count):
        good, bad = study
        for at, shift in enumerate(shifts):
            verdict = judge({good: study[good], bad: study[bad] + shift}, draws=DRAWS, rope_floor=rope_floor)
            found[at] += verdict.kind == "best" and verdict.group == (good,)
    return found


def covered(regime: str, effect: str, seeds: int, count: int, of_difference: bool = False) -> int:
    """Of `count` simulated matrices: how many whose interval has the true mean, or that of the difference of two."""
    of_seed, of_image, of_both, images = REGIMES[regime]
    rng = np.random.default_rng(seeds)

    def draw() -> Floats:
        rows = of_seed * EFFECTS[effect](rng, seeds)[:, None]
        return rows + of_image * EFFECTS["gamma(4)"](rng, images) + of_both * rng.standard_normal((seeds, images))

    hits = 0
    for _ in range(count):
        interval = mean_interval(draw() - draw() if of_difference else draw(), LEVEL)
        hits += interval.low <= 0 <= interval.high
    return hits


def rivals(values: Floats, draws: int = 2000) -> dict[str, Floats]:
    """values (count, R), a sample a row -> method -> (2, count): low and high of the intervals of the mean."""
    seeds = values.shape[1]
    weights = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    mean = values.mean(axis=1)
    drawn = (values - mean[:, None]) @ weights.T
    error = values.std(axis=1, ddof=1) / np.sqrt(seeds)
    drawn_error = np.sqrt(np.maximum(np.square(values - mean[:, None]) @ weights.T - drawn**2, 0) / (seeds - 1))
    t = stats.t.ppf((1 + LEVEL) / 2, seeds - 1)
    expanded = stats.norm.cdf(-t * np.sqrt(seeds / (seeds - 1)))
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of one seed alone
        studentised = np.nan_to_num(drawn / drawn_error, nan=0.0, posinf=1e6, neginf=-1e6)
    tail = (1 - LEVEL) / 2
    ours = np.array([(found.low, found.high) for found in map(mean_interval, values[:, :, None])])
    return {
        "student": mean + np.array([-t, t])[:, None] * error,
        "percentile": mean + np.quantile(drawn, [tail, 1 - tail], axis=1),
        "expanded": mean + np.quantile(drawn, [expanded, 1 - expanded], axis=1),
        "bootstrap t": mean - np.quantile(studentised, [1 - tail, tail], axis=1) * error,
        "ours": ours.T,
    }


# ---- the tables


def share(count: int, total: int) -> str:
    interval = wilson(count, total)
    return f"{count}/{total} {count / total:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def print_same(pool: Floats, count: int) -> None:
    print("\nOne activation under several names: how often one is called best, and how often any is out, of", count)
    print(f"{'names':>6}{'seeds':>6}{'least rope':>11}  {'best':36}any out")
    for names, seeds, rope_floor in [
        (2, 10, ROPE_FLOOR),
        (2, 10, 0.0),
        (2, 20, 0.0),
        (5, 10, ROPE_FLOOR),
        (5, 10, 0.0),
    ]:
        best, out = same_called_best(pool, names, seeds, count, rope_floor)
        print(f"{names:6}{seeds:6}{rope_floor:11.1f}  {share(best, count):36}{share(out, count)}", flush=True)


def print_power(pool: Floats, count: int) -> None:
    sd = float(pool.mean(axis=1).std(ddof=1))
    tables = (
        ("a seed's SD, rope half of it", SD_SHIFTS, sd, 0.0),
        (f"nats, rope {ROPE_FLOOR} nat", NAT_SHIFTS, 1.0, ROPE_FLOOR),
    )
    print(
        f"\nTwo activations that differ by a shift: % of {count} studies in which the better is best; SD {sd:.3f} nat"
    )
    for unit, shifts, factor, rope_floor in tables:
        print(f"shift in {unit}\n{'seeds':>6}" + "".join(f"{shift:8.2f}" for shift in shifts))
        for seeds in (5, 10, 20):
            found = power(pool, [factor * shift for shift in shifts], seeds, count, rope_floor)
            print(f"{seeds:6}" + "".join(f"{100 * hits / count:8.1f}" for hits in found), flush=True)


def print_coverage(count: int) -> None:
    print(f"\nCoverage of the {LEVEL:.0%} interval in %, of {count} simulated matrices each")
    print(f"{'differ by':14}{'seeds are':13}{'of':12}" + "".join(f"{f'R = {seeds}':>8}" for seeds in (3, 5, 10, 20)))
    cases = [(regime, effect, False) for regime in REGIMES for effect in EFFECTS]
    cases = [case for case in cases if case[0] in ("seeds alone", "seeds", "both") or case[1] == "normal"]
    for regime, effect, of_difference in [*cases, ("seeds alone", "exponential", True)]:
        hits = [covered(regime, effect, seeds, count, of_difference) for seeds in (3, 5, 10, 20)]
        what = "difference" if of_difference else "mean"
        print(f"{regime:14}{effect:13}{what:12}" + "".join(f"{100 * hit / count:8.1f}" for hit in hits), flush=True)


def print_rivals(count: int) -> None:
    print(
        f"\nThe same of other intervals, seeds alone: coverage in % (median width against Student's), {count} samples;"
    )
    print("and the width in nats with ten seeds of SD 0.05, one of which is 4 nats off")
    failed = np.append(np.random.default_rng(0).normal(0, 0.05, 9), 4.0)[None]
    widths = {method: float(high[0] - low[0]) for method, (low, high) in rivals(failed).items()}
    found = {
        (effect, seeds): rivals(np.stack([EFFECTS[effect](np.random.default_rng(at), seeds) for at in range(count)]))
        for effect in EFFECTS
        for seeds in (5, 10, 20)
    }
    print(f"{'':13}" + "".join(f"{f'{effect[:8]} {seeds}':>13}" for effect, seeds in found) + f"{'one failed':>12}")
    for method, width in widths.items():
        cells = []
        for each in found.values():
            (low, high), (least, most) = each[method], each["student"]
            hits = ((low <= 0) & (high >= 0)).mean()
            cells.append(f"{100 * hits:.1f} ({np.median((high - low) / (most - least)):.2f})")
        print(f"{method:13}" + "".join(f"{cell:>13}" for cell in cells) + f"{width:12.1f}", flush=True)


def print_real(pool: Mapping[str, Floats]) -> None:
    most = min(len(values) for values in pool.values())
    for seeds in (5, 10, 20, most):
        print_verdict(judge({name: values[:seeds] for name, values in pool.items()}))


def print_verdict(found: Verdict) -> None:
    group = ", ".join(found.group)
    print(f"\n{found.seeds} seeds of each, {found.images} images, rope {found.rope:.3f}: {found.kind}: {group}")
    print(f"smallest p {found.smallest_p:.2g}; leader and runner-up told apart by {found.seeds_to_decide} seeds")
    print(
        f"{'':12}{'mean':>8}{'95 % interval':>18}{'sd':>7}{'first':>7}   behind the leader{'p (Holm)':>12}{'better':>8}"
    )
    behind = {pair.b: pair for pair in found.pairs if pair.a == found.estimates[0].name}
    for each in found.estimates:
        line = f"{each.name:12}{each.mean:8.3f}{span(each.interval):>18}{each.sd:7.3f}{each.first:7.2f}"
        if each.name in behind:
            pair = behind[each.name]
            less = Interval(-pair.interval.high, -pair.interval.low)
            line += f"{-pair.difference:8.3f}{span(less):>18}{pair.p_holm:10.2g}{pair.better:8.2f}"
        print(line, flush=True)


def span(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"


def main() -> None:
    pool = read_pool()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("same", "power", "coverage", "rivals", "real")
    parser.add_argument("parts", nargs="*", choices=[[], *parts], default=[], metavar="|".join(parts))
    parser.add_argument("--studies", type=int, default=1000, help="in each row of the tables of studies")
    parser.add_argument("--matrices", type=int, default=4000, help="in each cell of the table of coverage")
    asked = parser.parse_args()
    for part in asked.parts or parts:
        if part == "same":
            print_same(pool["relu"], asked.studies)
        elif part == "power":
            print_power(pool["relu"], asked.studies // 2)
        elif part == "coverage":
            print_coverage(asked.matrices)
        elif part == "rivals":
            print_rivals(asked.matrices)
        else:
            print_real(pool)


if __name__ == "__main__":
    main()
