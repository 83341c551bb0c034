"""Finished jobs for the tools that come after them: real rows, results and files, without Ray and without a model."""

import asyncio

import pyarrow as pa

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs.storage.backends import open_folder
from jobs.storage.result_table import Results, schema_for
from jobs.synthesize.row_processing import BadRow, RowMaker
from jobs.synthesize.settings import JobSettings

_TEXT = (("text", pa.string()),)


def finished_job(output, rows, speaks=None, schema=_TEXT, parts=2, **settings):
    """Make rows, and write their results in so many parts; gives them by id.

    `schema` holds the manifest's columns as `(name, type)`.
    """
    chosen = JobSettings(manifest="-", output=str(output), **settings)
    maker, made = RowMaker(chosen), []
    speaks = speaks or FakeSynthesizer()

    async def make(number, row):
        try:
            result = await maker.make(speaks, row, maker.check(row))
        except BadRow as fault:
            result = maker.failed(row, fault)
        made.append({"manifest_row": number, **result})

    async def make_all():
        for number, row in enumerate(rows):
            await make(number, row)

    asyncio.run(make_all())
    results = Results(open_folder(str(output)), schema_for(pa.schema(schema)), "test")
    results.claim()
    # As they end, which is in no order.
    for part in range(parts):
        if made[part::parts]:
            results.append(made[part::parts][::-1])
    return {row["id"]: row for row in made}
