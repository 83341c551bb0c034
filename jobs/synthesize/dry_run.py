"""Prints the exact prompts of a job, one JSON line per script, and the expected hours of audio. Loads no model."""

from __future__ import annotations

import itertools
import json
import sys

from higgs_model.errors import HiggsError
from higgs_model.script.duration import FRAMES_PER_S, estimate_frames
from jobs.storage.manifest import Manifest
from jobs.synthesize.row_processing import RowFailure, RowProcessor
from jobs.synthesize.settings import JobSettings


def dry_run(settings: JobSettings, manifest: Manifest) -> int:
    """Print a JSON line per row to stdout and a summary to stderr; return the exit status."""
    processor = RowProcessor(settings)
    rows = failed = 0
    seconds = 0.0
    seen_ids: set[str] = set()
    for row in itertools.islice(manifest.rows(), settings.limit):
        rows += 1
        row_id = row.get("id")
        line: dict[str, object] = {"id": row_id, "chunks": [], "error": None}
        try:
            if isinstance(row_id, str) and row_id in seen_ids:
                raise RowFailure("duplicate_id", f"the id {row_id!r} is already used by an earlier row")
            plan = processor.validate(row).plan
            line["chunks"] = plan.dry_run()
            seconds += sum(estimate_frames(chunk.prompt_text).expected_frames for chunk in plan.chunks) / FRAMES_PER_S
        except (RowFailure, HiggsError) as error:
            failed += 1
            line["error"] = str(error)
        if isinstance(row_id, str):
            seen_ids.add(row_id)
        sys.stdout.write(json.dumps(line, ensure_ascii=True, default=str) + "\n")
    sys.stderr.write(f"{rows} rows, {failed} invalid; about {seconds / 3600:.2f} h of audio\n")
    return 3 if failed > settings.allowed_failures(rows) else 0
