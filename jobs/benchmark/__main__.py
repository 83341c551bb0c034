"""Run a benchmark: `python -m jobs.benchmark NAME` prints a table, then the results as one line of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

NAMES = ("capacity", "codec", "engine", "job", "model", "scale", "serve", "voice")


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__)
    parser.add_argument("name", choices=NAMES, help="benchmark to run; each has its own --help")
    name = parser.parse_args(sys.argv[1:2]).name
    # Other benchmarks are not imported, because their dependencies, such as Ray, may not be installed.
    module = importlib.import_module(f"jobs.benchmark.{name}")
    options = argparse.ArgumentParser(prog=f"{parser.prog} {name}", description=module.__doc__)
    module.add_arguments(options)
    result = module.run(options.parse_args(sys.argv[2:]))
    print(json.dumps({"benchmark": name, **result}))


if __name__ == "__main__":
    main()
