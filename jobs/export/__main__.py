"""`python -m jobs.export`: exports a finished job's results for training tools and media players.

Exit status: 0 success · 2 invalid arguments, or unreadable results · 3 audio files of some results are missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from higgs_model.errors import BadInput
from jobs.export.manifests import write_lhotse, write_nemo
from jobs.export.recordings import Recordings
from jobs.export.shards import write_shards
from jobs.export.subtitles import write_subtitles
from jobs.runtime.cli import ArgumentParser, print_status, run_command
from jobs.storage.backends import open_storage

FILES_MISSING = 3
_FORMATS_WITH_LEVELS = ("nemo", "lhotse", "hf")


def export(arguments: Sequence[str]) -> int:
    """Run the export that a command line describes; return the exit status."""
    flags = _build_parser().parse_args(arguments)
    if flags.level == "chunk" and flags.to not in _FORMATS_WITH_LEVELS:
        raise BadInput(
            f"--level chunk is available for {', '.join(_FORMATS_WITH_LEVELS)}; {flags.to} has one file per script"
        )
    source = open_storage(flags.results)
    output = open_storage(flags.output or f"{flags.results.rstrip('/')}/export/{flags.to}")
    recordings = Recordings(source, only_ok=flags.only == "ok")
    if flags.to == "nemo":
        count = write_nemo(recordings, output, flags.level)
    elif flags.to == "lhotse":
        count = write_lhotse(recordings, output, flags.level)
    elif flags.to == "hf":
        count = write_shards(recordings, source, output, flags.level)
    else:
        count = write_subtitles(recordings, output, flags.to)
    excluded = ", ".join(f"{number} {reason}" for reason, number in sorted(recordings.num_excluded.items()))
    print_status(f"{len(recordings)} recordings, {count} items in {output.uri}; excluded: {excluded or 'none'}")
    return FILES_MISSING if recordings.num_excluded["without audio file"] else 0


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jobs.export", description="Export a job's results for other tools.")
    parser.add_argument("--results", required=True, metavar="FOLDER", help="output of a job: a folder or s3:// prefix")
    parser.add_argument("--to", required=True, choices=("nemo", "lhotse", "hf", "srt", "vtt"), help="export format")
    parser.add_argument("--output", metavar="FOLDER", help="output folder (default: export/TO in the job's output)")
    parser.add_argument(
        "--level", choices=("script", "chunk"), default="script", help="one item per script (default) or per chunk"
    )
    parser.add_argument("--only", choices=("ok",), help="export only recordings with status ok")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(export))
