"""What a decoding step costs: against its size, an adapter's change, and what memory allows.

    size      time between two tokens of a user, for 1 to 32 users (two rows each) with 128 to 1024
              tokens behind them
    adapter   time until a user's adapter is ready: hot, already in the engine; cold, fetched from a
              store on the local disk, checked and loaded; both against just reading the file with
              safetensors
    limit     every weight is read once a step: bytes of the weights over the rate at which memory
              can be read is the shortest step there can be; for one user, how far the step is from
              it, and where its time goes (torch's profiler on the engine's thread: operations by
              kind; what they leave is Python, waiting and the recording itself)

A figure is the median over the rounds (of adapters: over users), a ratio the median of their
ratios. `step_vs_limit` is the step's time over the shortest there can be. The last line is one JSON
object: the machine's state, figures and `ratios`.
"""

import json
from collections.abc import Mapping
from functools import partial

from worker import (
    Setting,
    Worker,
    alternate,
    machine,
    option_parser,
    prepared,
    print_figures,
    print_ratios,
    print_report,
)

USERS = (1, 8, 32)
CONTEXTS = (128, 512, 1024)
SHORT = 64  # tokens of prompt where a step is compared with the limit
FILE, COLD, HOT = "just reading the file", "cold, from a local store", "hot, in the engine"
STEP, LIMIT = "step, 1 user", "reading the weights once"


def main() -> None:
    options = option_parser(__doc__.splitlines()[0], rounds=5, tokens=13).parse_args()
    state = machine("steps", options)
    print(json.dumps(state), flush=True)
    with prepared(options.device, max(USERS)) as (setting, workers):
        ours = workers.enter_context(Worker("ours:Ours", setting, num_users=max(USERS)))
        torch = workers.enter_context(Worker("peers:Torch", options.device))
        adapters = _adapters(ours, setting)
        limit = _against_limit(ours, torch, options.rounds, options.tokens)
        parts = _parts(ours, options.rounds, options.tokens)
        sizes = _sizes(ours, options.rounds, options.tokens)
    adapter_milliseconds = print_figures("adapter ready, ms", adapters, digits=3)
    limit_milliseconds = print_figures("limit, ms", limit, digits=2)
    part_milliseconds = print_figures("recorded step, ms", parts, digits=2)
    _print_shares(part_milliseconds, limit_milliseconds)
    step_milliseconds = print_figures("step, ms", sizes)
    ratios = print_ratios(
        {
            "step_vs_limit": (limit[STEP], limit[LIMIT]),
            "cold_adapter_vs_reading_file": (adapters[COLD], adapters[FILE]),
            "hot_adapter_vs_reading_file": (adapters[HOT], adapters[FILE]),
        }
    )
    milliseconds = {**step_milliseconds, **adapter_milliseconds, **limit_milliseconds}
    print_report(state, milliseconds=milliseconds, step_parts=part_milliseconds, ratios=ratios)


def _sizes(ours: Worker, rounds: int, num_tokens: int) -> Mapping[str, list[float]]:
    ways = {
        f"{users} user{'s' if users > 1 else ''}, {context} tokens": partial(
            ours.run,
            "step_milliseconds",
            num_users=users,
            prompt_tokens=context,
            num_tokens=num_tokens,
        )
        for users in USERS
        for context in CONTEXTS
    }
    # The largest reads 65 000 tokens of prompts before it is timed: that warms up.
    return alternate(ways, min(rounds, 3), warm_up=False)


def _adapters(ours: Worker, setting: Setting) -> dict[str, list[float]]:
    """Switch to every user's adapter once; the first one warms up."""
    ours.run("publish", store=setting.folder / "store")
    measured = [ours.run("switch_milliseconds", user=user) for user in range(setting.num_users)][1:]
    names = {"file": FILE, "cold": COLD, "hot": HOT}
    return {name: [one[key] for one in measured] for key, name in names.items()}


def _against_limit(
    ours: Worker, torch: Worker, rounds: int, num_tokens: int
) -> dict[str, list[float]]:
    weight_bytes = ours.run("weight_bytes")
    ways = {
        STEP: partial(
            ours.run, "step_milliseconds", num_users=1, prompt_tokens=SHORT, num_tokens=num_tokens
        ),
        LIMIT: lambda: 1000 * torch.run("read_seconds", num_bytes=weight_bytes),
    }
    return alternate(ways, rounds)


def _parts(ours: Worker, rounds: int, num_tokens: int) -> dict[str, list[float]]:
    """Return what a step of one user spends its time on; the first recording warms up."""
    recorded = [
        ours.run("profile", prompt_tokens=SHORT, num_tokens=num_tokens) for _ in range(rounds + 1)
    ][1:]
    return {kind: [one[kind] for one in recorded] for kind in recorded[0]}


def _print_shares(parts: Mapping[str, float], limit: Mapping[str, float]) -> None:
    whole = sum(parts.values())
    print(f"\nthe recorded step of 1 user, {whole:.1f} ms: ", end="")
    print(", ".join(f"{milliseconds / whole:.0%} {kind}" for kind, milliseconds in parts.items()))
    share = limit[LIMIT] / limit[STEP]
    print(
        f"not recorded it takes {limit[STEP]:.1f} ms, "
        f"{share:.0%} of the speed at which weights can be read"
    )


if __name__ == "__main__":
    main()
