"""Finished jobs for export and rendering: real rows, results and files, without Ray or a model."""

import asyncio

import pyarrow as pa

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs.storage.backends import open_storage
from jobs.storage.result_table import ResultTable, schema_for
from jobs.synthesize.row_processing import InvalidRow, RowProcessor
from jobs.synthesize.settings import JobSettings

_TEXT = (("text", pa.string()),)


def finished_job(output, rows, synthesizer=None, schema=_TEXT, parts=2, **settings):
    """Process rows and write their results in `parts` files; return them by id.

    `schema` holds the manifest's columns as `(name, type)`.
    """
    chosen = JobSettings(manifest="-", output=str(output), **settings)
    processor, made = RowProcessor(chosen), []
    synthesizer = synthesizer or FakeSynthesizer()

    async def make(number, row):
        try:
            result = await processor.synthesize(synthesizer, row, processor.validate(row))
        except InvalidRow as error:
            result = processor.failed_result(row, error)
        made.append({"manifest_row": number, **result})

    async def make_all():
        for number, row in enumerate(rows):
            await make(number, row)

    asyncio.run(make_all())
    results = ResultTable(open_storage(str(output)), schema_for(pa.schema(schema)), "test")
    results.take_ownership()
    # In the arbitrary order in which rows end.
    for part in range(parts):
        if made[part::parts]:
            results.append(made[part::parts][::-1])
    return {row["id"]: row for row in made}
