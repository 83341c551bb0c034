"""`python -m jobs.export`: a finished job's results as the files that training tools and players read.

Exit status: 0 all is there · 2 bad arguments, or results that cannot be read · 3 audio files of results are missing.
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
_WITH_LEVELS = ("nemo", "lhotse", "hf")


def export(arguments: Sequence[str]) -> int:
    """Run the export that a command line describes; gives the exit status."""
    chosen = _parser().parse_args(arguments)
    if chosen.level == "chunk" and chosen.to not in _WITH_LEVELS:
        raise BadInput(f"--level chunk is for {', '.join(_WITH_LEVELS)}; {chosen.to} has a file a script")
    source = open_storage(chosen.results)
    output = open_storage(chosen.output or f"{chosen.results.rstrip('/')}/export/{chosen.to}")
    recordings = Recordings(source, only_ok=chosen.only == "ok")
    if chosen.to == "nemo":
        count = write_nemo(recordings, output, chosen.level)
    elif chosen.to == "lhotse":
        count = write_lhotse(recordings, output, chosen.level)
    elif chosen.to == "hf":
        count = write_shards(recordings, source, output, chosen.level)
    else:
        count = write_subtitles(recordings, output, chosen.to)
    left_out = ", ".join(f"{number} {reason}" for reason, number in sorted(recordings.left_out.items()))
    print_status(f"{len(recordings)} recordings, {count} items in {output.uri}; left out: {left_out or 'none'}")
    return FILES_MISSING if recordings.left_out["without its audio file"] else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m jobs.export", description="Write a job's results as other tools read them.")
    parser.add_argument("--results", required=True, metavar="FOLDER", help="a job's output: a folder or s3:// prefix")
    parser.add_argument(
        "--to", required=True, choices=("nemo", "lhotse", "hf", "srt", "vtt"), help="manifests, shards or subtitles"
    )
    parser.add_argument("--output", metavar="FOLDER", help="where they go; by default export/TO in the job's output")
    parser.add_argument(
        "--level", choices=("script", "chunk"), default="script", help="an item a script (default), or a chunk of it"
    )
    parser.add_argument("--only", choices=("ok",), help="leave out recordings that were flagged")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(export))
