"""Measures what the agent costs and how fast it is: `python -m benchmarks [NAME…] [--quick] [--beside WHEEL]`."""

from __future__ import annotations

import argparse
import importlib
import time

from benchmarks import common

BENCHMARKS = {
    "startup": "a Python start, without and with the agent, beside other start-up hooks",
    "step": "an optimizer step, a DDP loop, an init",
    "save": "what it costs to be able to save at an eviction, beside a flag that is all-reduced in each step",
    "footprint": "memory, descriptors and threads of an armed rank",
    "teardown": "from the signal to the last exit, and to the last peer free",
    "channel": "the channel with up to 4,096 ranks",
}


def main() -> None:
    names = "\n".join(f"  {name:10} {text}" for name, text in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks", description=f"{__doc__}\n\n{names}", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*BENCHMARKS, []], help="all unless told")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works")
    parser.add_argument(
        "--beside",
        metavar="WHEEL",
        type=common.unpacked,
        help="another version of the agent, measured in turns with this one (startup, step, footprint, teardown)",
    )
    options = parser.parse_args()
    common.beside = options.beside
    print(common.machine())
    for name in options.names or BENCHMARKS:
        print(f"\n## {name}: {BENCHMARKS[name]}\n", flush=True)
        start = time.monotonic()
        module = importlib.import_module(f"benchmarks.{name}")
        if name == "channel":
            module.main(["--ranks", "64", "--rounds", "2"] if options.quick else [])
        else:
            module.run(options.quick)
        print(f"\n({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
