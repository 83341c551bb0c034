"""Finished jobs to export and render: real rows, results and files, without Ray or a model."""

import asyncio

import pyarrow as pa

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs.storage.backends import open_storage
from jobs.storage.result_table import ResultTable, result_schema
from jobs.synthesize.row_processing import RowFailure, RowProcessor
from jobs.synthesize.settings import JobSettings

_TEXT = (("text", pa.string()),)


def finished_job(output, rows, synthesizer=None, schema=_TEXT, parts=2, **settings):
    """Process rows and write their results; return them by id.

    Args:
        schema: the manifest's columns as `(name, type)`.
        parts: number of result files.
        settings: of the job.
    """
    processor = RowProcessor(JobSettings(manifest="-", output=str(output), **settings))
    results = []
    synthesizer = synthesizer or FakeSynthesizer()

    async def process_row(number, row):
        try:
            result = await processor.synthesize(synthesizer, row, processor.validate(row))
        except RowFailure as error:
            result = processor.failed_result(row, error)
        results.append({"manifest_row": number, **result})

    async def process_rows():
        for number, row in enumerate(rows):
            await process_row(number, row)

    asyncio.run(process_rows())
    table = ResultTable(open_storage(str(output)), result_schema(pa.schema(schema)), "test")
    table.take_ownership()
    # Not in the manifest's order, as rows finish in any order.
    for part in range(parts):
        if results[part::parts]:
            table.append(results[part::parts][::-1])
    return {row["id"]: row for row in results}
