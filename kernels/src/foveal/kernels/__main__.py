"""``python -m foveal.kernels doctor | bench | tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _doctor(asked: argparse.Namespace) -> int:
    from foveal.kernels.doctor import show

    show(asked.json)
    return 0


def _tune(asked: argparse.Namespace) -> int:
    import torch

    from foveal.kernels import configurations, tune
    from foveal.kernels.dispatch import has_triton, interpreting

    if not has_triton():
        print("tune needs triton, which is not installed: pip install 'foveal-kernels[triton]'", file=sys.stderr)
        return 2
    unknown = sorted(set(asked.family or ()) - set(tune.families()))
    if unknown:
        print(f"families that can be tuned are {', '.join(tune.families())}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    families = asked.family or tune.families()
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    toy = device.type == "cpu" and interpreting()
    if asked.list:
        for family in families:
            for tunable in tune.tunables(family, toy=toy):
                print(f"{family:14s} {tunable.entry:40s} " + "; ".join(tune.label(candidate) for candidate in tunable.candidates))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("tune was asked for a GPU, but torch can use none; see python -m foveal.kernels doctor", file=sys.stderr)
        return 2
    if device.type == "cpu" and not interpreting():
        print("tune needs a GPU; to try it without one (figures mean nothing) set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    for outcome in tune.tune(families, device, rounds=asked.rounds, toy=toy):
        shipped = outcome.milliseconds["shipped"]
        won = tune.label(outcome.chosen) if outcome.chosen else "shipped stays"
        time = outcome.milliseconds[tune.label(outcome.chosen)] if outcome.chosen else shipped
        print(f"{outcome.tunable.family:10s} {outcome.tunable.entry:28s} {shipped:9.4f} -> {time:9.4f} ms  {won}", flush=True)
        for candidate, reason in outcome.refused.items():
            print(f"           refused {candidate}: {reason}")
    print(f"written to {configurations.tuned_file(families[0], configurations.device_name(device)).parent}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 where the user can mend it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:
        from foveal.kernels import bench

        bench.discover()
        bench.main("foveal_kernels", Path.cwd(), given[1:], command=[sys.executable, "-m", "foveal.kernels", "bench"], table=True)
        return 0
    parser = argparse.ArgumentParser(prog="python -m foveal.kernels", description="Attention kernels: what runs here, how fast, and tuned how.")
    verbs = parser.add_subparsers(required=True, metavar="doctor | bench | tune")
    doctor = verbs.add_parser("doctor", help="versions, devices, compiler, and which backend each operator would use and why")
    doctor.add_argument("--json", action="store_true", help="for machines")
    doctor.set_defaults(run=_doctor)
    verbs.add_parser("bench", help="compare with what people use today; prints a table, writes JSON and CSV (bench --help has its options)")
    tune = verbs.add_parser("tune", help="time candidate tilings on this GPU, check the numbers of each, keep the fastest in the user's cache")
    tune.add_argument("--family", nargs="+", help="default: every family that can be tuned")
    tune.add_argument("--device", help="default: the first GPU")
    tune.add_argument("--rounds", type=int, default=20, help="times that each candidate is run")
    tune.add_argument("--list", action="store_true", help="show what would be tried, run nothing")
    tune.set_defaults(run=_tune)
    asked = parser.parse_args(given)
    return asked.run(asked)


if __name__ == "__main__":
    sys.exit(main())
