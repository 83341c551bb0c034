"""Learning: from recordings with transcripts to a checkpoint that speaks.

In the order in which a row of a manifest passes through:

    settings   everything that a training can be told
    loading    the network and its tokenizer, from a checkpoint or from nothing
    samples    a row as tokens, with what is learnt of them; the prompts are those of `higgs_model.script`
    prepare    recordings as codes and samples, rows as shards of the store
    batches    what is learnt when: references and turns drawn, samples of like length together
    collator   a batch: clips delayed, labels, mels, and where everything goes
    objective  its losses
    trainer    the loop; `optimizer`, `workers`, `snapshots`, `journal` and `previews` are what it uses

Knows no cluster and no tables; `jobs.train` brings both.
"""
