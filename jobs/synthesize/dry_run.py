"""Prints the exact prompts of a job, one JSON line per script, and how much audio to expect. Loads no model."""

from __future__ import annotations

import itertools
import json
import sys

from higgs_model.errors import HiggsError
from higgs_model.script.budget import FRAMES_PER_S, frame_budget
from jobs.storage.manifest import Manifest
from jobs.synthesize.row_processing import InvalidRow, RowProcessor
from jobs.synthesize.settings import JobSettings


def dry_run(settings: JobSettings, manifest: Manifest) -> int:
    """Print a line for every row and a summary to stderr; return the exit status of the job."""
    processor = RowProcessor(settings)
    rows = failed = 0
    seconds = 0.0
    seen: set[str] = set()
    for row in itertools.islice(manifest.rows(), settings.limit):
        rows += 1
        identity = row.get("id")
        line: dict[str, object] = {"id": identity, "chunks": [], "error": None}
        try:
            if isinstance(identity, str) and identity in seen:
                raise InvalidRow("duplicate_id", f"the id {identity!r} is already used by an earlier row")
            plan = processor.validate(row).plan
            line["chunks"] = plan.dry_run()
            seconds += sum(frame_budget(chunk.prompt_text).expected for chunk in plan.chunks) / FRAMES_PER_S
        except (InvalidRow, HiggsError) as error:
            failed += 1
            line["error"] = str(error)
        if isinstance(identity, str):
            seen.add(identity)
        sys.stdout.write(json.dumps(line, ensure_ascii=True, default=str) + "\n")
    sys.stderr.write(f"{rows} rows, {failed} invalid; about {seconds / 3600:.2f} h of audio\n")
    return 3 if failed > settings.allowed_failures(rows) else 0
