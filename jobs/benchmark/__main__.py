"""`python -m jobs.benchmark NAME`: prints a table; the last line is the same as one JSON object."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

NAMES = ("capacity", "codec", "engine", "job", "model", "scale", "serve", "voice")


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__)
    parser.add_argument("name", choices=NAMES, help="which; each has a --help of its own")
    name = parser.parse_args(sys.argv[1:2]).name
    # Only that one is imported: what the others need, Ray for one, may not be there.
    module = importlib.import_module(f"jobs.benchmark.{name}")
    options = argparse.ArgumentParser(prog=f"{parser.prog} {name}", description=module.__doc__)
    module.add_arguments(options)
    result = module.run(options.parse_args(sys.argv[2:]))
    print(json.dumps({"benchmark": name, **result}))


if __name__ == "__main__":
    main()
