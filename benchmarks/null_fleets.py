"""Of simulated fleets without any effect, how many publish somebody; and who is found otherwise.

    python benchmarks/null_fleets.py [--fleets 400] [--users 20,60,200]

Gains on 5, 8, 12, 20 or 30 texts a user have mean 0 and one standard deviation, of different
shapes. Printed for each shape and size of fleet: the share of null fleets that publish anybody, by
the p-values of Student's t alone and by the fleet's rule (`fleet/skewed_gains.py`), then, where
half of the users gain 0.5 or 1 standard deviation, the share of these who are published, by both.
The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Callable
from statistics import fmean

import numpy as np

from langchain_cope.fleet.discoveries import discoveries
from langchain_cope.fleet.skewed_gains import Gains, p_values
from langchain_cope.personalization.certainty import certainty, in_sds, prior_of, skewness

SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda random, n: random.normal(size=n),
    "Laplace": lambda random, n: random.laplace(size=n) / 2**0.5,
    "t3": lambda random, n: random.standard_t(3, size=n) / 3**0.5,
    "exponential, right": lambda random, n: random.exponential(size=n) - 1,
    "exponential, left": lambda random, n: 1 - random.exponential(size=n),
    "lognormal, left": lambda random, n: (
        (np.exp(0.125) - np.exp(random.normal(0, 0.5, n))) / 0.6039
    ),
}
NUM_TEXTS = (5, 8, 12, 20, 30)
SCEPTICAL = prior_of({}).sceptical


def shares(
    shape: str, num_users: int, effect: float, num_fleets: int, random: np.random.Generator
) -> tuple[float, float]:
    """Return of null fleets the share that publishes, else the share found; by t, by the rule."""
    gaining = num_users // 2 if effect else 0
    by_t, by_rule = [], []
    for _ in range(num_fleets):
        users = []
        for user in range(num_users):
            gains = SHAPES[shape](random, int(random.choice(NUM_TEXTS)))
            gains = (0.3 * (gains + effect * (user < gaining))).tolist()
            p_value = 1 - certainty(gains, SCEPTICAL)
            users.append(Gains(p_value, len(gains), in_sds(gains), skewness(gains)))
        for found, values in (
            (by_t, [user.p_value for user in users]),
            (by_rule, p_values(users)),
        ):
            published = discoveries(values)
            found.append(fmean(published[:gaining]) if effect else float(any(published)))
    return fmean(by_t), fmean(by_rule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fleets", type=int, default=400)
    parser.add_argument("--users", default="20,60,200")
    options = parser.parse_args()
    random, found = np.random.default_rng(0), {}
    for num_users in map(int, options.users.split(",")):
        for shape in SHAPES:
            row = {}
            for effect in (0, 0.5, 1):
                fleets = options.fleets if effect == 0 else options.fleets // 10
                row[effect] = shares(shape, num_users, effect, fleets, random)
            found[f"{shape}, {num_users} users"] = row
            print(shape, num_users, {e: [round(x, 3) for x in v] for e, v in row.items()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
