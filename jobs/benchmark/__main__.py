"""`python -m jobs.benchmark NAME`: prints a table; the last line is the same as one JSON object."""

from __future__ import annotations

import argparse
import importlib
import json

NAMES = ("codec", "engine", "model", "serve")


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m jobs.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="|".join(NAMES))
    modules = {name: importlib.import_module(f"jobs.benchmark.{name}") for name in NAMES}
    for name, module in modules.items():
        summary = (module.__doc__ or name).splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))
    arguments = parser.parse_args()
    result = modules[arguments.name].run(arguments)
    print(json.dumps({"benchmark": arguments.name, **result}))


if __name__ == "__main__":
    main()
